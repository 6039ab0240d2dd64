"""Is a difference more than luck: paired bootstrap over users, paired t-test over seeds, Holm's correction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.stats

from marsjax.evaluation.metrics import user_auc


class Interval(NamedTuple):
    """A difference (first minus second), its 95% interval and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    user_B: np.ndarray,
    label_B: np.ndarray,
    score_a_SB: np.ndarray,
    score_b_SB: np.ndarray,
    *,
    metric: str = "auc",
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Resamples users with replacement, the same users for both methods, and compares means over seeds.

    Args:
        score_a_SB, score_b_SB: scores of S seeds each on the same rows.
        metric: "auc" (pooled) or "gauc" (row-weighted, single-class users dropped).

    The bootstrap speaks of the users; the spread over seeds is `t_test_paired`'s business. nan without both classes.
    For more than two methods, call the three parts yourself: a method's resamples serve all its comparisons.
    """
    user_names, user_B = np.unique(user_B, return_inverse=True)
    count_RU = draw_users(len(user_names), n_resamples=n_resamples, seed=seed)
    a_R, b_R = (
        bootstrap(user_B, label_B, np.atleast_2d(score_SB), count_RU, metric=metric)
        for score_SB in (score_a_SB, score_b_SB)
    )
    return interval(a_R, b_R)


def draw_users(n_users: int, *, n_resamples: int, seed: int) -> np.ndarray:
    """How often each user is drawn, [n_resamples + 1, U] float32. Row 0 is the sample itself: everyone once."""
    rng = np.random.default_rng(seed)
    count_RU = np.ones((n_resamples + 1, n_users), np.float32)
    for count_U in count_RU[1:]:
        count_U[:] = np.bincount(rng.integers(n_users, size=n_users), minlength=n_users)
    return count_RU


def bootstrap(
    user_B: np.ndarray, label_B: np.ndarray, score_SB: np.ndarray, count_RU: np.ndarray, *, metric: str
) -> np.ndarray:
    """The mean over S seeds of a metric under each row of user counts, [R]; nan where it is undefined.

    Args:
        user_B: 0..U-1, columns of `count_RU`.
        metric: "auc" (pooled) or "gauc" (row-weighted, single-class users dropped).
    """
    functions = {"auc": _weighted_aucs, "gauc": _weighted_gaucs}
    if metric not in functions:
        raise ValueError(f"metric: expected one of {sorted(functions)}, found {metric!r}")
    return functions[metric](np.asarray(user_B), np.asarray(label_B), np.asarray(score_SB), count_RU).mean(axis=0)


def interval(a_R: np.ndarray, b_R: np.ndarray) -> Interval:
    """What `bootstrap` gave for two methods under the same user counts, of which row 0 is the sample itself."""
    difference_R = a_R - b_R
    drawn_R = difference_R[1:]
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if not np.isfinite(difference_R[0]) or not len(drawn_R):
        return Interval(np.nan, np.nan, np.nan, np.nan)
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    # One is added to each tail, since the sample itself is one of the resamples that could have been drawn.
    tail = min((drawn_R <= 0).sum(), (drawn_R >= 0).sum())
    p_value = min(1.0, 2 * (tail + 1) / (len(drawn_R) + 1))
    return Interval(float(difference_R[0]), float(low), float(high), float(p_value))


def _weighted_aucs(user_B: np.ndarray, label_B: np.ndarray, score_SB: np.ndarray, count_RU: np.ndarray) -> np.ndarray:
    """Pooled AUC [S, R] under each row of user counts, from one sort a seed.

    With C[k] the weight of the k lowest negatives, a positive that beats k of them and ties with t more is right in
    (C[k] + C[k + t]) / 2 of its pairs. So the sum over positives is one over the N negatives: C times the halves of the
    positives' weights that fall on each k. All sums are of halves of whole numbers, and exact.
    """
    positive_B = label_B > 0
    n_users = count_RU.shape[1]
    rows_2U = np.stack([np.bincount(user_B[of_B], minlength=n_users) for of_B in (~positive_B, positive_B)])
    ranked = [_ranked(user_B, positive_B, score_B, n_users) for score_B in score_SB]
    out_SR = np.full((len(score_SB), len(count_RU)), np.nan)
    for block, count_UK in _blocks(count_RU, len(user_B)):
        pairs_K = np.prod(rows_2U @ count_UK, axis=0)
        for out_R, (user_N, halves_NU) in zip(out_SR, ranked, strict=True):
            lowest_NK = np.cumsum(count_UK[user_N], axis=0)
            right_K = np.einsum("nk,nk->k", lowest_NK, halves_NU @ count_UK)
            np.divide(right_K, pairs_K, out=out_R[block], where=pairs_K > 0)
    return out_SR


def _ranked(
    user_B: np.ndarray, positive_B: np.ndarray, score_B: np.ndarray, n_users: int
) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """The users of the negatives, lowest first [N], and a half of each positive on its two C[k], k from 1 [N, U]."""
    order_N = np.flatnonzero(~positive_B)[np.argsort(score_B[~positive_B], kind="stable")]
    score_N, score_P, user_P = score_B[order_N], score_B[positive_B], user_B[positive_B]
    k_X = np.concatenate([np.searchsorted(score_N, score_P, side) for side in ("left", "right")])
    user_X = np.tile(user_P, 2)[k_X > 0]  # C[0] is 0
    k_X = k_X[k_X > 0] - 1
    halves_NU = scipy.sparse.csr_array((np.full(len(k_X), 0.5), (k_X, user_X)), shape=(len(order_N), n_users))
    return user_B[order_N], halves_NU


def _weighted_gaucs(user_B: np.ndarray, label_B: np.ndarray, score_SB: np.ndarray, count_RU: np.ndarray) -> np.ndarray:
    """Row-weighted mean [S, R] of the users' AUCs under each row of user counts."""
    of_seeds = [user_auc(user_B, label_B, score_B) for score_B in score_SB]
    users = of_seeds[0]
    counted_U = ~np.isnan(users.auc_U)  # of the labels, so the same for all seeds
    column_U, rows_U = users.user_U[counted_U], users.rows_U[counted_U].astype(np.float64)
    sum_SU = np.stack([seed.auc_U[counted_U] for seed in of_seeds]) * rows_U
    out_SR = np.full((len(score_SB), len(count_RU)), np.nan)
    if not len(column_U):  # such as one row a user
        return out_SR
    for block, count_UK in _blocks(count_RU, len(user_B)):
        count_UK = count_UK[column_U]
        total_K = rows_U @ count_UK
        np.divide(sum_SU @ count_UK, total_K, out=out_SR[:, block], where=total_K > 0)
    return out_SR


def _blocks(count_RU: np.ndarray, n_rows: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Resamples in blocks [U, K] of float64 whose arrays of `n_rows` stay in the processor's cache, or nearly so."""
    size = max(8, 2**17 // n_rows)
    for start in range(0, len(count_RU), size):
        block = slice(start, start + size)
        yield block, np.ascontiguousarray(count_RU[block].T, np.float64)


def t_test_paired(a_S: Sequence[float], b_S: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test over seeds; nan for fewer than 2 seeds, 1 for no difference at all."""
    difference_S = np.asarray(a_S, np.float64) - np.asarray(b_S, np.float64)
    if len(difference_S) < 2 or not np.isfinite(difference_S).all():
        return float("nan")
    spread = difference_S.std(ddof=1)
    if spread == 0:
        return 1.0 if difference_S.mean() == 0 else 0.0
    t = difference_S.mean() / (spread / np.sqrt(len(difference_S)))
    return float(2 * scipy.stats.t.sf(abs(t), len(difference_S) - 1))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: p-values adjusted for being the best of several."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    out = np.empty_like(p)
    out[order] = np.minimum(stepped, 1.0)
    return out
