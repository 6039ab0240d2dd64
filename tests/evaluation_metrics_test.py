"""Metrics against their definitions, pair by pair."""

import itertools

import numpy as np
import pytest

from marsjax.evaluation import metrics
from marsjax.records import Predictions


def pairs_auc(label, score):
    """The definition: the share of (positive, negative) pairs in the right order, ties counting half."""
    positives = [s for y, s in zip(label, score, strict=True) if y]
    negatives = [s for y, s in zip(label, score, strict=True) if not y]
    if not positives or not negatives:
        return np.nan
    return np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in itertools.product(positives, negatives)])


def sample(n=300, users=40, ties=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, users, n), rng.integers(0, 2, n).astype(np.float32), rng.integers(0, ties, n) / ties


@pytest.mark.parametrize("ties", [1, 2, 8, 10**6])
def test_auc_equals_counting_pairs(ties):
    _, label, score = sample(ties=ties)
    assert metrics.auc(label, score) == pytest.approx(pairs_auc(label, score), abs=1e-12)


def test_auc_of_known_orders():
    assert metrics.auc([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]) == 1.0
    assert metrics.auc([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4]) == 0.0
    assert metrics.auc([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]) == 0.5
    # Pairs (0.2, 0.1) right, (0.2, 0.4) wrong, (0.4, 0.1) right, (0.4, 0.4) tied: 2.5 of 4.
    assert metrics.auc([1, 1, 0, 0], [0.2, 0.4, 0.1, 0.4]) == 0.625


def test_auc_is_invariant_under_monotone_transforms_and_permutations():
    _, label, score = sample(ties=50)
    order = np.random.default_rng(1).permutation(len(label))
    value = metrics.auc(label, score)
    assert metrics.auc(label, np.exp(3 * score) - 7) == pytest.approx(value, abs=1e-12)
    assert metrics.auc(label[order], score[order]) == pytest.approx(value, abs=1e-12)
    assert metrics.auc(label, -score) == pytest.approx(1 - value, abs=1e-12)


@pytest.mark.parametrize("label", [[], [1, 1], [0]])
def test_auc_without_both_classes_is_undefined(label):
    assert np.isnan(metrics.auc(label, np.zeros(len(label))))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="found 2 that are not, the first in row 1"):
        metrics.auc([0, 1, 1], [0.1, np.nan, np.inf])


@pytest.mark.parametrize("weight", ["rows", "positives", "uniform"])
@pytest.mark.parametrize("single_class", ["drop", "zero", "half"])
def test_gauc_equals_loop_over_users(weight, single_class):
    user, label, score = sample(users=120)
    total = mass = counted = dropped = 0
    for u in np.unique(user):
        mine = user == u
        value = pairs_auc(label[mine], score[mine])
        if np.isnan(value) and single_class == "drop":
            dropped += 1
            continue
        value = {"zero": 0.0, "half": 0.5}.get(single_class) if np.isnan(value) else value
        w = {"rows": mine.sum(), "positives": label[mine].sum(), "uniform": 1}[weight]
        total, mass, counted = total + w * value, mass + w, counted + 1
    found = metrics.gauc(user, label, score, weight=weight, single_class=single_class)
    assert found.value == pytest.approx(total / mass, abs=1e-12)
    assert (found.users_counted, found.users_dropped) == (counted, dropped)


def test_gauc_conventions_of_other_systems():
    """Rows (AUC) 4 (1.0), 2 (0.0), 3 of one class: FuxiCTR, RecBole, an unweighted mean, LibRecommender."""
    user = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    label = np.array([1, 0, 0, 0, 1, 0, 1, 1, 1])
    score = np.array([0.9, 0.1, 0.2, 0.3, 0.1, 0.9, 0.5, 0.6, 0.7])
    assert metrics.gauc(user, label, score).value == pytest.approx((4 * 1.0 + 2 * 0.0) / 6)
    assert metrics.gauc(user, label, score, weight="positives").value == pytest.approx((1 * 1.0 + 1 * 0.0) / 2)
    assert metrics.gauc(user, label, score, weight="uniform").value == pytest.approx(0.5)
    assert metrics.gauc(user, label, score, single_class="zero").value == pytest.approx(4 / 9)


def test_gauc_on_one_row_a_user_is_undefined():
    """Leave-one-out leaves one test row a user: Eq. 19 has nothing to average."""
    found = metrics.gauc(np.arange(5), np.array([0, 1, 0, 1, 1]), np.linspace(0, 1, 5))
    assert np.isnan(found.value)
    assert (found.users_counted, found.users_dropped) == (0, 5)


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="found 'clicks'"):
        metrics.gauc([0], [1], [0.5], weight="clicks")


def test_logloss_and_calibration():
    label, score = np.array([1.0, 0.0]), np.array([0.8, 0.4])
    assert metrics.logloss(label, score) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert np.isfinite(metrics.logloss(np.array([1.0, 0.0]), np.array([0.0, 1.0])))
    # Two bins of two: mean scores 0.2 and 0.8, mean labels 0.5 and 1.0.
    error = metrics.calibration_error(np.array([0, 1, 1, 1]), np.array([0.1, 0.3, 0.7, 0.9]), n_bins=2)
    assert error == pytest.approx((abs(0.2 - 0.5) + abs(0.8 - 1.0)) / 2)
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    assert metrics.calibration_error(rng.random(len(p)) < p, p) < 0.01


def test_relative_improvement_is_of_what_is_above_a_coin():
    """Eq. 20 by hand; tests/evaluation_paper_test.py recomputes the paper's tables with it."""
    assert metrics.relative_improvement(0.6, 0.55) == pytest.approx(100)
    assert metrics.relative_improvement(0.525, 0.55) == pytest.approx(-50)
    assert np.isnan(metrics.relative_improvement(0.6, 0.5))


def test_summary_by_group():
    user, label, score = sample(n=600, users=240)  # some of one class
    group = (user % 3).astype(np.int8)
    found = metrics.summarise(Predictions(user, user, label, score.astype(np.float32), group))
    for number, name in enumerate(("low", "middle", "high")):
        mine = group == number
        assert found[name]["auc"] == pytest.approx(pairs_auc(label[mine], score[mine].astype(np.float32)))
        assert found[name]["rows"] == mine.sum()
        assert found[name]["users"] == len(np.unique(user[mine]))
        for metric, options in {
            "gauc": {},
            "gauc_positives": {"weight": "positives"},
            "gauc_uniform": {"weight": "uniform"},
            "gauc_zero": {"single_class": "zero"},
            "gauc_half": {"single_class": "half"},
        }.items():
            expected = metrics.gauc(user[mine], label[mine], score[mine].astype(np.float32), **options).value
            assert found[name][metric] == expected
    assert found["all"]["rows"] == 600
    nobody = metrics.summarise(Predictions(user, user, label, score.astype(np.float32), group * 0))
    assert np.isnan(nobody["high"]["auc"])
    assert all(np.isnan(nobody["high"][f"gauc{kind}"]) for kind in ("", "_positives", "_uniform", "_zero", "_half"))
    assert nobody["high"]["rows"] == nobody["high"]["users"] == nobody["high"]["gauc_users"] == 0
