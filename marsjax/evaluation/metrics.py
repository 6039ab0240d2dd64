"""AUC, grouped AUC in its variants, log loss, calibration and relative improvement."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marsjax.records import GROUP_NAMES, Predictions


class UserAuc(NamedTuple):
    """The AUC of each user, and what it is weighted by."""

    user_U: np.ndarray  # [U] the users, ascending
    auc_U: np.ndarray  # [U] float64, nan for users of one class
    rows_U: np.ndarray  # [U] int64
    positives_U: np.ndarray  # [U] int64


class Gauc(NamedTuple):
    """A grouped AUC and how many users it counts."""

    value: float
    users_counted: int
    users_dropped: int


def auc(label_B: np.ndarray, score_B: np.ndarray) -> float:
    """Pooled area under the ROC curve; ties count half; nan where only one class is present.

    Raises ValueError for scores that are not finite.
    """
    label_B, score_B = _checked(label_B, score_B)
    return float(user_auc(np.zeros(len(label_B), np.int64), label_B, score_B).auc_U[0]) if len(label_B) else np.nan


def user_auc(user_B: np.ndarray, label_B: np.ndarray, score_B: np.ndarray) -> UserAuc:
    """The AUC of every user with rows, from one sort: (sum of mid-ranks of positives - p (p + 1) / 2) / (p n)."""
    label_B, score_B = _checked(label_B, score_B)
    order_B = np.lexsort((score_B, user_B))
    user_B, score_B, positive_B = np.asarray(user_B)[order_B], score_B[order_B], label_B[order_B] > 0
    new_user_B, new_tie_B = np.ones((2, len(user_B)), bool)
    new_user_B[1:] = user_B[1:] != user_B[:-1]
    new_tie_B[1:] = new_user_B[1:] | (score_B[1:] != score_B[:-1])
    first_U = np.flatnonzero(new_user_B)
    rows_U = np.diff(np.append(first_U, len(user_B)))
    # Mid-rank of a tie of rows [first, last] within a user that begins at b: (first + last) / 2 - b + 1.
    first_T = np.flatnonzero(new_tie_B)
    last_T = np.append(first_T[1:], len(user_B)) - 1
    middle_B = ((first_T + last_T) / 2)[np.cumsum(new_tie_B) - 1]
    rank_B = middle_B - np.repeat(first_U, rows_U) + 1
    positives_U = np.add.reduceat(positive_B.astype(np.int64), first_U)
    rank_sum_U = np.add.reduceat(np.where(positive_B, rank_B, 0.0), first_U)
    pairs_U = positives_U * (rows_U - positives_U)
    area_U = rank_sum_U - positives_U * (positives_U + 1) / 2
    auc_U = np.divide(area_U, pairs_U, out=np.full(len(pairs_U), np.nan), where=pairs_U > 0)
    return UserAuc(user_B[first_U], auc_U, rows_U, positives_U)


def gauc(
    user_B: np.ndarray, label_B: np.ndarray, score_B: np.ndarray, *, weight: str = "rows", single_class: str = "drop"
) -> Gauc:
    """Mean AUC over users, Eq. 19.

    Args:
        weight: "rows" (impressions: Eq. 19, FuxiCTR), "positives" (RecBole) or "uniform" (one vote a user).
        single_class: users whose rows are all of one class have no AUC: "drop" them, or count them as "zero"
            (LibRecommender) or "half".

    The value is nan where no user counts.
    """
    return mean_auc(user_auc(user_B, label_B, score_B), weight=weight, single_class=single_class)


def mean_auc(users: UserAuc, *, weight: str = "rows", single_class: str = "drop") -> Gauc:
    """`gauc` of users whose AUCs are known."""
    weights = {"rows": users.rows_U, "positives": users.positives_U, "uniform": np.ones_like(users.rows_U)}
    fills = {"drop": np.nan, "zero": 0.0, "half": 0.5}
    if weight not in weights or single_class not in fills:
        raise ValueError(
            f"gauc: expected weight of {sorted(weights)} and single_class of {sorted(fills)}, found {weight!r} and "
            f"{single_class!r}"
        )
    auc_U = np.where(np.isnan(users.auc_U), fills[single_class], users.auc_U)
    counted_U = ~np.isnan(auc_U)
    weight_U = weights[weight] * counted_U
    if not weight_U.sum():
        return Gauc(np.nan, 0, len(auc_U))
    value = float((np.where(counted_U, auc_U, 0.0) * weight_U).sum() / weight_U.sum())
    return Gauc(value, int(counted_U.sum()), int((~counted_U).sum()))


def logloss(label_B: np.ndarray, score_B: np.ndarray) -> float:
    """Mean binary cross-entropy of probabilities, Eq. 2; nan without rows."""
    label_B, score_B = _checked(label_B, score_B)
    if not len(label_B):
        return np.nan
    p_B = np.clip(score_B.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(label_B * np.log(p_B) + (1 - label_B) * np.log1p(-p_B)))


def calibration_error(label_B: np.ndarray, score_B: np.ndarray, *, n_bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: mean |mean score - mean label|; nan without rows.

    Rows of one score share a bin, whose mass then differs: the bin of their middle rank.
    """
    label_B, score_B = _checked(label_B, score_B)
    if not len(label_B):
        return np.nan
    _, tie_B, count_T = np.unique(score_B, return_inverse=True, return_counts=True)
    middle_T = np.cumsum(count_T) - (count_T + 1) / 2
    bin_B = (middle_T * n_bins // len(score_B)).astype(np.int64)[tie_B]
    return float(np.abs(np.bincount(bin_B, weights=score_B.astype(np.float64) - label_B)).sum() / len(score_B))


def relative_improvement(auc_value: float, base: float) -> float:
    """RelaImpr, Eq. 20, in percent: the AUC above a coin's 0.5, relative to the base's; nan for a base of 0.5."""
    return float(((auc_value - 0.5) / (base - 0.5) - 1) * 100) if base != 0.5 else np.nan


def summarise(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Every metric for all users and for each activity group; nan where a metric is undefined.

    `gauc` weighs users by rows and drops those of one class; the others differ from it in what their names say.
    """
    out = {}
    for number, name in enumerate(("all", *GROUP_NAMES), start=-1):
        keep_B = np.ones(len(predictions.user_B), bool) if number < 0 else predictions.group_B == number
        user_B, label_B, score_B = (
            value[keep_B] for value in (predictions.user_B, predictions.label_B, predictions.score_B)
        )
        by_user = user_auc(user_B, label_B, score_B)
        grouped = mean_auc(by_user)
        out[name] = {
            "auc": auc(label_B, score_B),
            "gauc": grouped.value,
            "gauc_positives": mean_auc(by_user, weight="positives").value,
            "gauc_uniform": mean_auc(by_user, weight="uniform").value,
            "gauc_zero": mean_auc(by_user, single_class="zero").value if grouped.users_counted else np.nan,
            "gauc_half": mean_auc(by_user, single_class="half").value if grouped.users_counted else np.nan,
            "gauc_users": float(grouped.users_counted),
            "logloss": logloss(label_B, score_B),
            "ece": calibration_error(label_B, score_B),
            "predicted_over_observed": float(score_B.mean() / label_B.mean()) if label_B.sum() else np.nan,
            "rows": float(len(label_B)),
            "users": float(len(by_user.user_U)),
            "positive_rate": float(label_B.mean()) if len(label_B) else np.nan,
            "lent": _mean(predictions.lent_B, keep_B),
        }
    return out


def _mean(value_B: np.ndarray | None, keep_B: np.ndarray) -> float:
    return 0.0 if value_B is None or not keep_B.any() else float(value_B[keep_B].mean())


def _checked(label_B: np.ndarray, score_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    label_B, score_B = np.asarray(label_B), np.asarray(score_B)
    if label_B.shape != score_B.shape:
        raise ValueError(f"expected one score a label, found {score_B.shape} scores and {label_B.shape} labels")
    bad_B = ~np.isfinite(score_B)
    if bad_B.any():
        raise ValueError(
            f"expected finite scores, found {int(bad_B.sum())} that are not, the first in row {np.argmax(bad_B)}"
        )
    return label_B, score_B
