"""NT-Xent, the contrastive loss between two views of every row (Chen et al., SimCLR, arXiv 2002.05709)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from marsjax.training.step import total

SIMILARITIES = ("dot", "cosine")


def nt_xent(
    first_BD: jax.Array,
    second_BD: jax.Array,
    weight_B: jax.Array,
    *,
    temperature: float,
    similarity: str,
    axis_name: str | None,
) -> jax.Array:
    """This device's share of the mean, over all 2B views, of -log softmax of the row's other view among the 2B - 1.

    The negatives of a view are both views of every other row of the global batch, so all views are gathered, and each
    device answers for those of its own rows. Rows of weight 0 are neither anchors nor negatives, whatever they hold.
    0 without a valid row, and with one (it has no negative).

    Args:
        similarity: "dot" (CoSeRec; CL4SRec as RecBole-DA runs it) or "cosine" (SimCLR).

    Raises ValueError for another similarity.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: expected one of {sorted(SIMILARITIES)}, found {similarity!r}")
    # Replaced, not multiplied by 0: a padded row may hold NaN.
    views = [jnp.where(weight_B[:, None] > 0, view_BD, 0.0).astype(jnp.float32) for view_BD in (first_BD, second_BD)]
    if similarity == "cosine":
        # eps inside the root: the norm of a zero row has no gradient otherwise (NaN).
        views = [view_BD * lax.rsqrt(jnp.sum(view_BD**2, axis=1, keepdims=True) + 1e-12) for view_BD in views]
    n_rows = len(weight_B)
    keys, valid_B, begin = views, weight_B > 0, jnp.int32(0)
    if axis_name is not None:
        keys = [lax.all_gather(view_BD, axis_name, tiled=True) for view_BD in views]
        valid_B = lax.all_gather(valid_B, axis_name, tiled=True)
        begin = lax.axis_index(axis_name) * n_rows
    n_keys = 2 * len(valid_B)
    # Anchors (A) are the views of this device's rows, keys (K) those of all: first views, then second ones.
    own_A = jnp.concatenate([begin + jnp.arange(n_rows), begin + jnp.arange(n_rows) + n_keys // 2])
    # Dot products have no bound, so the digits that a fast float32 product drops would move the loss.
    logit_AK = jnp.matmul(jnp.concatenate(views), jnp.concatenate(keys).T, precision=lax.Precision.HIGHEST)
    allowed_AK = jnp.tile(valid_B, 2)[None, :] & (jnp.arange(n_keys)[None, :] != own_A[:, None])
    logit_AK = jnp.where(allowed_AK, logit_AK / temperature, -1e30)
    loss_A = optax.softmax_cross_entropy_with_integer_labels(logit_AK, (own_A + n_keys // 2) % n_keys)
    weight_A = jnp.tile(weight_B, 2)
    n_anchors = jnp.maximum(total(jnp.sum(weight_A), axis_name), 1.0)
    return jnp.sum(jnp.where(weight_A > 0, loss_A * weight_A, 0.0)) / n_anchors
