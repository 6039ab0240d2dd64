"""Mean pooling of the history and a tower: the simplest backbone (Covington et al., 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from marsjax.ctr.activations import Tower
from marsjax.ctr.items import ItemEmbedding, embed_rows, feedback_embedding, parts_of, tower_input, user_embedding
from marsjax.records import CtrBatch, ItemTables


class Dnn(nn.Module):
    """The mean of the history items beside the target, then a tower. Attributes and methods as in `Din`."""

    n_items: int
    n_categories: int
    n_users: int = 0
    embedding: int = 10
    content: int = 0
    levels: int = 0
    apart: bool = False
    tower: tuple[int, ...] = (200, 80)
    activation: str = "prelu"
    dtype: str = "float32"
    axis_name: str | None = None

    def setup(self) -> None:
        self.items = ItemEmbedding(self.n_items, self.n_categories, self.embedding, self.content)
        if self.levels:
            self.marks = feedback_embedding(self.levels)
        if self.n_users:
            self.users = user_embedding(self.n_users, self.embedding)
        self.score = Tower(self.tower, self.activation, self.axis_name)

    def embed(self, batch: CtrBatch, tables: ItemTables) -> tuple[jax.Array, jax.Array]:
        """Targets [B, D] and histories [B, L, D]."""
        return embed_rows(self.items(tables), self.marks if self.levels else None, batch, self.dtype)

    def pool(self, target_BD: jax.Array, history_BLD: jax.Array, batch: CtrBatch, *, train: bool) -> list[jax.Array]:
        """The mean of each part of the history, [B, D] each; the target is not read."""
        means = []
        for part_BL in parts_of(batch, apart=self.apart):
            count_B1 = jnp.maximum(jnp.sum(part_BL, axis=1, keepdims=True), 1.0)
            total_BD = jnp.einsum("bl,bld->bd", part_BL.astype(history_BLD.dtype), history_BLD)
            means.append(total_BD / count_B1.astype(history_BLD.dtype))
        return means

    def decide(
        self, target_BD: jax.Array, interests: Sequence[jax.Array], batch: CtrBatch, *, train: bool
    ) -> jax.Array:
        """Returns logit_B from what was pooled."""
        features_BF = tower_input(target_BD, interests, self.users if self.n_users else None, batch)
        return self.score(features_BF, batch.weight_B, train=train)

    def __call__(self, batch: CtrBatch, tables: ItemTables, *, train: bool) -> jax.Array:
        """Returns logit_B. Padding of the history and of the batch changes nothing."""
        target_BD, history_BLD = self.embed(batch, tables)
        return self.decide(target_BD, self.pool(target_BD, history_BLD, batch, train=train), batch, train=train)
