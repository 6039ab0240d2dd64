"""Batches for both training stages: whole batches gathered with NumPy under an own seeded permutation, served by Grain.

Per-example pipelines run at a hundredth of a gather's speed, so a Grain source here *is* a list of batches: item i of
the source is batch i of the whole training, made from (seed, i) alone. A checkpoint therefore holds one number, and
batch i is the same whether the run was interrupted or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

import grain.python as grain
import jax
import numpy as np

from marsjax.data.histories import gather_histories, length_bounds, own_tails, windows
from marsjax.records import AlignmentBatch, Augmentation, CtrBatch, Inputs, Log, Rows, Viewed, Viewing, Views

Batch = TypeVar("Batch")
Own = Callable[[int], slice]  # how many rows a batch has -> which of them this process trains on
IDS = Inputs()
VIEWED = (1, 2, 16)  # rows of a batch over those among them that have views: each is a step to compile


def all_rows(size: int) -> slice:
    """Those of a process that trains alone."""
    return slice(0, size)


class Epoch(NamedTuple):
    """The plan of one epoch: rows of batch i are row_E[start_I1[i]:start_I1[i + 1]], padded to length_I[i]."""

    row_E: np.ndarray  # [E'] int64, event numbers
    start_I1: np.ndarray  # [I + 1] int64
    length_I: np.ndarray  # [I] int64


class BatchSource(Generic[Batch]):
    """A random-access source of batches for Grain."""

    def __init__(self, make: Callable[[int], Batch], count: int):
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        return self._make(int(index))


def iterate(source: BatchSource[Batch], *, threads: int = 2) -> grain.DatasetIterator[Batch]:
    """An iterator with `get_state` and `set_state`; batches are made ahead by `threads` threads, in order."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def pad_to(size: int, value: np.ndarray, dtype: type) -> np.ndarray:
    """`value` with zero rows appended up to `size` rows."""
    out = np.zeros((size, *value.shape[1:]), dtype)
    out[: len(value)] = value
    return out


def cut(batch: Batch, own: Own) -> Batch:
    """The rows of each leaf that `own` names, padded with zero rows."""

    def part(leaf: np.ndarray) -> np.ndarray:
        rows = own(len(leaf))
        if rows == slice(0, len(leaf)):
            return leaf
        return pad_to(rows.stop - rows.start, leaf[rows], leaf.dtype.type)

    return jax.tree.map(part, batch)


def history_lengths(
    rows: Rows, row_B: np.ndarray, *, cap: int, augmentation: Augmentation | None
) -> tuple[np.ndarray, np.ndarray]:
    """Own and borrowed entries of each row, [B] each; own ones come first when `cap` bites."""
    histories = rows.histories
    own_B = np.minimum(histories.end_E[row_B] - histories.start_E[row_B], cap)
    if augmentation is None:
        return own_B, np.zeros_like(own_B)
    start_Q1, query_B = augmentation.borrowed.start_Q1, augmentation.queries.query_E[row_B]
    # Query -1 reads start_Q1[0] on both sides: nothing is available to it.
    available_B = start_Q1[query_B + 1] - start_Q1[np.maximum(query_B, 0)]
    return own_B, np.minimum(available_B, cap - own_B)


def ctr_batch(
    log: Log,
    rows: Rows,
    row_B: np.ndarray,
    *,
    length: int,
    size: int,
    cap: int,
    augmentation: Augmentation | None = None,
    inputs: Inputs = IDS,
) -> CtrBatch:
    """Gathers CTR rows `row_B` (event numbers) into a batch of `size` rows and histories of `length`.

    The history is the borrowed items followed by the own ones (Eq. 18), cut to the last `cap`, so that own events
    survive. With `augmentation.time_safe` a borrowed item that the donor met after the target is blanked; with
    `drop_target` one that is the target itself is.
    """
    histories = rows.histories
    own_B, extra_B = history_lengths(rows, row_B, cap=cap, augmentation=augmentation)
    total_B = own_B + extra_B
    if total_B.max(initial=0) > length:
        raise ValueError(f"history of {total_B.max()} entries does not fit a batch of length {length}")
    # A batch is made while the step runs, on the same cores: arrays [B, L] are few, and of few bytes.
    column_1L = np.arange(length, dtype=np.min_scalar_type(length))[None, :]
    is_own_BL = column_1L < total_B.astype(column_1L.dtype)[:, None]
    if extra_B.any():
        is_own_BL &= column_1L >= extra_B.astype(column_1L.dtype)[:, None]
    first_B = histories.end_E[row_B] - total_B

    def own(value_H: np.ndarray) -> np.ndarray:
        out_BL = np.zeros((size, length), value_H.dtype)
        np.multiply(windows(value_H, first_B, length), is_own_BL, out=out_BL[: len(row_B)])
        return out_BL

    history_BL = own(histories.item_H)
    feedback_BL = None if inputs.mark_H is None else own(inputs.mark_H)
    borrowed_BL = np.zeros((size, length), bool)
    if augmentation is not None and extra_B.any():
        borrowed = augmentation.borrowed
        # As wide as the most that is borrowed, at the start of the rows.
        width = int(extra_B.max())
        is_borrowed_BX = column_1L[:, :width] < extra_B.astype(column_1L.dtype)[:, None]
        # The last `extra` of what the query borrows: the same end survives as in the concatenated sequence.
        slot_B = borrowed.start_Q1[augmentation.queries.query_E[row_B] + 1] - extra_B
        item_BX = windows(borrowed.item_S, slot_B, width)
        if augmentation.time_safe:
            is_borrowed_BX &= windows(borrowed.time_S, slot_B, width) <= log.time_E[row_B][:, None]
        if augmentation.drop_target:
            is_borrowed_BX &= item_BX != log.item_E[row_B][:, None]
        # Own entries are 0 where borrowed ones stand; a copy under a mask in no order takes several times as long.
        history_BL[: len(row_B), :width] += item_BX * is_borrowed_BX
        if feedback_BL is not None and borrowed.feedback_S is not None:
            feedback_BL[: len(row_B), :width] += windows(borrowed.feedback_S, slot_B, width) * is_borrowed_BX
        borrowed_BL[: len(row_B), :width] = is_borrowed_BX

    user_B = rows.user_E[row_B] + 1
    if inputs.hidden_E is not None:
        user_B = np.where(inputs.hidden_E[row_B], 0, user_B)
    return CtrBatch(
        user_B=pad_to(size, user_B, np.int32),
        target_B=pad_to(size, log.item_E[row_B], np.int32),
        label_B=pad_to(size, log.label_E[row_B], np.float32),
        weight_B=pad_to(size, np.ones(len(row_B)), np.float32),
        history_BL=history_BL,
        borrowed_BL=borrowed_BL,
        feedback_BL=feedback_BL,
        dense_BJ=None if inputs.dense_EJ is None else pad_to(size, inputs.dense_EJ[row_B], np.float32),
    )


def with_views(
    batch: CtrBatch,
    rows: Rows,
    row_B: np.ndarray,
    viewing: Viewing,
    mark_H: np.ndarray | None,
    *,
    bounds: tuple[int, ...],
    cap: int,
    rng: np.random.Generator,
) -> CtrBatch:
    """The batch of the rows `row_B` with views of their own histories, which stand in their place or beside them.

    An entry of a view that is an own one keeps its mark; what is similar, drawn or hidden has none. Where views replace
    the last entries, the history gets the shortest length of `bounds` that holds all of them; nothing may be borrowed.

    Where few rows have views, these come as a batch of their own, of one of few sizes: a loss on views takes as long as
    several steps without one.
    """
    length, size = min(viewing.length, cap), len(batch.user_B)
    some = None
    if viewing.row_E is not None and not viewing.replaces:
        at_S = np.flatnonzero(viewing.row_E[row_B])
        size = min(bound for share in VIEWED if (bound := -(-size // share)) >= len(at_S))
        some = jax.tree.map(lambda leaf: pad_to(size, leaf[at_S], leaf.dtype.type), batch)
        row_B = row_B[at_S]
    # Without marks, labels stand where nobody looks.
    value_H = rows.histories.label_H if mark_H is None else mark_H
    tail_BW, mark_BW, length_B = own_tails(rows.histories, value_H, row_B, length=length)
    views = viewing.make(tail_BW, length_B, rng)
    marks = [
        np.where(view.column_BL >= 0, np.take_along_axis(mark_BW, np.maximum(view.column_BL, 0), axis=1), 0)
        for view in views
    ]
    if viewing.replaces:
        return _replace_tails(batch, views[0], marks[0], length_B, bounds=bounds)
    rates = [np.zeros(len(row_B)) if view.rate_B is None else view.rate_B for view in views]
    made = Views(
        item_BVW=pad_to(size, np.stack([view.history_BL for view in views], axis=1), np.int32),
        feedback_BVW=None if batch.feedback_BL is None else pad_to(size, np.stack(marks, axis=1), np.int8),
        rate_BV=pad_to(size, np.stack(rates, axis=1), np.float32),
        weight_B=pad_to(size, length_B > 0, np.float32),
        rows=some,
    )
    return batch._replace(views=made)


def _replace_tails(
    batch: CtrBatch, view: Viewed, mark_BW: np.ndarray, tail_B: np.ndarray, *, bounds: tuple[int, ...]
) -> CtrBatch:
    """The last `tail_B` entries of each history replaced by a view of them."""
    if batch.borrowed_BL.any():
        raise ValueError("views in the place of histories: expected rows that borrow nothing, found borrowed entries")
    n_rows, size = len(tail_B), len(batch.user_B)
    kept_B = (batch.history_BL[:n_rows] > 0).sum(axis=1) - tail_B
    total_B = kept_B + view.length_B
    length = bounds[int(np.searchsorted(bounds, total_B.max(initial=0)))]
    column_1L = np.arange(length)[None, :]
    is_view_BL = (column_1L >= kept_B[:, None]) & (column_1L < total_B[:, None])
    at_BL = np.clip(column_1L - kept_B[:, None], 0, mark_BW.shape[1] - 1)

    def replaced(before_BL: np.ndarray, view_BW: np.ndarray) -> np.ndarray:
        out_BL = np.zeros((size, length), before_BL.dtype)
        width = min(length, before_BL.shape[1])
        out_BL[:, :width] = before_BL[:, :width]
        out_BL[:n_rows] = np.where(column_1L < kept_B[:, None], out_BL[:n_rows], 0)
        out_BL[:n_rows] += np.where(is_view_BL, np.take_along_axis(view_BW, at_BL, axis=1), 0).astype(out_BL.dtype)
        return out_BL

    marks_BL = batch.feedback_BL
    return batch._replace(
        history_BL=replaced(batch.history_BL, view.history_BL),
        borrowed_BL=np.zeros((size, length), bool),
        feedback_BL=None if marks_BL is None else replaced(marks_BL, mark_BW),
    )


def plan_epoch(length_R: np.ndarray, row_R: np.ndarray, *, size: int, buckets: tuple[int, ...], seed: int) -> Epoch:
    """Shuffles rows, groups them by the shortest bucket that holds their history, and shuffles the batches.

    Real histories are far shorter than the cap, so buckets save most of the arithmetic; few lengths keep the number
    of compiled steps small. The number of batches does not depend on the seed.
    """
    generator = np.random.default_rng(seed)
    shuffled_R = generator.permutation(len(row_R))
    bucket_R = np.searchsorted(np.asarray(buckets), length_R[shuffled_R])
    shuffled_R = shuffled_R[np.argsort(bucket_R, kind="stable")]
    count_K = np.bincount(bucket_R, minlength=len(buckets))
    if len(count_K) > len(buckets):
        raise ValueError(f"a history of {length_R.max()} entries is longer than the longest bucket, {buckets[-1]}")
    batches_K = -(-count_K // size)
    length_I = np.repeat(np.asarray(buckets), batches_K)
    size_I = np.full(batches_K.sum(), size)
    last_K = (np.cumsum(batches_K) - 1)[batches_K > 0]
    size_I[last_K] = (count_K - (batches_K - 1) * size)[batches_K > 0]
    start_I = np.cumsum(size_I) - size_I
    order_I = generator.permutation(len(length_I))
    # Lay the rows of the batches out in the order in which the batches are served.
    size_I, start_I, length_I = size_I[order_I], start_I[order_I], length_I[order_I]
    start_I1 = np.concatenate([[0], np.cumsum(size_I)])
    gather_R = np.repeat(start_I - start_I1[:-1], size_I) + np.arange(start_I1[-1])
    return Epoch(row_E=row_R[shuffled_R[gather_R]], start_I1=start_I1, length_I=length_I)


def ctr_source(
    log: Log,
    rows: Rows,
    row_R: np.ndarray,
    *,
    size: int,
    cap: int,
    buckets: tuple[int, ...],
    epochs: int,
    seed: int,
    augmentation: Augmentation | None = None,
    inputs: Inputs = IDS,
    viewing: Viewing | None = None,
    own: Own = all_rows,
) -> tuple[BatchSource[CtrBatch], int]:
    """Training batches over `epochs` epochs of the rows `row_R`, and the number of batches in one epoch.

    With `viewing` batch i has the same rows as without; its views are drawn from (seed, i) alone.

    All processes plan the same batches, and of each a process gathers the rows `own` alone. With `viewing` it gathers
    the others too, as views of all rows come out of one draw, and gives its own.
    """
    buckets = length_bounds(buckets, cap)
    own_R, extra_R = history_lengths(rows, row_R, cap=cap, augmentation=augmentation)
    length_R = own_R + extra_R

    @functools.lru_cache(maxsize=2)
    def epoch_plan(epoch: int) -> Epoch:
        return plan_epoch(length_R, row_R, size=size, buckets=buckets, seed=hash_seed(seed, epoch))

    per_epoch = len(epoch_plan(0).length_I)

    def make(index: int) -> CtrBatch:
        plan = epoch_plan(index // per_epoch)
        i = index % per_epoch
        row_B = plan.row_E[plan.start_I1[i] : plan.start_I1[i + 1]]
        gathered = own(size) if viewing is None else all_rows(size)
        batch = ctr_batch(
            log,
            rows,
            row_B[gathered],
            length=int(plan.length_I[i]),
            size=gathered.stop - gathered.start,
            cap=cap,
            augmentation=augmentation,
            inputs=inputs,
        )
        if viewing is None:
            return batch
        # 2: a number of its own, which is not 0, since (seed, epoch, 0) would be the seed of an epoch.
        rng = np.random.default_rng(hash_seed(seed, index, 2))
        return cut(with_views(batch, rows, row_B, viewing, inputs.mark_H, bounds=buckets, cap=cap, rng=rng), own)

    return BatchSource(make, per_epoch * epochs), per_epoch


def hash_seed(*numbers: int) -> int:
    """One seed from several, so that (seed, epoch) and (seed + 1, epoch - 1) share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def alignment_source(
    log: Log,
    rows: Rows,
    *,
    blocks: int,
    targets: int,
    length: int,
    stein_items: int,
    steps: int,
    seed: int,
    own: Own = all_rows,
) -> tuple[BatchSource[AlignmentBatch], int]:
    """Batches of the alignment stage, and the number of batches in one epoch.

    The training events of a user are cut into blocks of `targets` consecutive events. A block shares one history, the
    `length` items before its first target, so it is encoded once, and no target is ever in its own history. The first
    event of a user has no history and is no target. An epoch visits every block once.

    Stein items are drawn from the distinct items of the batch, at most `stein_items`: an item that repeats would count
    as a mode of the distribution whose score is estimated. So a process gathers all blocks, and gives the rows `own`.
    """
    histories = rows.histories
    train_U = rows.train_length_U
    first_U = log.start_U1[:-1]
    blocks_U = -(-np.maximum(train_U - 1, 0) // targets)
    user_X = np.repeat(np.arange(len(train_U)), blocks_U)
    number_X = np.arange(blocks_U.sum()) - np.repeat(np.cumsum(blocks_U) - blocks_U, blocks_U)
    begin_X = first_U[user_X] + 1 + number_X * targets
    if not len(begin_X):
        raise ValueError("alignment: expected users with at least 2 training events, found none")
    per_epoch = -(-len(begin_X) // blocks)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng(hash_seed(seed, epoch)).permutation(len(begin_X))

    def make(index: int) -> AlignmentBatch:
        block_B = order(index // per_epoch)[(index % per_epoch) * blocks :][:blocks]
        user_B, begin_B = user_X[block_B], begin_X[block_B]
        event_BT = begin_B[:, None] + np.arange(targets)
        inside_BT = event_BT < (first_U + train_U)[user_B][:, None]
        event_BT = np.where(inside_BT, event_BT, 0)
        history_BL = gather_histories(histories, user_B, histories.end_E[begin_B], cap=length)
        target_BT = np.where(inside_BT, log.item_E[event_BT], 0)
        distinct = np.unique(np.concatenate([history_BL.ravel(), target_BT.ravel()]))
        distinct = np.random.default_rng(hash_seed(seed, index, 1)).permutation(distinct[distinct > 0])
        stein_item_N = np.zeros(stein_items, np.int32)
        stein_item_N[: len(distinct)] = distinct[:stein_items]

        batch = AlignmentBatch(
            history_BL=pad_to(blocks, history_BL, np.int32),
            target_BT=pad_to(blocks, target_BT, np.int32),
            label_BT=pad_to(blocks, np.where(inside_BT, log.label_E[event_BT], 0), np.float32),
            weight_BT=pad_to(blocks, inside_BT, np.float32),
            stein_item_N=stein_item_N,
        )
        return cut(batch, own)

    return BatchSource(make, steps), per_epoch


def lent_items(
    log: Log, rows: Rows, row_R: np.ndarray, *, size: int, cap: int, augmentation: Augmentation
) -> np.ndarray:
    """How many borrowed items stand in the history of each row, [R] int64: after truncation and blanking."""
    parts = [
        ctr_batch(log, rows, row_R[begin : begin + size], length=cap, size=size, cap=cap, augmentation=augmentation)
        for begin in range(0, len(row_R), size)
    ]
    return np.concatenate([part.borrowed_BL.sum(axis=1) for part in parts])[: len(row_R)].astype(np.int64)


class EvaluationBatches(NamedTuple):
    """Batches over given rows; concatenating their rows of weight 1 gives the rows in the order `order_R`."""

    batches: Callable[[], Iterator[CtrBatch]]
    order_R: np.ndarray  # [R] positions in the rows asked for


def evaluation_batches(
    log: Log,
    rows: Rows,
    row_R: np.ndarray,
    *,
    size: int,
    cap: int,
    buckets: tuple[int, ...],
    augmentation: Augmentation | None = None,
    inputs: Inputs = IDS,
) -> EvaluationBatches:
    """Every row once, sorted by history length so that short ones share short batches."""
    bound_K = np.asarray(length_bounds(buckets, cap))
    own_R, extra_R = history_lengths(rows, row_R, cap=cap, augmentation=augmentation)
    bucket_R = np.searchsorted(bound_K, own_R + extra_R)
    order_R = np.argsort(bucket_R, kind="stable")

    def batches() -> Iterator[CtrBatch]:
        for bucket, bound in enumerate(bound_K):
            member_R = order_R[bucket_R[order_R] == bucket]
            for begin in range(0, len(member_R), size):
                yield ctr_batch(
                    log,
                    rows,
                    row_R[member_R[begin : begin + size]],
                    length=int(bound),
                    size=size,
                    cap=cap,
                    augmentation=augmentation,
                    inputs=inputs,
                )

    return EvaluationBatches(batches, order_R)
