"""Item embeddings shared by all backbones: an id embedding beside the mean embedding of the item's categories."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from marsjax.records import CtrBatch, ItemTables


class ItemEmbedding(nn.Module):
    """Embeds every item of the catalogue once, so that a batch only gathers rows.

    Attributes:
        n_items: N, rows of the tables, padding included.
        n_categories: category numbers, padding included; 1 where the data have none.
        width: width of the id embedding and of the category embedding.
    """

    n_items: int
    n_categories: int
    width: int

    @nn.compact
    def __call__(self, tables: ItemTables) -> jax.Array:
        """Returns [N, D] with D = 2 * width (width without categories); row 0 is zero."""
        init = nn.initializers.normal(stddev=self.width**-0.5)
        id_ND = self.param("item", init, (self.n_items, self.width))
        parts = [id_ND]
        if self.n_categories > 1:
            category_CD = self.param("category", init, (self.n_categories, self.width))
            known_NG1 = (tables.category_NG > 0).astype(jnp.float32)[..., None]
            total_ND = jnp.sum(category_CD[tables.category_NG] * known_NG1, axis=1)
            parts.append(total_ND / jnp.maximum(jnp.sum(known_NG1, axis=1), 1.0))
        real_N1 = (jnp.arange(self.n_items) > 0).astype(jnp.float32)[:, None]
        return jnp.concatenate(parts, axis=1) * real_N1


def user_embedding(module: nn.Module, n_users: int, width: int, batch: CtrBatch) -> jax.Array:
    """Adds a user table to `module`; returns [B, width]."""
    table_UD = module.param("user", nn.initializers.normal(stddev=0.01), (n_users + 1, width))
    return table_UD[batch.user_B]
