"""RepPad: the own history repeated where there would be padding.

Source: Repeated Padding for Sequential Recommendation (Dang et al., RecSys 2024, pp. 497-506); the number of copies is
random, as in its released code. A training history of n < L entries gets k copies of itself in front, k drawn evenly
from 1..floor(L / n): k + 1 copies in all. Where they are longer than L, the last L stay, and the first copy is a part.
With n >= L nothing changes. It is for training rows only. The released code can put a 0 between the copies, which is
padding here and so left out. "paper" and "as_released" do not differ.

Repeating whole copies leaves softmax attention over the history as it is, and multiplies a sum over it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marsjax.augmentation.budget import Lent, lend_chunks
from marsjax.augmentation.operators import Mode, View, check_mode, view_of
from marsjax.records import Borrowed, Histories, Queries, Viewed


class Settings(NamedTuple):
    """The defaults of the source."""

    least: int = 1  # copies added at the least
    length: int | None = None  # L; None: as wide as the array of the histories


DEFAULTS = Settings()


def view(settings: Settings, *, n_items: int, similar_NK: np.ndarray | None = None, mode: Mode = "paper") -> View:
    """k copies of the history, then the history."""
    check_mode(mode)

    def repeated(history_BL: np.ndarray, length_B: np.ndarray, rng: np.random.Generator) -> Viewed:
        width = history_BL.shape[1]
        length = min(settings.length or width, width)
        length_B1 = np.maximum(length_B, 1)[:, None]
        most_B = length // length_B1[:, 0]
        copies_B = rng.integers(np.minimum(settings.least, most_B), most_B + 1)
        # No more than 2 L entries where there are copies: k <= floor(L / n). A copy beside n = L is cut away.
        slot_X = np.arange(max(2 * length, width))
        column_BX = slot_X % length_B1
        item_BX = np.take_along_axis(history_BL, column_BX, axis=1).astype(np.int32)
        total_B = length_B * (copies_B + 1)
        bound_B = np.where(copies_B > 0, length, width)
        first_B = np.maximum(total_B - bound_B, 0)
        kept_BX = (slot_X >= first_B[:, None]) & (slot_X < total_B[:, None])
        return view_of(kept_BX, item_BX, column_BX, width=width)

    return repeated


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
    """The prefix repeated, cut to its last items, as many as the budget: the settings are not used.

    Nothing is drawn. An empty prefix lends nothing.
    """
    check_mode(mode)
    return lend_chunks(histories, queries, budget_Q, _copies, seed=seed)


def _copies(prefix_BL: np.ndarray, length_B: np.ndarray, budget_B: np.ndarray, rng: np.random.Generator) -> Lent:
    slot_M = np.arange(int(budget_B.max(initial=0)))
    # Slot budget - 1 is the last event of the prefix; NumPy's % is never negative.
    column_BM = (slot_M - budget_B[:, None]) % np.maximum(length_B, 1)[:, None]
    lent_BM = (slot_M < budget_B[:, None]) & (length_B[:, None] > 0)
    item_BM = np.where(lent_BM, np.take_along_axis(prefix_BL, column_BM, axis=1), 0)
    return Lent(item_BM, column_BM, lent_BM)
