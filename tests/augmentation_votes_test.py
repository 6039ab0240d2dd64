"""Votes equal their definition, and nothing of the row or of what came later enters."""

import numpy as np
import pytest

from marsjax.augmentation import votes
from marsjax.data.splits import make_rows
from marsjax.records import HIGH, TRAIN, Log

N, D = 15, 6


def make_log(seed=0, n_users=40):
    rng = np.random.default_rng(seed)
    count_U = rng.integers(4, N, n_users)
    item_E = np.concatenate([rng.permutation(N - 1)[:count] + 1 for count in count_U]).astype(np.int32)
    return Log(
        start_U1=np.concatenate([[0], np.cumsum(count_U)]),
        item_E=item_E,
        label_E=rng.integers(0, 2, len(item_E)).astype(np.float32),
        time_E=np.concatenate([np.sort(rng.integers(0, 10**6, count)) for count in count_U]).astype(np.int64),
        raw_user_U=np.arange(n_users).astype(str),
    )


@pytest.fixture
def data():
    log = make_log()
    rows = make_rows(log, split="leave_one_out")
    item_ND = np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)
    item_ND[0] = 0
    donors = np.flatnonzero(rows.group_U == HIGH).astype(np.int32)
    asks_R = np.flatnonzero(rows.group_U[rows.user_E] != HIGH)
    return log, rows, item_ND, donors, asks_R


def scalar_vote(log, rows, item_ND, donors, event, settings):
    """One event, by loops."""
    train = {donor: [e for e in np.flatnonzero(rows.user_E == donor) if rows.split_E[e] == TRAIN] for donor in donors}
    every = [e for events in train.values() for e in events]
    overall = log.label_E[every].mean()

    def rate(events):
        return (log.label_E[events].sum() + votes.PRIOR * overall) / (len(events) + votes.PRIOR)

    usual = {item: rate([e for e in every if log.item_E[e] == item]) for item in range(N)}
    moved = item_ND - item_ND[1:].mean(axis=0)
    moved = moved / np.linalg.norm(moved, axis=1, keepdims=True)

    def profile(items, labels):
        total = sum(((y - usual[i]) * moved[i] for i, y in zip(items, labels, strict=True)), np.zeros(D))
        return total / max(np.linalg.norm(total), 1e-12)

    user, histories = rows.user_E[event], rows.histories
    seen = slice(max(histories.start_U1[user], histories.end_E[event] - settings.cap), histories.end_E[event])
    mine = profile(histories.item_H[seen], histories.label_H[seen])
    n_seen = seen.stop - seen.start
    sharpness = settings.sharpness * n_seen / (n_seen + settings.evidence)
    strength = {
        donor: np.exp(sharpness * mine @ profile(log.item_E[events], log.label_E[events]))
        for donor, events in train.items()
    }
    mean = np.mean(list(strength.values()))
    top = bottom = 0.0
    for donor, events in train.items():
        for e in events:
            late = settings.time_safe and log.time_E[e] >= log.time_E[event]
            if log.item_E[e] == log.item_E[event] and not late:
                weight = strength[donor] / mean
                top += weight * (log.label_E[e] - 0.5 * (usual[log.item_E[e]] + rate(events)))
                bottom += weight
    return top / (bottom + settings.shrink), np.log1p(bottom)


@pytest.mark.parametrize(
    "settings",
    [
        votes.Settings(sharpness=3.0, shrink=0.7, evidence=4.0),
        votes.Settings(sharpness=0.0, shrink=2.0),
        votes.Settings(sharpness=3.0, shrink=0.7, time_safe=True),
        votes.Settings(sharpness=3.0, shrink=0.7, cap=2),
    ],
)
def test_votes_equal_their_definition(data, settings):
    log, rows, item_ND, donors, asks_R = data
    voters = votes.make_voters(log, rows, donors, item_ND)
    vote_R2 = votes.vote(log, rows, voters, item_ND, asks_R, settings)
    expected = [scalar_vote(log, rows, item_ND, donors, event, settings) for event in asks_R[::7]]
    np.testing.assert_allclose(vote_R2[::7], expected, rtol=1e-4, atol=1e-5)


def test_the_users_own_label_and_later_events_change_nothing(data):
    log, rows, item_ND, donors, asks_R = data
    voters = votes.make_voters(log, rows, donors, item_ND)
    before = votes.vote(log, rows, voters, item_ND, asks_R, votes.Settings())
    user = rows.user_E[asks_R[0]]
    own_E = np.arange(log.start_U1[user], log.start_U1[user + 1])
    changed_E = log.label_E.copy()
    changed_E[own_E[2:]] = 1 - changed_E[own_E[2:]]
    changed = log._replace(label_E=changed_E)
    rows = make_rows(changed, split="leave_one_out")
    voters = votes.make_voters(changed, rows, donors, item_ND)
    after = votes.vote(changed, rows, voters, item_ND, asks_R, votes.Settings())
    up_to_third_R = (rows.user_E[asks_R] != user) | (asks_R <= own_E[2])
    np.testing.assert_array_equal(before[up_to_third_R], after[up_to_third_R])
    assert (before[~up_to_third_R] != after[~up_to_third_R]).any()


def test_donors_validation_and_test_events_are_never_votes(data):
    log, rows, item_ND, donors, asks_R = data
    held_E = np.isin(rows.user_E, donors) & (rows.split_E != TRAIN)
    changed = log._replace(label_E=np.where(held_E, 1 - log.label_E, log.label_E))
    changed_rows = make_rows(changed, split="leave_one_out")
    both = [
        votes.vote(a, r, votes.make_voters(a, r, donors, item_ND), item_ND, asks_R, votes.Settings())
        for a, r in ((log, rows), (changed, changed_rows))
    ]
    np.testing.assert_array_equal(*both)


def test_a_user_without_history_hears_everybody_alike(data):
    log, rows, item_ND, donors, _ = data
    voters = votes.make_voters(log, rows, donors, item_ND)
    first_R = log.start_U1[:-1][rows.group_U != HIGH]
    sharp, flat = (
        votes.vote(log, rows, voters, item_ND, first_R, votes.Settings(sharpness=sharpness)) for sharpness in (8.0, 0.0)
    )
    np.testing.assert_allclose(sharp, flat, rtol=1e-5)


def test_chunks_change_nothing(data, monkeypatch):
    log, rows, item_ND, donors, asks_R = data
    voters = votes.make_voters(log, rows, donors, item_ND)
    whole = votes.vote(log, rows, voters, item_ND, asks_R, votes.Settings())
    monkeypatch.setattr(votes, "CHUNK", 7)
    np.testing.assert_allclose(votes.vote(log, rows, voters, item_ND, asks_R, votes.Settings()), whole, rtol=1e-5)


def test_tables_too_large_for_memory_are_refused(data, monkeypatch):
    log, rows, item_ND, donors, _ = data
    monkeypatch.setattr(votes, "LARGEST", N * len(donors) - 1)
    with pytest.raises(ValueError, match=f"found 15 x {len(donors)}; lower split.high_fraction"):
        votes.make_voters(log, rows, donors, item_ND)
