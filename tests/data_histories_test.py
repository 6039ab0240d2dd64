"""Cut histories are runs of the histories that were there, of lengths that low-active users have."""

import numpy as np
import pytest

from marsjax.data.histories import cut_histories, gather_histories, ragged_histories, windows
from marsjax.data.splits import make_rows
from marsjax.records import LOW, TRAIN, Log


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    count_U = rng.integers(8, 40, 50)
    n_events = int(count_U.sum())
    log = Log(
        start_U1=np.concatenate([[0], np.cumsum(count_U)]),
        item_E=rng.integers(1, 30, n_events).astype(np.int32),
        label_E=rng.integers(0, 2, n_events).astype(np.float32),
        time_E=np.arange(n_events),
        raw_user_U=np.arange(50).astype(str),
    )
    return make_rows(log, split="last_fraction", sparse_fraction=0.3, sparse_events=4)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.float32])
@pytest.mark.parametrize(("entries", "length"), [(40, 7), (40, 40), (5, 7), (1, 3), (0, 3), (0, 0), (40, 0)])
def test_windows_are_entries_looked_up_one_by_one(entries, length, dtype):
    """Wherever they begin: before the first entry, and so late that they end beyond the last one, too."""
    value_H = np.random.default_rng(0).integers(1, 100, entries).astype(dtype)
    value_H.flags.writeable = False  # as where it is mapped from a file
    first_B = np.arange(-length - 2, entries + 3)
    found_BL = windows(value_H, first_B, length)
    assert (found_BL.shape, found_BL.dtype) == ((len(first_B), length), dtype)
    for first, found_L in zip(first_B, found_BL, strict=True):
        at_L = np.clip(np.arange(first, first + length), 0, max(entries - 1, 0))
        np.testing.assert_array_equal(found_L, value_H[at_L] if entries else np.zeros(length))
    assert windows(value_H, first_B[:0], length).shape == (0, length)


def test_only_training_rows_of_other_users_are_cut_and_to_what_low_active_users_have(rows):
    shown, cut_E = cut_histories(rows, share=0.5, seed=0)
    before, after = rows.histories, shown.histories
    assert cut_E.any()
    assert (rows.split_E[cut_E] == TRAIN).all()
    assert (rows.group_U[rows.user_E[cut_E]] != LOW).all()
    length_E = after.end_E - after.start_E
    assert set(length_E[cut_E]) == {4}  # every sparse user keeps four
    assert (after.start_E >= before.start_E).all()
    assert (after.end_E <= before.end_E).all()  # nothing later than the row
    for field in ("start_E", "end_E"):
        np.testing.assert_array_equal(getattr(after, field)[~cut_E], getattr(before, field)[~cut_E])
    could_E = (rows.split_E == TRAIN) & (rows.group_U[rows.user_E] != LOW) & (before.end_E - before.start_E > 4)
    assert 0.4 < cut_E[could_E].mean() < 0.6
    # Places are drawn from the whole history: its first run and its last one both occur.
    assert (after.start_E[cut_E] == before.start_E[cut_E]).any()
    assert (after.end_E[cut_E] == before.end_E[cut_E]).any()


def test_share_none_and_all_and_the_seed(rows):
    nothing, cut_E = cut_histories(rows, share=0.0, seed=0)
    assert not cut_E.any()
    np.testing.assert_array_equal(nothing.histories.start_E, rows.histories.start_E)
    _, all_E = cut_histories(rows, share=1.0, seed=0)
    length_E = rows.histories.end_E - rows.histories.start_E
    could_E = (rows.split_E == TRAIN) & (rows.group_U[rows.user_E] != LOW) & (length_E > 4)
    np.testing.assert_array_equal(all_E, could_E)
    one, two = (cut_histories(rows, share=0.5, seed=seed)[1] for seed in (0, 1))
    assert (one != two).any()
    np.testing.assert_array_equal(one, cut_histories(rows, share=0.5, seed=0)[1])


def test_without_low_active_users_nothing_is_cut(rows):
    nobody = rows._replace(group_U=np.full_like(rows.group_U, 1))
    shown, cut_E = cut_histories(nobody, share=1.0, seed=0)
    assert shown is nobody
    assert not cut_E.any()


def test_ragged_histories_hold_what_padded_ones_do(rows):
    histories = rows.histories
    event_Q = np.flatnonzero(rows.split_E == TRAIN)[::5]
    start_Q1, at_X = ragged_histories(histories.start_E[event_Q], histories.end_E[event_Q], cap=6)
    padded_QL = gather_histories(histories, rows.user_E[event_Q], histories.end_E[event_Q], cap=6)
    for query, item_L in enumerate(padded_QL):
        mine = histories.item_H[at_X[start_Q1[query] : start_Q1[query + 1]]]
        np.testing.assert_array_equal(mine, item_L[item_L > 0])
