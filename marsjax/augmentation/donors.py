"""Who may lend: the high-active users, with what they did in training."""

from __future__ import annotations

import numpy as np

from marsjax.data.histories import gather_histories
from marsjax.records import HIGH, Donors, Rows


def find_donors(rows: Rows, *, cap: int) -> Donors:
    """The high-active users and the last `cap` items of their training histories, as wide as the longest of them.

    Raises ValueError where there is none. A donor is never the borrower: groups are disjoint.
    """
    histories = rows.histories
    user_P = np.flatnonzero((rows.group_U == HIGH) & (histories.train_end_U > histories.start_U1[:-1]))
    if not len(user_P):
        raise ValueError(
            "expected high-active users with a training history, found none; see split.high_fraction and "
            "split.sparse_fraction"
        )
    end_P = histories.train_end_U[user_P]
    # Columns that hold nothing would go through all that follows, for every donor and for every query.
    cap = min(cap, int((end_P - histories.start_U1[user_P]).max()))
    times = histories._replace(item_H=histories.time_H)
    return Donors(
        user_P.astype(np.int32),
        gather_histories(histories, user_P, end_P, cap=cap),
        gather_histories(times, user_P, end_P, cap=cap),
    )
