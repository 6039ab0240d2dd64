"""Batches: gathered as a loop over rows would, every row once, nothing from the future, and a position that resumes."""

import numpy as np
import pytest

from marsjax.data import batches
from marsjax.data.histories import feedback, gather_histories
from marsjax.data.splits import make_rows
from marsjax.records import TRAIN, Augmentation, Borrowed, Inputs, Log, Queries


def small_log(seed=0, users=12, items=30, longest=14):
    rng = np.random.default_rng(seed)
    length_U = rng.integers(1, longest, users, endpoint=True)
    start_U1 = np.concatenate([[0], np.cumsum(length_U)]).astype(np.int64)
    n = start_U1[-1]
    time_E = np.concatenate([np.sort(rng.integers(0, 1000, length)) for length in length_U])
    return Log(
        start_U1,
        rng.integers(1, items, n).astype(np.int32),
        rng.integers(0, 2, n).astype(np.float32),
        time_E,
        np.arange(users).astype(str),
    )


def lend(rows, log, seed=0, **options):
    """Every user's rows borrow a list of their own; a third of the rows borrow nothing."""
    rng = np.random.default_rng(seed)
    n_users = len(rows.group_U)
    count_Q = rng.integers(0, 9, n_users)
    start_Q1 = np.concatenate([[0], np.cumsum(count_Q)]).astype(np.int64)
    s = start_Q1[-1]
    borrowed = Borrowed(
        start_Q1,
        rng.integers(1, 30, s).astype(np.int32),
        rng.integers(0, 1000, s),
        np.zeros(s, np.int32),
        np.zeros(s, np.float32),
        rng.integers(0, 3, s).astype(np.int8),
    )
    query_E = np.where(rng.random(len(rows.user_E)) < 0.67, rows.user_E, -1).astype(np.int32)
    return Augmentation(
        Queries(np.arange(n_users, dtype=np.int32), rows.histories.train_end_U, query_E), borrowed, **options
    )


def expected_history(log, rows, augmentation, row, cap):
    """The definition, one row at a time: (item, borrowed, mark) of borrowed items, then of own ones, cut to the last
    `cap`."""
    user = rows.user_E[row]
    own = [(log.item_E[event], False, 2 if log.label_E[event] else 1) for event in range(log.start_U1[user], row)]
    lent = []
    if augmentation is not None and augmentation.queries.query_E[row] >= 0:
        borrowed, q = augmentation.borrowed, augmentation.queries.query_E[row]
        for slot in range(borrowed.start_Q1[q], borrowed.start_Q1[q + 1]):
            item, mark = borrowed.item_S[slot], borrowed.feedback_S[slot]
            late = augmentation.time_safe and borrowed.time_S[slot] > log.time_E[row]
            same = augmentation.drop_target and item == log.item_E[row]
            lent.append((0, False, 0) if late or same else (item, True, mark))
    return (lent + own)[-cap:]


@pytest.mark.parametrize(("cap", "length", "longest"), [(3, 40, 14), (10, 40, 14), (40, 40, 14), (300, 300, 400)])
@pytest.mark.parametrize("options", [None, {}, {"time_safe": True}, {"drop_target": True}])
def test_gather_equals_loop_over_rows(cap, length, longest, options):
    log = small_log(longest=longest)
    rows = make_rows(log, split="leave_one_out")
    augmentation = None if options is None else lend(rows, log, **options)
    row_B = np.random.default_rng(1).permutation(len(log.item_E))[:50]
    inputs = Inputs(mark_H=feedback(rows.histories.label_H))
    made = batches.ctr_batch(
        log, rows, row_B, length=length, size=64, cap=cap, augmentation=augmentation, inputs=inputs
    )
    for i, row in enumerate(row_B):
        expected = expected_history(log, rows, augmentation, row, cap)
        expected += [(0, False, 0)] * (length - len(expected))
        for found_L, expected_L in zip(
            (made.history_BL[i], made.borrowed_BL[i], made.feedback_BL[i]), zip(*expected, strict=True), strict=True
        ):
            np.testing.assert_array_equal(found_L, expected_L)
        assert (made.target_B[i], made.label_B[i]) == (log.item_E[row], log.label_E[row])
    np.testing.assert_array_equal(made.weight_B, np.arange(64) < 50)
    assert not made.history_BL[50:].any()
    assert not made.feedback_BL[50:].any()


def test_own_events_survive_truncation():
    log = small_log()
    rows = make_rows(log, split="leave_one_out")
    row_B = np.flatnonzero(rows.histories.end_E - rows.histories.start_U1[rows.user_E] >= 4)
    made = batches.ctr_batch(log, rows, row_B, length=4, size=len(row_B), cap=4, augmentation=lend(rows, log))
    assert not made.borrowed_BL.any()
    np.testing.assert_array_equal(made.history_BL[:, -1], log.item_E[row_B - 1])


def test_time_safe_borrows_nothing_later_than_the_target():
    log = small_log()
    rows = make_rows(log, split="leave_one_out")
    late = lend(rows, log, time_safe=True)
    late = late._replace(borrowed=late.borrowed._replace(time_S=late.borrowed.time_S * 0 + log.time_E.max() + 1))
    made = batches.ctr_batch(log, rows, np.arange(40), length=40, size=40, cap=40, augmentation=late)
    assert not made.borrowed_BL.any()


def test_changing_the_future_changes_no_earlier_row():
    log = small_log()
    rows = make_rows(log, split="leave_one_out")
    user = int(np.argmax(np.diff(log.start_U1)))
    cut = log.start_U1[user] + 3
    end = log.start_U1[user + 1]
    item_E = log.item_E.copy()
    item_E[cut:end] = item_E[cut:end] % 29 + 1
    changed = log._replace(item_E=item_E)
    before = np.arange(log.start_U1[user], cut)
    for version in (log, changed):
        version_rows = make_rows(version, split="leave_one_out")
        made = batches.ctr_batch(version, version_rows, before, length=20, size=8, cap=20)
        if version is log:
            reference = made
    np.testing.assert_array_equal(made.history_BL, reference.history_BL)
    assert rows.histories.end_E[cut] == cut


def all_rows(source, per_epoch, epoch):
    made = [source[i] for i in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
    keep = [batch.weight_B > 0 for batch in made]
    return np.concatenate([np.stack([b.user_B, b.target_B], 1)[k] for b, k in zip(made, keep, strict=True)])


def test_an_epoch_has_every_row_once_and_epochs_differ():
    log = small_log()
    rows = make_rows(log, split="leave_one_out")
    train_E = np.flatnonzero(rows.split_E == TRAIN)
    source, per_epoch = batches.ctr_source(log, rows, train_E, size=8, cap=10, buckets=(4, 10), epochs=2, seed=3)
    assert len(source) == 2 * per_epoch
    wanted = np.stack([rows.user_E[train_E] + 1, log.item_E[train_E]], 1)
    first, second = all_rows(source, per_epoch, 0), all_rows(source, per_epoch, 1)
    for found in (first, second):
        np.testing.assert_array_equal(
            np.sort(found.view("i4,i4"), axis=0), np.sort(wanted.astype(np.int32).view("i4,i4"), axis=0)
        )
    assert not np.array_equal(first, second)
    lengths = {source[i].history_BL.shape for i in range(len(source))}
    assert lengths <= {(8, 4), (8, 10)}


def test_evaluation_visits_every_row_in_the_told_order():
    log = small_log()
    rows = make_rows(log, split="leave_one_out")
    row_R = np.random.default_rng(0).permutation(len(log.item_E))
    evaluation = batches.evaluation_batches(log, rows, row_R, size=8, cap=10, buckets=(3, 6))
    found = np.concatenate([b.target_B[b.weight_B > 0] for b in evaluation.batches()])
    np.testing.assert_array_equal(found, log.item_E[row_R[evaluation.order_R]])


def test_position_resumes():
    log = small_log()
    rows = make_rows(log, split="leave_one_out")
    train_E = np.flatnonzero(rows.split_E == TRAIN)
    source, _ = batches.ctr_source(log, rows, train_E, size=8, cap=10, buckets=(10,), epochs=2, seed=3)
    whole = list(batches.iterate(source))
    first = batches.iterate(source)
    for _ in range(5):
        next(first)
    state = first.get_state()
    second = batches.iterate(source)
    second.set_state(state)
    rest = list(second)
    assert len(rest) == len(whole) - 5
    for a, b in zip(rest, whole[5:], strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_alignment_targets_are_later_than_their_history_and_complete():
    log = small_log()
    rows = make_rows(log, split="leave_one_out")
    source, per_epoch = batches.alignment_source(
        log, rows, blocks=4, targets=3, length=5, stein_items=16, steps=40, seed=0
    )
    # Items made unique, so that a target tells its event.
    unique = log._replace(item_E=np.arange(1, len(log.item_E) + 1, dtype=np.int32))
    rows = make_rows(unique, split="leave_one_out")
    source, per_epoch = batches.alignment_source(
        unique, rows, blocks=4, targets=3, length=5, stein_items=16, steps=40, seed=0
    )
    seen = []
    for i in range(per_epoch):
        batch = source[i]
        for history_L, target_T, weight_T in zip(batch.history_BL, batch.target_BT, batch.weight_BT, strict=True):
            target_T = target_T[weight_T > 0]
            seen += list(target_T)
            if len(target_T):
                assert history_L.max() < target_T.min()
                assert len(set(rows.user_E[np.append(history_L[history_L > 0], target_T) - 1])) == 1
        items = batch.stein_item_N[batch.stein_item_N > 0]
        assert len(items) == len(set(items))
        assert set(items) <= set(batch.history_BL.ravel()) | set(batch.target_BT.ravel())
    position_E = np.arange(len(log.item_E)) - log.start_U1[rows.user_E]
    wanted = np.flatnonzero((rows.split_E == TRAIN) & (position_E > 0)) + 1
    assert sorted(seen) == list(wanted)


@pytest.mark.parametrize("empty", [False, True])
def test_gathered_histories_keep_the_type_of_what_is_gathered(empty):
    """Milliseconds of our century do not fit int32."""
    log = small_log()
    log = log._replace(time_E=log.time_E + 1_700_000_000_000, label_E=log.label_E * (not empty))
    histories = make_rows(log, split="leave_one_out", history="positives" if empty else "all").histories
    user_Q, end_Q = np.arange(12), histories.train_end_U
    times_QL = gather_histories(histories._replace(item_H=histories.time_H), user_Q, end_Q, cap=5)
    items_QL = gather_histories(histories, user_Q, end_Q, cap=5)
    assert (items_QL.dtype, times_QL.dtype) == (np.int32, np.int64)
    for user, time_L in enumerate(times_QL):
        expected = histories.time_H[histories.start_U1[user] : end_Q[user]][-5:]
        np.testing.assert_array_equal(time_L, [*expected, *[0] * (5 - len(expected))])


def test_seeds_do_not_share_epochs():
    assert len({batches.hash_seed(s, e) for s in range(20) for e in range(20)}) == 400
