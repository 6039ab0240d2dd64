"""Who borrows, and from how much of the own history the donor is looked up."""

from __future__ import annotations

import numpy as np

from marsjax.records import LOW, Queries, Rows


def make_queries(rows: Rows, *, prefix_stride: int, max_prefixes: int = 64) -> Queries:
    """Queries of the low-active users.

    With `prefix_stride` 0 each user asks once, with the whole training history, and every row of the user borrows
    the answer (the paper). A training row then borrows from a donor who was found with the help of the row's own
    target and of what came after it: donors hold the target item more often on training rows than on test rows, and
    the model learns to trust a signal that is not there later.

    With `prefix_stride` s > 0 a user also asks with the first 1, 2, ..., s, 2s, 3s, ... history items, and a row
    borrows through the longest prefix that ends before it. Nothing later than the row is seen. Short prefixes are
    dense, since a user of five events would otherwise borrow at test and never in training. The first row of a user
    borrows nothing. Validation and test rows borrow through the whole training history, which ends before them.

    Returns queries sorted by user and end.
    """
    histories = rows.histories
    user_U = np.flatnonzero((rows.group_U == LOW) & (histories.train_end_U > histories.start_U1[:-1]))
    length_U = (histories.train_end_U - histories.start_U1[:-1])[user_U]
    # Prefixes are strictly shorter than the whole training history, which is a query of its own.
    prefixes_U = np.minimum(_prefixes_within(length_U - 1, prefix_stride), max_prefixes)
    count_U = prefixes_U + 1
    first_U = np.cumsum(count_U) - count_U
    user_Q = np.repeat(user_U, count_U).astype(np.int32)
    number_Q = np.arange(count_U.sum()) - np.repeat(first_U, count_U)
    is_whole_Q = number_Q == np.repeat(prefixes_U, count_U)
    prefix_Q = np.where(number_Q < prefix_stride, number_Q + 1, prefix_stride * (number_Q - prefix_stride + 2))
    end_Q = np.where(is_whole_Q, histories.train_end_U[user_Q], histories.start_U1[user_Q] + prefix_Q)

    query_E = np.full(len(rows.user_E), -1, np.int32)
    position_U = np.full(len(rows.group_U), -1, np.int64)
    position_U[user_U] = np.arange(len(user_U))
    row_E = np.flatnonzero(position_U[rows.user_E] >= 0)
    low_E = position_U[rows.user_E[row_E]]
    seen_E = histories.end_E[row_E] - histories.start_U1[rows.user_E[row_E]]
    whole_E = histories.end_E[row_E] >= histories.train_end_U[rows.user_E[row_E]]
    number_E = np.minimum(_prefixes_within(seen_E, prefix_stride), prefixes_U[low_E]) - 1
    number_E = np.where(whole_E | (prefix_stride == 0), prefixes_U[low_E], number_E)
    query_E[row_E] = np.where(number_E >= 0, first_U[low_E] + number_E, -1)
    return Queries(user_Q=user_Q, end_Q=end_Q.astype(np.int64), query_E=query_E)


def _prefixes_within(length_X: np.ndarray, stride: int) -> np.ndarray:
    """How many of the prefix lengths 1, 2, ..., s, 2s, 3s, ... are at most `length_X`; none for stride 0."""
    if stride == 0:
        return np.zeros_like(length_X)
    return np.where(length_X < stride, length_X, stride + length_X // stride - 1)
