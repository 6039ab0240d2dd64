"""From requests to click probabilities: the same function scores a file of requests and answers the service."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from marsjax.ctr import objective
from marsjax.records import LOW, NEW, CtrBatch
from marsjax.serving.bundle import Bundle, item_numbers, user_numbers
from marsjax.serving.knowledge import dense_width, numbers
from marsjax.serving.lending import NOTHING, Lent

log = logging.getLogger(__name__)

# Rows of a batch: a few shapes are compiled, and the smallest that fits is used. Not more: what a DIN computes between
# its layers for 128 rows and 200 entries still fits a cache, and eight such batches take a fifth of one of 1,024 rows.
SIZES = (32, 128)
FEW = 16  # items of a row that share a batch with others; more have the history gathered once for all
ONE = np.ones(1, np.float32)
LENGTH_STEP = 25  # histories are padded to a multiple of it, or to the cap


class Request(NamedTuple):
    """Candidates to score for one user, by ids of the source."""

    user: str
    items: tuple[str, ...]
    history: tuple[str, ...] | None = None  # replaces the history in the bundle
    time: int | None = None  # for time-safe borrowing


class Profile(NamedTuple):
    """What is known of a user when candidates are scored."""

    user: int  # the user's number; -1: not known to the model
    item_L: np.ndarray  # [L] int32, own history in time order, items that the bundle knows
    mark_L: np.ndarray  # [L] int8, what the user thought of them, as in `CtrBatch.feedback_BL`
    grade_L: np.ndarray  # [L] float32, how much, 0 to 1; NaN where it is not known
    lent: Lent = NOTHING


class Row(NamedTuple):
    """One request ready to be scored."""

    profile: Profile
    target_C: np.ndarray  # [C] int32, items to score; 0: an item that the bundle does not know
    time: int | None = None  # blanks what donors met later, where the method does so
    label_C: np.ndarray | None = None  # [C] float32, where the row is trained on


def own_history(bundle: Bundle, user: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The history in the bundle of a user, [L] int32, the marks [L] int8 and grades [L] float32; empty for user -1."""
    users = bundle.users
    own = slice(users.start_U1[user], users.start_U1[user + 1]) if user >= 0 else slice(0, 0)
    item_L = users.item_H[own]
    return item_L, marks(users.label_H[own]), users.grade_H[own] if len(users.grade_H) else not_graded(item_L)


def not_graded(item_L: np.ndarray) -> np.ndarray:
    """The grades [L] float32 of items that have none: NaN."""
    return np.full(len(item_L), np.nan, np.float32)


def table_lent(bundle: Bundle, user: int) -> Lent:
    """What a user borrows as the bundle has it, found with the training history."""
    users = bundle.users
    if user < 0:
        return NOTHING
    part = slice(users.borrowed_U1[user], users.borrowed_U1[user + 1])
    return Lent(
        users.borrowed_item_S[part], users.borrowed_time_S[part], users.borrowed_donor_S[part],
        users.borrowed_similarity_S[part], users.borrowed_mark_S[part],
    )  # fmt: skip


def marks(label_X: np.ndarray) -> np.ndarray:
    """What a user thought of items, [X] int8: 2 liked, 1 not liked."""
    return 1 + (label_X > 0).astype(np.int8)


def score(bundle: Bundle, requests: Sequence[Request]) -> list[np.ndarray]:
    """Click probabilities of every request's items, [C] float32 each.

    An unknown user has no history of its own but the one given, and borrows nothing. Unknown history items are
    passed over. Both are counted in a warning.

    Raises:
        ValueError: a candidate that the bundle does not know; the message names it.
    """
    rows, unknown, strangers = [], 0, 0
    for number, request in enumerate(requests, start=1):
        target_C = item_numbers(bundle, request.items)
        if (target_C == 0).any():
            name = request.items[int(np.argmax(target_C == 0))]
            raise ValueError(f"request {number}: expected items that the bundle knows, found {name!r}; drop it")
        (user,) = user_numbers(bundle, [request.user])
        strangers += int(user < 0)
        item_L, mark_L, grade_L = own_history(bundle, user)
        if request.history is not None:
            item_L = item_numbers(bundle, request.history)
            unknown += int((item_L == 0).sum())
            item_L = item_L[item_L > 0]
            mark_L, grade_L = np.zeros(len(item_L), np.int8), not_graded(item_L)
        profile = Profile(int(user), item_L, mark_L, grade_L, table_lent(bundle, user))
        rows.append(Row(profile, target_C, request.time))
    if unknown:
        log.warning("%d history items of the requests are unknown to the bundle and were passed over", unknown)
    if strangers:
        log.warning("%d of %d requests are of users unknown to the bundle, who borrow nothing", strangers, len(rows))
    return score_rows(bundle, rows)


def lengths(bundle: Bundle) -> tuple[int, ...]:
    """History lengths that are compiled, ascending; the last one is the cap."""
    cap = _cap(bundle)
    return (*range(LENGTH_STEP, cap, LENGTH_STEP), cap)


def _cap(bundle: Bundle) -> int:
    return int(bundle.manifest["config"]["ctr"]["cap"])


def score_rows(bundle: Bundle, rows: Sequence[Row]) -> list[np.ndarray]:
    """Click probabilities [C] float32 of each row's items. A row of many items has a batch of its own; those of few,
    and of about one length, share batches of a few shapes."""
    bounds, histories = lengths(bundle), [history(bundle, row) for row in rows]
    bucket_X = np.searchsorted(bounds, [len(item_L) for item_L, _, _ in histories])
    out = [np.zeros(len(row.target_C), np.float32) for row in rows]
    small: dict[int, list[int]] = {}
    on_the_way: collections.deque[tuple[int, slice, jax.Array]] = collections.deque()

    def wait() -> None:
        x, part, score_C = on_the_way.popleft()
        out[x][part] = np.asarray(score_C)[: part.stop - part.start]

    for x, (row, bucket) in enumerate(zip(rows, bucket_X.tolist(), strict=True)):
        if len(row.target_C) <= FEW:
            small.setdefault(bucket, []).append(x)
            continue
        for part, score_C in _score_alone(bundle, row, histories[x], bounds[bucket]):
            on_the_way.append((x, part, score_C))
            if len(on_the_way) > objective.AHEAD:
                wait()
    for bucket, members in small.items():
        count_X = [len(rows[x].target_C) for x in members]
        batches = make_batches(bundle, [rows[x] for x in members], bounds[bucket])
        score_B = objective.score(bundle.model, bundle.params, bundle.statistics, bundle.tables, batches)
        for x, part_C in zip(members, np.split(score_B, np.cumsum(count_X)[:-1]), strict=True):
            out[x] = part_C
    while on_the_way:
        wait()
    return out


def _score_alone(
    bundle: Bundle, row: Row, found: tuple[np.ndarray, np.ndarray, int], length: int
) -> Iterator[tuple[slice, jax.Array]]:
    """Scores of parts of a row's items, on their way; `found` is its history, and `length` what it is padded to."""
    item_L, mark_L, extra = found
    history_BL, borrowed_BL = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    history_BL[0, : len(item_L)] = item_L
    borrowed_BL[0, :extra] = item_L[:extra] > 0
    mark_BL = None
    if bundle.manifest["config"]["ctr"]["inputs"] == "strong":
        mark_BL = np.zeros((1, length), np.int8)
        mark_BL[0, : len(item_L)] = mark_L * (item_L > 0)
    user_B, dense_CJ = np.array([shown_user(bundle, row.profile.user) + 1], np.int32), dense_numbers(bundle, [row])
    for begin in range(0, len(row.target_C), objective.CANDIDATES):
        part = slice(begin, min(begin + objective.CANDIDATES, len(row.target_C)))
        target_C = np.zeros(objective.CANDIDATES, np.int32)
        target_C[: part.stop - begin] = row.target_C[part]
        dense_BJ = None if dense_CJ is None else _padded(dense_CJ[part], objective.CANDIDATES)
        batch = CtrBatch(user_B, target_C, ONE, ONE, history_BL, borrowed_BL, mark_BL, dense_BJ)
        yield part, score_alone(bundle, batch, part.stop - begin)


def score_alone(bundle: Bundle, batch: CtrBatch, count: int) -> jax.Array:
    """See `objective.probabilities_of_one`."""
    drops = bool(bundle.manifest["lends"]["drop_target"])
    return objective.probabilities_of_one(
        bundle.model, bundle.params, bundle.statistics, batch, np.int32(count), bundle.tables, drop_target=drops
    )


def history(bundle: Bundle, row: Row) -> tuple[np.ndarray, np.ndarray, int]:
    """The augmented history of Eq. 18, cut to the cap such that own entries survive: items [L], marks [L], and how many
    of them are borrowed. With `time_safe` what a donor met later than the row is blanked."""
    cap, extra = _cap(bundle), room(bundle, row)
    item_L, mark_L, lent = row.profile.item_L[-cap:], row.profile.mark_L[-cap:], row.profile.lent
    part = slice(len(lent.item_S) - extra, None)
    item_S, mark_S = lent.item_S[part], lent.mark_S[part]
    if bundle.manifest["lends"]["time_safe"] and row.time is not None:
        kept_S = lent.time_S[part] <= row.time
        item_S, mark_S = np.where(kept_S, item_S, 0), np.where(kept_S, mark_S, 0)
    return np.concatenate([item_S, item_L]), np.concatenate([mark_S, mark_L]), extra


def room(bundle: Bundle, row: Row) -> int:
    """How many of the borrowed items find room in the history."""
    return min(max(_cap(bundle) - len(row.profile.item_L), 0), len(row.profile.lent.item_S))


def make_batches(
    bundle: Bundle, rows: Sequence[Row], length: int, *, sizes: Sequence[int] = SIZES
) -> Iterator[CtrBatch]:
    """The rows' items as batches of one of the ascending sizes, and of histories of `length`, which must hold all of
    them, in order."""
    history_XL, mark_XL = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int8)
    borrowed_XL = np.zeros((len(rows), length), bool)
    for x, row in enumerate(rows):
        item_L, mark_L, extra = history(bundle, row)
        history_XL[x, : len(item_L)], mark_XL[x, : len(item_L)] = item_L, mark_L
        borrowed_XL[x, :extra] = item_L[:extra] > 0
    row_B = np.repeat(np.arange(len(rows)), [len(row.target_C) for row in rows])
    target_B = np.concatenate([row.target_C for row in rows]).astype(np.int32)
    label_B = np.concatenate([np.zeros(len(row.target_C)) if row.label_C is None else row.label_C for row in rows])
    user_B = np.array([shown_user(bundle, row.profile.user) for row in rows], np.int32)[row_B] + 1
    dense_BJ = dense_numbers(bundle, rows)
    marked = bundle.manifest["config"]["ctr"]["inputs"] == "strong"
    for begin in range(0, len(row_B), sizes[-1]):
        part = slice(begin, begin + sizes[-1])
        at_B, n = row_B[part], len(row_B[part])
        history_BL, borrowed_BL = history_XL[at_B], borrowed_XL[at_B]
        if bundle.manifest["lends"]["drop_target"]:
            same_BL = borrowed_BL & (history_BL == target_B[part][:, None])
            history_BL, borrowed_BL = np.where(same_BL, 0, history_BL), borrowed_BL & ~same_BL
        size = sizes[int(np.searchsorted(sizes, n))]
        asked = CtrBatch(
            user_B[part], target_B[part], label_B[part].astype(np.float32), np.ones(n, np.float32), history_BL,
            borrowed_BL, mark_XL[at_B] * (history_BL > 0) if marked else None,
            None if dense_BJ is None else dense_BJ[part],
        )  # fmt: skip
        yield jax.tree.map(functools.partial(_padded, size=size), asked)


def shown_user(bundle: Bundle, user: int) -> int:
    """The number that the model sees; -1 for none, where it knows users with few rows by their histories alone."""
    hidden = bundle.manifest["lends"]["hidden"] and user >= 0 and bundle.users.group_U[user] in (LOW, NEW)
    return -1 if hidden else user


def dense_numbers(bundle: Bundle, rows: Sequence[Row]) -> np.ndarray | None:
    """The numbers [X, J] float32 of all items of the rows, in order; None where the model reads none."""
    if not rows or not dense_width(bundle.known):
        return None
    cap, parts = int(bundle.manifest["config"]["retrieval"]["history"]), []
    for row in rows:
        for begin in range(0, len(row.target_C), SIZES[-1]):
            target_C = row.target_C[begin : begin + SIZES[-1]]
            size = SIZES[int(np.searchsorted(SIZES, len(target_C)))]
            found = numbers(bundle.known, *row.profile[:4], target_C, cap=cap, size=size)
            if found is not None:
                parts.append(found)
    return np.concatenate(parts) if parts else None


def _padded(value: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((size, *value.shape[1:]), value.dtype)  # np.pad takes ten times as long
    out[: len(value)] = value
    return out
