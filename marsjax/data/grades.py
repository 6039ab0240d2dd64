"""Grades: feedback as fine as the source has it, such as stars or seconds, where the label is a threshold of it.

A rank, since values may be stars, seconds or money, and a few of them huge. It is the rank among all events of the
source, those of test and of users outside of a sample too: what one unit of feedback means is taken to be known. What
reads grades says so in its fingerprint (`grades_fingerprint`); the data's own leaves them out, so that nothing else is
done again for them.
"""

from __future__ import annotations

import numpy as np

from marsjax.files import digest_arrays
from marsjax.records import GRADE_MARKS, TRAIN, Log, Rows


def rank_grades(value_R: np.ndarray) -> np.ndarray | None:
    """The share of values that are smaller, and half of those that are equal, [R] float32; None where there are at most
    two distinct values, which say no more than a label."""
    _, at_R, count_X = np.unique(value_R, return_inverse=True, return_counts=True)
    if len(count_X) <= 2:
        return None
    return ((np.cumsum(count_X) - count_X / 2) / len(value_R)).astype(np.float32)[at_R]


def check_grades(log: Log, reader: str) -> None:
    """Raises ValueError where `reader` reads grades, and the log has labels alone."""
    if log.grade_E is None:
        raise ValueError(
            f"{reader}: expected a log with grades (feedback of three values or more that data.label_threshold makes "
            "labels of), found labels alone; use the method or the inputs of labels (see docs/methods.md)"
        )


def grade_marks(log: Log, grade_X: np.ndarray) -> np.ndarray:
    """The mark of a history item by its grade, [X] int8, from 1 on: each grade that the log knows has one, or, where it
    knows more than `GRADE_MARKS`, each fifth of them."""
    distinct = np.unique(graded_log(log).label_E)
    border = distinct[1:] if len(distinct) <= GRADE_MARKS else np.arange(1, GRADE_MARKS, dtype=np.float32) / GRADE_MARKS
    return 1 + np.searchsorted(border, grade_X, side="right").astype(np.int8)


def graded_log(log: Log) -> Log:
    """The log with grades in the place of labels; of labels alone as it is (`check_grades` refuses these)."""
    return log if log.grade_E is None else log._replace(label_E=log.grade_E)


def graded_rows(rows: Rows) -> Rows:
    """The rows with grades in the place of labels in their histories, as `graded_log`."""
    histories = rows.histories
    if histories.grade_H is None:
        return rows
    return rows._replace(histories=histories._replace(label_H=histories.grade_H))


def middle_grades(log: Log, rows: Rows) -> np.ndarray:
    """The mean grade of the training events that were not liked, and of those that were, [2] float32."""
    is_train_E = rows.split_E == TRAIN
    grade_R, liked_R = graded_log(log).label_E[is_train_E], log.label_E[is_train_E] > 0
    return np.array([grade_R[liked_R == liked].mean() for liked in (False, True)], np.float32)


def grades_fingerprint(log: Log) -> str:
    """sha256 over the grades."""
    return digest_arrays({} if log.grade_E is None else {"grade": log.grade_E})
