"""Controls at the same budget: what borrowing gains when the donor, or the choice of items, means nothing."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from marsjax.augmentation.votes import unit
from marsjax.data.histories import ragged_histories
from marsjax.records import Borrowed, Donors, Histories, Queries

CHUNK = 8192  # queries at a time
CELLS = 2**24  # queries x donors at a time
ROUNDS = 50  # donors that a query asks at the most; only a budget near the size of the catalogue needs so many


def random_donor(donors: Donors, budget_Q: np.ndarray, *, seed: int) -> Borrowed:
    """Each query borrows its budget of distinct items from a random high-active user, chosen evenly, in time order.

    The items are a random subset of the donor's history, since the filter of MARS keeps a subset too. Where the donor
    holds fewer than the budget, further random donors lend the rest; the first stands last, next to the own history.
    """
    generator = np.random.default_rng(seed)
    chunks = range(0, len(budget_Q), CHUNK)
    lent = [_lend(donors, np.asarray(budget_Q[at : at + CHUNK], np.int64), generator, first=at) for at in chunks]
    query_S, position_S, column_S = np.concatenate([np.zeros((3, 0), np.int64), *lent], axis=1)
    return Borrowed(
        start_Q1=np.searchsorted(query_S, np.arange(len(budget_Q) + 1)).astype(np.int64),
        item_S=donors.item_PL[position_S, column_S],
        time_S=donors.time_PL[position_S, column_S],
        donor_S=donors.user_P[position_S].astype(np.int32),
        similarity_S=np.zeros(len(query_S), np.float32),
    )


def _lend(donors: Donors, budget_B: np.ndarray, generator: np.random.Generator, *, first: int) -> np.ndarray:
    """[3, S]: query (counted from `first`), position of the donor and column, in the order of the borrowed sequence."""
    n_items, lacking_B = int(donors.item_PL.max(initial=0)) + 1, budget_B.copy()
    lent: list[np.ndarray] = []  # [4, X] each: query, minus the round, position, column
    taken_X = np.zeros(0, np.int64)  # query * n_items + item of all that is lent
    for turn in range(ROUNDS):
        query_O = np.flatnonzero(lacking_B > 0)
        if not len(query_O):
            break
        position_O = generator.integers(len(donors.user_P), size=len(query_O))
        item_OL = donors.item_PL[position_O]
        key_OL = query_O[:, None] * n_items + item_OL
        free_OL = (item_OL > 0) & _is_first(item_OL)
        if turn:
            free_OL &= ~np.isin(key_OL, taken_X)
        draw_OL = np.where(free_OL, generator.random(item_OL.shape), np.inf)
        rank_OL = np.argsort(np.argsort(draw_OL, axis=1), axis=1)
        row_X, column_X = np.nonzero(free_OL & (rank_OL < lacking_B[query_O][:, None]))
        lent.append(np.stack([query_O[row_X], np.full(len(row_X), -turn), position_O[row_X], column_X]))
        lacking_B[query_O] -= np.bincount(row_X, minlength=len(query_O))
        taken_X = np.concatenate([taken_X, key_OL[row_X, column_X]])
    query_S, turn_S, position_S, column_S = np.concatenate([np.zeros((4, 0), np.int64), *lent], axis=1)
    order_S = np.lexsort((column_S, turn_S, query_S))
    return np.stack([query_S + first, position_S, column_S])[:, order_S]


def _is_first(item_BL: np.ndarray) -> np.ndarray:
    """True where an item stands for the first time in its row."""
    order_BL = np.argsort(item_BL, axis=1, kind="stable")
    sorted_BL = np.take_along_axis(item_BL, order_BL, axis=1)
    new_BL = np.concatenate([np.ones_like(sorted_BL[:, :1], bool), sorted_BL[:, 1:] != sorted_BL[:, :-1]], axis=1)
    first_BL = np.zeros(item_BL.shape, bool)
    np.put_along_axis(first_BL, order_BL, new_BL, axis=1)
    return first_BL


def popular_items(donors: Donors, budget_Q: np.ndarray, *, n_items: int) -> Borrowed:
    """Each query borrows the items that most donors hold; ties go to the lower item number.

    The time of a borrowed item is the first time that any donor met it. The least popular stands first, so that the
    most popular survive truncation.
    """
    held_PL = donors.item_PL > 0
    count_N = np.bincount(donors.item_PL[held_PL], minlength=n_items)
    first_N = np.full(n_items, np.iinfo(np.int64).max)
    np.minimum.at(first_N, donors.item_PL[held_PL], donors.time_PL[held_PL])
    ranked_N = np.argsort(-count_N, kind="stable")
    ranked_N = ranked_N[count_N[ranked_N] > 0].astype(np.int32)
    taken_Q = np.minimum(budget_Q, len(ranked_N)).astype(np.int64)
    start_Q1 = np.concatenate([[0], np.cumsum(taken_Q)])
    rank_S = np.repeat(start_Q1[1:], taken_Q) - 1 - np.arange(start_Q1[-1])
    item_S = ranked_N[rank_S]
    return Borrowed(
        start_Q1=start_Q1,
        item_S=item_S,
        time_S=first_N[item_S],
        donor_S=np.full(len(item_S), -1, np.int32),
        similarity_S=np.zeros(len(item_S), np.float32),
    )


def tfidf_donor(
    donors: Donors, histories: Histories, queries: Queries, budget_Q: np.ndarray, *, n_items: int, components: int = 0
) -> Borrowed:
    """Each query borrows the last items, its budget at the most, of the donor whose items are most like its own.

    Histories are compared by the cosine of TF-IDF vectors over item ids, with the smooth weight
    ln((1 + P) / (1 + P_i)) + 1 of an item that P_i of P donors hold; an item met twice counts twice. With `components`
    they are compared in that many principal directions of the donors' vectors (latent semantic analysis, Deerwester et
    al. 1990), where histories without an item in common can be alike. Among equals the lower user number lends; nobody
    lends to a query that is like no donor.
    """
    held_PL, cap = donors.item_PL > 0, donors.item_PL.shape[1]
    donor_X, item_X = np.nonzero(held_PL)[0], donors.item_PL[held_PL]
    weight_N = _tfidf_weights(donor_X, item_X, len(donors.user_P), n_items)
    donor_PN = _unit_bags(donor_X, item_X, weight_N, len(donors.user_P))
    begin_Q1, at_X = ragged_histories(histories.start_U1[queries.user_Q], queries.end_Q, cap=cap)
    query_X = np.repeat(np.arange(len(queries.user_Q)), np.diff(begin_Q1))
    query_QN = _unit_bags(query_X, histories.item_H[at_X], weight_N, len(queries.user_Q))
    if components:
        direction_NK = _directions(donor_PN, components)
        donor_PN, query_QN = (scipy.sparse.csr_array(unit(bags @ direction_NK)) for bags in (donor_PN, query_QN))
    best_Q, similarity_Q = np.zeros(len(budget_Q), np.int64), np.zeros(len(budget_Q), np.float32)
    chunk = max(CELLS // len(donors.user_P), 1)
    for first in range(0, len(budget_Q), chunk):
        similarity_BP = (query_QN[first : first + chunk] @ donor_PN.T).toarray()
        best_Q[first : first + chunk] = similarity_BP.argmax(axis=1)
        similarity_Q[first : first + chunk] = similarity_BP.max(axis=1)
    length_P = held_PL.sum(axis=1)
    taken_Q = np.where(similarity_Q > 0, np.minimum(budget_Q, length_P[best_Q]), 0).astype(np.int64)
    start_Q1 = np.concatenate([[0], np.cumsum(taken_Q)])
    position_S = np.repeat(best_Q, taken_Q)
    column_S = np.arange(start_Q1[-1]) - np.repeat(start_Q1[1:] - length_P[best_Q], taken_Q)
    return Borrowed(
        start_Q1=start_Q1,
        item_S=donors.item_PL[position_S, column_S],
        time_S=donors.time_PL[position_S, column_S],
        donor_S=donors.user_P[position_S].astype(np.int32),
        similarity_S=np.repeat(similarity_Q, taken_Q),
    )


def _directions(donor_PN: scipy.sparse.csr_array, components: int) -> np.ndarray:
    """The first right singular vectors, [N, K]; as many as there are donors and items for."""
    components = min(components, min(donor_PN.shape) - 1)
    if components < 1:
        return np.zeros((donor_PN.shape[1], 1))
    start = np.random.default_rng(0).normal(size=min(donor_PN.shape))  # fixed: the solver would draw one
    return scipy.sparse.linalg.svds(donor_PN, k=components, v0=start)[2].T


def _tfidf_weights(bag_X: np.ndarray, item_X: np.ndarray, n_bags: int, n_items: int) -> np.ndarray:
    distinct = np.unique(bag_X.astype(np.int64) * n_items + item_X)
    return np.log((1 + n_bags) / (1 + np.bincount(distinct % n_items, minlength=n_items))) + 1


def _unit_bags(bag_X: np.ndarray, item_X: np.ndarray, weight_N: np.ndarray, n_bags: int) -> scipy.sparse.csr_array:
    """Bags of items as rows of unit length."""
    bags = scipy.sparse.csr_array((weight_N[item_X], (bag_X, item_X)), (n_bags, len(weight_N)))
    norm_P = np.sqrt(np.asarray(bags.multiply(bags).sum(axis=1)).ravel())
    scale = scipy.sparse.diags_array(1 / np.maximum(norm_P, 1e-12))
    return scipy.sparse.csr_array(scale @ bags)
