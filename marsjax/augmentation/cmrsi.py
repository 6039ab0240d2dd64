"""CMRSI: each training history is cropped, masked, reordered, or has items substituted or inserted.

Source: MARS, section 4.1.2, names the five operators of CoSeRec (Liu et al., 2021, arXiv 2108.06479) without their
contrastive loss; it states neither rates nor how one is chosen. Here each history draws one of the five whatever its
length, with the rates of CoSeRec's released code.

as_released: crop and reorder never reach the last entry, a masked entry is left out; in "paper" it is the token
`n_items`. See operators.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from marsjax.augmentation.budget import lend_views
from marsjax.augmentation.operators import (
    Mode,
    Operator,
    View,
    as_view,
    check_mode,
    check_similar,
    crop,
    independent,
    insert,
    mask,
    one_of,
    reorder,
    substitute,
)
from marsjax.records import Borrowed, Histories, Queries


class Settings(NamedTuple):
    """The defaults of CoSeRec's released code."""

    crop: float = 0.2  # tau, kept
    mask: float = 0.7  # gamma, hidden
    reorder: float = 0.2  # beta, shuffled
    substitute: float = 0.1  # rho, replaced
    insert: float = 0.4  # mu, inserted before
    most: int = 1  # items inserted before one entry


DEFAULTS = Settings()


def operators(settings: Settings, *, mode: Mode) -> dict[str, Operator]:
    """The five operators by name."""
    return {
        "crop": functools.partial(crop, rate=settings.crop, mode=mode),
        "mask": functools.partial(mask, rate=settings.mask, mode=mode),
        "reorder": functools.partial(reorder, rate=settings.reorder, mode=mode),
        "substitute": functools.partial(substitute, rate=settings.substitute),
        "insert": functools.partial(insert, rate=settings.insert, most=settings.most, mode=mode),
    }


def view(settings: Settings, *, n_items: int, similar_NK: np.ndarray | None = None, mode: Mode = "paper") -> View:
    """The history with one of the operators applied, drawn for each. `similar_NK` is needed."""
    check_mode(mode)
    similar_NK = check_similar(similar_NK, n_items)
    return as_view(one_of(list(operators(settings, mode=mode).values())), n_items=n_items, similar_NK=similar_NK)


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
    """Views of the prefix, masked entries left out, as many items as the budget; an empty prefix lends nothing."""
    check_mode(mode)
    similar_NK = check_similar(similar_NK, n_items)
    pair = independent(one_of(list(operators(settings, mode=mode).values())))
    return lend_views(histories, queries, budget_Q, pair, seed=seed, n_items=n_items, similar_NK=similar_NK)
