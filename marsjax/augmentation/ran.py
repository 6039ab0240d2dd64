"""Ran: random items of the catalogue before the own history.

Source: the baseline "Random" of DiffuASR (Liu et al., CIKM 2023, arXiv 2309.12858), which MARS cites. DiffuASR adds
M = 10 items before every training history, drawn one after another from the whole catalogue, so that an item can
repeat and can be an own one. MARS states neither number nor place. "paper" and "as_released" do not differ.
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
    """M random items, then the history."""
    check_mode(mode)
    _check_catalogue(n_items)

    def prepended(history_BL: np.ndarray, length_B: np.ndarray, rng: np.random.Generator) -> Viewed:
        extra_BM = rng.integers(1, n_items, size=(len(length_B), settings.items))
        return prepend(
            extra_BM, np.full_like(extra_BM, -1), np.full(len(length_B), settings.items), history_BL, length_B
        )

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
    """Distinct random items, as many as the budget: `items` of the settings is not used.

    Fewer only where the budget is larger than the catalogue. Their time is that of the last event of the prefix.
    """
    check_mode(mode)
    _check_catalogue(n_items)

    def random_items(
        prefix_BL: np.ndarray, length_B: np.ndarray, budget_B: np.ndarray, rng: np.random.Generator
    ) -> Lent:
        item_BM = distinct_items(np.minimum(budget_B, n_items - 1), n_items, rng)
        column_BM = np.broadcast_to(length_B[:, None] - 1, item_BM.shape)
        return Lent(item_BM, column_BM, np.zeros(item_BM.shape, bool))

    width = n_items if _is_large(int(budget_Q.max(initial=0)), n_items) else 1
    return lend_chunks(histories, queries, budget_Q, random_items, seed=seed, width=width)


def distinct_items(count_B: np.ndarray, n_items: int, rng: np.random.Generator) -> np.ndarray:
    """`count_B` distinct items of 1..n_items-1 for each row, every sequence of them alike, [B, M] int32, then zeros."""
    size = int(count_B.max(initial=0))
    if _is_large(size, n_items):
        item_BM = 1 + np.argsort(rng.random((len(count_B), n_items - 1)), axis=1)[:, :size]
    else:
        # At most half of the catalogue is drawn: what repeats is drawn again, and soon nothing does.
        item_BM = rng.integers(1, n_items, size=(len(count_B), size))
        row_O = np.arange(len(count_B))
        while len(row_O):
            order_OM = np.argsort(item_BM[row_O], axis=1, kind="stable")
            sorted_OM = np.take_along_axis(item_BM[row_O], order_OM, axis=1)
            at_O, rank_O = np.nonzero(sorted_OM[:, 1:] == sorted_OM[:, :-1])
            again = row_O[at_O], order_OM[at_O, rank_O + 1]
            item_BM[again] = rng.integers(1, n_items, size=len(at_O))
            row_O = np.unique(again[0])
    return np.where(np.arange(size) < count_B[:, None], item_BM, 0).astype(np.int32)


def _is_large(size: int, n_items: int) -> bool:
    return 2 * size > n_items - 1


def _check_catalogue(n_items: int) -> None:
    if n_items < 2:
        raise ValueError(f"ran: expected a catalogue of at least one item, n_items of 2 with padding, found {n_items}")
