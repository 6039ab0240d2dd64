"""ItemCF-IUF against the sums written out pair by pair."""

import math

import numpy as np
import pytest

from marsjax.augmentation.item_similarity import most_similar


def brute_force(user_X, item_X, n_items, k, iuf):
    met = {}
    for user, item in zip(user_X.tolist(), item_X.tolist(), strict=True):
        met.setdefault(user, set()).add(item)
    users_N = [sum(item in items for items in met.values()) for item in range(n_items)]
    similar = []
    for i in range(n_items):
        weights = []
        for j in range(n_items):
            both = [items for items in met.values() if i in items and j in items]
            if i != j and both:
                total = sum(1 / math.log(1 + len(items)) if iuf else 1 for items in both)
                weights.append((-round(total / math.sqrt(users_N[i] * users_N[j]), 9), j))
        nearest = [j for _, j in sorted(weights)[:k]]
        similar.append(nearest + [0] * (k - len(nearest)))
    return similar


@pytest.mark.parametrize("iuf", [True, False])
@pytest.mark.parametrize("cells", [1, 60, 2**21])
def test_as_the_double_loop_has_it(iuf, cells):
    rng = np.random.default_rng(3)
    user_X = rng.integers(0, 25, 200) * 7 - 3  # users need not be numbered from 0
    item_X = rng.zipf(1.3, 200) % 18 + 1  # repeats, and a few popular ones
    similar_NK = most_similar(user_X, item_X, 20, k=6, iuf=iuf, cells=cells)
    assert similar_NK.dtype == np.int32
    assert similar_NK.tolist() == brute_force(user_X, item_X, 20, 6, iuf)


def test_a_user_of_many_items_says_less():
    """1 and 2 meet in a user of 2 items, 1 and 3 in one of 5: only with iuf is 2 nearer than 3."""
    user_X = np.array([0, 0, 1, 1, 1, 1, 1, 2])
    item_X = np.array([1, 2, 1, 3, 4, 5, 6, 2])
    assert most_similar(user_X, item_X, 8, k=1)[1] == 2
    # 2 has two users and 3 has one, which counts for 3.
    assert most_similar(user_X, item_X, 8, k=1, iuf=False)[1] == 3


def test_ties_go_to_the_lower_item_and_none_is_its_own_neighbour():
    similar_NK = most_similar(np.zeros(4, int), np.array([5, 3, 2, 4]), 7, k=5)
    assert similar_NK[5].tolist() == [2, 3, 4, 0, 0]
    assert similar_NK[2].tolist() == [3, 4, 5, 0, 0]
    assert not similar_NK[[0, 1, 6]].any()


@pytest.mark.parametrize("seed", range(8))
def test_sums_in_another_order_tie(seed):
    """2 and 3 each meet 1 in users of the same sizes, in opposite orders: the last digits must not decide."""
    sizes = np.random.default_rng(seed).integers(0, 30, 300).tolist()
    user_X, item_X, user = [], [], 0
    for item, order in ((2, sizes), (3, sizes[::-1])):
        for size in order:
            items = [1, item, *range(4, 4 + size)]
            user_X += [user] * len(items)
            item_X += items
            user += 1
    neighbours = most_similar(np.array(user_X), np.array(item_X), 40, k=39)[1].tolist()
    assert neighbours.index(3) == neighbours.index(2) + 1


def test_repeated_interactions_count_once():
    user_X, item_X = np.array([0, 0, 1, 1, 2]), np.array([1, 2, 1, 3, 3])
    once = most_similar(user_X, item_X, 5, k=2)
    np.testing.assert_array_equal(once, most_similar(np.tile(user_X, 3), np.tile(item_X, 3), 5, k=2))


def test_what_cannot_be_is_refused():
    one = np.ones(1, int)
    assert not most_similar(one[:0], one[:0], 4, k=2).any()
    with pytest.raises(ValueError, match="expected items in 1..3, found 4..4"):
        most_similar(one, 4 * one, 4, k=2)
    with pytest.raises(ValueError, match="expected items in 1..3, found 0..0"):
        most_similar(one, 0 * one, 4, k=2)
    with pytest.raises(ValueError, match="one user for each item"):
        most_similar(np.ones(2, int), one, 4, k=2)
    with pytest.raises(ValueError, match="k of at least 1"):
        most_similar(one, one, 4, k=0)
