"""The tables of the README are those of the committed results, and these say what the README claims."""

import json
import pathlib

import pytest

from marsjax import study
from marsjax.augmentation.methods import METHODS
from marsjax.evaluation import report

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
HEADLINE = "study/cells/headline"
QUALITY = {"method", "dataset", "inputs", "split", "group", "metric", "mean", "std", "seeds", "p_vs_base"}
PERFORMANCE = {"question", "case", "ours", "other", "other_name", "ratio", "target", "met"}


def read(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["synthetic", "ml1m", HEADLINE])
def test_readme_quotes_the_committed_results(name):
    results = read(name)
    assert report.as_short_markdown(results["rows"]).strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/what_works.md"])
@pytest.mark.parametrize(
    ("method", "group", "metric"),
    [
        ("mars_short_posterior", "low", "auc"),
        ("mars_short_posterior", "low", "gauc"),
        ("mars_short_posterior", "all", "auc"),
        ("mars_short_graded_posterior", "low", "auc"),
        ("mars_short_graded_posterior", "low", "gauc"),
        ("mars_short_graded_posterior", "all", "auc"),
    ],
)
def test_the_pages_quote_what_was_gained(page, method, group, metric):
    row = difference(HEADLINE, method, group, metric)
    text = " ".join((ROOT / page).read_text().split())
    assert f"{row['difference']:.4f}" in text
    assert f"[{row['low']:+.4f}, {row['high']:+.4f}]" in text


@pytest.mark.parametrize("page", ["README.md", "docs/what_works.md"])
@pytest.mark.parametrize(("group", "metric"), [("low", "auc"), ("low", "gauc"), ("all", "auc")])
def test_the_pages_quote_what_was_gained_over_a_base_that_reads_grades(page, group, metric):
    row = difference("study/cells/graded", "mars_short_graded_posterior", group, metric)
    text = " ".join((ROOT / page).read_text().split())
    assert f"{row['difference']:.4f} {metric.upper()} [{row['low']:+.4f}, {row['high']:+.4f}]" in text


def test_the_page_of_findings_quotes_what_grades_as_inputs_add():
    cells = "study/cells/graded", "study/cells/search_sparse5_strong"
    rows = [difference(cell, "mars_short_graded_posterior", "low") for cell in cells]
    both, alone = (f"{row['mean']:.4f}" for row in rows)
    assert [row["seeds"] for row in rows] == [5, 5]
    text = " ".join((ROOT / "docs" / "what_works.md").read_text().split())
    assert f"{both} AUC for the sparse users with both, {alone} with the expectation alone" in text
    assert abs(rows[0]["mean"] - rows[1]["mean"]) < max(row["std"] for row in rows)  # nothing that seeds do not make


@pytest.mark.parametrize("group", ["low", "all"])
def test_the_page_of_findings_quotes_what_is_gained_over_ids(group):
    text = " ".join((ROOT / "docs" / "what_works.md").read_text().split())
    row = difference("study/cells/table3_complete_ids", "mars_posterior", group)
    assert f"[{row['low']:+.4f}, {row['high']:+.4f}]" in text
    rows = [
        difference(f"study/cells/table3_{name}_ids", "mars_posterior", "low")
        for name in ("complete", "without_text", "without_image", "without_Stein")
    ]
    assert [f"{row['difference']:.4f}" in text for row in rows[:3]] == [True] * 3
    assert rows[3]["difference"] >= rows[0]["difference"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results" / "study" / "cells").glob("alignment_*")))
def test_the_page_of_findings_quotes_how_the_space_is_made(path):
    (variant,) = [
        cell.label for part in study.full(frozenset(METHODS)) for cell in part.cells if cell.name == path.stem
    ]
    rows = [difference(f"study/cells/{path.stem}", method, "low") for method in ("mars", "mars_posterior")]
    assert table_row(variant, [gained(row) for row in rows]) in (ROOT / "docs" / "what_works.md").read_text()


def test_the_page_of_findings_quotes_what_lending_costs():
    row = difference("study/cells/figure4_filter_strong", "mars", "low")
    text = (ROOT / "docs" / "what_works.md").read_text()
    assert f"{row['difference']:+.4f} AUC [{row['low']:+.4f}, {row['high']:+.4f}]" in text


def test_the_page_of_findings_quotes_what_permuted_labels_tell():
    rows = read("study/cells/leak_log_strong")["rows"]
    text = " ".join((ROOT / "docs" / "what_works.md").read_text().split())
    for group, said in (("low", "from {} to {} for low-active users"), ("all", "from {} to {} over all")):
        means = [row["mean"] for row in rows if (row["group"], row["metric"]) == (group, "auc")]
        assert said.format(f"{min(means):.4f}", f"{max(means):.4f}") in text
    (vote,) = (row for row in rows if (row["method"], row["group"], row["metric"]) == ("mars_vote", "low", "gauc"))
    assert f"{vote['mean']:.3f} ± {vote['std']:.3f} for `mars_vote`" in text


def test_the_page_of_findings_quotes_what_donors_lend():
    prefix, whole = read("leak")["rows"]
    text = " ".join((ROOT / "docs" / "what_works.md").read_text().split())
    assert f"to {prefix['lent_train']:.1%} of the training rows and {prefix['lent_test']:.1%} of the test rows" in text
    assert f"an AUC of {prefix['ours']:.3f} on the first and of {prefix['other']:.3f} on the second" in text
    assert f"to {whole['lent_train']:.1%} of the training rows, with an AUC of {whole['ours']:.3f}" in text
    assert f"{prefix['gap_sd']:.3f} and {whole['gap_sd']:.3f} are the standard deviations of the difference" in text


@pytest.mark.parametrize(
    "name", ["serving_faults", "serving_faults_redis", "serving_swaps", "serving_soak", "serving_soak_redis"]
)
def test_no_fault_lost_anything(name):
    rows = read(name)["rows"]
    assert rows
    assert [row["case"] for row in rows if row["met"] is False] == []


@pytest.mark.parametrize("name", ["serving_soak", "serving_soak_redis"])
def test_the_page_of_serving_quotes_the_soak(name):
    memory, rate, _ = read(name)["rows"]
    text = (ROOT / "docs" / "serving.md").read_text()
    assert f"| {', '.join(map(str, memory['mebibytes']))} |" in text
    assert f"{rate['ours']:,.0f}" in text


def test_the_plan_for_many_users_is_made_of_the_committed_rates():
    rows, text = read("serving_rebuild")["rows"], (ROOT / "docs" / "serving.md").read_text()
    used = ("read into shards", "by one process", "into the store", "bytes of", "into an index")
    found = [f"{row['ours']:,.0f}" for row in rows if any(words in row["question"] for words in used)]
    assert len(found) == 6
    assert [figure for figure in found if figure not in text] == []
    assert all(row["met"] is not False for row in rows)  # Ray's files are those of one process


@pytest.mark.parametrize("metric", ["auc", "gauc"])
@pytest.mark.parametrize("events", [3, 5, 10, 20])
def test_the_page_of_findings_quotes_what_short_histories_tell(events, metric):
    rows = {
        row["method"]: row
        for row in read("short_histories")["rows"]
        if (row["dataset"], row["metric"]) == (f"ml1m_sparse{events}", metric)
    }
    cells = [str(events), f"{rows['base']['mean']:.4f}"]
    for method in ("base_graded", "collaborative_posterior", "collaborative_graded_posterior"):
        added = rows[method]
        cells.append(f"{added['difference']:+.4f} [{added['low']:+.4f}, {added['high']:+.4f}]")
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "what_works.md").read_text()


@pytest.mark.parametrize("method", ["base", "mars", "mars_short_posterior"])
@pytest.mark.parametrize("features", ["plain", "encoded", "shuffled"])
def test_the_page_of_features_quotes_the_committed_results(features, method):
    rows = {(r["method"], r["group"], r["metric"]): r for r in read(f"ml1m_sparse5_{features}")["rows"]}
    cells = [method]
    for key in (("low", "auc"), ("low", "gauc"), ("all", "auc")):
        row = rows[method, *key]
        gain = "" if method == "base" else f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        cells += [f"{row['mean']:.4f}", gain]
    assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "features.md").read_text()


@pytest.mark.parametrize("clients", [1, 8, 32])
@pytest.mark.parametrize(
    ("name", "cases", "over"),
    [
        ("serving_load", ("without", "warm", "cold"), "p50 over that without augmentation"),
        ("serving_backends", ("marsjax", "torch", "onnx"), "p50, over that of marsjax"),
    ],
)
def test_the_page_of_serving_quotes_the_committed_results(name, cases, over, clients):
    rows = {(row["question"], row["case"]): row for row in read(name)["rows"]}
    for case in cases:
        found = {q: row for (q, of), row in rows.items() if of.startswith(f"{case}, {clients} client")}
        cells = [case, str(clients)]
        for question in ("p50, ms", "p99, ms"):
            low, high = found[question]["quartiles"]
            cells.append(f"{found[question]['ours']:.1f} [{low:.1f}, {high:.1f}]")
        cells.append(f"{found['requests a second']['ours']:.0f}")
        cells.append(f"{found['processor time of the service, ms a request']['ours']:.1f}")
        cells.append(f"{found[over]['ours']:.2f}" if over in found else "")
        assert f"| {' | '.join(cells)} |" in (ROOT / "docs" / "serving.md").read_text()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_have_the_keys_that_other_programs_read(path):
    results = json.loads(path.read_text())
    assert {"command", "commit", "machine", "wall_seconds", "rows"} <= set(results)
    assert "+changes" not in results["commit"]
    for row in results["rows"]:
        assert set(row) >= (QUALITY if "method" in row else PERFORMANCE)
        assert row.get("method", "base") in {*METHODS, "base_graded", "best_possible", "full_history"}


def difference(name, method, group, metric="auc"):
    (row,) = [
        row for row in read(name)["rows"] if (row["method"], row["group"], row["metric"]) == (method, group, metric)
    ]
    return row


def compared(name, method, group, metric="auc"):
    """By the other method, the rows that compare `method` with it."""
    return {
        row["against"]: row
        for row in read(name)["comparisons"]
        if (row["method"], row["group"], row["metric"]) == (method, group, metric)
    }


def test_mars_wins_on_the_planted_data_by_more_than_the_spread_over_seeds():
    for group in ("all", "low"):
        mars, base = (difference("synthetic", method, group) for method in ("mars", "base"))
        assert mars["seeds"] >= 3
        assert mars["mean"] - base["mean"] > max(mars["std"], base["std"])


def test_the_gain_vanishes_where_content_tells_nothing():
    assert difference("synthetic_shuffled", "mars", "low")["difference"] < 0


def test_the_posterior_does_not_trust_content_that_tells_nothing():
    found, without = (
        difference("synthetic_shuffled", f"{name}_posterior", "low") for name in ("mars", "collaborative")
    )
    assert abs(found["difference"] - without["difference"]) < 0.002


def test_the_short_posterior_of_grades_wins_for_sparse_users():
    won = difference(HEADLINE, "mars_short_graded_posterior", "low")
    assert won["seeds"] >= 10
    assert won["low"] > 0
    assert won["p_t_test"] < 0.05
    others = {row["method"] for row in read(HEADLINE)["rows"]} - {"full_history", "mars_short_graded_posterior"}
    assert all(won["mean"] > difference(HEADLINE, method, "low")["mean"] for method in others)


def test_the_base_is_strong_on_movielens():
    base = difference("ml1m", "base", "all")
    assert base["seeds"] >= 5
    assert base["mean"] >= 0.785


def table_row(label, cells):
    return f"| {label} | {' | '.join(cells)} |"


def gained(row):
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


TABLE_2 = {
    "controls_and_MARS": (
        "random_donor", "popular_items", "collaborative_posterior", "short_histories", "mars", "mars_posterior",
        "mars_graded_posterior",
    ),
    "at_MARS_s_number_of_items": (*study.BUDGET, "mars", "mars_posterior"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "method"), [(cell, method) for cell, methods in TABLE_2.items() for method in methods]
)
def test_readme_quotes_table_2(cell, method):
    cells = [f"study/cells/table2_{cell}_{inputs}" for inputs in study.BASES]
    found = [gained(difference(name, method, group)) for name in cells for group in ("low", "all")]
    assert table_row(method, found) in (ROOT / "README.md").read_text()


def test_the_posterior_is_above_the_baselines_over_ids():
    text = " ".join((ROOT / "README.md").read_text().split())
    for group, quoted in (("low", "AUC for low-active users"), ("all", "over all, or more")):
        against = compared("study/cells/table2_at_MARS_s_number_of_items_ids", "mars_posterior", group)
        rows = [against[name] for name in study.BUDGET]
        assert max(row["p_holm"] for row in rows) < 0.05
        assert f"{min(row['difference'] for row in rows):.4f} {quoted}" in text


@pytest.mark.parametrize("metric", ["auc", "gauc"])
@pytest.mark.parametrize("events", [3, 5, 10, 20])
def test_the_page_of_findings_quotes_the_sparse_curve(events, metric):
    cell = f"study/cells/sparse{events}_strong"
    followed = ("mars", "short_histories", "mars_short_posterior", "mars_short_graded_posterior")
    rows = [difference(cell, method, "low", metric) for method in followed]
    recovered = rows[-1]["difference"] / difference(cell, "full_history", "low", metric)["difference"]
    base = f"{difference(cell, 'base', 'low', metric)['mean']:.4f}"
    written = table_row(events, [base, *map(gained, rows), f"{recovered:.0%}"])
    assert written in (ROOT / "docs" / "what_works.md").read_text()


@pytest.mark.parametrize("users", [300, 1000, 3000])
def test_the_page_of_findings_quotes_what_content_adds_with_few_donors(users):
    text = " ".join((ROOT / "docs" / "what_works.md").read_text().split())
    for group in ("low", "all"):
        row = compared(f"study/cells/donors_{users}_strong", "mars_posterior", group)["collaborative_posterior"]
        assert gained(row).removeprefix("+") in text
