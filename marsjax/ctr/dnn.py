"""Mean pooling of the history and a tower: the simplest backbone (Covington et al., 2016)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from marsjax.ctr.activations import Tower
from marsjax.ctr.items import ItemEmbedding, feedback_embedding, user_embedding
from marsjax.records import CtrBatch, ItemTables


class Dnn(nn.Module):
    """The mean of the history items beside the target, then a tower. Attributes as in `Din`."""

    n_items: int
    n_categories: int
    n_users: int = 0
    embedding: int = 10
    content: int = 0
    feedback: bool = False
    apart: bool = False
    tower: tuple[int, ...] = (200, 80)
    activation: str = "prelu"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch: CtrBatch, tables: ItemTables, *, train: bool) -> jax.Array:
        """Returns logit_B. Padding of the history and of the batch changes nothing."""
        item_ND = ItemEmbedding(self.n_items, self.n_categories, self.embedding, self.content)(tables)
        target_BD, history_BLD = item_ND[batch.target_B], item_ND[batch.history_BL]
        if self.feedback:
            mark_BLD = feedback_embedding()(batch.feedback_BL)
            history_BLD = jnp.concatenate([history_BLD, mark_BLD], axis=2)
            target_BD = jnp.pad(target_BD, ((0, 0), (0, mark_BLD.shape[2])))
        mask_BL = (batch.history_BL > 0).astype(jnp.float32)
        is_lent_BL = batch.borrowed_BL.astype(jnp.float32)
        parts = [mask_BL * (1 - is_lent_BL), mask_BL * is_lent_BL] if self.apart else [mask_BL]
        features = [target_BD]
        for part_BL in parts:
            mean_BD = jnp.einsum("bl,bld->bd", part_BL, history_BLD)
            mean_BD = mean_BD / jnp.maximum(jnp.sum(part_BL, axis=1, keepdims=True), 1.0)
            features += [mean_BD, target_BD * mean_BD]
        if self.n_users:
            features.append(user_embedding(self.n_users, self.embedding)(batch.user_B))
        if batch.dense_BJ is not None:
            features.append(batch.dense_BJ)
        return Tower(self.tower, self.activation, self.axis_name)(
            jnp.concatenate(features, axis=1), batch.weight_B, train=train
        )
