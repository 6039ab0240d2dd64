"""Controls at the same budget: what borrowing gains when the donor, or the choice of items, means nothing."""

from __future__ import annotations

import numpy as np

from marsjax.augmentation.mars import Donors
from marsjax.records import Borrowed


def random_donor(donors: Donors, budget_Q: np.ndarray, *, seed: int) -> Borrowed:
    """Each query borrows its budget of items from one random high-active user, chosen evenly, in time order.

    The items are a random subset of the donor's history, since the filter of MARS keeps a subset too. A donor with
    fewer items than the budget gives all.
    """
    generator = np.random.default_rng(seed)
    position_Q = generator.integers(len(donors.user_P), size=len(budget_Q))
    item_QL, time_QL = donors.item_PL[position_Q], donors.time_PL[position_Q]
    draw_QL = np.where(item_QL > 0, generator.random(item_QL.shape), np.inf)
    rank_QL = np.argsort(np.argsort(draw_QL, axis=1), axis=1)
    kept_QL = (rank_QL < budget_Q[:, None]) & (item_QL > 0)
    count_Q = kept_QL.sum(axis=1)
    return Borrowed(
        start_Q1=np.concatenate([[0], np.cumsum(count_Q)]).astype(np.int64),
        item_S=item_QL[kept_QL],
        time_S=time_QL[kept_QL],
        donor_S=np.repeat(donors.user_P[position_Q], count_Q).astype(np.int32),
        similarity_S=np.zeros(count_Q.sum(), np.float32),
    )


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
