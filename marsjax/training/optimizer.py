"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), the optimizer of both stages."""

from __future__ import annotations

import jax
import optax


def adamw(*, learning_rate: float, weight_decay: float, clip: float) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Weight decay falls on matrices only, not on biases and scales."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(
            learning_rate,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )
