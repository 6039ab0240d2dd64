"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), the optimizer of both stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

Path = tuple[str, ...]


class AdamW(NamedTuple):
    """Settings of the optimizer; hashable, so that a step compiled for them is found again."""

    learning_rate: float
    weight_decay: float
    clip: float  # largest global norm of the gradient
    id_decay: float = 0.0  # weight decay of `id_tables`, beside the other one
    id_tables: tuple[Path, ...] = ()  # where the tables of ids stand among the parameters


def adamw(settings: AdamW) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Weight decay falls on matrices only, not on biases and scales.

    The decay of ids falls on every row at every step, so the id of a user or an item with few events, which a step
    seldom moves, stays near 0, and one with many does not: what is known of an id is shrunk by how little that is.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.scale_by_adam(),
        optax.add_decayed_weights(
            settings.weight_decay, lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        ),
        optax.add_decayed_weights(
            settings.id_decay,
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: names_of(path) in settings.id_tables, params
            ),
        ),
        optax.scale_by_learning_rate(settings.learning_rate),
    )


def names_of(path: Any) -> Path:
    """The names of dictionaries' keys and NamedTuples' fields along a path of a tree."""
    return tuple(str(getattr(key, "name", getattr(key, "key", key))) for key in path)
