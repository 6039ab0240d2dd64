"""The numbers that a model reads beside ids: what was known of user and item (`data/priors.py`), and what is to be
expected of the user on the target (`augmentation/posterior.py`)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from marsjax.augmentation import posterior
from marsjax.data.priors import ItemCounts, rate_and_count
from marsjax.records import Array

ONE = np.ones(1, np.float32)  # the scale of labels


class Knowledge(NamedTuple):
    """What a bundle holds of it, knowledge.npz. Arrays of a part that the model does not read are empty."""

    overall: np.ndarray  # [] float64, rate of likes over all training events
    total_2N: np.ndarray  # [2, N] float64, training events of the item, and likes among them
    others_2FN: np.ndarray  # [2, F, N] float64, the same of the users outside of each fold
    fold_U: np.ndarray  # [U] int64, the fold of each user
    usual_FN: Array  # [F, N] float32, `posterior.Opinions`
    loading_FNK: Array  # [F, N, K] float32
    scale_F: Array  # [F] float32; [0] where opinions are labels, and no grades
    middle_2: np.ndarray  # [2] float32, the mean grade of what was not liked and of what was, for events without one

    @property
    def has_priors(self) -> bool:
        """Whether the model reads rates and counts."""
        return bool(self.total_2N.size)

    @property
    def has_opinions(self) -> bool:
        """Whether the model reads expected opinions."""
        return bool(self.loading_FNK.size)


def make_knowledge(
    counted: ItemCounts | None, opinions: posterior.Opinions | None, middle_2: np.ndarray | None = None
) -> Knowledge:
    """Knowledge of what is given."""
    scale_F = None if opinions is None else opinions.scale_F
    return Knowledge(
        overall=np.array(0.0 if counted is None else counted.overall),
        total_2N=np.zeros((2, 0)) if counted is None else counted.total_2N,
        others_2FN=np.zeros((2, 0, 0)) if counted is None else counted.others_2FN,
        fold_U=np.zeros(0, np.int64) if counted is None else counted.fold_U,
        usual_FN=np.zeros((0, 0), np.float32) if opinions is None else opinions.usual_FN,
        loading_FNK=np.zeros((0, 0, 0), np.float32) if opinions is None else opinions.loading_FNK,
        scale_F=np.zeros(0, np.float32) if scale_F is None else scale_F,
        middle_2=np.zeros(2, np.float32) if middle_2 is None else middle_2,
    )


def dense_width(known: Knowledge) -> int:
    """J, how many numbers a row has."""
    return 6 * known.has_priors + 2 * known.has_opinions


def on_device(known: Knowledge) -> Knowledge:
    """With the arrays on the device that are read there."""
    return known._replace(usual_FN=jax.device_put(known.usual_FN), loading_FNK=jax.device_put(known.loading_FNK))


def numbers(
    known: Knowledge,
    user: int,
    item_L: np.ndarray,
    mark_L: np.ndarray,
    grade_L: np.ndarray,
    target_C: np.ndarray,
    *,
    cap: int,
    size: int,
) -> np.ndarray | None:
    """The numbers of a user's candidates, [C, J] float32; None where the model reads none.

    Items of the history whose mark is 0 are ones that nothing is known of, and count nowhere. A user who is not known
    is treated as one of the first fold. What is compiled depends on `cap`, the longest history that opinions are
    expected from, and on `size`, to which candidates are padded.
    """
    if not dense_width(known):
        return None
    item_L, mark_L, grade_L = item_L[mark_L > 0], mark_L[mark_L > 0], grade_L[mark_L > 0]
    parts = []
    if known.has_priors:
        fold = int(known.fold_U[user]) if user >= 0 else 0
        ones_C = np.ones(len(target_C))
        pairs = (
            (len(item_L) * ones_C, (mark_L == 2).sum() * ones_C),
            tuple(known.total_2N[:, target_C]),
            tuple(known.others_2FN[:, fold, target_C]),
        )
        parts += [
            column for count_C, likes_C in pairs for column in rate_and_count(count_C, likes_C, float(known.overall))
        ]
    if known.has_opinions:
        bound, item_L = _bound(cap), item_L[-cap:]
        padded_L, value_L = np.zeros(bound, np.int32), np.zeros(bound, np.float32)
        padded_L[: len(item_L)], value_L[: len(item_L)] = item_L, _values(known, mark_L[-cap:], grade_L[-cap:])
        padded_C = np.zeros(size, np.int32)
        padded_C[: len(target_C)] = target_C
        fold = max(user, 0) % known.usual_FN.shape[0]
        expected_C2 = posterior.expect_for_one(
            padded_L,
            value_L,
            padded_C,
            known.usual_FN[fold],
            known.loading_FNK[fold],
            known.scale_F[fold : fold + 1] if known.scale_F.size else ONE,
        )
        parts += list(np.asarray(expected_C2)[: len(target_C)].T)
    return np.stack(parts, axis=1).astype(np.float32)


def _values(known: Knowledge, mark_L: np.ndarray, grade_L: np.ndarray) -> np.ndarray:
    """What opinions are made of, [L]: labels, or grades, and where there is none the usual one of the label."""
    if not known.scale_F.size:
        return mark_L == 2
    return np.where(np.isnan(grade_L), known.middle_2[(mark_L == 2).astype(int)], grade_L)


def _bound(cap: int) -> int:
    return posterior.SHORTEST * 2 ** max(0, int(np.ceil(np.log2(max(cap, 1) / posterior.SHORTEST))))
