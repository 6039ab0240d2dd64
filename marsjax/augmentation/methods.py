"""The methods that a report compares: what each lends. A method is one function and one line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from marsjax.augmentation import controls
from marsjax.records import Augmentation, Borrowed, Donors, Queries


class Offer(NamedTuple):
    """What a method may lend from, and how much."""

    queries: Queries
    donors: Donors
    borrowed: Borrowed  # what MARS lends; its counts are the budget of the controls
    n_items: int
    seed: int


def base(offer: Offer) -> None:
    """Nothing is lent."""


def mars(offer: Offer) -> Augmentation:
    """What the similar donor's history has that is relevant, Eqs. 15-18."""
    return Augmentation(offer.queries, offer.borrowed)


def mars_time_safe(offer: Offer) -> Augmentation:
    """MARS without what the donor met later than the row's own time; nothing takes its place."""
    return Augmentation(offer.queries, offer.borrowed, time_safe=True)


def mars_without_target(offer: Offer) -> Augmentation:
    """MARS without the target item itself, which nothing replaces: what is left is no vote on the very item."""
    return Augmentation(offer.queries, offer.borrowed, drop_target=True)


def random_donor(offer: Offer) -> Augmentation:
    """The same number of items of a random high-active user."""
    budget_Q = np.diff(offer.borrowed.start_Q1)
    return Augmentation(offer.queries, controls.random_donor(offer.donors, budget_Q, seed=offer.seed))


def popular_items(offer: Offer) -> Augmentation:
    """The same number of the items that most donors hold."""
    budget_Q = np.diff(offer.borrowed.start_Q1)
    return Augmentation(offer.queries, controls.popular_items(offer.donors, budget_Q, n_items=offer.n_items))


METHODS: dict[str, Callable[[Offer], Augmentation | None]] = {
    "base": base,
    "random_donor": random_donor,
    "popular_items": popular_items,
    "mars": mars,
    "mars_time_safe": mars_time_safe,
    "mars_without_target": mars_without_target,
}
