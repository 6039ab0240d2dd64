"""The baselines: what each does to training histories, and what it lends when every one lends the same number."""

import collections
import functools
import itertools

import numpy as np
import pytest

from marsjax.augmentation import basrec, budget, cl4srec, cmr, cmrsi, coserec, ran, ran_s, reppad
from marsjax.augmentation.operators import crop, independent, mask
from marsjax.records import Histories, Queries

MODES = ("paper", "as_released")
BASELINES = {
    "ran": ran,
    "ran_s": ran_s,
    "reppad": reppad,
    "cmr": cmr,
    "cmrsi": cmrsi,
    "cl4srec": cl4srec,
    "coserec": coserec,
    "basrec": basrec,
}
OWN_ONLY = ("ran_s", "reppad", "cmr", "cl4srec")
SIMILAR = ("cmrsi", "coserec", "basrec")
N_ITEMS = 500
LOWEST = np.iinfo(np.int64).min


def make_histories(lengths, seed=0, items=300):
    """Users with distinct items 1..items and distinct times, unlike those of all others."""
    rng = np.random.default_rng(seed)
    start_U1 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    item_H = np.concatenate([np.zeros(0, int), *(rng.permutation(items)[:n] + 1 for n in lengths)]).astype(np.int32)
    time_H = np.concatenate([np.zeros(0, int), *(np.sort(rng.permutation(5000)[:n]) for n in lengths)])
    nothing = np.zeros(0, np.int64)
    return Histories(start_U1, item_H, time_H, np.ones(len(item_H), np.float32), nothing, start_U1[1:], nothing)


def similar():
    """Items up to 400 are like the next 100; the others, and every tenth, are like nothing."""
    similar_NK = np.zeros((N_ITEMS, 1), np.int32)
    item_N = np.arange(1, 401)
    similar_NK[item_N, 0] = np.where(item_N % 10 == 0, 0, item_N + 99)
    return similar_NK


@pytest.fixture(scope="module")
def case():
    """Users of 0 to 12 events, several prefixes of each, and budgets from 0."""
    rng = np.random.default_rng(1)
    histories = make_histories(rng.integers(0, 13, 60))
    length_U = np.diff(histories.start_U1)
    user_Q = np.sort(rng.integers(0, 60, 150)).astype(np.int32)
    end_Q = histories.start_U1[user_Q] + rng.integers(0, length_U[user_Q] + 1)
    return histories, Queries(user_Q, end_Q, np.zeros(0, np.int32)), rng.integers(0, 40, 150)


def lend(name, histories, queries, budget_Q, *, seed=0, mode="paper", **settings):
    module = BASELINES[name]
    settings = {"settings": module.Settings(**settings)} if settings else {}
    return module.lend(
        histories, queries, budget_Q, seed=seed, n_items=N_ITEMS, similar_NK=similar(), mode=mode, **settings
    )


def each_query(histories, queries, borrowed):
    """Prefix items, prefix times, and the slice that is borrowed, for each query."""
    for q, (user, end) in enumerate(zip(queries.user_Q, queries.end_Q, strict=True)):
        own = slice(histories.start_U1[user], end)
        lent = slice(borrowed.start_Q1[q], borrowed.start_Q1[q + 1])
        yield q, histories.item_H[own].tolist(), histories.time_H[own].tolist(), lent


every = pytest.mark.parametrize(("name", "mode"), list(itertools.product(BASELINES, MODES)))


@every
def test_the_budget_is_met_exactly(case, name, mode):
    histories, queries, budget_Q = case
    borrowed = lend(name, *case, mode=mode)
    empty_Q = queries.end_Q == histories.start_U1[queries.user_Q]
    assert empty_Q.any()
    expected_Q = budget_Q if name == "ran" else np.where(empty_Q, 0, budget_Q)
    np.testing.assert_array_equal(np.diff(borrowed.start_Q1), expected_Q)
    assert borrowed.start_Q1[0] == 0
    assert {len(field) for field in borrowed[1:]} == {borrowed.start_Q1[-1]}
    assert [field.dtype for field in borrowed] == [np.int64, np.int32, np.int64, np.int32, np.float32, np.int8]
    assert not borrowed.similarity_S.any()


@every
def test_items_are_of_the_catalogue_and_never_the_mask(case, name, mode):
    borrowed = lend(name, *case, mode=mode)
    assert borrowed.item_S.min() >= 1
    assert borrowed.item_S.max() < N_ITEMS


@every
def test_items_times_and_donors_belong_together(case, name, mode):
    """Own items have their own times. All others have the time of the event that they stand for or before."""
    histories, queries, _ = case
    borrowed, similar_NK = lend(name, *case, mode=mode), similar()
    own_count = 0
    for q, item_P, time_P, lent in each_query(histories, queries, borrowed):
        at_time = dict(zip(time_P, item_P, strict=True))
        for item, time, donor in zip(borrowed.item_S[lent], borrowed.time_S[lent], borrowed.donor_S[lent], strict=True):
            if donor >= 0:
                own_count += 1
                assert donor == queries.user_Q[q]
                assert at_time[time] == item
            elif name == "ran":
                assert time == (time_P[-1] if time_P else LOWEST)
            else:
                like = similar_NK[at_time[time], 0]
                assert item == like if like else item != at_time[time]
    assert own_count == {"ran": 0}.get(name, own_count)
    others = len(borrowed.item_S) - own_count
    assert (others > 0) == (name in (*SIMILAR, "ran"))
    assert (own_count > 0) == (name != "ran")


@every
def test_nothing_after_the_prefix_is_read(name, mode):
    """Later events are others, and more, and nothing changes."""
    lengths = np.random.default_rng(2).integers(1, 13, 50)
    histories = make_histories(lengths)
    user_Q = np.arange(50, dtype=np.int32)
    prefix_Q = np.random.default_rng(3).integers(0, lengths + 1)
    budget_Q = np.full(50, 15)
    before = lend(name, histories, Queries(user_Q, histories.start_U1[:-1] + prefix_Q, user_Q), budget_Q, mode=mode)
    other = make_histories(lengths + 5, seed=9)
    start_U1 = other.start_U1
    for user, n in enumerate(prefix_Q):
        for ours, theirs in ((other.item_H, histories.item_H), (other.time_H, histories.time_H)):
            ours[start_U1[user] : start_U1[user] + n] = theirs[histories.start_U1[user] : histories.start_U1[user] + n]
    after = lend(name, other, Queries(user_Q, start_U1[:-1] + prefix_Q, user_Q), budget_Q, mode=mode)
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, two)
    assert len(before.item_S)


@every
def test_what_is_lent_follows_the_seed(case, name, mode):
    one, two, three = (lend(name, *case, mode=mode, seed=seed) for seed in (4, 4, 5))
    for field, again in zip(one, two, strict=True):
        np.testing.assert_array_equal(field, again)
    assert name == "reppad" or (one.item_S != three.item_S).any()


@pytest.mark.parametrize("name", BASELINES)
def test_no_queries_and_no_budget_are_no_items(case, name):
    histories, queries, budget_Q = case
    none = lend(name, histories, Queries(queries.user_Q[:0], queries.end_Q[:0], queries.query_E), budget_Q[:0])
    assert none.start_Q1.tolist() == [0]
    assert not len(lend(name, histories, queries, np.zeros_like(budget_Q)).item_S)


@pytest.mark.parametrize("name", BASELINES)
def test_budgets_that_are_none_are_refused(case, name):
    histories, queries, budget_Q = case
    for wrong_Q in (budget_Q[1:], budget_Q - 1):
        with pytest.raises(ValueError, match="expected one budget of at least 0 for each of 150 queries"):
            lend(name, histories, queries, wrong_Q)


@pytest.mark.parametrize("name", SIMILAR)
def test_similar_items_are_asked_for(case, name):
    for similar_NK in (None, similar()[1:]):
        with pytest.raises(ValueError, match="expected similar items of shape"):
            BASELINES[name].lend(*case, seed=0, n_items=N_ITEMS, similar_NK=similar_NK)
        make = getattr(BASELINES[name], "view", None) or BASELINES[name].views
        with pytest.raises(ValueError, match="expected similar items of shape"):
            make(BASELINES[name].Settings(), n_items=N_ITEMS, similar_NK=similar_NK)


@pytest.mark.parametrize("name", BASELINES)
def test_an_unknown_mode_is_refused(case, name):
    with pytest.raises(ValueError, match="expected one of .*, found 'published'"):
        lend(name, *case, mode="published")
    make = getattr(BASELINES[name], "view", None) or BASELINES[name].views
    with pytest.raises(ValueError, match="expected one of .*, found 'published'"):
        make(BASELINES[name].Settings(), n_items=N_ITEMS, similar_NK=similar(), mode="published")


def test_ran_lends_distinct_items(case):
    histories, queries, _ = case
    borrowed = lend("ran", histories, queries, np.full(150, 200))
    for _, _, _, lent in each_query(histories, queries, borrowed):
        assert len(set(borrowed.item_S[lent].tolist())) == 200


@pytest.mark.parametrize("n_items", [4, 5, 9, 12])
def test_distinct_items_are_drawn_evenly(n_items):
    """Of a small and of a large part of the catalogue: every pair alike, whatever repeats."""
    item_BM = ran.distinct_items(np.full(30_000, 2), n_items, np.random.default_rng(0))
    found = collections.Counter(map(tuple, item_BM.tolist()))
    assert set(found) == set(itertools.permutations(range(1, n_items), 2))
    expected = 30_000 / len(found)
    assert max(abs(count - expected) for count in found.values()) < 5 * np.sqrt(expected)


def test_ran_lends_the_whole_catalogue_at_the_most():
    histories = make_histories([3], items=3)
    queries = Queries(np.zeros(1, np.int32), np.array([3]), np.zeros(3, np.int32))
    borrowed = ran.lend(histories, queries, np.array([10]), seed=0, n_items=6)
    assert sorted(borrowed.item_S.tolist()) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="catalogue of at least one item"):
        ran.lend(histories, queries, np.array([10]), seed=0, n_items=1)


def test_ran_s_lends_every_event_before_any_again(case):
    histories, queries, _ = case
    borrowed = lend("ran_s", *case)
    orders = set()
    for _, item_P, _, lent in each_query(histories, queries, borrowed):
        items = borrowed.item_S[lent].tolist()
        for first in range(0, len(items), max(len(item_P), 1)):
            part = items[first : first + len(item_P)]
            assert len(set(part)) == len(part)
            assert set(part) <= set(item_P)
            if len(item_P) == len(part) == 3:
                orders.add(tuple(item_P.index(item) for item in part))
    assert orders == set(itertools.permutations(range(3)))


def test_reppad_lends_the_prefix_repeated(case):
    histories, queries, budget_Q = case
    borrowed = lend("reppad", *case)
    for q, item_P, time_P, lent in each_query(histories, queries, borrowed):
        if item_P:
            assert borrowed.item_S[lent].tolist() == (item_P * 40)[len(item_P) * 40 - budget_Q[q] :]
            assert borrowed.time_S[lent].tolist() == (time_P * 40)[len(time_P) * 40 - budget_Q[q] :]


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("cmr", {"crop": 1.0, "mask": 0.0, "reorder": 0.0}),
        ("cl4srec", {"crop": 1.0, "mask": 0.0, "reorder": 0.0}),
        ("ran_s", None),
    ],
)
def test_views_that_change_nothing_are_copies(case, name, rates):
    """And Ran-S lends the copies in another order: whole rounds of the same events."""
    copies, lent = lend("reppad", *case), lend(name, *case, **(rates or {}))
    np.testing.assert_array_equal(copies.start_Q1, lent.start_Q1)
    assert (copies.item_S == lent.item_S).all() == (rates is not None)


def test_the_first_view_stands_next_to_the_own_history_and_the_last_is_cut(case):
    """Runs of floor(n / 2) entries in time order: read from the end, only the farthest may be short."""
    histories, queries, budget_Q = case
    pair = independent(functools.partial(crop, rate=0.5, mode="paper"))
    borrowed = budget.lend_views(histories, queries, budget_Q, pair, seed=0, n_items=N_ITEMS)
    for _, item_P, _, lent in each_query(histories, queries, borrowed):
        items, size = borrowed.item_S[lent].tolist(), max(len(item_P) // 2, 1)
        while items:
            run, items = items[-size:], items[:-size]
            first = item_P.index(run[0])
            assert run == item_P[first : first + len(run)]


def test_masked_entries_are_not_lent_and_nothing_takes_their_place(case):
    """Half of each view is masked: the other half stands in order."""
    histories, queries, budget_Q = case
    pair = independent(functools.partial(mask, rate=0.5, mode="paper"))
    borrowed = budget.lend_views(histories, queries, budget_Q, pair, seed=0, n_items=N_ITEMS)
    for _, item_P, _, lent in each_query(histories, queries, borrowed):
        items, size = borrowed.item_S[lent].tolist(), len(item_P) - len(item_P) // 2
        while items:
            run, items = items[-size:], items[:-size]
            places = [item_P.index(item) for item in run]
            assert places == sorted(set(places))


@pytest.mark.parametrize("cells", [1, 200, 2**20])
def test_chunks_change_nothing_but_the_draws(case, cells):
    histories, queries, budget_Q = case
    whole = lend("reppad", *case)
    chunked = budget.lend_chunks(histories, queries, budget_Q, reppad._copies, seed=0, cells=cells)
    for one, two in zip(whole, chunked, strict=True):
        np.testing.assert_array_equal(one, two)
    pair = independent(functools.partial(crop, rate=0.5, mode="paper"))
    views = budget.lend_views(histories, queries, budget_Q, pair, seed=0, n_items=N_ITEMS, cells=cells)
    np.testing.assert_array_equal(views.start_Q1, whole.start_Q1)


def rows(length_B, width):
    column_L = np.arange(width)
    return np.where(column_L < np.asarray(length_B)[:, None], column_L + 1, 0).astype(np.int32)


@pytest.mark.parametrize(
    ("name", "mode"), [pair for pair in itertools.product(BASELINES, MODES) if pair[0] not in ("cl4srec", "coserec")]
)
def test_views_of_training_rows_are_left_aligned(name, mode):
    length_B = np.concatenate([[0, 1, 2, 20], np.random.default_rng(0).integers(0, 21, 300)])
    module = BASELINES[name]
    view = module.view(module.Settings(), n_items=N_ITEMS, similar_NK=similar(), mode=mode)
    history_BL, viewed_B, column_BL, rate_B = view(rows(length_B, 20), length_B, np.random.default_rng(1))
    assert history_BL.shape == (304, 20)
    assert history_BL.dtype == np.int32
    np.testing.assert_array_equal(history_BL > 0, np.arange(20) < viewed_B[:, None])
    np.testing.assert_array_equal(viewed_B > 0, length_B > 0)
    assert history_BL.max() <= N_ITEMS
    assert (history_BL == N_ITEMS).any() == (name == "cmr" or (name == "cmrsi" and mode == "paper"))
    again = view(rows(length_B, 20), length_B, np.random.default_rng(1))
    np.testing.assert_array_equal(history_BL, again.history_BL)
    assert (rate_B is not None) == (name == "basrec")
    # Item c + 1 stands at place c of the histories, so an entry that is an own one tells its place.
    own_BL = column_BL >= 0
    np.testing.assert_array_equal(history_BL[own_BL], column_BL[own_BL] + 1)
    assert not own_BL[history_BL == 0].any()
    if name in OWN_ONLY:
        np.testing.assert_array_equal(own_BL, (history_BL > 0) & (history_BL < N_ITEMS))
    else:
        assert (~own_BL & (history_BL > 0) & (history_BL < N_ITEMS)).any()


@pytest.mark.parametrize("name", ["ran", "ran_s"])
def test_ran_and_ran_s_put_ten_items_before_the_history(name):
    length_B = np.full(3000, 4)
    module = BASELINES[name]
    view = module.view(module.Settings(), n_items=31)
    history_BL, viewed_B, *_ = view(rows(length_B, 20), length_B, np.random.default_rng(0))
    assert set(viewed_B) == {14}
    np.testing.assert_array_equal(history_BL[:, 10:14], rows(length_B, 4))
    drawn = np.bincount(history_BL[:, :10].ravel(), minlength=31)
    expected = np.where((np.arange(31) > 0) & (np.arange(31) < (31 if name == "ran" else 5)), 1.0, 0.0)
    expected *= 30_000 / expected.sum()
    assert np.abs(drawn - expected).max() < 5 * np.sqrt(expected.max())
    assert (drawn[expected == 0] == 0).all()
    history_BL, viewed_B, *_ = view(rows(length_B, 6), length_B, np.random.default_rng(0))
    assert set(viewed_B) == {6}
    np.testing.assert_array_equal(history_BL[:, 2:], rows(length_B, 4))


@pytest.mark.parametrize(("n", "width", "length"), [(3, 11, None), (3, 20, 11), (5, 10, None), (6, 11, None)])
def test_reppad_adds_one_to_all_the_copies_that_fit(n, width, length):
    own, most = list(range(1, n + 1)), (length or width) // n
    view = reppad.view(reppad.Settings(length=length), n_items=N_ITEMS)
    length_B = np.full(5000, n)
    history_BL, viewed_B, *_ = view(rows(length_B, width), length_B, np.random.default_rng(0))
    found = collections.Counter(tuple(row[:m].tolist()) for row, m in zip(history_BL, viewed_B, strict=True))
    expected = collections.Counter(tuple((own * (k + 1))[-(length or width) :]) for k in range(1, most + 1))
    assert set(found) == set(expected)
    for result, times in expected.items():
        assert abs(found[result] - 5000 * times / most) < 5 * np.sqrt(5000 * times / most)


@pytest.mark.parametrize("length", [None, 6])
def test_reppad_leaves_a_full_history(length):
    view = reppad.view(reppad.Settings(length=length), n_items=N_ITEMS)
    history_BL, viewed_B, *_ = view(rows([8, 0], 8), np.array([8, 0]), np.random.default_rng(0))
    np.testing.assert_array_equal(history_BL, rows([8, 0], 8))
    assert viewed_B.tolist() == [8, 0]


def kinds(view_BL, viewed_B, before_BL, length_B):
    """What was done to each row: an operator that leaves this trace, by length, mask, order and new items."""
    for view_L, m, own_L, n in zip(view_BL, viewed_B, before_BL, length_B, strict=True):
        view, own = view_L[:m].tolist(), own_L[:n].tolist()
        if N_ITEMS in view:
            yield "mask"
        elif len(view) > len(own):
            yield "insert"
        elif set(view) - set(own):
            yield "substitute"
        elif len(view) < len(own):
            yield "crop" if view == own[own.index(view[0]) :][: len(view)] else "mask"
        else:
            yield "reorder"


@pytest.mark.parametrize("mode", MODES)
def test_cmr_draws_one_of_three_and_leaves_one_entry_alone(mode):
    view = cmr.view(cmr.Settings(), n_items=N_ITEMS, mode=mode)
    length_B = np.full(6000, 10)
    found = collections.Counter(
        kinds(*view(rows(length_B, 20), length_B, np.random.default_rng(0))[:2], rows(length_B, 20), length_B)
    )
    assert set(found) == {"crop", "mask", "reorder"}
    assert max(abs(count - 2000) for count in found.values()) < 5 * np.sqrt(2000)
    one = rows(np.ones(500, int), 20)
    np.testing.assert_array_equal(view(one, np.ones(500, int), np.random.default_rng(0))[0], one)


def test_cmrsi_draws_one_of_five():
    view = cmrsi.view(cmrsi.Settings(), n_items=N_ITEMS, similar_NK=similar(), mode="paper")
    length_B = np.full(6000, 8)
    before_BL = rows(length_B, 20) + np.where(rows(length_B, 20) > 0, 10, 0)  # items 11..18, all with similar ones
    found = collections.Counter(
        kinds(*view(before_BL, length_B, np.random.default_rng(0))[:2], before_BL, length_B),
    )
    assert set(found) == {"crop", "mask", "reorder", "substitute", "insert"}
    assert max(abs(count - 1200) for count in found.values()) < 5 * np.sqrt(1200)


def test_masks_of_coserec_are_tokens_in_the_paper_and_left_out_as_released():
    """Only masks can be drawn: 10 entries, 7 of them hidden."""
    settings = coserec.Settings(short=("mask",), threshold=10)
    length_B = np.full(400, 10)
    for mode, tokens, entries in (("paper", 7, 10), ("as_released", 0, 3)):
        views = coserec.views(settings, n_items=N_ITEMS, similar_NK=similar(), mode=mode)
        for history_BL, viewed_B, *_ in views(rows(length_B, 12), length_B, np.random.default_rng(0)):
            assert set((history_BL == N_ITEMS).sum(axis=1)) == {tokens}
            assert set(viewed_B) == {entries}


def test_reorder_of_short_histories_has_the_rate_of_the_mask_as_released():
    settings = coserec.Settings(short=("reorder",), threshold=10)
    length_B = np.full(3000, 10)
    for mode, block in (("paper", 2), ("as_released", 7)):
        views = coserec.views(settings, n_items=N_ITEMS, similar_NK=similar(), mode=mode)
        for history_BL, *_ in views(rows(length_B, 10), length_B, np.random.default_rng(0)):
            moved_B = (history_BL != rows(length_B, 10)).sum(axis=1)
            assert moved_B.max() == block


def test_coserec_changes_short_histories_little():
    views = coserec.views(coserec.Settings(), n_items=N_ITEMS, similar_NK=similar(), mode="paper")
    for n, expected in (
        (4, {"insert", "substitute", "mask"}),
        (5, {"insert", "substitute", "mask", "crop", "reorder"}),
    ):
        length_B = np.full(1000, n)
        before_BL = rows(length_B, 12) + np.where(rows(length_B, 12) > 0, 10, 0)
        one, two = views(before_BL, length_B, np.random.default_rng(0))
        kinds_one, kinds_two = (list(kinds(*view[:2], before_BL, length_B)) for view in (one, two))
        assert set(kinds_one) == set(kinds_two) == expected
        assert {a == b for a, b in zip(kinds_one, kinds_two, strict=True)} == {True, False}  # they may coincide


def test_coserec_refuses_unknown_operators():
    with pytest.raises(ValueError, match="coserec: expected operators for short histories"):
        coserec.views(coserec.Settings(short=("shuffle",)), n_items=N_ITEMS, similar_NK=similar())


def test_cl4srec_draws_two_different_operators():
    length_B = np.full(3000, 10)
    views = cl4srec.views(cl4srec.Settings(), n_items=N_ITEMS, mode="paper")
    one, two = views(rows(length_B, 12), length_B, np.random.default_rng(0))
    pairs = collections.Counter(
        zip(*(kinds(*view[:2], rows(length_B, 12), length_B) for view in (one, two)), strict=True)
    )
    assert set(pairs) == set(itertools.permutations(("crop", "mask", "reorder"), 2))


def test_cl4srec_as_released_makes_the_second_view_of_what_the_first_overwrote():
    length_B = np.full(3000, 10)
    hidden = {}
    for mode in MODES:
        views = cl4srec.views(cl4srec.Settings(), n_items=N_ITEMS, mode=mode)
        (one_BL, *_), (two_BL, two_B, *_) = views(rows(length_B, 12), length_B, np.random.default_rng(0))
        masked_B = (one_BL == N_ITEMS).any(axis=1)
        hidden[mode] = (two_BL[masked_B] == N_ITEMS).sum()
        assert set(two_B[masked_B]) == {6, 10}
    assert hidden["paper"] == 0
    assert hidden["as_released"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_basrec_reorders_or_substitutes_at_the_rate_that_it_returns(mode):
    n, width = 20, 24
    length_B = np.full(4000, n)
    before_BL = np.where(rows(length_B, width) > 0, rows(length_B, width) + 10, 0)
    view = basrec.view(basrec.Settings(), n_items=N_ITEMS, similar_NK=similar(), mode=mode)
    history_BL, viewed_B, _, rate_B = view(before_BL, length_B, np.random.default_rng(0))
    assert set(viewed_B) == {n}
    assert 0.2 <= rate_B.min() < 0.21
    assert 0.5 < rate_B.max() <= 0.51
    new_BL = ~np.isin(history_BL, before_BL[0])
    substituted_B = new_BL.any(axis=1)
    assert abs(substituted_B.mean() - 0.5) < 5 * 0.5 / np.sqrt(4000)
    for history_L, rate, substituted in zip(history_BL, rate_B, substituted_B, strict=True):
        place_X = np.flatnonzero(history_L != before_BL[0])
        size = int(rate * n)
        if substituted:
            assert len(place_X) == size
        elif len(place_X):
            assert place_X[-1] - place_X[0] < size
            assert sorted(history_L) == sorted(before_BL[0])
    moved_last_B = (history_BL[:, n - 1] != before_BL[:, n - 1]) & ~substituted_B
    assert moved_last_B.any() == (mode == "paper")


def test_basrec_refuses_rates_out_of_order():
    for settings, message in ((basrec.Settings(0.6, 0.5), "rate_low <= rate_high"), (basrec.Settings(0, 2), "0 to 1")):
        with pytest.raises(ValueError, match=message):
            basrec.view(settings, n_items=N_ITEMS, similar_NK=similar())


def test_the_modes_of_lending_differ_where_the_operators_do(case):
    different = {
        name for name in BASELINES if (lend(name, *case).item_S != lend(name, *case, mode="as_released").item_S).any()
    }
    assert different == {"cmrsi", "cl4srec", "coserec", "basrec"}
