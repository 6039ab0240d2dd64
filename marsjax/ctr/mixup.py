"""The mixup of BASRec (Dang et al., arXiv 2412.08300): within a sequence, and across the sequences of a batch.

Random numbers belong to a row by its number in the global batch, so neither padding nor the number of devices changes
what a row draws. All devices are given the same key.

Two modes where paper and released code differ. "paper" weighs each row's loss by its own relevance, and mixes labels
as inputs are mixed; "as_released" multiplies an [B, 1] weight with a flat loss, which NumPy's rules make a [B, B]
table, so that every row's loss is scaled by the sum of all weights; and it keeps the label of the row itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import lax

from marsjax.training.step import total

MODES = ("as_released", "paper")
LEAST = 2.0**-24  # share of a distribution; uniform draws are 0 or 2^-23 and more


class Mixed(NamedTuple):
    """A batch mixed across its rows. The weights of the rows stay as they were."""

    encoded_BD: jax.Array
    target_BD: jax.Array
    label_B: jax.Array


def draw_lambda(
    key: jax.Array, n_rows: int, *, alpha: float, axis_name: str | None, n_channels: int | None = None
) -> jax.Array:
    """lambda ~ Beta(alpha, alpha): one a row, [B], or one a row and channel, [B, n_channels].

    From uniform draws, by the inverse of the distribution function: `jax.random.beta` takes most of a training step,
    since on a CPU it draws one number after the other.
    """
    shape = () if n_channels is None else (n_channels,)
    draw = jax.vmap(lambda row_key: jax.random.uniform(row_key, shape))
    return quantile(draw(_row_keys(key, n_rows, axis_name)), alpha)


def quantile(share: jax.Array, alpha: float) -> jax.Array:
    """The value below which Beta(alpha, alpha) has this share of its mass, 0 to 1, to four digits.

    Both ends are powers of the share, so the logarithm is interpolated over the logarithm, and the upper half is the
    lower one turned round.
    """
    table = jnp.asarray(_log_quantiles(alpha))
    last = len(table) - 1
    tail = jnp.clip(jnp.minimum(share, 1.0 - share), LEAST, 0.5)
    place = jnp.log(tail / LEAST) * (last / np.log(0.5 / LEAST))
    left = jnp.clip(place.astype(jnp.int32), 0, last - 1)
    value = jnp.exp(table[left] + (place - left) * (table[left + 1] - table[left]))
    return jnp.where(share < 0.5, value, 1.0 - value)


@functools.lru_cache(maxsize=8)
def _log_quantiles(alpha: float) -> np.ndarray:
    """Logarithms of the quantiles of 1,024 shares from `LEAST` to a half, in equal steps of the logarithm."""
    share = np.geomspace(LEAST, 0.5, 1024)
    return np.log(scipy.special.betaincinv(alpha, alpha, share)).astype(np.float32)


def mix_histories(original_BLD: jax.Array, augmented_BLD: jax.Array, lambda_B: jax.Array) -> jax.Array:
    """lambda E(original) + (1 - lambda) E(augmented), position by position: [B, L, D].

    Both histories must be padded at the same positions, as reordering and substituting leave them; then the mask of
    the original is that of the mix.
    """
    share_B11 = lambda_B[:, None, None]
    return share_B11 * original_BLD + (1.0 - share_B11) * augmented_BLD


def relevance(lambda_B: jax.Array, rate_B: jax.Array, weight_B: jax.Array, *, axis_name: str | None) -> jax.Array:
    """omega = 1 / (lambda rate), scaled to 0..1 over the valid rows of the global batch; 0 at padded rows. No gradient.

    Where all valid rows have the same omega, one row alone among them, the scale is 0 / 0 (NaN in the released code);
    here they all get 1, since none is less relevant than another.

    Args:
        rate_B: the share of the sequence that the operator changed.
    """
    valid_B = weight_B > 0
    # Beta draws come as near to 0 as float32 has numbers; the inverse must stay finite.
    raw_B = lax.stop_gradient(1.0 / jnp.maximum(jnp.where(valid_B, lambda_B * rate_B, 1.0), 1e-12))
    low = jnp.min(jnp.where(valid_B, raw_B, jnp.inf))
    high = jnp.max(jnp.where(valid_B, raw_B, -jnp.inf))
    if axis_name is not None:
        low, high = lax.pmin(low, axis_name), lax.pmax(high, axis_name)
    differs = high > low
    low, spread = jnp.where(differs, low, 0.0), jnp.where(differs, high - low, 1.0)
    return jnp.where(valid_B, jnp.where(differs, (raw_B - low) / spread, 1.0), 0.0)


def weighted_loss(
    loss_B: jax.Array, omega_B: jax.Array, weight_B: jax.Array, *, mode: str, axis_name: str | None
) -> jax.Array:
    """This device's share of the loss of mixed rows, over the number of valid rows of the global batch, n.

    "paper": sum(omega loss) / n. "as_released": sum(omega) sum(loss) / n.

    Raises ValueError for another mode.
    """
    _check_mode(mode)
    loss_B = jnp.where(weight_B > 0, loss_B * weight_B, 0.0)
    omega_B = jnp.where(weight_B > 0, omega_B, 0.0)
    n_rows = jnp.maximum(total(jnp.sum(weight_B), axis_name), 1.0)
    if mode == "as_released":
        return total(jnp.sum(omega_B), axis_name) * jnp.sum(loss_B) / n_rows
    return jnp.sum(omega_B * loss_B) / n_rows


def draw_partners(key: jax.Array, weight_B: jax.Array, *, axis_name: str | None) -> jax.Array:
    """A random permutation of the valid rows of the global batch: the partner [B] of this device's rows.

    Partners are numbers of rows in the global batch. A row may be its own partner; a padded row always is.
    """
    valid_G = _gather(weight_B > 0, axis_name)
    draw_G = jax.vmap(jax.random.uniform)(_row_keys(key, len(valid_G), None))
    # The valid rows in a random order, padded ones after them; the i-th valid row gets the i-th of that order.
    order_G = jnp.argsort(jnp.where(valid_G, draw_G, jnp.inf))
    partner_G = jnp.where(valid_G, order_G[jnp.cumsum(valid_G) - 1], jnp.arange(len(valid_G)))
    return lax.dynamic_slice_in_dim(partner_G, _first_row(len(weight_B), axis_name), len(weight_B))


def mix_rows(
    encoded_BD: jax.Array,
    target_BD: jax.Array,
    label_B: jax.Array,
    lambda_: jax.Array,
    partner_B: jax.Array,
    *,
    mode: str,
    axis_name: str | None,
) -> Mixed:
    """Every row with its partner: lambda own + (1 - lambda) partner's, of encoder outputs and target embeddings alike.

    "as_released" keeps the row's own label. "paper" mixes labels by lambda, by its mean over the channels where it
    differs between them (outputs and targets then need the same width).

    Args:
        lambda_: [B] one a row, or [B, D] one a row and channel.

    Raises ValueError for another mode.
    """
    _check_mode(mode)
    share_BD = lambda_[:, None] if lambda_.ndim == 1 else lambda_
    label_share_B = jnp.mean(share_BD, axis=1)

    def mix(own: jax.Array, share: jax.Array) -> jax.Array:
        return share * own + (1.0 - share) * _gather(own, axis_name)[partner_B]

    label_B = mix(label_B, label_share_B) if mode == "paper" else label_B
    return Mixed(mix(encoded_BD, share_BD), mix(target_BD, share_BD), label_B)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mixup mode: expected one of {sorted(MODES)}, found {mode!r}")


def _gather(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


def _first_row(n_rows: int, axis_name: str | None) -> jax.Array:
    """The number in the global batch of this device's first row."""
    return jnp.int32(0) if axis_name is None else lax.axis_index(axis_name) * n_rows


def _row_keys(key: jax.Array, n_rows: int, axis_name: str | None) -> jax.Array:
    row_B = _first_row(n_rows, axis_name) + jnp.arange(n_rows)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(row_B)
