"""PReLU, and Dice with statistics over the global batch."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from marsjax.training.step import total

EPSILON = 1e-8  # added to the variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dice_of_batch(
    x: jax.Array, weight: jax.Array, alpha_D: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Dice by the mean and the variance of the batch itself, over its entries of weight 1 on all devices.

    y = x (p + (1 - p) alpha) with p = sigmoid(z), z = (x - mean) / sqrt(variance + EPSILON). Most of the time
    goes into reading and writing arrays of the size of the histories, and the gradient that JAX derives makes some ten
    of them, so it is written out.

    Args:
        x: [..., D] float32.
        weight: [...] of 0 and 1; has no gradient.
        alpha_D: the slope where the gate is closed.
        axis_name: mapped axis to sum over; None on one device.

    Returns:
        [..., D], and mean and variance [D], which have no gradient.
    """
    return _dice_forward(x, weight, alpha_D, axis_name)[0]


class _Kept(NamedTuple):
    """What the gradient of Dice reads."""

    x: jax.Array
    weight: jax.Array
    alpha_D: jax.Array
    mean_D: jax.Array
    scale_D: jax.Array  # 1 / standard deviation
    entries: jax.Array  # how many of weight 1


def _dice_forward(
    x: jax.Array, weight: jax.Array, alpha_D: jax.Array, axis_name: str | None
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _Kept]:
    x_ND, weight_N1 = x.reshape(-1, x.shape[-1]), weight.reshape(-1, 1)
    count, total_D = total((jnp.sum(weight), jnp.sum(x_ND * weight_N1, axis=0)), axis_name)
    count = jnp.maximum(count, 1.0)
    mean_D = total_D / count
    variance_D = total(jnp.sum((x_ND - mean_D[None]) ** 2 * weight_N1, axis=0), axis_name) / count
    scale_D = lax.rsqrt(variance_D + EPSILON)
    gate_ND = nn.sigmoid((x_ND - mean_D[None]) * scale_D[None])
    y_ND = x_ND * (alpha_D[None] + (1 - alpha_D[None]) * gate_ND)
    return (y_ND.reshape(x.shape), mean_D, variance_D), _Kept(x, weight, alpha_D, mean_D, scale_D, count)


def _dice_backward(
    axis_name: str | None, kept: _Kept, gradients: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    width = kept.x.shape[-1]
    x_ND, of_y_ND = kept.x.reshape(-1, width), gradients[0].reshape(-1, width)
    z_ND = (x_ND - kept.mean_D[None]) * kept.scale_D[None]
    gate_ND, open_D = nn.sigmoid(z_ND), 1 - kept.alpha_D
    closed_ND = of_y_ND * x_ND * (1 - gate_ND)
    of_z_ND = closed_ND * gate_ND  # times open_D, which is left to the sums
    # Mean and variance are those of all devices: what any of them passes back goes to the entries of all. With g the
    # gradient of z / std that is (sum(g) + z sum(g z)) / n; the variance does not move with the mean, from which the
    # deviations sum to 0.
    sums = jnp.sum(of_z_ND, axis=0) * open_D, jnp.sum(of_z_ND * z_ND, axis=0) * open_D
    by_mean_D, by_deviation_D = (value * kept.scale_D / kept.entries for value in total(sums, axis_name))
    shared_ND = by_mean_D[None] + by_deviation_D[None] * z_ND
    of_x_ND = of_y_ND * (kept.alpha_D[None] + open_D[None] * gate_ND) + of_z_ND * (kept.scale_D * open_D)[None]
    of_x_ND -= kept.weight.reshape(-1, 1) * shared_ND
    return of_x_ND.reshape(kept.x.shape), jnp.zeros_like(kept.weight), jnp.sum(closed_ND, axis=0)


dice_of_batch.defvjp(_dice_forward, _dice_backward)


class Activation(nn.Module):
    """PReLU, or Dice (Zhou et al., DIN, arXiv 1706.06978, Eq. 4).

    Dice normalises by the mean and variance over the valid entries of the global batch when training, and by their
    running averages (collection `statistics`) otherwise; padded entries (weight 0) count nowhere.

    Attributes:
        kind: "prelu" or "dice".
        axis_name: mapped axis to sum the statistics over; None on one device.
    """

    kind: str
    axis_name: str | None = None
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array, *, train: bool) -> jax.Array:
        """`x` is [..., D], `weight` [...] of 0 and 1; returns [..., D]."""
        width = x.shape[-1]
        last = (1,) * (x.ndim - 1) + (width,)
        alpha = self.param("alpha", nn.initializers.constant(0.25 if self.kind == "prelu" else 0.0), (width,))
        if self.kind == "prelu":
            return jnp.where(x >= 0, x, alpha.astype(x.dtype).reshape(last) * x)
        if self.kind != "dice":
            raise ValueError(f"activation: expected 'prelu' or 'dice', found {self.kind!r}")
        dtype, x = x.dtype, x.astype(jnp.float32)  # sums over all rows have no digits to spare
        mean = self.variable("statistics", "mean", jnp.zeros, (width,))
        variance = self.variable("statistics", "variance", jnp.ones, (width,))
        if train:
            y, mean_D, variance_D = dice_of_batch(x, weight, alpha, self.axis_name)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * mean_D
                variance.value = self.momentum * variance.value + (1 - self.momentum) * variance_D
            return y.astype(dtype)
        gate = nn.sigmoid((x - mean.value.reshape(last)) * lax.rsqrt(variance.value + EPSILON).reshape(last))
        return (x * (gate + (1 - gate) * alpha.reshape(last))).astype(dtype)


class Tower(nn.Module):
    """Dense layers with an activation between them and one output: [B, F] -> logit [B] float32.

    They compute in the type of what they are given.
    """

    widths: tuple[int, ...]
    kind: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BF: jax.Array, weight_B: jax.Array, *, train: bool) -> jax.Array:
        for width in self.widths:
            x_BF = nn.Dense(width, dtype=x_BF.dtype)(x_BF)
            x_BF = Activation(self.kind, self.axis_name)(x_BF, weight_B, train=train)
        return nn.Dense(1, dtype=x_BF.dtype)(x_BF)[:, 0].astype(jnp.float32)
