"""Item embeddings shared by all backbones: id, mean of the categories, and content where it is given."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from marsjax.records import Array, CtrBatch, Items, ItemTables

ID_TABLES = (("items", "item"), ("users", "table"))  # where a backbone's tables of ids stand among its parameters
FEEDBACK_WIDTH = 4  # of the embedding of liked, not liked and not known


class ItemEmbedding(nn.Module):
    """Embeds every item of the catalogue once, so that a batch only gathers rows.

    Attributes:
        n_items: N, rows of the tables, padding included.
        n_categories: category numbers, padding included; 1 where the data have none.
        width: width of the id embedding and of the category embedding.
        content: width of the projected features of `ItemTables`; 0 does without.
    """

    n_items: int
    n_categories: int
    width: int
    content: int = 0

    @nn.compact
    def __call__(self, tables: ItemTables) -> jax.Array:
        """Returns [N, D], the parts side by side; row 0 is zero."""
        if tables.vector_ND is not None:
            return jnp.asarray(tables.vector_ND)
        init = nn.initializers.normal(stddev=self.width**-0.5)
        id_ND = self.param("item", init, (self.n_items, self.width))
        parts = [id_ND]
        if self.n_categories > 1:
            category_CD = self.param("category", init, (self.n_categories, self.width))
            known_NG1 = (tables.category_NG > 0).astype(jnp.float32)[..., None]
            total_ND = jnp.sum(category_CD[tables.category_NG] * known_NG1, axis=1)
            parts.append(total_ND / jnp.maximum(jnp.sum(known_NG1, axis=1), 1.0))
        if self.content:
            parts.append(nn.Dense(self.content, use_bias=False, name="content")(tables.feature_NF))
        real_N1 = (jnp.arange(self.n_items) > 0).astype(jnp.float32)[:, None]
        return jnp.concatenate(parts, axis=1) * real_N1


def content_table(items: Items, *, components: int) -> np.ndarray:
    """Item features of all modalities in few numbers, [N, F] float32: principal components, whitened.

    Each modality is centred over the items that have it and scaled to one variance; absent features count as the mean.
    Whitening lets a small projection learn at one rate from all directions. [N, 0] without modalities.
    """
    parts = []
    for feature_NF, present_N in items.modalities.values():
        if not present_N.any():
            continue
        moved_NF = (feature_NF - feature_NF[present_N].mean(axis=0)) * present_N[:, None]
        parts.append(moved_NF / max(float(np.sqrt((moved_NF[present_N] ** 2).sum(axis=1).mean())), 1e-12))
    if not parts:
        return np.zeros((len(items.raw_id_N), 0), np.float32)
    left_NF, _, _ = np.linalg.svd(np.concatenate(parts, axis=1).astype(np.float64), full_matrices=False)
    left_NF = left_NF[:, :components] * np.sqrt(len(left_NF))
    # The sign of a component is arbitrary, and libraries differ in it: its largest entry is positive.
    left_NF = left_NF * np.sign(left_NF[np.argmax(np.abs(left_NF), axis=0), np.arange(left_NF.shape[1])])[None]
    return left_NF.astype(np.float32)


def padded_tables(tables: ItemTables, n_items: int) -> ItemTables:
    """The tables with rows of zeros up to `n_items`: a mask beyond the catalogue has no category and no content."""

    def pad(value: np.ndarray) -> np.ndarray:
        return np.pad(value, ((0, n_items - len(value)), (0, 0)))

    return ItemTables(pad(tables.category_NG), None if tables.feature_NF is None else pad(tables.feature_NF))


def parts_of(batch: CtrBatch, *, apart: bool) -> list[jax.Array]:
    """Masks [B, L] float32 of the parts of the history that are pooled: all of it, or the own and the borrowed ones."""
    mask_BL, is_lent_BL = (
        jnp.asarray(value).astype(jnp.float32) for value in (batch.history_BL > 0, batch.borrowed_BL)
    )
    return [mask_BL * (1 - is_lent_BL), mask_BL * is_lent_BL] if apart else [mask_BL]


class Embedding(nn.Module):
    """A table of vectors, gathered by number."""

    rows: int
    width: int
    stddev: float
    zero_is_none: bool = False  # the vector of number 0 is 0 and stays so

    @nn.compact
    def __call__(self, number: Array) -> jax.Array:
        """Numbers [...] -> [..., width]."""
        table = self.param("table", nn.initializers.normal(stddev=self.stddev), (self.rows, self.width))
        found = table[number]
        return jnp.where(number[..., None] > 0, found, 0.0) if self.zero_is_none else found


def user_embedding(n_users: int, width: int) -> Embedding:
    """Of users' numbers + 1; 0 is padding, and users who are unknown or hidden, who have no vector."""
    return Embedding(n_users + 1, width, stddev=0.01, zero_is_none=True)


def feedback_embedding(levels: int) -> Embedding:
    """Of the marks of history items: not known, and from the least liked to the most."""
    return Embedding(1 + levels, FEEDBACK_WIDTH, stddev=0.5)


def embed_rows(item_ND: jax.Array, marks: Embedding | None, batch: CtrBatch, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Targets [B, D] and histories [B, L, D]; with marks both have room for them, and targets have none.

    All that follows computes in their `dtype`. Tables stay float32, so that the gradients of rows, of which an item has
    many in a batch, add up in float32.
    """
    target_BD, history_BLD = item_ND[batch.target_B], item_ND[batch.history_BL]
    if marks is not None:
        mark_BLD = marks(batch.feedback_BL)
        history_BLD = jnp.concatenate([history_BLD, mark_BLD], axis=2)
        target_BD = jnp.pad(target_BD, ((0, 0), (0, mark_BLD.shape[2])))
    return target_BD.astype(dtype), history_BLD.astype(dtype)


def tower_input(
    target_BD: jax.Array, interests: Sequence[jax.Array], users: Embedding | None, batch: CtrBatch
) -> jax.Array:
    """What the tower reads, [B, F]: the target, each interest alone and times the target, the user, the numbers."""
    features = [target_BD]
    for interest_BD in interests:
        features += [interest_BD, target_BD * interest_BD]
    if users is not None:
        features.append(users(batch.user_B))
    if batch.dense_BJ is not None:
        features.append(jnp.asarray(batch.dense_BJ))
    return jnp.concatenate([feature.astype(target_BD.dtype) for feature in features], axis=1)
