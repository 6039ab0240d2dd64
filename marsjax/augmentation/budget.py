"""Lends to each query exactly the number of items that it is due, made of nothing but the query's own prefix.

The baselines change the histories of training rows in ways of their own. Compared at the same number of added items,
each lends what its operators make of the own prefix, which stands before the own history.

Of the histories nothing after the prefix is read. Similar items, where a baseline has them, are those of the table it
is given, which CoSeRec makes of the training histories of all users, and so of the user's own later ones too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from marsjax.augmentation.operators import MASKED, OWN, Pair, fill
from marsjax.data.histories import feedback, gather_histories
from marsjax.records import Borrowed, Histories, Queries

CELLS = 2**20  # entries of the widest array at a time


class Lent(NamedTuple):
    """What a chunk of queries borrows, in the order of the columns."""

    item_BM: np.ndarray  # [B, M] int32, 0 is nothing
    column_BM: np.ndarray  # [B, M] int64, the event of the prefix that gives the time; -1: an empty prefix has none
    own_BM: np.ndarray  # [B, M] bool, the item is that of the event


# (prefix_BL, length_B, budget_B, rng) -> Lent
Lender = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], Lent]


def lend_chunks(
    histories: Histories,
    queries: Queries,
    budget_Q: np.ndarray,
    lender: Lender,
    *,
    seed: int,
    width: int = 1,
    cells: int = CELLS,
) -> Borrowed:
    """Asks `lender` for the queries, a chunk at a time.

    The time of an item is that of its event; an item of an empty prefix is older than everything. The donor of an own
    item is the user, else -1. Similarities are 0. An own item has the mark of its very event: the user may have met it
    again after the prefix, and what was thought of it then is not known yet. All others have none.

    Args:
        width: of the widest array that `lender` makes for a query, where prefix and budget are not.

    Raises:
        ValueError: budgets that are negative or not one a query.
    """
    if budget_Q.shape != queries.user_Q.shape or (budget_Q < 0).any():
        raise ValueError(
            f"expected one budget of at least 0 for each of {len(queries.user_Q)} queries, found shape "
            f"{budget_Q.shape} and a minimum of {budget_Q.min(initial=0)}"
        )
    rng = np.random.default_rng(seed)
    start_Q = histories.start_U1[queries.user_Q]
    length_Q = queries.end_Q - start_Q
    step = max(cells // max(int((length_Q + budget_Q).max(initial=1)), width), 1)
    parts = []
    for first in range(0, len(budget_Q), step):
        here = slice(first, first + step)
        prefix_BL = gather_histories(
            histories, queries.user_Q[here], queries.end_Q[here], cap=max(int(length_Q[here].max()), 1)
        )
        lent = lender(prefix_BL, length_Q[here], budget_Q[here].astype(np.int64), rng)
        row_S, slot_S = np.nonzero(lent.item_BM > 0)
        query_S, column_S = row_S + first, lent.column_BM[row_S, slot_S]
        parts.append((query_S, lent.item_BM[row_S, slot_S], column_S, lent.own_BM[row_S, slot_S]))
    query_S, item_S, column_S, own_S = (
        np.concatenate([np.zeros(0, kind), *(part[i] for part in parts)])
        for i, kind in enumerate((np.int64, np.int32, np.int64, np.bool_))
    )
    oldest = np.iinfo(np.int64).min
    time_S = np.full(len(query_S), oldest)
    timed_S = column_S >= 0
    at_S = start_Q[query_S] + column_S
    time_S[timed_S] = histories.time_H[at_S[timed_S]]
    feedback_S = np.zeros(len(query_S), np.int8)
    feedback_S[own_S] = feedback(histories.label_H[at_S[own_S]])
    return Borrowed(
        start_Q1=np.searchsorted(query_S, np.arange(len(budget_Q) + 1)).astype(np.int64),
        item_S=item_S,
        time_S=time_S,
        donor_S=np.where(own_S, queries.user_Q[query_S], -1).astype(np.int32),
        similarity_S=np.zeros(len(query_S), np.float32),
        feedback_S=feedback_S,
    )


def lend_views(
    histories: Histories,
    queries: Queries,
    budget_Q: np.ndarray,
    pair: Pair,
    *,
    seed: int,
    n_items: int,
    similar_NK: np.ndarray | None = None,
    cells: int = CELLS,
) -> Borrowed:
    """Each query borrows views of its prefix, made in pairs, until the budget is met.

    The first view stands next to the own history, later ones before it; the last one is cut to its last items. Masked
    entries are left out. A query with an empty prefix borrows nothing, every other one its budget.
    """

    def lend(prefix_BL: np.ndarray, length_B: np.ndarray, budget_B: np.ndarray, rng: np.random.Generator) -> Lent:
        shape = len(budget_B), int(budget_B.max(initial=0))
        lent = Lent(np.zeros(shape, np.int32), np.zeros(shape, np.int64), np.zeros(shape, bool))
        lacking_B = np.where(length_B > 0, budget_B, 0)
        while len(row_O := np.flatnonzero(lacking_B > 0)):
            # Twice as wide: a view is longer than its prefix where items are inserted.
            for edit in pair(length_B[row_O], 2 * prefix_BL.shape[1], rng):
                item_OL = fill(edit, prefix_BL[row_O], n_items=n_items, similar_NK=similar_NK, rng=rng)
                kept_OL = (item_OL > 0) & (edit.origin_BL != MASKED)
                from_end_OL = np.cumsum(kept_OL[:, ::-1], axis=1)[:, ::-1]
                lacking_O = lacking_B[row_O]
                kept_OL &= from_end_OL <= lacking_O[:, None]
                at_X, slot_X = np.nonzero(kept_OL)
                to = row_O[at_X], lacking_O[at_X] - from_end_OL[at_X, slot_X]
                lent.item_BM[to] = item_OL[at_X, slot_X]
                lent.column_BM[to] = edit.column_BL[at_X, slot_X]
                lent.own_BM[to] = edit.origin_BL[at_X, slot_X] == OWN
                lacking_B[row_O] = lacking_O - kept_OL.sum(axis=1)
        return lent

    return lend_chunks(histories, queries, budget_Q, lend, seed=seed, cells=cells // 2)
