"""CoSeRec: two views of each history, also by substituting and inserting, are brought together by a contrastive loss.

Source: Contrastive Self-supervised Sequential Recommendation with Robust Augmentation (Liu et al., 2021, arXiv
2108.06479), with the defaults of its released code. The two views are drawn independently, by one of five operators
each; histories of at most K entries draw from those that change little: insert, substitute and mask.

as_released: crop and reorder never reach the last entry; a masked entry is left out, where in "paper" it is the token
`n_items`; and a reorder among the operators for short histories has the rate of the mask. See operators.py.

Similar items are those of ItemCF-IUF throughout (item_similarity.py). The change to a hybrid with the embeddings being
trained, after the warm-up, is not made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marsjax.augmentation import cmrsi
from marsjax.augmentation.budget import lend_views
from marsjax.augmentation.operators import (
    Mode,
    Operator,
    Views,
    as_views,
    by_length,
    check_mode,
    check_similar,
    independent,
)
from marsjax.records import Borrowed, Histories, Queries


class Settings(NamedTuple):
    """The defaults of the released code."""

    crop: float = 0.2  # tau, kept
    mask: float = 0.7  # gamma, hidden
    reorder: float = 0.2  # beta, shuffled
    substitute: float = 0.1  # rho, replaced; 0.05 for Amazon-Beauty
    insert: float = 0.4  # mu, inserted before; 0.5 for Amazon-Beauty
    most: int = 1  # items inserted before one entry
    threshold: int = 4  # K, entries of a short history; 12 for Amazon-Beauty
    short: tuple[str, ...] = ("insert", "substitute", "mask")  # for short histories; all five for Amazon-Beauty
    temperature: float = 1.0  # of the contrastive loss, over dot products
    weight: float = 0.1  # of the contrastive loss


DEFAULTS = Settings()


def operator(settings: Settings, *, mode: Mode) -> Operator:
    """One of five operators for each history, one of `short` for a short one."""
    check_mode(mode)
    rates = cmrsi.Settings(
        crop=settings.crop,
        mask=settings.mask,
        reorder=settings.reorder,
        substitute=settings.substitute,
        insert=settings.insert,
        most=settings.most,
    )
    long = cmrsi.operators(rates, mode=mode)
    unknown = set(settings.short) - set(long)
    if unknown or not settings.short:
        raise ValueError(f"coserec: expected operators for short histories out of {list(long)}, found {settings.short}")
    short_rates = rates._replace(reorder=rates.mask) if mode == "as_released" else rates
    short = cmrsi.operators(short_rates, mode=mode)
    return by_length([short[name] for name in settings.short], list(long.values()), threshold=settings.threshold)


def views(settings: Settings, *, n_items: int, similar_NK: np.ndarray | None = None, mode: Mode = "paper") -> Views:
    """Both views of each history, for the contrastive loss. `similar_NK` is needed."""
    similar_NK = check_similar(similar_NK, n_items)
    return as_views(independent(operator(settings, mode=mode)), n_items=n_items, similar_NK=similar_NK)


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
    similar_NK = check_similar(similar_NK, n_items)
    pair = independent(operator(settings, mode=mode))
    return lend_views(histories, queries, budget_Q, pair, seed=seed, n_items=n_items, similar_NK=similar_NK)
