"""Cuts padded histories out of the CSR arrays."""

from __future__ import annotations

import numpy as np

from marsjax.records import Histories


def gather_histories(histories: Histories, user_Q: np.ndarray, end_Q: np.ndarray, *, cap: int) -> np.ndarray:
    """The last `cap` history items before `end_Q` of each user, [Q, cap], left-aligned and padded with 0.

    The type is that of `item_H`: int32 for items. Where times stand in their place it is int64, which the
    milliseconds of our century need.
    """
    length_Q = np.minimum(end_Q - histories.start_U1[user_Q], cap)
    column_1L = np.arange(cap)[None, :]
    inside_QL = column_1L < length_Q[:, None]
    at_QL = np.where(inside_QL, (end_Q - length_Q)[:, None] + column_1L, 0)
    if not len(histories.item_H):
        return np.zeros(inside_QL.shape, histories.item_H.dtype)
    return np.where(inside_QL, histories.item_H[at_QL], 0)


def ragged_histories(
    histories: Histories, user_Q: np.ndarray, end_Q: np.ndarray, *, cap: int
) -> tuple[np.ndarray, np.ndarray]:
    """The last `cap` history entries before `end_Q` of each user, not padded: where each begins [Q + 1], and where the
    entries stand in `item_H` [X]."""
    length_Q = np.minimum(end_Q - histories.start_U1[user_Q], cap)
    start_Q1 = np.concatenate([[0], np.cumsum(length_Q)])
    return start_Q1, np.repeat(end_Q - length_Q - start_Q1[:-1], length_Q) + np.arange(start_Q1[-1])
