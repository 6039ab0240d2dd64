"""Borrowing: each strategy against its definition, and no query that sees what comes after its row."""

import itertools

import numpy as np
import pytest

from marsjax import embeddings
from marsjax.augmentation import controls, mars
from marsjax.augmentation.donors import find_donors
from marsjax.augmentation.queries import make_queries
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.records import LOW, TEST, TRAIN, VALID, Donors, Histories, Neighbours, Queries
from tests.data_batches_test import small_log

P, L, D, Q, K = 6, 8, 5, 4, 3


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    item_PL = rng.integers(1, 15, (P, L)).astype(np.int32)
    item_PL[2, 5:] = 0
    donors = Donors(np.arange(10, 10 + P, dtype=np.int32), item_PL, rng.integers(0, 99, (P, L)))
    user_QK = np.stack([rng.permutation(P)[:K] for _ in range(Q)]) + 10
    valid_QK = np.ones((Q, K), bool)
    valid_QK[3, 1:] = False
    neighbours = Neighbours(
        np.where(valid_QK, user_QK, -1), np.where(valid_QK, [[0.9, 0.5, 0.1]], -np.inf).astype(np.float32), valid_QK
    )
    return donors, neighbours, rng.normal(size=(Q, D)).astype(np.float32), rng.normal(size=(P, L, D)).astype(np.float32)


def run(case, strategy, *, theta=None, theta_quantile=None, centre=0.0):
    donors, neighbours, query_QD, vector_PLD = case
    return mars.borrow(
        donors,
        neighbours,
        query_QD,
        lambda position_X: embeddings.units(vector_PLD, np.full(D, centre, np.float32))[position_X],
        strategy=strategy,
        theta=theta,
        theta_quantile=theta_quantile,
        centre_D=np.full(D, centre, np.float32),
        size=3,
    )


def candidates_of(case, q, k, centre=0.0):
    """(item, similarity) of the first `k` donors of a query, least similar donor first, one by one."""
    donors, neighbours, query_QD, vector_PLD = case
    out = []
    for user, valid in list(zip(neighbours.user_BK[q, :k], neighbours.valid_BK[q, :k], strict=True))[::-1]:
        if valid:
            row = user - 10
            for item, vector in zip(donors.item_PL[row], vector_PLD[row], strict=True):
                if item:
                    a, b = vector - centre, query_QD[q] - centre
                    out.append((user, item, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))))
    return out


def last_of_each(kept):
    items = [item for _, item, _ in kept]
    return [entry for i, entry in enumerate(kept) if entry[1] not in items[i + 1 :]]


def kept_of(found, q):
    keep = found.kept_QS[q]
    return list(zip(found.donor_QS[q][keep], found.item_QS[q][keep], found.similarity_QS[q][keep], strict=True))


def assert_same(found, expected):
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    np.testing.assert_allclose([entry[2] for entry in found], [entry[2] for entry in expected], atol=1e-5)


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_filter_keeps_items_at_least_theta(case, centre):
    found = run(case, "filter", theta=0.1, centre=centre)
    for q in range(Q):
        expected = last_of_each([entry for entry in candidates_of(case, q, 1, centre) if entry[2] >= 0.1])
        assert_same(kept_of(found, q), expected)


def test_filter_by_quantile_keeps_the_better_part(case):
    found = run(case, "filter", theta_quantile=0.5)
    for q in range(Q):
        everything = candidates_of(case, q, 1)
        theta = sorted(s for _, _, s in everything)[len(everything) // 2]
        assert_same(kept_of(found, q), last_of_each([e for e in everything if e[2] >= theta]))


def test_most_similar_copies_the_nearest_donor(case):
    found = run(case, "most_similar", theta_quantile=0.0)
    for q in range(Q):
        assert_same(kept_of(found, q), last_of_each(candidates_of(case, q, 1)))


def test_kth_similar_goes_from_least_to_most_similar(case):
    found = run(case, "kth_similar", theta_quantile=0.0)
    for q in range(Q):
        assert_same(kept_of(found, q), last_of_each(candidates_of(case, q, K)))


def test_dp_takes_the_best_run_of_one_donor(case):
    found = run(case, "dp", theta=0.1)
    for q in range(Q):
        best, run_kept = 0.0, []
        for _, group in itertools.groupby(candidates_of(case, q, K), key=lambda entry: entry[0]):
            entries = list(group)
            for i, j in itertools.combinations(range(len(entries) + 1), 2):
                value = sum(s - 0.1 for _, _, s in entries[i:j])
                if value > best + 1e-6:
                    best, run_kept = value, entries[i:j]
        assert_same(kept_of(found, q), last_of_each(run_kept))


@pytest.mark.parametrize("n", range(1, 13))
def test_best_run_against_enumeration(n):
    rng = np.random.default_rng(n)
    gain_BL = np.round(rng.normal(size=(20, n)), 2).astype(np.float32)
    valid_BL = rng.random((20, n)) < 0.8
    best_B, first_B, last_B = mars.best_run(gain_BL, valid_BL)
    for b in range(20):
        gain = np.where(valid_BL[b], gain_BL[b], 0)
        sums = {(i, j): gain[i : j + 1].sum() for i in range(n) for j in range(i, n)}
        expected = max(0.0, max(sums.values()))
        assert float(best_B[b]) == pytest.approx(expected, abs=1e-5)
        if expected > 1e-6:
            assert sums[int(first_B[b]), int(last_B[b])] == pytest.approx(expected, abs=1e-5)
        else:
            assert last_B[b] < first_B[b]


def test_quantile_zero_keeps_all_and_every_rate_is_reported(case):
    assert (
        run(case, "filter", theta_quantile=0.0).kept_QS.sum()
        == run(case, "most_similar", theta_quantile=0.0).kept_QS.sum()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "nearest", "theta": 0.1}, "expected one of"),
        ({"strategy": "filter"}, "exactly one of theta"),
        ({"strategy": "filter", "theta": 0.1, "theta_quantile": 0.5}, "exactly one of theta"),
    ],
)
def test_bad_options_are_refused(case, options, message):
    with pytest.raises(ValueError, match=message):
        run(case, **options)


@pytest.mark.parametrize("strategy", mars.STRATEGIES)
def test_nobody_asks_and_nothing_is_lent(case, strategy):
    donors, neighbours, query_QD, vector_PLD = case
    nobody = Neighbours(*(value[:0] for value in neighbours))
    found = run((donors, nobody, query_QD[:0], vector_PLD), strategy, theta_quantile=0.5)
    assert len(found.item_QS) == len(found.time_QS) == 0
    np.testing.assert_array_equal(mars.kept_items(found).start_Q1, [0])


def test_csr_holds_the_kept_items_in_order(case):
    found = run(case, "kth_similar", theta_quantile=0.0)
    borrowed = mars.kept_items(found)
    for q in range(Q):
        part = slice(borrowed.start_Q1[q], borrowed.start_Q1[q + 1])
        np.testing.assert_array_equal(borrowed.item_S[part], found.item_QS[q][found.kept_QS[q]])
        np.testing.assert_array_equal(borrowed.donor_S[part], found.donor_QS[q][found.kept_QS[q]])


# --- queries


@pytest.mark.parametrize("split", ["leave_one_out", "last_fraction", "global_time"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_prefix_queries_end_before_their_row(split, stride):
    """The leak of the label: no row may borrow through a query that saw the row or anything later."""
    log = small_log(users=30)
    rows = make_rows(log, split=split, low_fraction=0.5)
    queries = make_queries(rows, prefix_stride=stride)
    borrows_E = queries.query_E >= 0
    assert borrows_E.any()
    query_E = queries.query_E[borrows_E]
    assert (queries.end_Q[query_E] <= rows.histories.end_E[borrows_E]).all()
    np.testing.assert_array_equal(queries.user_Q[query_E], rows.user_E[borrows_E])
    assert (rows.group_U[queries.user_Q] == LOW).all()
    # The longest such prefix of 1, 2, ..., s, 2s, 3s, ..., unless the training history is used whole.
    whole = queries.end_Q[query_E] == rows.histories.train_end_U[rows.user_E[borrows_E]]
    start = rows.histories.start_U1[rows.user_E[borrows_E]]
    seen = rows.histories.end_E[borrows_E] - start
    expected = np.where(seen < stride, seen, seen // stride * stride)
    np.testing.assert_array_equal((queries.end_Q[query_E] - start)[~whole], expected[~whole])
    # Only rows without a history borrow nothing.
    silent = (rows.group_U[rows.user_E] == LOW) & ~borrows_E
    assert (rows.histories.end_E == rows.histories.start_U1[rows.user_E])[silent].all()
    later = np.isin(rows.split_E, (VALID, TEST)) & (rows.group_U[rows.user_E] == LOW)
    later &= (rows.histories.train_end_U > rows.histories.start_U1[:-1])[rows.user_E]
    np.testing.assert_array_equal(queries.end_Q[queries.query_E[later]], rows.histories.train_end_U[rows.user_E[later]])


def test_stride_zero_is_one_query_a_user_and_does_leak():
    log = small_log(users=30)
    rows = make_rows(log, split="leave_one_out", low_fraction=0.5)
    queries = make_queries(rows, prefix_stride=0)
    assert len(queries.user_Q) == len(set(queries.user_Q))
    train = (rows.split_E == TRAIN) & (queries.query_E >= 0)
    assert (queries.end_Q[queries.query_E[train]] > rows.histories.end_E[train]).any()


def test_no_low_active_user_borrows_nothing():
    rows = make_rows(small_log(), split="leave_one_out", low_fraction=0.0)
    queries = make_queries(rows, prefix_stride=4)
    assert not len(queries.user_Q)
    assert (queries.query_E == -1).all()


# --- controls


def test_random_donor_lends_the_budget_of_distinct_items(case):
    """From one donor where it holds enough, in its order; else from further donors, the first one last."""
    donors = case[0]
    distinct = {donor: len(set(row[row > 0])) for donor, row in zip(donors.user_P, donors.item_PL, strict=True)}
    everything = len(set(donors.item_PL[donors.item_PL > 0]))
    budget_Q = np.array([0, 3, 8, 20, 5] * 20)
    borrowed = controls.random_donor(donors, budget_Q, seed=0)
    np.testing.assert_array_equal(np.diff(borrowed.start_Q1), np.minimum(budget_Q, everything))
    chosen = set()
    for q, budget in enumerate(budget_Q):
        part = slice(borrowed.start_Q1[q], borrowed.start_Q1[q + 1])
        items, lenders = borrowed.item_S[part], borrowed.donor_S[part]
        assert len(set(items)) == len(items)
        groups = [(donor, list(items[lenders == donor])) for donor in dict.fromkeys(lenders)]
        assert [donor for donor, _ in groups] == [donor for donor, _ in itertools.groupby(lenders)]
        for donor, lent in groups:
            row = iter(donors.item_PL[donor - 10])
            assert all(item in row for item in lent)  # a subsequence
        if budget:
            assert len(groups[-1][1]) == min(budget, distinct[groups[-1][0]])
            chosen.add(groups[-1][0])
    assert chosen == set(donors.user_P)
    again = controls.random_donor(donors, budget_Q, seed=0)
    np.testing.assert_array_equal(again.item_S, borrowed.item_S)


def test_random_donor_copies_time_with_the_item(case):
    donors = case[0]
    borrowed = controls.random_donor(donors, np.full(50, 6), seed=3)
    known = {
        (donor, item, time)
        for donor, items, times in zip(donors.user_P, donors.item_PL, donors.time_PL, strict=True)
        for item, time in zip(items, times, strict=True)
    }
    assert set(zip(borrowed.donor_S, borrowed.item_S, borrowed.time_S, strict=True)) <= known


def test_popular_items_are_the_most_held_within_budget(case):
    donors = case[0]
    count = np.bincount(donors.item_PL[donors.item_PL > 0], minlength=15)
    borrowed = controls.popular_items(donors, np.array([2, 0, 100]), n_items=15)
    ranked = sorted(np.flatnonzero(count), key=lambda item: (-count[item], item))
    np.testing.assert_array_equal(borrowed.item_S[:2], ranked[:2][::-1])
    np.testing.assert_array_equal(borrowed.start_Q1, [0, 2, 2, 2 + len(ranked)])
    first = {item: donors.time_PL[donors.item_PL == item].min() for item in ranked}
    np.testing.assert_array_equal(borrowed.time_S[2:], [first[item] for item in ranked[::-1]])


def test_tfidf_donor_is_the_one_whose_items_are_most_alike():
    """Item 1 is held by all donors and says least; each query finds the donor who shares its rare item."""
    donors = Donors(
        np.array([3, 5, 9], np.int32),
        np.array([[1, 2, 4, 0], [1, 3, 0, 0], [6, 5, 1, 7]], np.int32),
        np.arange(12).reshape(3, 4),
    )
    own = [[1, 3], [2, 1, 8], [5], [8, 8]]  # the last shares nothing with anybody
    histories = Histories(
        start_U1=np.array([0, 2, 5, 6, 8]),
        item_H=np.array(sum(own, []), np.int32),
        time_H=np.arange(8),
        label_H=np.zeros(8, np.float32),
        end_E=np.zeros(0, np.int64),
        train_end_U=np.array([2, 5, 6, 8]),
        start_E=np.zeros(0, np.int64),
    )
    queries = Queries(np.arange(4, dtype=np.int32), histories.train_end_U, np.zeros(0, np.int32))
    borrowed = controls.tfidf_donor(donors, histories, queries, np.array([2, 2, 3, 2]), n_items=9)
    np.testing.assert_array_equal(borrowed.start_Q1, [0, 2, 4, 7, 7])
    np.testing.assert_array_equal(borrowed.item_S, [1, 3, 2, 4, 5, 1, 7])  # the donor's last ones, in time order
    np.testing.assert_array_equal(borrowed.donor_S, [5, 5, 3, 3, 9, 9, 9])
    np.testing.assert_array_equal(borrowed.time_S, [4, 5, 1, 2, 9, 10, 11])

    idf = {item: np.log(4 / (1 + held)) + 1 for item, held in {1: 3, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 0}.items()}

    def norm(items):
        return np.sqrt(sum(idf[item] ** 2 for item in items))

    expected = [1.0, (idf[1] ** 2 + idf[2] ** 2) / norm([1, 2, 4]) / norm([1, 2, 8]), idf[5] / norm([1, 5, 6, 7])]
    np.testing.assert_allclose(borrowed.similarity_S, np.repeat(expected, [2, 2, 3]), rtol=1e-6)


def test_in_few_directions_histories_without_a_common_item_find_the_donor_of_their_kind():
    """Donors hold items of one of two kinds; the query's item 1 is not held by the donor with the most of its kind."""
    items = [[1, 2, 3], [2, 3, 4], [6, 7, 8], [7, 8, 9], [3, 4, 5], [8, 9, 10]]
    donors = Donors(np.arange(6, dtype=np.int32), np.array(items, np.int32), np.zeros((6, 3), np.int64))
    histories = Histories(
        start_U1=np.array([0, 1, 2]),
        item_H=np.array([1, 6], np.int32),
        time_H=np.zeros(2, np.int64),
        label_H=np.zeros(2, np.float32),
        end_E=np.zeros(0, np.int64),
        train_end_U=np.array([1, 2]),
        start_E=np.zeros(0, np.int64),
    )
    queries = Queries(np.arange(2, dtype=np.int32), histories.train_end_U, np.zeros(0, np.int32))

    def bag(numbers):
        held_N = np.bincount(np.ravel(items), minlength=11)
        row_N = np.zeros(11)
        row_N[numbers] = np.log(7 / (1 + held_N[numbers])) + 1
        return row_N / np.linalg.norm(row_N)

    donor_PN = np.stack([bag(row) for row in items])
    direction_KN = np.linalg.svd(donor_PN)[2][:2]

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    expected_QP = unit(np.stack([bag([1]), bag([6])]) @ direction_KN.T) @ unit(donor_PN @ direction_KN.T).T
    borrowed = controls.tfidf_donor(donors, histories, queries, np.array([2, 2]), n_items=11, components=2)
    np.testing.assert_allclose(borrowed.similarity_S[::2], expected_QP.max(axis=1), rtol=1e-6)
    for query, donor in enumerate(borrowed.donor_S[::2]):
        assert expected_QP[query, donor] > expected_QP[query].max() - 1e-6
        assert (donor in (2, 3, 5)) == (query == 1)


def test_queries_with_the_same_donor_are_filtered_together(case):
    """Whatever the order of the queries, a donor is fetched in one part of them, or in two that follow one another."""
    donors, _, query_QD, vector_PLD = case
    user_Q1 = donors.user_P[np.arange(Q) % 3][:, None].astype(np.int64)
    neighbours = Neighbours(user_Q1, np.ones((Q, 1), np.float32), np.ones((Q, 1), bool))
    asked = []

    def vectors(position_X):
        asked.append(position_X.tolist())
        return vector_PLD[position_X]

    mars.borrow(
        donors, neighbours, query_QD, vectors, strategy="filter", theta=None, theta_quantile=0.5,
        centre_D=np.zeros(D, np.float32), size=3,
    )  # fmt: skip
    assert sorted(sum(asked, [])) == sum(asked, [])


def test_donors_are_as_wide_as_the_longest_of_them():
    dataset = make_synthetic(n_users=80, n_items=40, n_types=4, n_topics=8, topics_per_type=2, high_events=(20, 30))
    rows = make_rows(dataset.log, split="leave_one_out")
    donors, few = find_donors(rows, cap=200), find_donors(rows, cap=5)
    assert donors.item_PL.shape == donors.time_PL.shape
    assert (donors.item_PL > 0).sum(axis=1).max() == donors.item_PL.shape[1] < 200
    assert few.item_PL.shape[1] == 5
    last_P = (donors.item_PL > 0).sum(axis=1) - 1
    np.testing.assert_array_equal(few.item_PL[:, -1], donors.item_PL[np.arange(len(last_P)), last_P])


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 0.9])
def test_comparing_all_pairs_is_sorting(monkeypatch, quantile):
    """With ties, repeats and padding: short rows are compared pair by pair, long ones sorted."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        similarity_BS = (rng.integers(0, 5, (16, 9)) / 4).astype(np.float32)
        valid_BS = rng.random((16, 9)) < rng.random((16, 1))
        item_BS = rng.integers(1, 6, (16, 9)).astype(np.int32)
        found = []
        for paired in (0, 9):
            monkeypatch.setattr(mars, "PAIRED", paired)
            theta_B = mars.threshold(similarity_BS, valid_BS, value=None, quantile=quantile)
            found.append((np.asarray(theta_B), np.asarray(mars.drop_repeats(item_BS, valid_BS))))
        np.testing.assert_array_equal(found[0][0], found[1][0])
        np.testing.assert_array_equal(found[0][1], found[1][1])
