"""The committed study is the plan's: its cells, its report, and what the pages say of it."""

import json

import pytest

from marsjax import cells, pipeline, study
from marsjax.augmentation.methods import METHODS
from marsjax.configuration import load_config
from marsjax.evaluation import page, study_page
from tests.readme_test import QUALITY, ROOT, read

STUDY = ROOT / "benchmarks" / "results" / "study"
PLAN = study.full(frozenset(METHODS))
CELLS = {cell.name: cell for part in PLAN for cell in part.cells}
FINISHED = sorted(path.stem for path in (STUDY / "cells").glob("*.json"))


@pytest.mark.parametrize("name", FINISHED)
def test_a_committed_cell_is_what_the_plan_asks_for(name):
    found, cell = read(f"study/cells/{name}"), CELLS[name]
    config = load_config("configs/ml1m.py:5seeds", {})
    planned = pipeline.with_changes(config, {**cell.changes, "evaluation.methods": ",".join(cell.methods)})
    assert found["config"] == json.loads(json.dumps(pipeline.of_learning(planned)))
    tried = {name: dict(changes) for name, changes in cell.settings.items()}
    assert found["fingerprint"] == cells.cell_key(found["data"], found["config"], tried)
    assert "+changes" not in found["commit"]
    assert {row["method"] for row in found["rows"]} - {"full_history"} == set(cell.methods)
    for row in found["rows"]:
        assert set(row) >= QUALITY
        assert row["seeds"] == len(planned.seeds)


def test_the_committed_report_holds_every_committed_cell():
    written = (STUDY / "report.md").read_text()
    results = {name: read(f"study/cells/{name}") for name in FINISHED}
    for part in PLAN:
        if part.cells and any(cell.name in results for cell in part.cells):
            section = study_page.section(part, results, {})
            drawn = page.to_markdown(page.Page("", (), (section,)), plots=lambda plot: "plot.svg")
            tables = [block for block in drawn.split("\n\n") if block.startswith("|")]
            assert tables
            assert [table for table in tables if table not in written] == []


@pytest.mark.parametrize("part", [part for part in PLAN if part.cells], ids=lambda part: part.name)
def test_every_part_of_the_plan_can_be_drawn(part):
    """With the results of other cells, where its own are not there: hours of trainings must not end in an error."""
    stand_in = read("study/cells/" + ("headline" if part.kind == "search" else "sparse5_strong"))
    drawn = study_page.section(part, {cell.name: stand_in for cell in part.cells}, {})
    written = page.to_html(page.Page("", (), (drawn,)))  # plots too
    assert "<table" in written
    assert "Not run yet" not in written


def test_no_auc_is_above_a_half_where_labels_are_permuted_over_the_log():
    """Pooled over some 13,000 test rows of low-active users, whose AUC has a standard error of 0.005, and over 202,000
    of all. GAUC may be anywhere (`tests/study_test.py` says why)."""
    rows = [row for row in read("study/cells/leak_log_strong")["rows"] if row["metric"] == "auc"]
    for group, noise in (("low", 0.015), ("all", 0.004)):
        found = {row["method"]: row["mean"] for row in rows if row["group"] == group}
        assert {"base", "mars", "mars_vote", "mars_posterior"} <= found.keys()
        assert {name: mean for name, mean in found.items() if abs(mean - 0.5) > noise} == {}


def test_every_plot_of_the_committed_report_is_there():
    written = (STUDY / "report.md").read_text()
    named = {line.rpartition("(")[2].removesuffix(")") for line in written.splitlines() if line.startswith("![")}
    assert named == {path.name for path in STUDY.glob("*.svg")}


def test_there_is_a_committed_study():
    assert "headline" in FINISHED
    assert (STUDY / "report.md").exists()
