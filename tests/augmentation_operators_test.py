"""Each operator against all outcomes of its definition, written out entry by entry, with their probabilities."""

import collections
import functools
import itertools
import math

import numpy as np
import pytest

from marsjax.augmentation import operators
from marsjax.augmentation.operators import (
    as_view,
    by_length,
    crop,
    independent,
    insert,
    mask,
    one_of,
    reorder,
    substitute,
    two_different,
    unchanged,
)

MODES = ("paper", "as_released")
N_ITEMS = 100
DRAWS = 40_000


def similar():
    """The items most similar to i are i + 50 and i + 40, for i up to 40; higher ones have none."""
    similar_NK = np.zeros((N_ITEMS, 2), np.int32)
    similar_NK[1:41] = np.arange(1, 41)[:, None] + [50, 40]
    return similar_NK


def histories(length_B, width, first=1):
    """Row of length n: first, first + 1, ..., first + n - 1."""
    column_L = np.arange(width)
    return np.where(column_L < np.asarray(length_B)[:, None], column_L + first, 0).astype(np.int32)


def outcomes(operator, n, *, width=12, seed=0):
    """Frequencies of the results for a history 1..n."""
    length_B = np.full(DRAWS, n)
    view = as_view(operator, n_items=N_ITEMS, similar_NK=similar())
    history_BL, length_B, *_ = view(histories(length_B, width), length_B, np.random.default_rng(seed))
    found = collections.Counter(tuple(row[:m].tolist()) for row, m in zip(history_BL, length_B, strict=True))
    return {result: count / DRAWS for result, count in found.items()}


def assert_follows(found, expected):
    """The same results, and frequencies within five standard deviations."""
    assert set(found) == set(expected)
    assert math.isclose(sum(expected.values()), 1)
    for result, probability in expected.items():
        assert abs(found[result] - probability) < 5 * math.sqrt(probability / DRAWS), result


def evenly(results):
    """Probabilities of results that are listed as often as they are likely."""
    count = collections.Counter(map(tuple, results))
    return {result: times / len(results) for result, times in count.items()}


def starts(n, size, mode):
    """CoSeRec draws of randint(0, n - size - 1), which leaves the last start out."""
    return range(max(n - size, 1)) if mode == "as_released" else range(n - size + 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "rate"), [(1, 0.2), (3, 0.2), (5, 0.2), (5, 0.6), (7, 0.5), (4, 1.0)])
def test_crop_is_a_run_of_the_stated_length(n, rate, mode):
    own, size = list(range(1, n + 1)), int(rate * n)
    if size == 0:  # one random item, in both
        expected = [[item] for item in own]
    else:
        expected = [own[start : start + size] for start in starts(n, size, mode)]
    assert_follows(outcomes(functools.partial(crop, rate=rate, mode=mode), n), evenly(expected))


def test_crop_as_released_never_keeps_the_last_entry_and_the_paper_does():
    last = {
        mode: {result[-1] for result in outcomes(functools.partial(crop, rate=0.4, mode=mode), 5)} for mode in MODES
    }
    assert last == {"paper": {2, 3, 4, 5}, "as_released": {2, 3, 4}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "rate"), [(1, 0.7), (3, 0.3), (4, 0.5), (5, 0.7)])
def test_mask_hides_the_stated_number(n, rate, mode):
    expected = []
    for hidden in itertools.combinations(range(n), int(rate * n)):
        token = [N_ITEMS] if mode == "paper" else []
        expected.append(sum([token if i in hidden else [i + 1] for i in range(n)], []))
    assert_follows(outcomes(functools.partial(mask, rate=rate, mode=mode), n), evenly(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "rate"), [(1, 0.6), (4, 0.5), (5, 0.6), (6, 0.2), (3, 1.0)])
def test_reorder_permutes_one_block(n, rate, mode):
    own, size = list(range(1, n + 1)), int(rate * n)
    expected = [
        own[:start] + list(block) + own[start + size :]
        for start in starts(n, size, mode)
        for block in itertools.permutations(own[start : start + size])
    ]
    assert_follows(outcomes(functools.partial(reorder, rate=rate, mode=mode), n), evenly(expected))


@pytest.mark.parametrize(("n", "rate"), [(1, 0.1), (4, 0.1), (5, 0.4), (4, 1.0)])
def test_substitute_changes_the_stated_number_to_the_most_similar(n, rate):
    expected = [
        [i + 51 if i in changed else i + 1 for i in range(n)]
        for changed in itertools.combinations(range(n), max(1, int(rate * n)))
    ]
    assert_follows(outcomes(functools.partial(substitute, rate=rate), n), evenly(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "rate"), [(1, 0.4), (4, 0.4), (5, 0.4), (3, 1.0)])
def test_insert_puts_the_most_similar_before_its_anchor(n, rate, mode):
    expected = [
        sum([[i + 51, i + 1] if i in anchors else [i + 1] for i in range(n)], [])
        for anchors in itertools.combinations(range(n), max(1, int(rate * n)))
    ]
    assert_follows(outcomes(functools.partial(insert, rate=rate, mode=mode), n), evenly(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_insert_of_several_divides_them_among_positions_only_as_released(rate, mode):
    n, most, size = 4, 2, int(rate * 4)
    highest = max(1, most // size) if mode == "as_released" else most
    expected = []
    for anchors in itertools.combinations(range(n), size):
        for numbers in itertools.product(range(1, highest + 1), repeat=size):
            before = dict(zip(anchors, numbers, strict=True))
            expected.append(sum([[i + 51, i + 41][: before.get(i, 0)] + [i + 1] for i in range(n)], []))
    assert_follows(outcomes(functools.partial(insert, rate=rate, most=most, mode=mode), n), evenly(expected))


def test_insert_beyond_the_width_keeps_the_last():
    n = width = 4
    expected = []
    for anchors in itertools.combinations(range(n), 2):
        whole = sum([[i + 51, i + 1] if i in anchors else [i + 1] for i in range(n)], [])
        expected.append(whole[-width:])
    operator = functools.partial(insert, rate=0.5, mode="paper")
    assert_follows(outcomes(operator, n, width=width), evenly(expected))


def test_insert_of_more_than_are_similar_inserts_what_there_is():
    similar_NK = similar()
    similar_NK[2, 1] = 0
    view = as_view(functools.partial(insert, rate=1.0, most=5, mode="paper"), n_items=N_ITEMS, similar_NK=similar_NK)
    length_B = np.full(500, 2)
    found = {
        tuple(row[row > 0].tolist()) for row in view(histories(length_B, 12), length_B, np.random.default_rng(0))[0]
    }
    assert found == {(51, 1, 52, 2), (51, 41, 1, 52, 2)}


@pytest.mark.parametrize("n_items", [3, 4, 60])
def test_an_item_without_similar_ones_gives_way_to_any_other(n_items):
    similar_NK = np.zeros((n_items, 1), np.int32)
    view = as_view(functools.partial(substitute, rate=1.0), n_items=n_items, similar_NK=similar_NK)
    length_B = np.full(5000, 1)
    for own in (1, n_items - 1):
        history_BL, *_ = view(histories(length_B, 1, first=own), length_B, np.random.default_rng(0))
        assert set(history_BL[:, 0]) == set(range(1, n_items)) - {own}


def test_a_catalogue_of_one_item_has_no_other():
    view = as_view(functools.partial(substitute, rate=1.0), n_items=2, similar_NK=np.zeros((2, 1), np.int32))
    history_BL, length_B, *_ = view(np.ones((1, 2), np.int32), np.array([2]), np.random.default_rng(0))
    assert history_BL.tolist() == [[1, 1]]
    assert length_B.tolist() == [2]


def every_operator(mode):
    return {
        "unchanged": unchanged,
        "crop": functools.partial(crop, rate=0.4, mode=mode),
        "mask": functools.partial(mask, rate=0.4, mode=mode),
        "reorder": functools.partial(reorder, rate=0.6, mode=mode),
        "substitute": functools.partial(substitute, rate=0.3),
        "insert": functools.partial(insert, rate=0.5, most=2, mode=mode),
        "one_of": one_of([functools.partial(crop, rate=0.4, mode=mode), functools.partial(mask, rate=0.4, mode=mode)]),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(every_operator("paper")))
def test_views_are_left_aligned_and_follow_the_seed(name, mode):
    rng = np.random.default_rng(5)
    length_B = np.concatenate([[0, 1, 2, 9, 10], rng.integers(0, 11, 200)])
    before_BL = histories(length_B, 10)
    view = as_view(every_operator(mode)[name], n_items=N_ITEMS, similar_NK=similar())
    history_BL, viewed_B, *_ = view(before_BL, length_B, np.random.default_rng(1))
    assert history_BL.shape == before_BL.shape
    assert history_BL.dtype == np.int32
    np.testing.assert_array_equal(history_BL > 0, np.arange(10) < viewed_B[:, None])
    np.testing.assert_array_equal(viewed_B > 0, length_B > 0)
    np.testing.assert_array_equal(before_BL, histories(length_B, 10))  # the input is left alone
    again_BL, *_ = view(before_BL, length_B, np.random.default_rng(1))
    np.testing.assert_array_equal(history_BL, again_BL)
    if name != "unchanged":
        assert (view(before_BL, length_B, np.random.default_rng(2))[0] != history_BL).any()
    else:
        np.testing.assert_array_equal(history_BL, before_BL)


def test_no_rows_are_no_views():
    for operator in every_operator("paper").values():
        view = as_view(operator, n_items=N_ITEMS, similar_NK=similar())
        history_BL, length_B, *_ = view(np.zeros((0, 4), np.int32), np.zeros(0, np.int64), np.random.default_rng(0))
        assert history_BL.shape == (0, 4)
        assert length_B.shape == (0,)


def constant(column):
    """An operator that keeps one entry: tells which operator a row drew."""

    def operator(length_B, width, rng):
        edit = unchanged(length_B, width, rng)
        length_B = np.minimum(length_B, 1)
        return edit._replace(column_BL=np.where(np.arange(width) < length_B[:, None], column, 0), length_B=length_B)

    return operator


def test_one_of_draws_evenly():
    assert_follows(
        outcomes(one_of([constant(0), constant(1), constant(2)]), 3), {(1,): 1 / 3, (2,): 1 / 3, (3,): 1 / 3}
    )


def test_by_length_draws_of_the_subset_up_to_the_threshold():
    operator = by_length([constant(0)], [constant(1), constant(2)], threshold=3)
    assert_follows(outcomes(operator, 3), {(1,): 1})
    assert_follows(outcomes(operator, 4), {(2,): 1 / 2, (3,): 1 / 2})


def pairs(pair, n, width=6):
    length_B = np.full(DRAWS, n)
    views = operators.as_views(pair, n_items=N_ITEMS, similar_NK=similar())
    (first_BL, first_B, *_), (second_BL, second_B, *_) = views(
        histories(length_B, width), length_B, np.random.default_rng(0)
    )
    found = collections.Counter(
        (tuple(one[:n_one].tolist()), tuple(two[:n_two].tolist()))
        for one, n_one, two, n_two in zip(first_BL, first_B, second_BL, second_B, strict=True)
    )
    return {result: count / DRAWS for result, count in found.items()}


def test_two_different_never_coincide_and_independent_ones_do():
    three = [constant(0), constant(1), constant(2)]
    expected = {((i,), (j,)): 1 / 6 for i, j in itertools.permutations((1, 2, 3), 2)}
    assert_follows(pairs(two_different(three), 3), expected)
    expected = {((i,), (j,)): 1 / 9 for i, j in itertools.product((1, 2, 3), repeat=2)}
    assert_follows(pairs(independent(one_of(three)), 3), expected)


def test_two_different_leave_one_entry_alone():
    assert_follows(pairs(two_different([constant(0), constant(0)]), 1), {((1,), (1,)): 1})
    changes = [functools.partial(substitute, rate=1.0)] * 2
    assert_follows(pairs(two_different(changes), 1), {((1,), (1,)): 1})
    assert_follows(pairs(two_different(changes), 2), {((51, 52), (51, 52)): 1})


def test_an_operator_in_place_is_seen_by_the_second_view():
    """Masked in place, then cropped: the crop has the masks of the first view."""
    hide, cut = functools.partial(mask, rate=0.5, mode="paper"), functools.partial(crop, rate=0.5, mode="paper")
    token, own, runs = N_ITEMS, [1, 2], [[1], [2]]
    masked = [[token, 2], [1, token]]
    apart = [(view, run) for view in masked for run in runs] + [(run, view) for view in masked for run in runs]
    assert_follows(pairs(two_different([hide, cut]), 2), evenly([(tuple(a), tuple(b)) for a, b in apart]))
    through = [(view, [view[i]]) for view in masked for i in range(len(own))]
    through += [(run, view) for view in masked for run in runs]
    found = pairs(two_different([hide, cut], in_place=(True, False)), 2)
    assert_follows(found, evenly([(tuple(a), tuple(b)) for a, b in through]))


def test_rates_may_differ_by_row():
    length_B = np.full(2000, 5)
    rate_B = np.where(np.arange(2000) % 2 == 0, 0.2, 0.8)
    edit = substitute(length_B, 5, np.random.default_rng(0), rate=rate_B)
    np.testing.assert_array_equal((edit.origin_BL >= 0).sum(axis=1), np.where(rate_B == 0.2, 1, 4))
    edit = reorder(length_B, 5, np.random.default_rng(0), rate=rate_B, mode="paper")
    moved_B = (edit.column_BL != np.arange(5)).sum(axis=1)
    assert moved_B[rate_B == 0.2].max() == 0
    assert moved_B[rate_B == 0.8].max() == 4


def test_prepend_keeps_the_last_and_leaves_an_empty_history():
    extra_BM = np.array([[7, 8, 9], [7, 8, 9], [7, 8, 9]])
    column_BM = np.array([[1, -1, 0], [-1, 0, -1], [0, 0, 0]])
    history_BL, length_B, column_BL, _ = operators.prepend(
        extra_BM, column_BM, np.array([3, 2, 3]), histories([2, 1, 0], 4), np.array([2, 1, 0])
    )
    assert column_BL.tolist() == [[-1, 0, 0, 1], [-1, 0, 0, -1], [-1, -1, -1, -1]]
    assert history_BL.tolist() == [[8, 9, 1, 2], [7, 8, 1, 0], [0, 0, 0, 0]]
    assert length_B.tolist() == [4, 3, 0]


@pytest.mark.parametrize("rate", [-0.1, 1.1, np.nan])
def test_a_rate_outside_0_to_1_is_refused(rate):
    for operator in (crop, mask, reorder, insert):
        with pytest.raises(ValueError, match="expected a rate from 0"):
            operator(np.array([3]), 3, np.random.default_rng(0), rate=rate, mode="paper")
    with pytest.raises(ValueError, match="substitute: expected a rate from 0"):
        substitute(np.array([3]), 3, np.random.default_rng(0), rate=rate)


def test_what_cannot_be_is_refused():
    rng, length_B = np.random.default_rng(0), np.array([3])
    for operator in (crop, mask, reorder, insert):
        with pytest.raises(ValueError, match="expected one of .*, found 'published'"):
            operator(length_B, 3, rng, rate=0.5, mode="published")
    with pytest.raises(ValueError, match="mask: expected a rate from 0 to below 1"):
        mask(length_B, 3, rng, rate=1.0, mode="paper")
    with pytest.raises(ValueError, match="insert: expected at least 1 item"):
        insert(length_B, 3, rng, rate=0.5, most=0, mode="paper")
    with pytest.raises(ValueError, match="expected at least 2 operators"):
        two_different([unchanged])
    for similar_NK in (None, np.zeros((9, 1), np.int32)):
        view = as_view(functools.partial(substitute, rate=0.5), n_items=N_ITEMS, similar_NK=similar_NK)
        with pytest.raises(ValueError, match="expected similar items of shape"):
            view(histories([3], 3), length_B, rng)
