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


def test_every_plot_of_the_committed_report_is_there():
    written = (STUDY / "report.md").read_text()
    named = {line.rpartition("(")[2].removesuffix(")") for line in written.splitlines() if line.startswith("![")}
    assert named == {path.name for path in STUDY.glob("*.svg")}


def test_there_is_a_committed_study():
    assert "headline" in FINISHED
    assert (STUDY / "report.md").exists()
