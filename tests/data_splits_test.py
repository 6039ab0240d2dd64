"""Splits: nothing later than a row is in what the row sees."""

import numpy as np
import pytest

from marsjax.data.splits import activity_groups, make_rows
from marsjax.records import HIGH, LOW, MIDDLE, NEW, TEST, TRAIN, VALID
from tests.data_batches_test import small_log

SPLITS = ("leave_one_out", "last_fraction", "global_time")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("history", ["all", "positives"])
def test_histories_end_before_the_place_of_their_event(split, history):
    """Also where several events share an instant: those that stand earlier are seen."""
    log = small_log(users=40)
    log = log._replace(time_E=log.time_E // 200)
    rows = make_rows(log, split=split, history=history)
    keep_E = np.ones(len(log.item_E), bool) if history == "all" else log.label_E > 0
    for event in range(len(log.item_E)):
        user = rows.user_E[event]
        before = np.arange(log.start_U1[user], event)
        expected = log.item_E[before[keep_E[before]]]
        found = rows.histories.item_H[rows.histories.start_U1[user] : rows.histories.end_E[event]]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("split", SPLITS)
def test_training_histories_hold_training_events_only(split):
    log = small_log(users=40)
    rows = make_rows(log, split=split)
    for user in range(40):
        events = np.arange(log.start_U1[user], log.start_U1[user + 1])
        train = events[rows.split_E[events] == TRAIN]
        np.testing.assert_array_equal(train, events[: len(train)])  # a prefix
        found = rows.histories.item_H[rows.histories.start_U1[user] : rows.histories.train_end_U[user]]
        np.testing.assert_array_equal(found, log.item_E[train])
        assert rows.train_length_U[user] == len(train)
        order = rows.split_E[events]
        assert (np.diff(order) >= 0).all()  # train, then validation, then test


def test_leave_one_out_counts():
    log = small_log(users=40)
    rows = make_rows(log, split="leave_one_out")
    length_U = np.diff(log.start_U1)
    last_E = log.start_U1[1:] - 1
    np.testing.assert_array_equal(rows.split_E[last_E] == TEST, length_U >= 3)
    assert (rows.split_E == TEST).sum() == (rows.split_E == VALID).sum() == (length_U >= 3).sum()


def test_last_fraction_counts():
    log = small_log(users=40)
    rows = make_rows(log, split="last_fraction", fraction_test=0.2, fraction_valid=0.1)
    for user, length in enumerate(np.diff(log.start_U1)):
        mine = rows.split_E[log.start_U1[user] : log.start_U1[user + 1]]
        expected = (np.ceil(0.2 * length), np.ceil(0.1 * length)) if length >= 5 else (0, 0)
        assert ((mine == TEST).sum(), (mine == VALID).sum()) == expected


def test_global_time_never_divides_a_moment():
    log = small_log(users=40)
    log = log._replace(time_E=log.time_E // 100)  # many ties
    rows = make_rows(log, split="global_time")
    latest = [log.time_E[rows.split_E == split].max() for split in (TRAIN, VALID, TEST)]
    earliest = [log.time_E[rows.split_E == split].min() for split in (TRAIN, VALID, TEST)]
    assert latest[0] < earliest[1]
    assert latest[1] < earliest[2]


@pytest.mark.parametrize("length", [[5] * 100, list(range(1, 101)), [5] * 60 + [9] * 40])
def test_groups_are_exact_and_tied_users_are_drawn_by_seed(length):
    length_U = np.array(length)
    group_U = activity_groups(length_U, low_fraction=0.3, high_fraction=0.3, seed=0)
    assert [(group_U == g).sum() for g in (LOW, MIDDLE, HIGH)] == [30, 40, 30]
    assert length_U[group_U == LOW].max() <= length_U[group_U == MIDDLE].min()
    assert length_U[group_U == MIDDLE].max() <= length_U[group_U == HIGH].min()
    np.testing.assert_array_equal(group_U, activity_groups(length_U, low_fraction=0.3, high_fraction=0.3, seed=0))
    if len(set(length)) == 1:
        other_U = activity_groups(length_U, low_fraction=0.3, high_fraction=0.3, seed=1)
        assert (group_U != other_U).any()


def test_users_without_training_events_are_new_and_not_ranked():
    length_U = np.concatenate([np.zeros(50, int), np.arange(1, 11)])
    group_U = activity_groups(length_U, low_fraction=0.3, high_fraction=0.2, seed=0)
    np.testing.assert_array_equal(group_U, [NEW] * 50 + [LOW] * 3 + [MIDDLE] * 5 + [HIGH] * 2)
    assert (activity_groups(length_U[:50], low_fraction=0.3, high_fraction=0.3, seed=0) == NEW).all()


def test_low_active_users_of_a_split_by_time_have_training_events():
    log = small_log(users=40)
    user_E = np.repeat(np.arange(40), np.diff(log.start_U1))
    log = log._replace(time_E=log.time_E + 500 * user_E)  # the later users come when training is over
    rows = make_rows(log, split="global_time")
    np.testing.assert_array_equal(rows.group_U == NEW, rows.train_length_U == 0)
    assert (rows.group_U == NEW).sum() > 5
    ranked = (rows.group_U != NEW).sum()
    assert (rows.group_U == LOW).sum() == (rows.group_U == HIGH).sum() == round(0.3 * ranked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "random"}, "found 'random'"),
        ({"split": "last_fraction", "fraction_test": 0.9, "fraction_valid": 0.1}, "leave something to train on"),
        ({"split": "leave_one_out", "low_fraction": 0.8}, "together at most 1"),
        ({"split": "leave_one_out", "history": "liked"}, "found 'liked'"),
        (
            {"split": "leave_one_out", "sparse_fraction": 0.3, "sparse_events": 99},
            "more than sparse_events=99 training",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_rows(small_log(), **options)


@pytest.mark.parametrize("split", ["leave_one_out", "last_fraction"])
@pytest.mark.parametrize("history", ["all", "positives"])
def test_sparse_users_keep_their_first_events_and_nothing_else_changes(split, history):
    log = small_log(users=60)
    whole = make_rows(log, split=split, history=history, low_fraction=0.3, seed=1)
    rows = make_rows(log, split=split, history=history, sparse_fraction=0.3, sparse_events=2, low_fraction=0.5, seed=1)
    sparse = np.flatnonzero(rows.group_U == LOW)
    assert len(sparse) == 18  # none of the others is low-active, and all have training events
    for split_name in (VALID, TEST):  # the same rows are judged
        np.testing.assert_array_equal(rows.split_E == split_name, whole.split_E == split_name)
    in_history_E = np.ones(len(log.item_E), bool) if history == "all" else log.label_E > 0
    for user in range(60):
        events = np.arange(log.start_U1[user], log.start_U1[user + 1])
        if user not in sparse:
            np.testing.assert_array_equal(rows.split_E[events], whole.split_E[events])
            np.testing.assert_array_equal(rows.histories.end_E[events], whole.histories.end_E[events])
            assert rows.train_length_U[user] == whole.train_length_U[user]
            continue
        kept = events[: min(2, whole.train_length_U[user])]
        np.testing.assert_array_equal(events[rows.split_E[events] == TRAIN], kept)
        assert rows.train_length_U[user] == len(kept)
        seen = kept[in_history_E[kept]]
        for event in events[rows.split_E[events] >= VALID]:
            start = rows.histories.start_U1[user]
            np.testing.assert_array_equal(rows.histories.item_H[start : rows.histories.end_E[event]], log.item_E[seen])
            assert rows.histories.end_E[event] == rows.histories.train_end_U[user]


def test_sparse_users_are_drawn_by_the_seed():
    log = small_log(users=60)
    drawn = [
        tuple(np.flatnonzero(make_rows(log, split="leave_one_out", sparse_fraction=0.3, seed=s).group_U == LOW))
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(ValueError, match="sparse_events of 1 or more, found 0.3 and 0"):
        make_rows(log, split="leave_one_out", sparse_fraction=0.3, sparse_events=0)
