"""The click loss of a backbone (Eq. 2) as a share, and scoring."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from marsjax.records import CtrBatch, ItemTables
from marsjax.training.step import LossFn, Share, total

PyTree = Any


def init_model(model: nn.Module, batch: CtrBatch, tables: ItemTables, *, seed: int) -> tuple[PyTree, PyTree]:
    """Parameters and running statistics of a backbone; the batch only gives shapes."""
    small = jax.tree.map(lambda leaf: leaf[:2], batch)
    variables = model.init(jax.random.key(seed), small, tables, train=False)
    return variables["params"], variables.get("statistics", {})


def make_loss(model: nn.Module, *, axis_name: str | None) -> LossFn:
    """Binary cross-entropy, averaged over the rows of weight 1 of the global batch."""

    def loss(params: PyTree, statistics: PyTree, batch: CtrBatch, tables: ItemTables, key: jax.Array) -> Share:
        logit_B, new = model.apply(
            {"params": params, "statistics": statistics}, batch, tables, train=True, mutable=["statistics"]
        )
        row_B = optax.sigmoid_binary_cross_entropy(logit_B, batch.label_B) * batch.weight_B
        n_rows = jnp.maximum(total(jnp.sum(batch.weight_B), axis_name), 1.0)
        return Share(jnp.sum(row_B) / n_rows, new.get("statistics", {}), {})

    return loss


class Scorer:
    """Scores batches with one compiled function per history length; the last batch's padding is cut off."""

    def __init__(self, model: nn.Module, tables: ItemTables):
        self._tables = jax.device_put(tables)

        def probability(params: PyTree, statistics: PyTree, batch: CtrBatch, tables: ItemTables) -> jax.Array:
            logit_B = model.apply({"params": params, "statistics": statistics}, batch, tables, train=False)
            return nn.sigmoid(logit_B)  # type: ignore[arg-type]

        self._probability = jax.jit(probability)

    def __call__(self, params: PyTree, statistics: PyTree, batches: Iterable[CtrBatch]) -> np.ndarray:
        """Probabilities [rows] float32 of the rows of weight 1, in order."""
        params, statistics = jax.device_put((params, statistics))
        parts = [
            np.asarray(self._probability(params, statistics, batch, self._tables))[batch.weight_B > 0]
            for batch in batches
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)
