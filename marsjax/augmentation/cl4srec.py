"""CL4SRec: two views of each history, by two different operators, are brought together by a contrastive loss.

Source: Contrastive Learning for Sequential Recommendation (Xie et al., ICDE 2022, arXiv 2010.14395), operators crop,
mask and reorder; the authors' code is not public, rates, temperature and weight are those of RecBole-DA. A history of
one entry is left alone. The mask is the token `n_items`.

as_released (as read in a fork of RecBole-DA): mask and reorder write into the batch itself. So the second view is
made of the result of the first where that was masked or reordered. The history that the main loss reads is overwritten
too, which a view cannot do and is not reproduced.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from marsjax.augmentation.budget import lend_views
from marsjax.augmentation.operators import (
    Mode,
    Pair,
    Views,
    as_views,
    check_mode,
    crop,
    mask,
    reorder,
    two_different,
)
from marsjax.records import Borrowed, Histories, Queries


class Settings(NamedTuple):
    """The defaults of RecBole-DA."""

    crop: float = 0.6  # eta, kept
    mask: float = 0.3  # gamma, hidden
    reorder: float = 0.6  # beta, shuffled
    temperature: float = 1.0  # of the contrastive loss, over dot products
    weight: float = 0.1  # of the contrastive loss


DEFAULTS = Settings()


def pair(settings: Settings, *, mode: Mode) -> Pair:
    """Two different ones of crop, mask and reorder for each history of at least 2 entries."""
    check_mode(mode)
    operators = [
        functools.partial(crop, rate=settings.crop, mode="paper"),
        functools.partial(mask, rate=settings.mask, mode="paper"),
        functools.partial(reorder, rate=settings.reorder, mode="paper"),
    ]
    return two_different(operators, in_place=(False, True, True) if mode == "as_released" else None)


def views(settings: Settings, *, n_items: int, similar_NK: np.ndarray | None = None, mode: Mode = "paper") -> Views:
    """Both views of each history, for the contrastive loss."""
    return as_views(pair(settings, mode=mode), n_items=n_items)


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
    """Pairs of views of the prefix, masked entries left out, as many items as the budget.

    An empty prefix lends nothing. Without the contrastive loss this is CMR, but for the operators of a pair, which
    differ.
    """
    return lend_views(histories, queries, budget_Q, pair(settings, mode=mode), seed=seed, n_items=n_items)
