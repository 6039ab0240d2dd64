"""Prior rates and counts know nothing of the event itself or of what came later."""

import numpy as np
import pytest

from marsjax.data.priors import STRENGTH, earlier_events, prior_numbers
from marsjax.data.splits import make_rows
from marsjax.records import TRAIN, Log


def make_log(n_users=30, n_items=12, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    count_U = rng.integers(4, 11, n_users)
    item_E = np.concatenate([rng.permutation(n_items)[:count] + 1 for count in count_U]).astype(np.int32)
    time_E = np.concatenate([np.sort(rng.integers(0, 5 if ties else 10**6, count)) for count in count_U])
    return Log(
        start_U1=np.concatenate([[0], np.cumsum(count_U)]),
        item_E=item_E,
        label_E=rng.integers(0, 2, len(item_E)).astype(np.float32),
        time_E=time_E.astype(np.int64),
        raw_user_U=np.arange(n_users).astype(str),
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("split", [{}, {"sparse_fraction": 0.3, "sparse_events": 3}, {"history": "positives"}])
@pytest.mark.parametrize("folds", [2, 5])
def test_numbers_equal_their_definition(ties, split, folds):
    log = make_log(ties=ties)
    rows = make_rows(log, split="leave_one_out", **split)
    numbers_E6 = prior_numbers(log, rows, folds=folds)
    overall = log.label_E[rows.split_E == TRAIN].mean()
    for event in range(len(log.item_E)):
        user = rows.user_E[event]
        seen = slice(rows.histories.start_U1[user], rows.histories.end_E[event])
        of_user = rows.histories.label_H[seen]
        earlier = (rows.split_E == TRAIN) & (log.item_E == log.item_E[event]) & (log.time_E < log.time_E[event])
        fold_U = np.random.default_rng(0).permutation(30) % folds
        others = (rows.split_E == TRAIN) & (log.item_E == log.item_E[event]) & (fold_U != fold_U[user])[rows.user_E]
        expected = []
        for label_X in (of_user, log.label_E[earlier], log.label_E[others]):
            rate = (label_X.sum() + STRENGTH * overall) / (len(label_X) + STRENGTH)
            expected += [4 * (rate - overall), np.log1p(len(label_X)) / 4 - 1]
        np.testing.assert_allclose(numbers_E6[event], expected, rtol=1e-5, atol=1e-6)


def test_the_label_of_an_event_and_all_later_ones_change_nothing():
    """Two logs of one overall rate that differ in an event's label and, to make up for it, in a later event's."""
    log = make_log()
    rows = make_rows(log, split="leave_one_out")
    train_X = np.flatnonzero(rows.split_E == TRAIN)
    by_time_X = train_X[np.argsort(log.time_E[train_X])]
    event = by_time_X[len(by_time_X) // 2]
    other = next(
        e for e in by_time_X[::-1] if log.label_E[e] != log.label_E[event] and log.time_E[e] > log.time_E[event]
    )
    changed_E = log.label_E.copy()
    changed_E[[event, other]] = 1 - changed_E[[event, other]]
    changed = log._replace(label_E=changed_E)
    before = prior_numbers(log, rows)
    after = prior_numbers(changed, make_rows(changed, split="leave_one_out"))
    untouched_E = log.time_E <= log.time_E[event]
    np.testing.assert_array_equal(before[untouched_E, :4], after[untouched_E, :4])
    assert (before != after).any()


def test_the_rate_of_the_other_folds_does_not_know_the_own_label():
    """Labels of a user are turned; the overall rate is kept by turning as many of another user of the same fold."""
    log = make_log()
    rows = make_rows(log, split="leave_one_out")
    fold_U = np.random.default_rng(0).permutation(30) % 5
    one, other = np.flatnonzero(fold_U == 0)[:2]
    train = [np.flatnonzero((rows.user_E == user) & (rows.split_E == TRAIN)) for user in (one, other)]
    first = next(e for e in train[0] if any(log.label_E[o] != log.label_E[e] for o in train[1]))
    second = next(e for e in train[1] if log.label_E[e] != log.label_E[first])
    changed_E = log.label_E.copy()
    changed_E[[first, second]] = 1 - changed_E[[first, second]]
    changed = log._replace(label_E=changed_E)
    before, after = prior_numbers(log, rows), prior_numbers(changed, make_rows(changed, split="leave_one_out"))
    same_fold_E = fold_U[rows.user_E] == 0
    np.testing.assert_array_equal(before[same_fold_E, 4:], after[same_fold_E, 4:])
    assert (before[~same_fold_E, 4:] != after[~same_fold_E, 4:]).any()


def test_earlier_events_of_one_moment_do_not_see_one_another():
    item_E = np.array([1, 1, 1, 2, 1])
    time_E = np.array([5, 5, 6, 5, 4])
    (count_E,) = earlier_events(item_E, time_E, np.ones((1, 5)))
    np.testing.assert_array_equal(count_E, [1, 1, 3, 0, 0])
