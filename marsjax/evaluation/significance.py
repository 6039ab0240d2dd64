"""Is a difference more than luck: paired bootstrap over users, paired t-test over seeds, Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
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
    """
    user_names, user_B = np.unique(user_B, return_inverse=True)
    n_users = len(user_names)
    rng = np.random.default_rng(seed)
    functions = {"auc": _weighted_aucs, "gauc": _weighted_gaucs}
    if metric not in functions:
        raise ValueError(f"metric: expected one of {sorted(functions)}, found {metric!r}")
    # Row 0 is the sample itself; the others count how often each user was drawn.
    count_RU = np.ones((n_resamples + 1, n_users), np.float32)
    for row in range(1, n_resamples + 1):
        count_RU[row] = np.bincount(rng.integers(n_users, size=n_users), minlength=n_users)

    def mean_over_seeds(score_SB: np.ndarray) -> np.ndarray:
        values = [functions[metric](user_B, np.asarray(label_B), score_B, count_RU) for score_B in score_SB]
        return np.mean(values, axis=0)

    difference_R = mean_over_seeds(np.atleast_2d(score_a_SB)) - mean_over_seeds(np.atleast_2d(score_b_SB))
    drawn_R = difference_R[1:]
    drawn_R = drawn_R[np.isfinite(drawn_R)]
    if not np.isfinite(difference_R[0]) or not len(drawn_R):
        return Interval(np.nan, np.nan, np.nan, np.nan)
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    # One is added to each tail, since the sample itself is one of the resamples that could have been drawn.
    tail = min((drawn_R <= 0).sum(), (drawn_R >= 0).sum())
    p_value = min(1.0, 2 * (tail + 1) / (len(drawn_R) + 1))
    return Interval(float(difference_R[0]), float(low), float(high), float(p_value))


def _weighted_aucs(user_B: np.ndarray, label_B: np.ndarray, score_B: np.ndarray, count_RU: np.ndarray) -> np.ndarray:
    """Pooled AUC [R] under each row of user counts, from one sort."""
    order_B = np.argsort(score_B, kind="stable")
    score_B, label_B, user_B = score_B[order_B], label_B[order_B], user_B[order_B]
    first_T = np.flatnonzero(np.concatenate([[True], score_B[1:] != score_B[:-1]]))
    positive_B = (label_B > 0).astype(np.float64)
    out = []
    for count_U in count_RU:
        weight_B = count_U[user_B].astype(np.float64)
        positive_T = np.add.reduceat(weight_B * positive_B, first_T)
        negative_T = np.add.reduceat(weight_B * (1 - positive_B), first_T)
        below_T = np.cumsum(negative_T) - negative_T / 2
        pairs = positive_T.sum() * negative_T.sum()
        out.append((positive_T * below_T).sum() / pairs if pairs else np.nan)
    return np.array(out)


def _weighted_gaucs(user_B: np.ndarray, label_B: np.ndarray, score_B: np.ndarray, count_RU: np.ndarray) -> np.ndarray:
    users = user_auc(user_B, label_B, score_B)
    counted_U = ~np.isnan(users.auc_U)
    weight_RU = count_RU[:, counted_U] * users.rows_U[counted_U]
    total_R = weight_RU.sum(axis=1)
    sum_R = weight_RU @ users.auc_U[counted_U]
    return np.divide(sum_R, total_R, out=np.full(len(total_R), np.nan), where=total_R > 0)


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
