"""The study is well formed, runs small, resumes, and its report tells what is missing."""

import json

import numpy as np
import pytest

from marsjax import pipeline, study
from marsjax.augmentation.methods import METHODS
from marsjax.configuration import load_config
from marsjax.data.permutation import permute_labels
from marsjax.data.sampling import sample_users
from marsjax.data.synthetic import make_synthetic
from marsjax.evaluation import study_page

KNOWN = frozenset(METHODS)
TINY = {
    "data.synthetic.n_users": "150",
    "data.synthetic.n_items": "60",
    "data.synthetic.n_types": "6",
    "data.synthetic.n_topics": "10",
    "data.synthetic.topics_per_type": "3",
    "data.synthetic.high_events": "30,40",
    "alignment.width": "8",
    "alignment.id_width": "4",
    "alignment.hidden": "4",
    "retrieval.backend": "exact",
    "ctr.embedding": "4",
    "ctr.tower": "8",
    "ctr.attention": "4",
    "ctr.content": "3",
    "ctr.cap": "25",
    "ctr.buckets": "25",
    "training.sharding": "single",
}


@pytest.fixture
def config():
    return load_config("configs/synthetic.py:1seed", TINY)


@pytest.mark.parametrize("plan", [study.full(KNOWN), study.quick(KNOWN)])
def test_cells_have_names_of_their_own_known_methods_and_known_keys(plan, config):
    cells = [cell for part in plan for cell in part.cells]
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({part.name for part in plan}) == len(plan)
    for part in plan:
        assert part.kind in study_page.DRAWN
    for cell in cells:
        assert "base" in cell.methods
        assert set(cell.methods) <= KNOWN
        assert len(set(cell.methods)) == len(cell.methods)
        pipeline.check(pipeline.with_changes(config, cell.changes))


def test_changes_leave_the_configuration_alone(config):
    changed = pipeline.with_changes(config, {"ctr.epochs": "7"})
    assert changed.ctr.epochs == 7
    assert config.ctr.epochs != 7
    with pytest.raises(ValueError, match="did you mean ctr.epochs"):
        pipeline.with_changes(config, {"ctr.epoch": "7"})


def test_unknown_parts_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="--parts: expected some of table1, .*found table9"):
        pipeline.reproduce(config, tmp_path, parts="table9")


def test_reproduce_writes_a_report_and_runs_nothing_twice(config, tmp_path, monkeypatch):
    few = study.Cell("few", "few", ("base", "mars_vote"), {"ctr.inputs": "strong"})
    sparse = study.Cell(
        "sparse3", "3 events", ("base",),
        {"split.sparse_fraction": "0.3", "split.sparse_events": "3", "split.kind": "last_fraction"}, 3.0,
    )  # fmt: skip
    never = study.Cell(
        "never", "1000 events", ("base",), {"split.sparse_fraction": "0.3", "split.sparse_events": "1000"}
    )
    plan = (
        study.Part("table1", "Table 1", "statistics", "Counts."),
        study.Part("few", "Methods", "methods", "Few.", (few,)),
        study.Part("sparse", "Sparse", "sparse", "Curve.", (sparse, never), "events"),
        study.Part("variants", "Variants", "variants", "Two.", (few._replace(name="other", changes={}),)),
        study.Part("cases", "Cases", "cases", "Users."),
    )
    monkeypatch.setattr(study, "full", lambda known: plan)
    config.unlock()
    config.ctr.epochs, config.evaluation.bootstrap, config.alignment.epochs = 1, 20, 0.2
    pipeline.reproduce(config, tmp_path, parts="table1,few,sparse,cases")
    page = (tmp_path / "report.html").read_text()
    text = (tmp_path / "report.md").read_text()
    for title in ("Table 1", "Methods", "Sparse", "Variants", "Cases"):
        assert title in page
        assert f"## {title}" in text
    assert "Not run yet: few" in text  # of the part that was not asked for
    assert "1000 events: cannot be run on these data" in text
    assert "of the loss recovered" in text
    found = json.loads((tmp_path / "cells" / "few.json").read_text())
    assert {"command", "commit", "machine", "wall_seconds", "rows", "comparisons", "validation"} <= set(found)
    assert {row["method"] for row in found["validation"]} == {"base", "mars_vote"}
    assert {row["method"] for row in found["rows"]} == {"base", "mars_vote", "best_possible"}
    assert "full_history" in {
        row["method"] for row in json.loads((tmp_path / "cells" / "sparse3.json").read_text())["rows"]
    }

    def no_training(*_, **__):
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(pipeline, "run_cell", no_training)
    pipeline.reproduce(config, tmp_path, parts="table1,few,sparse")


def test_a_sample_of_users_keeps_their_events_as_they_were():
    whole = make_synthetic(n_users=60, n_items=40, n_types=4, n_topics=8, topics_per_type=2, high_events=(20, 30))
    part = sample_users(whole, 20, seed=0)
    assert len(part.log.raw_user_U) == 20
    assert part.fingerprint != whole.fingerprint
    for number, name in enumerate(part.log.raw_user_U):
        (at,) = np.flatnonzero(whole.log.raw_user_U == name)
        mine = slice(part.log.start_U1[number], part.log.start_U1[number + 1])
        theirs = slice(whole.log.start_U1[at], whole.log.start_U1[at + 1])
        for field in ("item_E", "label_E", "time_E"):
            np.testing.assert_array_equal(getattr(part.log, field)[mine], getattr(whole.log, field)[theirs])
        np.testing.assert_array_equal(part.oracle_E[mine], whole.oracle_E[theirs])
    assert sample_users(whole, 60, seed=0) is whole


def test_permuted_labels_keep_every_user_s_count_and_nothing_else_changes():
    whole = make_synthetic(n_users=60, n_items=40, n_types=4, n_topics=8, topics_per_type=2, high_events=(20, 30))
    part = permute_labels(whole, seed=0)
    for user in range(60):
        mine = slice(whole.log.start_U1[user], whole.log.start_U1[user + 1])
        assert part.log.label_E[mine].sum() == whole.log.label_E[mine].sum()
    assert (part.log.label_E != whole.log.label_E).any()
    assert part.fingerprint != whole.fingerprint
    assert part.oracle_E is None
    np.testing.assert_array_equal(part.log.item_E, whole.log.item_E)
