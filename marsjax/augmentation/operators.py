"""Operators on own histories: crop, mask, reorder (CL4SRec), substitute, insert (CoSeRec), and how they are combined.

An operator sees only how long the histories are, and says what becomes of them as an `Edit`: for each entry of the
result the own entry that it comes from, and whether it is that entry, a mask, or an item similar to it. Items are
filled in afterwards, so that it is known of each item of a view whose it is and when it was met.

A view is `(history_BL, length_B, rng) -> Viewed`: entries 0..length-1, then zeros, and of each entry the one of the
history that it is, if any. A result that is longer than L keeps its last L. An empty history stays empty.

`mode` is "paper", the definition of CL4SRec and CoSeRec, or "as_released", what the released code of CoSeRec does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from marsjax.records import Viewed

Mode = Literal["paper", "as_released"]

OWN, MASKED = -1, -2  # values of Edit.origin_BL; r >= 0 is the r-th most similar item


class Edit(NamedTuple):
    """Where the entries of a view come from."""

    column_BL: np.ndarray  # [B, L] int64, the own entry; 0 at padding
    origin_BL: np.ndarray  # [B, L] int64: OWN, MASKED, or r for the r-th item similar to the own entry
    length_B: np.ndarray  # [B] int64


Rng = np.random.Generator
View = Callable[[np.ndarray, np.ndarray, Rng], Viewed]
Views = Callable[[np.ndarray, np.ndarray, Rng], tuple[Viewed, Viewed]]
Operator = Callable[[np.ndarray, int, Rng], Edit]  # of length_B and the width L
Pair = Callable[[np.ndarray, int, Rng], tuple[Edit, Edit]]


def check_mode(mode: str) -> None:
    """Raises ValueError unless it is a mode."""
    if mode not in get_args(Mode):
        raise ValueError(f"augmentation mode: expected one of {list(get_args(Mode))}, found {mode!r}")


def check_rate(name: str, rate: float | np.ndarray, *, below_one: bool = False) -> None:
    """Raises ValueError unless all rates are from 0 to 1."""
    lowest, highest = np.min(rate, initial=0.0), np.max(rate, initial=0.0)
    if not (lowest >= 0 and (highest < 1 if below_one else highest <= 1)):  # NaN fails too
        raise ValueError(f"{name}: expected a rate from 0 to {'below ' if below_one else ''}1, found {rate}")


def check_similar(similar_NK: np.ndarray | None, n_items: int) -> np.ndarray:
    """The array itself; raises ValueError where it is missing or of another catalogue."""
    if similar_NK is None or similar_NK.ndim != 2 or len(similar_NK) != n_items or not similar_NK.shape[1]:
        found = "none" if similar_NK is None else f"shape {similar_NK.shape}"
        raise ValueError(
            f"substitute and insert: expected similar items of shape [{n_items}, K], found {found}; "
            "see item_similarity.most_similar"
        )
    return similar_NK


def unchanged(length_B: np.ndarray, width: int, rng: Rng) -> Edit:
    """The history itself."""
    column_BL = np.broadcast_to(np.arange(width), (len(length_B), width))
    return _edit(column_BL, OWN, length_B)


def crop(length_B: np.ndarray, width: int, rng: Rng, *, rate: float, mode: Mode) -> Edit:
    """Keeps a contiguous run of floor(rate n) entries, at least one, from a start chosen evenly.

    as_released: the run never ends with the last entry, unless floor(rate n) is 0 (or n is 1).
    """
    check_mode(mode)
    check_rate("crop", rate)
    floor_B = _part(rate, length_B)
    size_B = np.minimum(np.maximum(floor_B, 1), length_B)
    start_B = rng.integers(0, _last_start(size_B, length_B, short=(mode == "as_released") & (floor_B > 0)) + 1)
    column_BL = start_B[:, None] + np.arange(width)
    return _edit(column_BL, OWN, size_B)


def mask(length_B: np.ndarray, width: int, rng: Rng, *, rate: float, mode: Mode) -> Edit:
    """Hides floor(rate n) entries, chosen without replacement, behind the mask token.

    as_released: CoSeRec writes 0, which is its padding: the entries are left out and the rest moves together.
    """
    check_mode(mode)
    check_rate("mask", rate, below_one=True)  # a history of nothing but masks is of no use
    hidden_BL = _choose(_part(rate, length_B), length_B, width, rng)
    column_BL, origin_BL, _ = unchanged(length_B, width, rng)
    if mode == "as_released":
        return _cut(column_BL, origin_BL, (np.arange(width) < length_B[:, None]) & ~hidden_BL, width)
    return _edit(column_BL, np.where(hidden_BL, MASKED, OWN), length_B)


def reorder(length_B: np.ndarray, width: int, rng: Rng, *, rate: float | np.ndarray, mode: Mode) -> Edit:
    """Shuffles a contiguous block of floor(rate n) entries, from a start chosen evenly.

    as_released: the last start is unreachable, the block never holds the last entry.
    """
    check_mode(mode)
    check_rate("reorder", rate)
    size_B = _part(rate, length_B)
    last_B = _last_start(size_B, length_B, short=np.full(len(length_B), mode == "as_released"))
    start_B1 = rng.integers(0, last_B + 1)[:, None]
    column_BL = np.broadcast_to(np.arange(width), (len(length_B), width))
    inside_BL = (column_BL >= start_B1) & (column_BL < start_B1 + size_B[:, None])
    # Entries of the block draw a place within the block; all others keep theirs.
    place_BL = np.where(inside_BL, start_B1 + rng.random(column_BL.shape) * size_B[:, None], column_BL)
    order_BL = np.argsort(place_BL, axis=1, kind="stable")
    return _edit(order_BL, OWN, length_B)


def substitute(length_B: np.ndarray, width: int, rng: Rng, *, rate: float | np.ndarray) -> Edit:
    """Replaces max(1, floor(rate n)) entries, chosen without replacement, by the item most similar to each."""
    check_rate("substitute", rate)
    replaced_BL = _choose(np.maximum(_part(rate, length_B), 1), length_B, width, rng)
    return unchanged(length_B, width, rng)._replace(origin_BL=np.where(replaced_BL, 0, OWN))


def insert(length_B: np.ndarray, width: int, rng: Rng, *, rate: float, mode: Mode, most: int = 1) -> Edit:
    """Puts similar items before max(1, floor(rate n)) entries, chosen without replacement, the most similar first.

    How many before each is drawn evenly from 1 to `most`; as_released: to max(1, floor(most / number of the chosen)).
    """
    check_mode(mode)
    check_rate("insert", rate)
    if most < 1:
        raise ValueError(f"insert: expected at least 1 item a position, found {most}")
    count_B = np.maximum(_part(rate, length_B), 1)
    anchor_BL = _choose(count_B, length_B, width, rng)
    most_B = np.maximum(most // count_B, 1) if mode == "as_released" else np.full(len(length_B), most)
    number_BL = np.where(anchor_BL, rng.integers(1, most_B[:, None] + 1, size=anchor_BL.shape), 0)
    # Room for `most` items before each entry, and the entry; what is not used is cut out.
    slot_S = np.arange(most + 1)
    kept_BLS = (slot_S == most) | (slot_S < number_BL[..., None])
    kept_BLS &= (np.arange(width) < length_B[:, None])[..., None]
    column_BLS = np.broadcast_to(np.arange(width)[None, :, None], kept_BLS.shape)
    origin_BLS = np.broadcast_to(np.where(slot_S < most, slot_S, OWN), kept_BLS.shape)
    flat = len(length_B), width * (most + 1)
    return _cut(column_BLS.reshape(flat), origin_BLS.reshape(flat), kept_BLS.reshape(flat), width)


def one_of(operators: Sequence[Operator]) -> Operator:
    """Each row draws one of the operators, evenly."""
    return by_length(operators, operators, threshold=0)


def by_length(short: Sequence[Operator], long: Sequence[Operator], *, threshold: int) -> Operator:
    """Each row draws one operator: of `short` where it has at most `threshold` entries (CoSeRec), else of `long`."""

    def edit(length_B: np.ndarray, width: int, rng: Rng) -> Edit:
        is_long_B = length_B > threshold
        choice_B = rng.integers(0, np.where(is_long_B, len(long), len(short)))
        return _apply([*short, *long], choice_B + np.where(is_long_B, len(short), 0), length_B, width, rng)

    return edit


def independent(operator: Operator) -> Pair:
    """Two draws of one operator, which may coincide (CoSeRec)."""

    def edit(length_B: np.ndarray, width: int, rng: Rng) -> tuple[Edit, Edit]:
        return operator(length_B, width, rng), operator(length_B, width, rng)

    return edit


def two_different(operators: Sequence[Operator], *, in_place: Sequence[bool] | None = None) -> Pair:
    """Each row draws two different operators, one for each view (CL4SRec). Rows of fewer than 2 entries are left alone.

    Where `in_place` names the first operator, the second is applied to the result of the first instead of to the
    history. Such operators keep the length.
    """
    if len(operators) < 2:
        raise ValueError(f"two_different: expected at least 2 operators, found {len(operators)}")

    def edit(length_B: np.ndarray, width: int, rng: Rng) -> tuple[Edit, Edit]:
        first_B = rng.integers(0, len(operators), size=len(length_B))
        second_B = rng.integers(0, len(operators) - 1, size=len(length_B))
        second_B += second_B >= first_B
        alone_B = length_B < 2
        edits = [
            _apply([*operators, unchanged], np.where(alone_B, len(operators), choice_B), length_B, width, rng)
            for choice_B in (first_B, second_B)
        ]
        if in_place is None:
            return edits[0], edits[1]
        row_X = np.flatnonzero(np.asarray(in_place)[first_B] & ~alone_B)
        return edits[0], _apply_after(edits[0], edits[1], row_X)

    return edit


def select(choice_B: np.ndarray, first: Edit, second: Edit) -> Edit:
    """`second` where `choice_B`, else `first`."""
    return Edit(
        np.where(choice_B[:, None], second.column_BL, first.column_BL),
        np.where(choice_B[:, None], second.origin_BL, first.origin_BL),
        np.where(choice_B, second.length_B, first.length_B),
    )


def fill(edit: Edit, history_BL: np.ndarray, *, n_items: int, similar_NK: np.ndarray | None, rng: Rng) -> np.ndarray:
    """The items of the view, [B, L] int32: `n_items`, one more than any item, is the mask token, 0 is no entry.

    An item without similar ones is given a random other item in their place (CoSeRec). There is no entry, even before
    the end, where an item has fewer similar ones than asked for.
    """
    inside_BL = np.arange(edit.column_BL.shape[1]) < edit.length_B[:, None]
    own_BL = np.where(inside_BL, np.take_along_axis(history_BL, edit.column_BL, axis=1), 0)
    item_BL = np.where(inside_BL & (edit.origin_BL == MASKED), n_items, own_BL)
    row_X, column_X = np.nonzero(inside_BL & (edit.origin_BL >= 0))
    if len(row_X):
        similar_NK = check_similar(similar_NK, n_items)
        own_X, rank_X = own_BL[row_X, column_X], edit.origin_BL[row_X, column_X]
        similar_X = similar_NK[own_X, np.minimum(rank_X, similar_NK.shape[1] - 1)]
        similar_X = np.where(rank_X < similar_NK.shape[1], similar_X, 0)
        random_X = rng.integers(1, max(n_items - 1, 2), size=len(own_X))
        random_X += (random_X >= own_X) & (n_items > 2)
        item_BL[row_X, column_X] = np.where(similar_NK[own_X, 0] > 0, similar_X, random_X)
    return item_BL.astype(np.int32)


def as_view(operator: Operator, *, n_items: int, similar_NK: np.ndarray | None = None) -> View:
    """The view that an operator makes. The mask token is `n_items`: an embedding of it is one row more."""

    def view(history_BL: np.ndarray, length_B: np.ndarray, rng: Rng) -> Viewed:
        edit = operator(length_B, history_BL.shape[1], rng)
        return write(edit, history_BL, n_items=n_items, similar_NK=similar_NK, rng=rng)

    return view


def as_views(pair: Pair, *, n_items: int, similar_NK: np.ndarray | None = None) -> Views:
    """Both views of each history, as the contrastive loss needs them: what one drew may bind the other."""

    def views(history_BL: np.ndarray, length_B: np.ndarray, rng: Rng) -> tuple[Viewed, Viewed]:
        first, second = pair(length_B, history_BL.shape[1], rng)
        return (
            write(first, history_BL, n_items=n_items, similar_NK=similar_NK, rng=rng),
            write(second, history_BL, n_items=n_items, similar_NK=similar_NK, rng=rng),
        )

    return views


def write(edit: Edit, history_BL: np.ndarray, *, n_items: int, similar_NK: np.ndarray | None, rng: Rng) -> Viewed:
    """The view that an edit describes."""
    item_BL = fill(edit, history_BL, n_items=n_items, similar_NK=similar_NK, rng=rng)
    column_BL = np.where(edit.origin_BL == OWN, edit.column_BL, -1)
    return view_of(item_BL > 0, item_BL, column_BL, width=item_BL.shape[1])


def view_of(kept_BX: np.ndarray, item_BX: np.ndarray, column_BX: np.ndarray, *, width: int) -> Viewed:
    """The view of the last `width` kept entries, which are the own ones `column_BX`, or none where it is -1."""
    (item_BL, column_BL), length_B = keep_last(kept_BX, width, item_BX, column_BX + 1)
    return Viewed(item_BL, length_B, column_BL - 1)


def prepend(
    extra_BM: np.ndarray, column_BM: np.ndarray, count_B: np.ndarray, history_BL: np.ndarray, length_B: np.ndarray
) -> Viewed:
    """The view of the first `count_B` entries of `extra_BM`, then the history; an empty history stays empty.

    `column_BM` says which own entries the items of `extra_BM` are, -1: none.
    """
    count_B = np.where(length_B > 0, count_B, 0)
    kept_BX = np.concatenate(
        [
            np.arange(extra_BM.shape[1]) < count_B[:, None],
            np.arange(history_BL.shape[1]) < length_B[:, None],
        ],
        axis=1,
    )
    item_BX = np.concatenate([extra_BM, history_BL], axis=1).astype(np.int32)
    own_BL = np.broadcast_to(np.arange(history_BL.shape[1]), history_BL.shape)
    column_BX = np.concatenate([column_BM, own_BL], axis=1)
    return view_of(kept_BX, item_BX, column_BX, width=history_BL.shape[1])


def keep_last(kept_BX: np.ndarray, width: int, *arrays_BX: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Of each row the last `width` kept entries, moved to the left, zeros behind them; and how many they are, [B]."""
    count_B = kept_BX.sum(axis=1)
    at_BX = np.cumsum(kept_BX, axis=1) - 1 - np.maximum(count_B - width, 0)[:, None]
    row_X, from_X = np.nonzero(kept_BX & (at_BX >= 0))
    to_X = at_BX[row_X, from_X]
    moved = []
    for array_BX in arrays_BX:
        moved_BL = np.zeros((len(kept_BX), width), array_BX.dtype)
        moved_BL[row_X, to_X] = array_BX[row_X, from_X]
        moved.append(moved_BL)
    return moved, np.minimum(count_B, width)


def _cut(column_BX: np.ndarray, origin_BX: np.ndarray, kept_BX: np.ndarray, width: int) -> Edit:
    (column_BL, origin_BL), length_B = keep_last(kept_BX, width, column_BX, origin_BX)
    return _edit(column_BL, origin_BL, length_B)


def _edit(column_BL: np.ndarray, origin_BL: np.ndarray | int, length_B: np.ndarray) -> Edit:
    """The first `length_B` entries of each row; what is behind them does not count."""
    inside_BL = np.arange(column_BL.shape[1]) < length_B[:, None]
    return Edit(np.where(inside_BL, column_BL, 0), np.where(inside_BL, origin_BL, OWN), length_B)


def _part(rate: float | np.ndarray, length_B: np.ndarray) -> np.ndarray:
    """floor(rate n), [B] int64, rounded as Python's int(rate * n) in the released code."""
    return np.floor(rate * length_B.astype(np.float64)).astype(np.int64)


def _last_start(size_B: np.ndarray, length_B: np.ndarray, *, short: np.ndarray) -> np.ndarray:
    """The last start of a run of `size_B` entries; one less where `short`, as far as there is one."""
    return np.maximum(length_B - size_B - short, 0)


def _choose(count_B: np.ndarray, length_B: np.ndarray, width: int, rng: Rng) -> np.ndarray:
    """True at `count_B` of the entries of each row, chosen evenly without replacement, [B, L]."""
    inside_BL = np.arange(width) < length_B[:, None]
    draw_BL = np.where(inside_BL, rng.random(inside_BL.shape), np.inf)
    chosen_BL = np.zeros(inside_BL.shape, bool)
    np.put_along_axis(chosen_BL, np.argsort(draw_BL, axis=1), np.arange(width) < count_B[:, None], axis=1)
    return inside_BL & chosen_BL


def _apply(operators: Sequence[Operator], choice_B: np.ndarray, length_B: np.ndarray, width: int, rng: Rng) -> Edit:
    """Operator `choice_B` for each row; each operator sees its own rows only."""
    shape = len(length_B), width
    edit = Edit(np.zeros(shape, np.int64), np.full(shape, OWN), np.zeros(len(length_B), np.int64))
    for number, operator in enumerate(operators):
        row_X = np.flatnonzero(choice_B == number)
        if len(row_X):
            for whole, part in zip(edit, operator(length_B[row_X], width, rng), strict=True):
                whole[row_X] = part
    return edit


def _apply_after(first: Edit, second: Edit, row_X: np.ndarray) -> Edit:
    """`second` with its entries taken of the result of `first` in the rows `row_X`."""
    through_XL = second.column_BL[row_X]
    column_BL, origin_BL = second.column_BL.copy(), second.origin_BL.copy()
    column_BL[row_X] = np.take_along_axis(first.column_BL[row_X], through_XL, axis=1)
    before_XL = np.take_along_axis(first.origin_BL[row_X], through_XL, axis=1)
    origin_BL[row_X] = np.where(origin_BL[row_X] == OWN, before_XL, origin_BL[row_X])
    return Edit(column_BL, origin_BL, second.length_B)
