"""BASRec: a history mixed with its reordered or substituted view in the space of embeddings.

Source: Augmenting Sequential Recommendation with Balanced Relevance and Diversity (Dang et al., AAAI 2025, arXiv
2412.08300). For each view a rate r ~ U(a, b) is drawn, and one of two operators: reorder a block of floor(r n) entries,
or substitute max(1, floor(r n)) entries by the item most similar to each. The mixture is lambda E(history) +
(1 - lambda) E(view) with lambda ~ Beta(alpha, alpha), weighted by 1 / (lambda r): that is the model's part, which is
why the view returns the rates. Defaults are those of the released code.

as_released: the reordered block never holds the last entry, see operators.py. (The released loss has a fault of its
own: weights [B, 1] times losses [B L] become [B, B L], so that each loss meets the sum of the weights.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marsjax.augmentation.budget import lend_views
from marsjax.augmentation.operators import (
    Edit,
    Mode,
    View,
    check_mode,
    check_rate,
    check_similar,
    independent,
    reorder,
    select,
    substitute,
    write,
)
from marsjax.records import Borrowed, Histories, Queries, Viewed


class Settings(NamedTuple):
    """The defaults of the released code."""

    rate_low: float = 0.2  # a
    rate_high: float = 0.51  # b
    alpha: float = 0.3  # of the Beta distribution of lambda; 0.4 for Amazon-Beauty
    pairs: int = 1  # pairs of views of each history; 2 for Amazon-Beauty
    whole_levels: int = 1  # times that encoded histories are mixed across users; 3 for Amazon-Beauty
    single_weight: float = 1.0  # of the loss of the views
    cross_weight: float = 1.0  # of the loss of the mixtures across users


DEFAULTS = Settings()


def edit(
    settings: Settings, length_B: np.ndarray, width: int, rng: np.random.Generator, *, mode: Mode
) -> tuple[Edit, np.ndarray]:
    """What becomes of each history, and the rates drawn [B] float64."""
    rate_B = rng.uniform(settings.rate_low, settings.rate_high, size=len(length_B))
    is_substitute_B = rng.integers(0, 2, size=len(length_B)).astype(bool)
    reordered = reorder(length_B, width, rng, rate=rate_B, mode=mode)
    return select(is_substitute_B, reordered, substitute(length_B, width, rng, rate=rate_B)), rate_B


def view(settings: Settings, *, n_items: int, similar_NK: np.ndarray | None = None, mode: Mode = "paper") -> View:
    """The history reordered or substituted, drawn for each, and the rate of each. `similar_NK` is needed."""
    _check(settings, mode)
    similar_NK = check_similar(similar_NK, n_items)

    def rated(history_BL: np.ndarray, length_B: np.ndarray, rng: np.random.Generator) -> Viewed:
        drawn, rate_B = edit(settings, length_B, history_BL.shape[1], rng, mode=mode)
        viewed = write(drawn, history_BL, n_items=n_items, similar_NK=similar_NK, rng=rng)
        return viewed._replace(rate_B=rate_B)

    return rated


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
    """Views of the prefix, as many items as the budget; an empty prefix lends nothing."""
    _check(settings, mode)
    similar_NK = check_similar(similar_NK, n_items)
    pair = independent(lambda length_B, width, rng: edit(settings, length_B, width, rng, mode=mode)[0])
    return lend_views(histories, queries, budget_Q, pair, seed=seed, n_items=n_items, similar_NK=similar_NK)


def _check(settings: Settings, mode: Mode) -> None:
    check_mode(mode)
    check_rate("basrec", np.array([settings.rate_low, settings.rate_high]))
    if settings.rate_low > settings.rate_high:
        raise ValueError(f"basrec: expected rate_low <= rate_high, found {settings.rate_low} > {settings.rate_high}")
