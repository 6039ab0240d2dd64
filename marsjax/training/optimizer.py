"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), the optimizer of both stages."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax


class AdamW(NamedTuple):
    """Settings of the optimizer; hashable, so that a step compiled for them is found again."""

    learning_rate: float
    weight_decay: float
    clip: float  # largest global norm of the gradient


def adamw(settings: AdamW) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Weight decay falls on matrices only, not on biases and scales."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )
