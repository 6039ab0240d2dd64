"""Deep Interest Network (Zhou et al., arXiv 1706.06978): attention of the target over the history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from marsjax.ctr.activations import Activation, Tower
from marsjax.ctr.items import ItemEmbedding, embed_rows, feedback_embedding, parts_of, tower_input, user_embedding
from marsjax.processors import processors
from marsjax.products import dense_dot_general, rows_by_matrices
from marsjax.records import CtrBatch, ItemTables

LEAST_ROWS = 16  # fewer at a time cost more than they save


class Parts(NamedTuple):
    """How the attention is trained in parts."""

    rows: int  # at a time
    beyond: int  # numbers of [B, L, A], where parts begin to pay


# One processor reads and writes 2^20 numbers as fast as it multiplies. Several wait for each other after each product
# of a part: parts pay only where the whole, in float32, would not fit the 32 MiB that the allocator keeps.
ONE_PROCESSOR, SEVERAL = Parts(32, 2**20), Parts(128, 2**23)


class TargetAttention(nn.Module):
    """The attention unit of DIN: an MLP over [t, h, t - h, t * h], one number a history item.

    The first layer is linear, so its four blocks fold into one [D, A] matrix a row: the [B, L, 4 D] input, the largest
    tensor of a DIN, never exists.
    """

    widths: tuple[int, ...]
    activation: str
    bias: bool = True  # of the last layer; a softmax over the history would cancel it, and only noise would train it
    axis_name: str | None = None

    @nn.compact
    def __call__(self, target_BD: jax.Array, history_BLD: jax.Array, weight_BL: jax.Array, *, train: bool) -> jax.Array:
        """Returns [B, L] float32, not normalised; `weight_BL` is 0 where an entry counts in no statistic."""
        depth, width = target_BD.shape[1], self.widths[0]
        kernel_4DA = self.param("kernel", nn.initializers.glorot_uniform(), (4 * depth, width))
        bias_A = self.param("bias", nn.initializers.zeros_init(), (width,))
        kernel_4DA, bias_A = kernel_4DA.astype(history_BLD.dtype), bias_A.astype(history_BLD.dtype)
        of_t_DA, of_h_DA, of_difference_DA, of_product_DA = kernel_4DA.reshape(4, depth, width)
        matrix_BDA = (of_h_DA - of_difference_DA)[None] + target_BD[:, :, None] * of_product_DA[None]
        shift_BA = target_BD @ (of_t_DA + of_difference_DA) + bias_A[None]
        hidden_BLA = rows_by_matrices(history_BLD, matrix_BDA) + shift_BA[:, None, :]
        hidden_BLA = Activation(self.activation, self.axis_name)(hidden_BLA, weight_BL, train=train)
        for extra in self.widths[1:]:
            hidden_BLA = nn.Dense(extra, dtype=history_BLD.dtype, dot_general=dense_dot_general)(hidden_BLA)
            hidden_BLA = Activation(self.activation, self.axis_name)(hidden_BLA, weight_BL, train=train)
        score = nn.Dense(1, use_bias=self.bias, dtype=history_BLD.dtype, dot_general=dense_dot_general)
        return score(hidden_BLA)[..., 0].astype(jnp.float32)


class Din(nn.Module):
    """Target attention over the history, then a tower.

    Attributes:
        n_users: rows of an embedding of the user's id beside the history; 0 does without.
        content: width of the projected content of items; 0 does without.
        levels: history items carry the mark of what the user thought of them, one of so many; 0 does without.
        softmax: normalise the attention weights over the history. Off is the original DIN (a weighted sum).
        apart: pool borrowed items apart from the user's own, by the same attention. Together (Eq. 18) a few own items
            may drown among many borrowed ones; apart, only rows that borrow train the tower's use of them.
        activation: "prelu" or "dice", in the attention and in the tower.
        dtype: what is computed in, float32 or bfloat16. Parameters, softmax, statistics and logits are float32.
        axis_name: mapped axis for the statistics of Dice; None on one device.
    """

    n_items: int
    n_categories: int
    n_users: int = 0
    embedding: int = 10
    content: int = 0
    levels: int = 0
    attention: tuple[int, ...] = (32,)
    tower: tuple[int, ...] = (200, 80)
    softmax: bool = True
    apart: bool = False
    activation: str = "prelu"
    dtype: str = "float32"
    axis_name: str | None = None

    def setup(self) -> None:
        self.items = ItemEmbedding(self.n_items, self.n_categories, self.embedding, self.content)
        # A softmax over the history cancels a bias of the last layer, and only noise would train it.
        self.attend = TargetAttention(self.attention, self.activation, not self.softmax, self.axis_name)
        if self.levels:
            self.marks = feedback_embedding(self.levels)
        if self.n_users:
            self.users = user_embedding(self.n_users, self.embedding)
        self.score = Tower(self.tower, self.activation, self.axis_name)

    def embed(self, batch: CtrBatch, tables: ItemTables) -> tuple[jax.Array, jax.Array]:
        """Targets [B, D] and histories [B, L, D]; with marks both have room for them, and targets have none."""
        return embed_rows(self.items(tables), self.marks if self.levels else None, batch, self.dtype)

    def pool(self, target_BD: jax.Array, history_BLD: jax.Array, batch: CtrBatch, *, train: bool) -> list[jax.Array]:
        """What the attention pools of each part of the history, [B, D] each. Of the batch the masks are read."""
        values = target_BD, history_BLD, batch.weight_B, parts_of(batch, apart=self.apart)
        # What only scores is exported for any number of rows. Dice asks for the mean over all rows.
        if not train or self.activation == "dice" or self.is_initializing():
            return self._pooled(*values, train=train)
        rows = rows_at_a_time(history_BLD, self.attention[0])
        if rows == len(history_BLD):
            return self._pooled(*values, train=True)
        chunks = jax.tree.map(lambda value: value.reshape(-1, rows, *value.shape[1:]), values)
        one = nn.remat(lambda module, _, chunk: (None, module._pooled(*chunk, train=True)))
        each = nn.scan(one, variable_broadcast="params", split_rngs={"params": False})
        _, pooled = each(self, None, chunks)
        return [pooled_CRD.reshape(target_BD.shape) for pooled_CRD in pooled]

    def _pooled(
        self, target_BD: jax.Array, history_BLD: jax.Array, weight_B: jax.Array, parts: list[jax.Array], *, train: bool
    ) -> list[jax.Array]:
        in_some_BL = jnp.minimum(sum(parts), 1.0)
        weight_BL = self.attend(target_BD, history_BLD, in_some_BL * weight_B[:, None], train=train)
        weights = [masked_softmax(weight_BL, mask_BL) if self.softmax else weight_BL * mask_BL for mask_BL in parts]
        return [jnp.einsum("bl,bld->bd", part_BL.astype(history_BLD.dtype), history_BLD) for part_BL in weights]

    def decide(
        self, target_BD: jax.Array, interests: Sequence[jax.Array], batch: CtrBatch, *, train: bool
    ) -> jax.Array:
        """Returns logit_B from what was pooled. Of the batch the user and the numbers are read."""
        features_BF = tower_input(target_BD, interests, self.users if self.n_users else None, batch)
        return self.score(features_BF, batch.weight_B, train=train)

    def __call__(self, batch: CtrBatch, tables: ItemTables, *, train: bool) -> jax.Array:
        """Returns logit_B. Padding of the history and of the batch changes nothing."""
        target_BD, history_BLD = self.embed(batch, tables)
        return self.decide(target_BD, self.pool(target_BD, history_BLD, batch, train=train), batch, train=train)


def rows_at_a_time(history_BLD: jax.Array, width: int) -> int:
    """How many rows go through the attention at a time when it is trained; all of them where that is best.

    On a CPU the time goes into reading and writing [B, L, A]; of few rows that stays in the cache, or in memory that is
    kept, and the gradient makes it again instead of reading it. An accelerator would wait for one part after the other.
    """
    rows, length, _ = history_BLD.shape
    parts = ONE_PROCESSOR if len(processors()) == 1 else SEVERAL
    few = math.gcd(rows, parts.rows)
    if jax.default_backend() != "cpu" or few < LEAST_ROWS or rows * length * width < parts.beyond:
        return rows
    return few


def masked_softmax(logit_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """Softmax over the entries whose mask is 1; all zero for a row without any."""
    highest_B1 = jnp.max(jnp.where(mask_BL > 0, logit_BL, -jnp.inf), axis=1, keepdims=True)
    highest_B1 = jnp.where(jnp.isfinite(highest_B1), highest_B1, 0.0)
    # The logit is replaced before exp, not the result after it: exp of a masked large logit would be inf * 0 = NaN.
    raised_BL = jnp.exp(jnp.where(mask_BL > 0, logit_BL - highest_B1, -jnp.inf)) * mask_BL
    return raised_BL / jnp.maximum(jnp.sum(raised_BL, axis=1, keepdims=True), 1e-20)
