"""Reports: the keys that other programs read, and no comparison of different rows."""

import json

import numpy as np
import pytest

from marsjax.evaluation import report, significance
from marsjax.evaluation.metrics import auc
from marsjax.records import Predictions


def predictions(strength, seed, users=90, rows=4):
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users), rows)
    label = rng.integers(0, 2, len(user)).astype(np.float32)
    noise = np.random.default_rng(seed).normal(size=len(user))
    score = 1 / (1 + np.exp(-(strength * label + noise)))
    return Predictions(user, user + 1, label, score.astype(np.float32), (user % 3).astype(np.int8))


@pytest.fixture(scope="module")
def rows():
    results = {"base": [predictions(0.2, s) for s in (1, 2)], "mars": [predictions(1.5, s) for s in (1, 2)]}
    evaluation = report.evaluate(results, n_resamples=100)
    return report.quality_rows(evaluation, dataset="synthetic", inputs="ids", split="last_fraction")


def rows_of(results):
    return report.quality_rows(report.evaluate(results, n_resamples=20), dataset="d", inputs="ids", split="s")


def row_of(rows, **keys):
    (row,) = [row for row in rows if all(row[k] == v for k, v in keys.items())]
    return row


def test_rows_have_the_keys_and_values(rows):
    row = row_of(rows, method="mars", group="low", metric="auc")
    each = []
    for seed in (1, 2):
        p = predictions(1.5, seed)
        each.append(auc(p.label_B[p.group_B == 0], p.score_B[p.group_B == 0]))
    assert row["mean"] == pytest.approx(np.mean(each))
    assert row["std"] == pytest.approx(np.std(each, ddof=1))
    assert (row["seeds"], row["dataset"], row["inputs"], row["split"]) == (2, "synthetic", "ids", "last_fraction")
    base = row_of(rows, method="base", group="low", metric="auc")
    assert base["p_vs_base"] is None
    assert row["difference"] == pytest.approx(row["mean"] - base["mean"])
    assert row["low"] < row["difference"] < row["high"]
    assert row["p_vs_base"] < 0.05
    assert row["rela_impr"] == pytest.approx(((row["mean"] - 0.5) / (base["mean"] - 0.5) - 1) * 100)


def test_different_rows_are_refused():
    results = {"base": [predictions(0.2, 1)], "mars": [predictions(0.2, 1, users=30)]}
    with pytest.raises(ValueError, match="mars: expected predictions on the same rows"):
        report.evaluate(results)


def test_tables(rows):
    text = report.as_table(rows)
    assert "mars" in text
    assert "360 test rows, 120 of low-active users" in text
    assert "fewer than 5 seeds: no claim" in text
    mars = row_of(rows, method="mars", group="low", metric="auc")
    assert f"p {mars['p_vs_base']:.3f}, t {mars['p_t_test']:.3f}" in text
    for markdown in (report.as_markdown(rows), report.as_short_markdown(rows)):
        assert markdown.count("\n| ") == 4
    assert max(map(len, text.splitlines()[2:])) < 180  # fits a wide terminal
    json.dumps(rows, allow_nan=False)


def test_five_seeds_are_enough_for_a_claim():
    results = {name: [predictions(s, seed) for seed in range(5)] for name, s in (("base", 0.2), ("mars", 1.5))}
    rows = rows_of(results)
    assert "no claim" not in report.as_table(rows)


def test_mars_is_compared_with_every_other_method_that_lends():
    strengths = {"base": 0.2, "best_possible": 3.0, "random_donor": 0.3, "popular_items": 1.4, "mars": 1.5}
    results = {name: [predictions(strength, s) for s in (1, 2)] for name, strength in strengths.items()}
    evaluation = report.evaluate(results, n_resamples=200)
    compared = report.comparisons(evaluation)
    assert {row["against"] for row in compared} == {"random_donor", "popular_items"}
    for metric in ("auc", "gauc"):
        for group in ("all", "low"):
            family = [row for row in compared if (row["metric"], row["group"]) == (metric, group)]
            adjusted = significance.holm([row["p"] for row in family])
            np.testing.assert_allclose([row["p_holm"] for row in family], adjusted)
    (row,) = [r for r in compared if (r["against"], r["metric"], r["group"]) == ("random_donor", "auc", "all")]
    aucs = {n: np.mean([auc(p.label_B, p.score_B) for p in results[n]]) for n in ("mars", "random_donor")}
    assert row["difference"] == pytest.approx(aucs["mars"] - aucs["random_donor"])
    rows = report.quality_rows(evaluation, dataset="d", inputs="ids", split="s")
    assert "| mars minus |" in report.as_markdown(rows, compared)
    assert report.comparisons(report.evaluate({"base": results["base"]})) == []


@pytest.mark.parametrize("metric", ["auc", "gauc"])
@pytest.mark.parametrize("group", [None, 0, 1])
def test_shared_resamples_are_those_of_each_pair(metric, group):
    """What is drawn once for all methods gives what a bootstrap of the two methods alone gives."""
    strengths = {"base": 0.2, "random_donor": 0.3, "mars": 1.5}
    results = {name: [predictions(strength, s) for s in (1, 2)] for name, strength in strengths.items()}
    evaluation = report.evaluate(results, n_resamples=50, seed=3)
    rows = report.quality_rows(evaluation, dataset="d", inputs="ids", split="s")
    compared = report.comparisons(evaluation)
    name = "all" if group is None else ("low", "middle")[group]
    first = results["base"][0]
    keep = np.ones(len(first.user_B), bool) if group is None else first.group_B == group

    def expected(method, other):
        scores = (np.stack([p.score_B[keep] for p in results[m]]) for m in (method, other))
        user, label = first.user_B[keep], first.label_B[keep]
        return significance.paired_bootstrap(user, label, *scores, metric=metric, n_resamples=50, seed=3)

    for method in ("random_donor", "mars"):
        row = row_of(rows, method=method, group=name, metric=metric)
        found = [row[key] for key in ("difference", "low", "high", "p_vs_base")]
        np.testing.assert_allclose(found, expected(method, "base"), rtol=0, atol=1e-12)
    if group != 1:
        (row,) = [row for row in compared if (row["group"], row["metric"]) == (name, metric)]
        found = [row[key] for key in ("difference", "low", "high", "p")]
        np.testing.assert_allclose(found, expected("mars", "random_donor"), rtol=0, atol=1e-12)


def test_new_users_have_rows_where_there_are_some():
    """Empty groups of low, middle and high stay, undefined; new users, who are rare, are told of only if there are."""

    def with_groups(group):
        return {
            name: [predictions(s, 1)._replace(group_B=np.full(360, group, np.int8))]
            for name, s in (("base", 0.2), ("mars", 1.5))
        }

    rows = rows_of(with_groups(1))
    assert {row["group"] for row in rows} == {"all", "low", "middle", "high"}
    low = row_of(rows, method="mars", group="low", metric="auc")
    assert low["mean"] is None
    assert "difference" not in low
    rows = rows_of(with_groups(3))
    assert row_of(rows, method="mars", group="new", metric="auc")["difference"] > 0


def test_lent_items_are_counted_by_group():
    lent = predictions(1.5, 1)
    lent = lent._replace(lent_B=np.where(lent.group_B == 0, 7, 0))
    rows = rows_of({"base": [predictions(0.2, 1)], "mars": [lent]})
    assert row_of(rows, method="mars", group="low", metric="lent")["mean"] == 7
    assert row_of(rows, method="mars", group="all", metric="lent")["mean"] == pytest.approx(7 / 3)
    assert row_of(rows, method="base", group="low", metric="lent")["mean"] == 0


def test_undefined_values_are_null():
    one_each = {m: [predictions(0.2, 1, rows=1)] for m in ("base", "mars")}
    rows = rows_of(one_each)
    assert row_of(rows, method="mars", group="all", metric="gauc")["mean"] is None
    assert "gauc" not in report.as_table(rows)


def test_comparisons_of_two_methods_stand_in_tables_of_their_own():
    strength = (("base", 0.2), ("mars", 1.0), ("other", 0.5), ("vote", 1.5))
    results = {name: [predictions(s, seed) for seed in range(2)] for name, s in strength}
    evaluated = report.evaluate(results, n_resamples=50)
    compared = [row for name in ("mars", "vote") for row in report.comparisons(evaluated, method=name)]
    text = report.as_markdown(rows_of(results), compared)
    for name, others in (("mars", ("other", "vote")), ("vote", ("mars", "other"))):
        _, _, table = text.partition(f"| {name} minus |")
        lines = table.split("\n\n")[0].splitlines()[2:]
        assert [line.split("|")[1].strip() for line in lines] == list(others)
    differences = [row["difference"] for row in compared if row["method"] == "vote" and row["against"] == "mars"]
    assert all(f"{difference:+.4f}" in text for difference in differences)
