"""PReLU, and Dice with statistics over the global batch."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Activation(nn.Module):
    """PReLU, or Dice (Zhou et al., DIN, arXiv 1706.06978, Eq. 4).

    Dice normalises by the mean and variance over the valid entries of the global batch when training, and by their
    running averages (collection `statistics`) otherwise; padded entries (weight 0) count nowhere.

    Attributes:
        kind: "prelu" or "dice".
        axis_name: mapped axis to sum the statistics over; None on one device.
    """

    kind: str
    axis_name: str | None = None
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array, *, train: bool) -> jax.Array:
        """`x` is [..., D], `weight` [...] of 0 and 1; returns [..., D]."""
        width = x.shape[-1]
        last = (1,) * (x.ndim - 1) + (width,)
        alpha = self.param("alpha", nn.initializers.constant(0.25 if self.kind == "prelu" else 0.0), (width,))
        if self.kind == "prelu":
            return jnp.where(x >= 0, x, alpha.astype(x.dtype).reshape(last) * x)
        if self.kind != "dice":
            raise ValueError(f"activation: expected 'prelu' or 'dice', found {self.kind!r}")
        dtype, x = x.dtype, x.astype(jnp.float32)  # sums over all rows have no digits to spare
        mean = self.variable("statistics", "mean", jnp.zeros, (width,))
        variance = self.variable("statistics", "variance", jnp.ones, (width,))
        mean_D, variance_D = mean.value, variance.value
        if train:
            axes = tuple(range(x.ndim - 1))
            moments = jnp.sum(weight), jnp.sum(x * weight[..., None], axis=axes)
            if self.axis_name is not None:
                moments = lax.psum(moments, self.axis_name)
            mean_D = moments[1] / jnp.maximum(moments[0], 1.0)
            square_D = jnp.sum((x - mean_D.reshape(last)) ** 2 * weight[..., None], axis=axes)
            if self.axis_name is not None:
                square_D = lax.psum(square_D, self.axis_name)
            variance_D = square_D / jnp.maximum(moments[0], 1.0)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * mean_D
                variance.value = self.momentum * variance.value + (1 - self.momentum) * variance_D
        gate = nn.sigmoid((x - mean_D.reshape(last)) * lax.rsqrt(variance_D + 1e-8).reshape(last))
        return (x * (gate + (1 - gate) * alpha.reshape(last))).astype(dtype)


class Tower(nn.Module):
    """Dense layers with an activation between them and one output: [B, F] -> logit [B] float32.

    They compute in the type of what they are given.
    """

    widths: tuple[int, ...]
    kind: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BF: jax.Array, weight_B: jax.Array, *, train: bool) -> jax.Array:
        for width in self.widths:
            x_BF = nn.Dense(width, dtype=x_BF.dtype)(x_BF)
            x_BF = Activation(self.kind, self.axis_name)(x_BF, weight_B, train=train)
        return nn.Dense(1, dtype=x_BF.dtype)(x_BF)[:, 0].astype(jnp.float32)
