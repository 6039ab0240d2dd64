"""Cuts padded histories out of the CSR arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from marsjax.records import LOW, TRAIN, Histories, Rows


def feedback(label_X: np.ndarray) -> np.ndarray:
    """The mark of a history item [X] int8: 2 liked, 1 not liked."""
    return 1 + (label_X > 0).astype(np.int8)


def length_bounds(buckets: Iterable[int], cap: int) -> tuple[int, ...]:
    """Lengths that histories are padded to, ascending: of the buckets those below the cap, and the cap."""
    return tuple(sorted({min(int(bucket), cap) for bucket in buckets} | {cap}))


def windows(value_H: np.ndarray, first_B: np.ndarray, length: int) -> np.ndarray:
    """The entries `first_B`, `first_B` + 1, ... of a column, [B, length]; beyond its ends stands its first or last one,
    and 0 where it has none.

    One copy of `length` entries for each row: looking up each entry by its number takes two to three times as long.
    """
    value_H = np.ascontiguousarray(value_H)
    last = len(value_H) - length
    if not len(value_H) or not length:
        return np.zeros((len(first_B), length), value_H.dtype)
    if last < 0:
        return value_H.take(first_B[:, None] + np.arange(length), mode="clip")
    size = value_H.itemsize
    # As many windows as fit, each an entry after the one before, over one another.
    window_W = np.ndarray(last + 1, np.dtype((np.void, length * size)), value_H, strides=(size,))
    found_BL = window_W[np.clip(first_B, 0, last)].view(value_H.dtype).reshape(len(first_B), length)
    beyond_X = np.flatnonzero((first_B < 0) | (first_B > last))
    if len(beyond_X):
        found_BL[beyond_X] = value_H.take(first_B[beyond_X, None] + np.arange(length), mode="clip")
    return found_BL


def gather_histories(histories: Histories, user_Q: np.ndarray, end_Q: np.ndarray, *, cap: int) -> np.ndarray:
    """The last `cap` history items before `end_Q` of each user, [Q, cap], left-aligned and padded with 0.

    The type is that of `item_H`: int32 for items. Where times stand in their place it is int64, which the
    milliseconds of our century need.
    """
    length_Q = np.minimum(end_Q - histories.start_U1[user_Q], cap)
    inside_QL = np.arange(cap) < length_Q[:, None]
    return windows(histories.item_H, end_Q - length_Q, cap) * inside_QL


def ragged_histories(start_Q: np.ndarray, end_Q: np.ndarray, *, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `cap` history entries from `start_Q` to before `end_Q`, not padded: where those of each begin [Q + 1],
    and where the entries stand in `item_H` [X]."""
    length_Q = np.minimum(end_Q - start_Q, cap)
    start_Q1 = np.concatenate([[0], np.cumsum(length_Q)])
    return start_Q1, np.repeat(end_Q - length_Q - start_Q1[:-1], length_Q) + np.arange(start_Q1[-1])


def own_tails(
    histories: Histories, value_H: np.ndarray, row_B: np.ndarray, *, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last `length` own entries of rows: items and values, [B, length] left-aligned and padded with 0, and how
    many they are, [B]."""
    length_B = np.minimum(histories.end_E[row_B] - histories.start_E[row_B], length)
    inside_BW = np.arange(length) < length_B[:, None]
    first_B = histories.end_E[row_B] - length_B
    item_BW, value_BW = (windows(value, first_B, length) * inside_BW for value in (histories.item_H, value_H))
    return item_BW, value_BW, length_B


def cut_histories(rows: Rows, *, share: float, seed: int) -> tuple[Rows, np.ndarray]:
    """Shows a share of the training rows of users who are not low-active as if the user were, and which rows these are.

    A row keeps a run of consecutive entries of its history, at a random place and of a length drawn from those that
    low-active users have at their end of training. So the model learns from many users what a short history means, also
    when it ends long before the target; few rows of the log itself show that. Returns the rows and cut_E, [E] bool.
    """
    histories, rng = rows.histories, np.random.default_rng(seed)
    low_U = (rows.group_U == LOW) & (rows.train_length_U > 0)
    kept_U = (histories.train_end_U - histories.start_U1[:-1])[low_U]
    length_E = histories.end_E - histories.start_E
    if not len(kept_U):
        return rows, np.zeros(len(length_E), bool)
    drawn_E = rng.choice(kept_U, len(length_E))
    cut_E = (rows.split_E == TRAIN) & (rows.group_U[rows.user_E] != LOW) & (length_E > drawn_E)
    cut_E &= rng.random(len(length_E)) < share
    start_E = histories.start_E + rng.integers(0, np.where(cut_E, length_E - drawn_E, 0) + 1)
    shorter = histories._replace(
        start_E=np.where(cut_E, start_E, histories.start_E), end_E=np.where(cut_E, start_E + drawn_E, histories.end_E)
    )
    return rows._replace(histories=shorter), cut_E
