"""MARS: filter, most-similar, kth-similar and dp, Eqs. 16-18 and section 4.4, batched over queries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from marsjax.records import Array, Borrowed, Donors, Neighbours

# Entries of which all pairs are compared, where more are sorted: XLA sorts on a CPU by one comparison after the other,
# and vectorises what goes through all pairs, which pays up to some 300.
PAIRED = 256


class Candidates(NamedTuple):
    """Everything that was considered for borrowing, kept or not. S = K donors x L items, most similar donor last."""

    item_QS: np.ndarray  # [Q, S] int32, 0 is padding
    time_QS: np.ndarray  # [Q, S] int64
    donor_QS: np.ndarray  # [Q, S] int32
    donor_similarity_QS: np.ndarray  # [Q, S] float32, Eq. 15
    similarity_QS: np.ndarray  # [Q, S] float32, Eq. 16; -inf at padding
    kept_QS: np.ndarray  # [Q, S] bool


def cosine(unit_BSD: jax.Array, query_BD: jax.Array, centre_D: jax.Array) -> jax.Array:
    """Eq. 16, [B, S]: cosine of each item with the query user, both moved by `centre_D` (zeros: the literal Eq. 16).

    Mean-pooled vectors share a large common part and their cosines bunch near 1; moving by the mean of the donors'
    vectors spreads them. Items come moved and of length 1 (`embeddings.units`): theirs are the same for all who ask,
    and working out the lengths would be most of the work here.
    """
    query_BD = query_BD - centre_D[None, :]
    length_B = jnp.sqrt(jnp.sum(query_BD**2, axis=-1))
    return jnp.einsum("bsd,bd->bs", unit_BSD, query_BD / jnp.maximum(length_B, 1e-12)[:, None])


def threshold(
    similarity_BS: jax.Array, valid_BS: jax.Array, *, value: float | None, quantile: float | None
) -> jax.Array:
    """theta of Eq. 17, one for each query [B]: a fixed value, or a quantile of the query's own candidates.

    The quantile is a lower order statistic: quantile 0 keeps all, 0.5 the better half.
    """
    if value is not None:
        return jnp.full(similarity_BS.shape[:1], value, similarity_BS.dtype)
    assert quantile is not None
    value_BS = jnp.where(valid_BS, similarity_BS, jnp.inf)
    count_B = jnp.sum(valid_BS, axis=1)
    rank_B = jnp.clip(jnp.floor(quantile * count_B).astype(jnp.int32), 0, jnp.maximum(count_B - 1, 0))
    if value_BS.shape[1] > PAIRED:
        return jnp.take_along_axis(jnp.sort(value_BS, axis=1), rank_B[:, None], axis=1)[:, 0]
    # The order statistic is the largest value that no more than `rank` others are below.
    below_BS = jnp.sum(value_BS[:, None, :] < value_BS[:, :, None], axis=2, dtype=jnp.int32)
    return jnp.max(jnp.where(below_BS <= rank_B[:, None], value_BS, -jnp.inf), axis=1)


def best_run(gain_BL: jax.Array, valid_BL: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The contiguous run with the largest sum (Kadane), as (sum, first, last) [B] each; last < first is empty.

    Padding ends nothing: its gain counts as 0. The empty run, of sum 0, wins where no run is positive; among equal
    sums the run that ends first, and begins last, wins.
    """
    gain_BL = jnp.where(valid_BL, gain_BL, 0.0)
    n = gain_BL.shape[0]

    def advance(carry: Any, column: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        here_B, start_B, best_B, first_B, last_B = carry
        gain_B, at = column
        restart_B = here_B <= 0.0
        here_B = jnp.where(restart_B, gain_B, here_B + gain_B)
        start_B = jnp.where(restart_B, at, start_B)
        better_B = here_B > best_B
        return (
            here_B,
            start_B,
            jnp.where(better_B, here_B, best_B),
            jnp.where(better_B, start_B, first_B),
            jnp.where(better_B, at, last_B),
        ), None

    zero_B = jnp.zeros(n, gain_BL.dtype)
    none_B = jnp.zeros(n, jnp.int32)
    start = (zero_B, none_B, zero_B, none_B, none_B - 1)
    columns = gain_BL.T, jnp.arange(gain_BL.shape[1], dtype=jnp.int32)
    (_, _, best_B, first_B, last_B), _ = jax.lax.scan(advance, start, columns)
    return best_B, first_B, last_B


def keep_all(similarity_BKL: jax.Array, valid_BKL: jax.Array, theta_B: jax.Array) -> jax.Array:
    """Most-similar and kth-similar: every item of every donor."""
    return valid_BKL


def keep_similar(similarity_BKL: jax.Array, valid_BKL: jax.Array, theta_B: jax.Array) -> jax.Array:
    """Filter, Eq. 17: items at least as similar as theta."""
    return valid_BKL & (similarity_BKL >= theta_B[:, None, None])


def keep_best_run(similarity_BKL: jax.Array, valid_BKL: jax.Array, theta_B: jax.Array) -> jax.Array:
    """DP: the contiguous run with the largest sum of (similarity - theta), over all donors; one donor's run wins."""
    n, k, length = similarity_BKL.shape
    gain_XL = (similarity_BKL - theta_B[:, None, None]).reshape(n * k, length)
    best_X, first_X, last_X = best_run(gain_XL, valid_BKL.reshape(n * k, length))
    best_BK, first_BK, last_BK = (x.reshape(n, k) for x in (best_X, first_X, last_X))
    # The nearest donor stands last, and argmax takes the first of equals: look from the end.
    winner_B = k - 1 - jnp.argmax(best_BK[:, ::-1], axis=1)
    column_L = jnp.arange(length)[None, None, :]
    inside_BKL = (column_L >= first_BK[..., None]) & (column_L <= last_BK[..., None])
    return valid_BKL & inside_BKL & (jnp.arange(k)[None, :] == winner_B[:, None])[..., None]


class Strategy(NamedTuple):
    """How many donors a strategy looks at, and which of their items it keeps."""

    donors: int | None  # None: as many as asked for
    keep: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


STRATEGIES = {
    "most_similar": Strategy(1, keep_all),
    "filter": Strategy(1, keep_similar),
    "kth_similar": Strategy(None, keep_all),
    "dp": Strategy(None, keep_best_run),
}


def drop_repeats(item_BS: jax.Array, kept_BS: jax.Array) -> jax.Array:
    """Of several kept entries of one item, keeps the last: the nearest donor's, nearest to the own history."""
    length = item_BS.shape[1]
    if length <= PAIRED:
        later_SS = jnp.arange(length)[None, :] > jnp.arange(length)[:, None]
        same_BSS = (item_BS[:, None, :] == item_BS[:, :, None]) & kept_BS[:, None, :]
        return kept_BS & ~jnp.any(same_BSS & later_SS[None], axis=2)
    # Stable sort by item brings the repeats together, in their order; the last of each group stays.
    key_BS = jnp.where(kept_BS, item_BS, -1)
    order_BS = jnp.argsort(key_BS, axis=1, stable=True)
    sorted_BS = jnp.take_along_axis(key_BS, order_BS, axis=1)
    last_BS = jnp.concatenate([sorted_BS[:, :-1] != sorted_BS[:, 1:], jnp.ones_like(sorted_BS[:, :1], bool)], axis=1)
    rows_B1 = jnp.arange(item_BS.shape[0])[:, None]
    is_last_BS = jnp.zeros(item_BS.shape, bool).at[rows_B1, order_BS].set(last_BS)
    return kept_BS & is_last_BS


@functools.partial(jax.jit, static_argnames=("keep", "theta", "theta_quantile"))
def select(
    item_BKL: Array,
    unit_BKLD: Array,
    query_BD: Array,
    centre_D: Array,
    *,
    keep: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    theta: float | None,
    theta_quantile: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Similarities [B, S] (Eq. 16) and what is kept [B, S] (Eq. 17 or another rule), compiled for one shape."""
    n, k, length = item_BKL.shape
    valid_BKL = item_BKL > 0
    similarity_BS = cosine(unit_BKLD.reshape(n, k * length, -1), query_BD, centre_D)
    theta_B = threshold(similarity_BS, valid_BKL.reshape(n, -1), value=theta, quantile=theta_quantile)
    kept_BKL = keep(similarity_BS.reshape(n, k, length), valid_BKL, theta_B)
    return similarity_BS, drop_repeats(item_BKL.reshape(n, -1), kept_BKL.reshape(n, -1))


def check_theta(theta: float | None, theta_quantile: float | None) -> None:
    """Raises ValueError unless exactly one of them is given, and the quantile is one."""
    if (theta is None) == (theta_quantile is None):
        raise ValueError(
            f"augmentation: expected exactly one of theta and theta_quantile, found {theta} and {theta_quantile}; "
            "set the other to none"
        )
    if theta_quantile is not None and not 0 <= theta_quantile < 1:
        raise ValueError(f"augmentation.theta_quantile: expected 0 to below 1, found {theta_quantile}")


def borrow(
    donors: Donors,
    neighbours: Neighbours,
    query_QD: np.ndarray,
    units: Callable[[np.ndarray], np.ndarray],
    *,
    strategy: str,
    theta: float | None,
    theta_quantile: float | None,
    centre_D: np.ndarray,
    size: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> Candidates:
    """Eqs. 16-17 for all queries.

    Args:
        neighbours: donors of each query, [Q, K], the most similar first.
        query_QD: user vectors of the queries.
        units: item vectors of donors, contextual or static, as `embeddings.units` moves them by `centre_D`: positions
            [X] in `donors` -> [X, L, D].
        strategy: a key of `STRATEGIES`.
        theta, theta_quantile: one of them is None.
        centre_D: subtracted from queries before the cosine; zeros for the literal Eq. 16.
        size: queries at a time; one shape is compiled.

    Raises:
        ValueError: unknown strategy; both or neither of `theta` and `theta_quantile`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"augmentation.strategy: expected one of {sorted(STRATEGIES)}, found {strategy!r}")
    check_theta(theta, theta_quantile)
    chosen = STRATEGIES[strategy]
    k = min(chosen.donors or neighbours.user_BK.shape[1], neighbours.user_BK.shape[1])
    # Least to most similar, so that the best donor's items stand next to the own history and survive truncation.
    donor_QK = neighbours.user_BK[:, :k][:, ::-1]
    valid_QK = neighbours.valid_BK[:, :k][:, ::-1]
    similarity_QK = np.where(valid_QK, neighbours.similarity_BK[:, :k][:, ::-1], 0.0)
    position_QK = np.where(valid_QK, np.searchsorted(donors.user_P, donor_QK), 0)
    length = donors.item_PL.shape[1]

    n_queries = len(query_QD)
    item_QS = np.zeros((n_queries, k * length), np.int32)
    similarity_QS = np.full((n_queries, k * length), -np.inf, np.float32)
    kept_QS = np.zeros((n_queries, k * length), bool)
    # Those with the same nearest donor together: each donor is then fetched about once, whoever many borrow from it.
    order_Q = np.argsort(position_QK[:, -1], kind="stable")
    for begin in range(0, n_queries, size):
        end = min(begin + size, n_queries)
        row_B = order_Q[np.minimum(np.arange(begin, begin + size), n_queries - 1)]
        position_BK = position_QK[row_B]
        item_BKL = np.where(valid_QK[row_B][..., None], donors.item_PL[position_BK], 0)
        unique_X, inverse = np.unique(position_BK, return_inverse=True)
        unit_BKLD = units(unique_X)
        if not np.array_equal(unique_X, position_BK.ravel()):
            unit_BKLD = unit_BKLD[inverse.reshape(position_BK.shape)]
        unit_BKLD = unit_BKLD.reshape(*item_BKL.shape, -1)
        similarity_BS, kept_BS = select(
            item_BKL,
            unit_BKLD,
            query_QD[row_B],
            centre_D,
            keep=chosen.keep,
            theta=theta,
            theta_quantile=theta_quantile,
        )
        item_BS, similarity_BS, kept_BS = (
            np.asarray(value).reshape(size, -1)[: end - begin] for value in (item_BKL, similarity_BS, kept_BS)
        )
        row_B = row_B[: end - begin]
        item_QS[row_B] = item_BS
        similarity_QS[row_B] = np.where(item_BS > 0, similarity_BS, -np.inf)
        kept_QS[row_B] = kept_BS
        advance(end - begin)
    return Candidates(
        item_QS=item_QS,
        time_QS=donors.time_PL[position_QK].reshape(n_queries, k * length) * (item_QS > 0),
        donor_QS=np.repeat(np.where(valid_QK, donor_QK, -1), length, axis=1).astype(np.int32),
        donor_similarity_QS=np.repeat(similarity_QK, length, axis=1).astype(np.float32),
        similarity_QS=similarity_QS,
        kept_QS=kept_QS,
    )


def kept_items(candidates: Candidates) -> Borrowed:
    """The kept candidates as CSR, in the order in which Eq. 18 prepends them."""
    kept_QS = candidates.kept_QS
    start_Q1 = np.concatenate([[0], np.cumsum(kept_QS.sum(axis=1))]).astype(np.int64)
    return Borrowed(
        start_Q1=start_Q1,
        item_S=candidates.item_QS[kept_QS],
        time_S=candidates.time_QS[kept_QS],
        donor_S=candidates.donor_QS[kept_QS],
        similarity_S=candidates.similarity_QS[kept_QS],
    )
