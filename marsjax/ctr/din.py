"""Deep Interest Network (Zhou et al., arXiv 1706.06978): attention of the target over the history."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from marsjax.ctr.activations import Activation, Tower
from marsjax.ctr.items import ItemEmbedding, user_embedding
from marsjax.records import CtrBatch, ItemTables


class Din(nn.Module):
    """Target attention over the history, then a tower.

    Attributes:
        softmax: normalise the attention weights over the history. Off is the original DIN (a weighted sum).
        activation: "prelu" or "dice", in the attention and in the tower.
        axis_name: mapped axis for the statistics of Dice; None on one device.
    """

    n_items: int
    n_categories: int
    n_users: int = 0
    embedding: int = 10
    attention: tuple[int, ...] = (32,)
    tower: tuple[int, ...] = (200, 80)
    softmax: bool = True
    activation: str = "prelu"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch: CtrBatch, tables: ItemTables, *, train: bool) -> jax.Array:
        """Returns logit_B. Padding of the history and of the batch changes nothing."""
        item_ND = ItemEmbedding(self.n_items, self.n_categories, self.embedding)(tables)
        target_BD, history_BLD = item_ND[batch.target_B], item_ND[batch.history_BL]
        mask_BL = (batch.history_BL > 0).astype(jnp.float32)
        weight_BL = self._attend(target_BD, history_BLD, mask_BL * batch.weight_B[:, None], train=train)
        if self.softmax:
            weight_BL = masked_softmax(weight_BL, mask_BL)
        interest_BD = jnp.einsum("bl,bld->bd", weight_BL * mask_BL, history_BLD)
        features_BF = jnp.concatenate([target_BD, interest_BD, target_BD * interest_BD], axis=1)
        if self.n_users:
            features_BF = jnp.concatenate(
                [features_BF, user_embedding(self, self.n_users, self.embedding, batch)], axis=1
            )
        return Tower(self.tower, self.activation, self.axis_name)(features_BF, batch.weight_B, train=train)

    def _attend(self, target_BD: jax.Array, history_BLD: jax.Array, weight_BL: jax.Array, *, train: bool) -> jax.Array:
        """The attention unit: an MLP over [t, h, t - h, t * h], giving one number a history item, [B, L].

        The first layer is linear, so its four blocks fold into one [D, A] matrix a row: the [B, L, 4 D] input, the
        largest tensor of a DIN, never exists.
        """
        depth, width = target_BD.shape[1], self.attention[0]
        kernel_4DA = self.param("attention", nn.initializers.glorot_uniform(), (4 * depth, width))
        bias_A = self.param("attention_bias", nn.initializers.zeros_init(), (width,))
        of_t_DA, of_h_DA, of_difference_DA, of_product_DA = kernel_4DA.reshape(4, depth, width)
        matrix_BDA = (of_h_DA - of_difference_DA)[None] + target_BD[:, :, None] * of_product_DA[None]
        shift_BA = target_BD @ (of_t_DA + of_difference_DA) + bias_A[None]
        hidden_BLA = jnp.einsum("bld,bda->bla", history_BLD, matrix_BDA) + shift_BA[:, None, :]
        hidden_BLA = Activation(self.activation, self.axis_name)(hidden_BLA, weight_BL, train=train)
        for extra in self.attention[1:]:
            hidden_BLA = nn.Dense(extra)(hidden_BLA)
            hidden_BLA = Activation(self.activation, self.axis_name)(hidden_BLA, weight_BL, train=train)
        return nn.Dense(1)(hidden_BLA)[..., 0]


def masked_softmax(logit_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """Softmax over the entries whose mask is 1; all zero for a row without any."""
    highest_B1 = jnp.max(jnp.where(mask_BL > 0, logit_BL, -jnp.inf), axis=1, keepdims=True)
    highest_B1 = jnp.where(jnp.isfinite(highest_B1), highest_B1, 0.0)
    # The logit is replaced before exp, not the result after it: exp of a masked large logit would be inf * 0 = NaN.
    raised_BL = jnp.exp(jnp.where(mask_BL > 0, logit_BL - highest_B1, -jnp.inf)) * mask_BL
    return raised_BL / jnp.maximum(jnp.sum(raised_BL, axis=1, keepdims=True), 1e-20)
