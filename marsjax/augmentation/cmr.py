"""CMR: each training history is cropped, masked or reordered, with the operators of CL4SRec.

Source: MARS, section 4.1.2, names the three operators of CL4SRec (Xie et al., ICDE 2022, arXiv 2010.14395) without
their contrastive loss; it states neither rates nor how one is chosen. Here each history draws one of the three, with
the rates of RecBole-DA's CL4SRec; none of them changes a history of one entry. The mask is the token `n_items`.
"paper" and "as_released" do not differ: RecBole-DA's operators, each on its own, are those of the paper.
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
    crop,
    independent,
    mask,
    one_of,
    reorder,
)
from marsjax.records import Borrowed, Histories, Queries


class Settings(NamedTuple):
    """The defaults of RecBole-DA."""

    crop: float = 0.6  # eta, kept
    mask: float = 0.3  # gamma, hidden
    reorder: float = 0.6  # beta, shuffled


DEFAULTS = Settings()


def operator(settings: Settings) -> Operator:
    """One of crop, mask and reorder for each history."""
    operators = [
        functools.partial(crop, rate=settings.crop, mode="paper"),
        functools.partial(mask, rate=settings.mask, mode="paper"),
        functools.partial(reorder, rate=settings.reorder, mode="paper"),
    ]
    return one_of(operators)


def view(settings: Settings, *, n_items: int, similar_NK: np.ndarray | None = None, mode: Mode = "paper") -> View:
    """The history with one of the operators applied, drawn for each."""
    check_mode(mode)
    return as_view(operator(settings), n_items=n_items)


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
    return lend_views(histories, queries, budget_Q, independent(operator(settings)), seed=seed, n_items=n_items)
