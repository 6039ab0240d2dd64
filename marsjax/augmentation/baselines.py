"""The eight augmentations that MARS is compared with, told in one form: what they lend, and what they train on.

Each has two. In its own form, that of its source, it changes the histories of training rows, or adds a loss on views of
them, for all users, and adds nothing when the model is used. At the budget of MARS it lends the same users the same
number of items as MARS, before their histories, in training and after; one with a loss also trains on it, on rows of
these users.

The sources recommend the next item, and their histories hold 50 entries. Here a view is made of the last
`view_length` own entries, 50 by default, and older ones stay before it as they are: cut away, training rows would have
shorter histories than those that the model is judged on. Views for a loss are of the last entries alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from marsjax.augmentation import basrec, cl4srec, cmr, cmrsi, coserec, ran, ran_s, reppad
from marsjax.augmentation.item_similarity import most_similar
from marsjax.augmentation.operators import Mode, as_view, unchanged
from marsjax.records import TRAIN, Borrowed, Log, Objective, Rows, Viewed, Viewing

Make = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[Viewed, ...]]


class Settings(NamedTuple):
    """What all of them share; the rates and weights of each are the DEFAULTS of its file."""

    mode: Mode = "paper"  # or "as_released": as the released code, where it differs
    view_length: int = 50  # L of the sources


class Baseline(NamedTuple):
    """One augmentation."""

    lend: Callable[..., Borrowed]  # at a budget
    make: Callable[..., Make]  # (n_items, similar_NK, mode) -> the function that makes views
    objective: Callable[[Mode], Objective] | None = None  # the loss on the views; None: a view replaces the history
    mask_token: bool = False  # views may hold item n_items
    similar: bool = False  # reads which items are alike


def _one(module: Any) -> Callable[..., Make]:
    def make(*, n_items: int, similar_NK: np.ndarray | None, mode: Mode) -> Make:
        view = module.view(module.DEFAULTS, n_items=n_items, similar_NK=similar_NK, mode=mode)
        return lambda history_BL, length_B, rng: (view(history_BL, length_B, rng),)

    return make


def _two(module: Any) -> Callable[..., Make]:
    def make(*, n_items: int, similar_NK: np.ndarray | None, mode: Mode) -> Make:
        return module.views(module.DEFAULTS, n_items=n_items, similar_NK=similar_NK, mode=mode)

    return make


def _mixable(*, n_items: int, similar_NK: np.ndarray | None, mode: Mode) -> Make:
    """The history itself, then the views that are mixed with it, of the same length."""
    whole = as_view(unchanged, n_items=n_items)
    view = basrec.view(basrec.DEFAULTS, n_items=n_items, similar_NK=similar_NK, mode=mode)

    def make(history_BL: np.ndarray, length_B: np.ndarray, rng: np.random.Generator) -> tuple[Viewed, ...]:
        views = [view(history_BL, length_B, rng) for _ in range(2 * basrec.DEFAULTS.pairs)]
        return whole(history_BL, length_B, rng), *views

    return make


def _contrastive(settings: cl4srec.Settings | coserec.Settings) -> Callable[[Mode], Objective]:
    return lambda mode: Objective("contrastive", weight=settings.weight, temperature=settings.temperature)


def _mixup(mode: Mode) -> Objective:
    settings = basrec.DEFAULTS
    return Objective(
        "mixup",
        weight=settings.single_weight,
        cross_weight=settings.cross_weight,
        alpha=settings.alpha,
        levels=settings.whole_levels,
        mode=mode,
    )


BASELINES: dict[str, Baseline] = {
    "ran": Baseline(ran.lend, _one(ran)),
    "ran_s": Baseline(ran_s.lend, _one(ran_s)),
    "reppad": Baseline(reppad.lend, _one(reppad)),
    "cmr": Baseline(cmr.lend, _one(cmr), mask_token=True),
    "cmrsi": Baseline(cmrsi.lend, _one(cmrsi), mask_token=True, similar=True),
    "cl4srec": Baseline(cl4srec.lend, _two(cl4srec), _contrastive(cl4srec.DEFAULTS), mask_token=True),
    "coserec": Baseline(coserec.lend, _two(coserec), _contrastive(coserec.DEFAULTS), mask_token=True, similar=True),
    "basrec": Baseline(basrec.lend, _mixable, _mixup, similar=True),
}


def similar_items(name: str, log: Log, rows: Rows, *, n_items: int) -> np.ndarray | None:
    """The item most similar to each by the training events, [N, 1]; None where the baseline reads none."""
    if not BASELINES[name].similar:
        return None
    train_X = np.flatnonzero(rows.split_E == TRAIN)
    # No baseline reads more than the first: `most` is 1 in all DEFAULTS.
    return most_similar(rows.user_E[train_X], log.item_E[train_X], n_items, k=1)


def viewing(
    name: str,
    settings: Settings,
    *,
    n_items: int,
    similar_NK: np.ndarray | None,
    row_E: np.ndarray | None = None,
) -> Viewing:
    """The views of a baseline, of the events `row_E` where it is given."""
    baseline = BASELINES[name]
    make = baseline.make(n_items=n_items, similar_NK=similar_NK, mode=settings.mode)
    return Viewing(make, settings.view_length, replaces=baseline.objective is None, row_E=row_E)
