"""Losses that draw the two modalities of an item together, to stand in for L_align (Eq. 6): pure functions.

Each takes the vectors of N items in two modalities and who has both, and returns a scalar, lower is better. Items
without both change nothing, whatever their rows hold; without any item the loss is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from marsjax import stein


def unit(x_ND: jax.Array) -> jax.Array:
    """Rows of length 1, [N, D]. eps inside the root: the norm of a zero row has no gradient otherwise (NaN)."""
    return x_ND * lax.rsqrt(jnp.sum(x_ND * x_ND, axis=1, keepdims=True) + 1e-12)


def info_nce(query_ND: jax.Array, key_ND: jax.Array, both_N: jax.Array, *, temperature: float = 0.07) -> jax.Array:
    """Symmetric InfoNCE over cosines (Radford et al., CLIP, arXiv 2103.00020, whose first temperature is 0.07).

    Mean over the items, and over both directions, of -log softmax of the own pair among all items of the batch.
    """
    query_ND, key_ND = _only(query_ND, both_N), _only(key_ND, both_N)
    logit_NN = jnp.matmul(unit(query_ND), unit(key_ND).T, precision=stein.HIGHEST) / temperature
    logit_NN = jnp.where(both_N[:, None] & both_N[None, :], logit_NN, -1e30)
    own_N = jnp.arange(len(both_N))
    loss_N = 0.5 * sum(
        optax.softmax_cross_entropy_with_integer_labels(logit, own_N) for logit in (logit_NN, logit_NN.T)
    )
    return _mean(loss_N, both_N)


def cosine(query_ND: jax.Array, key_ND: jax.Array, both_N: jax.Array) -> jax.Array:
    """Mean of 1 - cosine of the two modalities of an item. Without negatives, only the entropy keeps items apart."""
    query_ND, key_ND = unit(_only(query_ND, both_N)), unit(_only(key_ND, both_N))
    return _mean(1.0 - jnp.sum(query_ND * key_ND, axis=1), both_N)


def mmd(query_ND: jax.Array, key_ND: jax.Array, both_N: jax.Array) -> jax.Array:
    """Squared maximum mean discrepancy of the two sets of vectors (Gretton et al. 2012; biased, never below 0).

    The kernel is that of Eq. 5, with the median distance over all pairs of the pooled sets as bandwidth. It compares
    distributions and not pairs: which text belongs to which image plays no part.
    """
    pooled_XD = jnp.concatenate([_only(query_ND, both_N), _only(key_ND, both_N)])  # X = 2 N
    valid_X = jnp.tile(both_N, 2)
    pair_XX = valid_X[:, None] & valid_X[None, :]
    square_XX = stein.squared_distances(pooled_XD, pooled_XD)
    gamma2 = stein.squared_bandwidth(square_XX, pair_XX & ~jnp.eye(len(valid_X), dtype=bool))
    kernel_XX = jnp.where(pair_XX, stein.rbf_kernel(square_XX, gamma2), 0.0)
    # Mean within queries + mean within keys - 2 mean between them.
    sign_X = jnp.concatenate([both_N, -1.0 * both_N]) / jnp.maximum(jnp.sum(both_N), 1.0)
    return jnp.sum(kernel_XX * sign_X[:, None] * sign_X[None, :])


def _only(x_ND: jax.Array, both_N: jax.Array) -> jax.Array:
    # Replaced, not multiplied by 0: a row that counts nowhere may hold NaN.
    return jnp.where(both_N[:, None], x_ND, 0.0)


def _mean(loss_N: jax.Array, both_N: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(both_N, loss_N, 0.0)) / jnp.maximum(jnp.sum(both_N), 1.0)
