"""Grades: feedback as fine as the source has it, such as stars or seconds, where the label is a threshold of it.

A rank, since values may be stars, seconds or money, and a few of them huge. What reads grades says so in its
fingerprint (`grades_fingerprint`); the data's own leaves them out, so that nothing else is done again for them.
"""

from __future__ import annotations

import numpy as np

from marsjax.files import digest_arrays
from marsjax.records import Log, Rows


def rank_grades(value_R: np.ndarray) -> np.ndarray | None:
    """The share of values that are smaller, and half of those that are equal, [R] float32; None where values are two
    at most, which say no more than a label."""
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


def graded_log(log: Log) -> Log:
    """The log with grades in the place of labels; of labels alone as it is (`check_grades` refuses these)."""
    return log if log.grade_E is None else log._replace(label_E=log.grade_E)


def graded_rows(rows: Rows) -> Rows:
    """The rows with grades in the place of labels in their histories, as `graded_log`."""
    histories = rows.histories
    if histories.grade_H is None:
        return rows
    return rows._replace(histories=histories._replace(label_H=histories.grade_H))


def grades_fingerprint(log: Log) -> str:
    """sha256 over the grades."""
    return digest_arrays({} if log.grade_E is None else {"grade": log.grade_E})
