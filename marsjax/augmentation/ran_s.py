"""Ran-S: random items of the own history before it.

Source: the baseline "Random-Seq" of DiffuASR (Liu et al., CIKM 2023, arXiv 2309.12858), which MARS cites. DiffuASR adds
M = 10 items before every training history, drawn one after another from it, so that an item can repeat. MARS states
neither number nor place. "paper" and "as_released" do not differ.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marsjax.augmentation.budget import Lent, lend_chunks
from marsjax.augmentation.operators import Mode, View, check_mode, prepend
from marsjax.records import Borrowed, Histories, Queries, Viewed


class Settings(NamedTuple):
    """The defaults of the source."""

    items: int = 10  # M, added to each history


DEFAULTS = Settings()


def view(settings: Settings, *, n_items: int, similar_NK: np.ndarray | None = None, mode: Mode = "paper") -> View:
    """M random items of the history, then the history."""
    check_mode(mode)

    def prepended(history_BL: np.ndarray, length_B: np.ndarray, rng: np.random.Generator) -> Viewed:
        column_BM = rng.integers(0, np.maximum(length_B, 1)[:, None], size=(len(length_B), settings.items))
        extra_BM = np.take_along_axis(history_BL, column_BM, axis=1)
        return prepend(extra_BM, column_BM, np.full(len(length_B), settings.items), history_BL, length_B)

    return prepended


def lend(
    histories: Histories,
    queries: Queries,
    budget_Q: np.ndarray,
    *,
    seed: int,
    n_items: int,
    settings: Settings = DEFAULTS,
    similar_NK: np.ndarray | None = None,
    mode: Mode = "paper",
) -> Borrowed:
    """Random events of the prefix, as many as the budget: `items` of the settings is not used.

    No event repeats before all have been lent; then all are lent again, in a new order. An empty prefix lends nothing.
    """
    check_mode(mode)
    return lend_chunks(histories, queries, budget_Q, _random_events, seed=seed)


def _random_events(prefix_BL: np.ndarray, length_B: np.ndarray, budget_B: np.ndarray, rng: np.random.Generator) -> Lent:
    size = int(budget_B.max(initial=0))
    # Rounds over the whole prefix, one after another; within its round an event draws its place.
    length_B1 = np.maximum(length_B, 1)[:, None]
    slot_X = np.arange(size + prefix_BL.shape[1])
    place_BX = slot_X // length_B1 + rng.random((len(length_B), len(slot_X)))
    column_BM = (np.argsort(place_BX, axis=1)[:, :size]) % length_B1
    lent_BM = (np.arange(size) < budget_B[:, None]) & (length_B[:, None] > 0)
    item_BM = np.where(lent_BM, np.take_along_axis(prefix_BL, column_BM, axis=1), 0)
    return Lent(item_BM, column_BM, lent_BM)
