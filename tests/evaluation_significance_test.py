"""Tests of significance: resampling equals repeating rows, and luck is called luck."""

import numpy as np
import pytest
import scipy.stats

from marsjax.evaluation import significance
from marsjax.evaluation.metrics import auc, gauc


def data(users=60, rows=6, strength=1.0, seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows)
    label = rng.integers(0, 2, len(user)).astype(np.float32)
    return user, label, label * strength + rng.normal(size=len(user)), rng


@pytest.mark.parametrize("metric", ["auc", "gauc"])
def test_weights_equal_repeated_users(metric):
    """The metric under user counts is the metric of rows literally repeated, each copy a user of its own."""
    user, label, score, rng = data()
    score_SB = np.round(np.stack([score, rng.normal(size=len(score))]), 1)  # ties
    count_RU = rng.integers(0, 4, (3, 60)).astype(np.float32)
    found = significance.bootstrap(user, label, score_SB, count_RU, metric=metric)
    for r in range(3):
        index = np.concatenate([np.flatnonzero(user == u) for u in range(60) for _ in range(int(count_RU[r, u]))])
        copy = np.repeat(np.arange(len(index) // 6), 6)
        expected = [
            auc(label[index], score[index]) if metric == "auc" else gauc(copy, label[index], score[index]).value
            for score in score_SB
        ]
        assert found[r] == pytest.approx(np.mean(expected), abs=1e-12)


def counted(user, label, score, count):
    """The definition under user counts: every pair of rows of both classes counts as often as its users, multiplied."""
    right = (score[:, None] > score) + 0.5 * (score[:, None] == score)
    weight = (label[:, None] > label) * count[user][:, None] * count[user]
    return (weight * right).sum() / weight.sum() if weight.any() else np.nan


@pytest.mark.parametrize("ties", [2, 20, 10**6])
def test_every_resample_equals_counting_pairs(ties):
    """Many resamples, that is several blocks of them; users have few rows and some no row of one class."""
    rng = np.random.default_rng(ties)
    user = np.unique(rng.integers(0, 40, 70), return_inverse=True)[1]
    label, score = rng.integers(0, 2, 70).astype(np.float32), rng.integers(0, ties, 70)
    count_RU = significance.draw_users(user.max() + 1, n_resamples=4000, seed=0)
    found = significance.bootstrap(user, label, score[None], count_RU, metric="auc")
    for r in [0, 1, 2, *rng.integers(0, 4001, 50), 4000]:
        assert found[r] == pytest.approx(counted(user, label, score, count_RU[r].astype(np.float64)), abs=1e-12)
    assert found[0] == pytest.approx(auc(label, score), abs=1e-12)


def test_drawn_users_are_a_sample_of_the_same_size():
    count_RU = significance.draw_users(50, n_resamples=400, seed=1)
    assert count_RU.shape == (401, 50)
    np.testing.assert_array_equal(count_RU[0], 1)
    np.testing.assert_array_equal(count_RU.sum(axis=1), 50)
    assert count_RU[1:].var() == pytest.approx(1 - 1 / 50, rel=0.05)  # multinomial: n p (1 - p) with p = 1 / n
    np.testing.assert_array_equal(count_RU, significance.draw_users(50, n_resamples=400, seed=1))
    assert not np.array_equal(count_RU, significance.draw_users(50, n_resamples=400, seed=2))


@pytest.mark.parametrize("metric", ["auc", "gauc"])
def test_resamples_without_both_classes_are_undefined(metric):
    """Users 0 and 1 have one class each, user 2 both: what is drawn decides."""
    user, label = np.array([0, 1, 2, 2]), np.array([1, 0, 1, 0])
    count_RU = np.array([[1, 1, 1], [3, 0, 0], [0, 3, 0], [0, 0, 3], [2, 1, 0]], np.float32)
    found = significance.bootstrap(user, label, np.array([[0.1, 0.5, 0.9, 0.2]]), count_RU, metric=metric)
    expected = {"auc": [2 / 4, np.nan, np.nan, 1, 0], "gauc": [1, np.nan, np.nan, 1, np.nan]}[metric]
    np.testing.assert_allclose(found, expected)


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="found 'logloss'"):
        significance.paired_bootstrap([0, 0], [0, 1], [0.1, 0.2], [0.2, 0.1], metric="logloss", n_resamples=1)


@pytest.mark.parametrize("metric", ["auc", "gauc"])
def test_a_method_against_itself_is_no_difference(metric):
    user, label, score, _ = data()
    found = significance.paired_bootstrap(user, label, score, score, metric=metric, n_resamples=200)
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("metric", ["auc", "gauc"])
def test_a_planted_difference_is_found(metric):
    user, label, good, rng = data(users=200, strength=1.0)
    bad = label * 0.3 + rng.normal(size=len(label))
    found = significance.paired_bootstrap(user, label, np.stack([good, good]), np.stack([bad, bad]), metric=metric)
    assert found.difference > 0.1
    assert found.low > 0
    assert found.p_value < 0.01
    turned = significance.paired_bootstrap(user, label, bad, good, metric=metric)
    assert turned.difference == pytest.approx(-found.difference)


def test_p_values_of_no_difference_are_spread():
    """Under the null about a tenth of the p-values lie below 0.1."""
    p = []
    for seed in range(120):
        user, label, _, rng = data(users=80, rows=4, seed=seed)
        first, second = rng.normal(size=(2, len(label)))
        p.append(significance.paired_bootstrap(user, label, first, second, n_resamples=100, seed=seed).p_value)
    assert 0.02 < np.mean(np.array(p) < 0.1) < 0.22


@pytest.mark.parametrize("wins", [11, 12, 13, 14, 15])
def test_p_value_and_interval_equal_the_binomial(wins):
    """25 users with one pair each: one method ranks `wins` pairs right and the other those that are left.

    So the difference of a resample is (2 X - 25) / 25 with X of Bin(25, wins / 25), and p is twice its smaller tail.
    """
    n = 25
    user, label = np.repeat(np.arange(n), 2), np.tile([0.0, 1.0], n)
    right = np.repeat(np.arange(n) < wins, 2)
    first = np.where(right, label, -label)
    found = significance.paired_bootstrap(user, label, first, -first, metric="gauc", n_resamples=4000)
    assert found.difference == pytest.approx((2 * wins - n) / n)
    drawn = scipy.stats.binom(n, wins / n)
    assert found.p_value == pytest.approx(2 * min(drawn.cdf(n // 2), drawn.sf(n // 2)), rel=0.15)
    expected = (2 * drawn.ppf([0.025, 0.975]) - n) / n
    np.testing.assert_allclose([found.low, found.high], expected, atol=1e-6)


def test_one_class_has_no_difference():
    found = significance.paired_bootstrap(np.arange(4), np.ones(4), np.arange(4.0), np.arange(4.0), n_resamples=10)
    assert np.isnan(found.difference)


def test_t_test_equals_scipy():
    a, b = np.array([0.71, 0.72, 0.735, 0.70]), np.array([0.70, 0.715, 0.72, 0.705])
    assert significance.t_test_paired(a, b) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert np.isnan(significance.t_test_paired([0.7], [0.6]))
    assert significance.t_test_paired([0.7, 0.7], [0.7, 0.7]) == 1.0


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.04 times 3, 2, 1, made monotone: 0.03, 0.04, 0.04."""
    np.testing.assert_allclose(significance.holm([0.04, 0.01, 0.02]), [0.04, 0.03, 0.04])
    np.testing.assert_allclose(significance.holm([0.6, 0.9]), [1.0, 1.0])
