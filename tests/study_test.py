"""The study is well formed, runs small, resumes, and its report tells what is missing."""

import json

import jax
import numpy as np
import pytest

from marsjax import cells as of_study
from marsjax import commands, jobs, pipeline, study
from marsjax.augmentation import posterior
from marsjax.augmentation.methods import METHODS
from marsjax.configuration import load_config
from marsjax.data import batches
from marsjax.data.permutation import permute_labels
from marsjax.data.sampling import sample_users
from marsjax.data.synthetic import make_synthetic
from marsjax.evaluation import report, study_page
from marsjax.evaluation.metrics import auc, gauc
from marsjax.evaluation.plots import svg
from marsjax.records import Predictions
from marsjax.stages import Stages

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


def test_a_cell_is_known_wherever_the_files_lie(config):
    def key(data="sum of the data", tried=None, **changes):
        changed = pipeline.with_changes(config, {name.replace("__", "."): value for name, value in changes.items()})
        return of_study.cell_key(data, pipeline.of_learning(changed), tried or {})

    assert key() == key(data__folder="elsewhere", data__text_features="other.npz", serving__port="9")
    others = [
        key("other data"),
        key(ctr__epochs="7"),
        key(data__strict="true"),
        key(tried={"one": {"ctr.epochs": "7"}}),
    ]
    assert len({key(), *others}) == 5


def test_unknown_parts_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="--parts: expected some of headline, .*found table9"):
        commands.reproduce(config, tmp_path, parts="table9")


def test_some_methods_alone_are_compared_with_the_base(config, tmp_path):
    wanted = frozenset({"base", "mars", "tfidf_donor"})
    compared = [set(cell.methods) for part in study.full(wanted) for cell in part.cells]
    assert set().union(*compared) == wanted
    assert all("base" in methods for methods in compared)
    assert commands._methods("mars,tfidf_donor") == wanted
    assert commands._methods("") == set(METHODS)
    with pytest.raises(ValueError, match="--methods: expected some of base, .*found mras"):
        commands.reproduce(config, tmp_path, methods="mars,mras")


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
    commands.reproduce(config, tmp_path, parts="table1,few,sparse3,never,cases")  # of a part, or of some cells
    page = (tmp_path / "report.html").read_text()
    text = (tmp_path / "report.md").read_text()
    for title in ("Table 1", "Methods", "Sparse", "Cases", "Not run yet"):
        assert title in page
        assert f"## {title}" in text
    assert "## Variants" not in text  # it was not asked for
    assert "\n`variants`: name some by" in text
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

    monkeypatch.setattr("marsjax.cells.run_cell", no_training)
    commands.reproduce(config, tmp_path, parts="table1,few,sparse")


def test_side_by_side_is_as_one_after_the_other(config, tmp_path, monkeypatch):
    changes = {"ctr.inputs": "strong", "split.sparse_fraction": "0.3", "split.sparse_events": "3"}
    cells = (
        study.Cell("few", "few", ("base", "mars_vote"), changes),
        study.Cell("suited", "suited", ("base", "mars"), {}, None, {"one": {}, "other": {"ctr.learning_rate": "0.01"}}),
        study.Cell("never", "never", ("base",), {"split.sparse_fraction": "0.3", "split.sparse_events": "1000"}),
    )
    plan = (study.Part("few", "Methods", "methods", "Few.", cells),)
    monkeypatch.setattr(study, "full", lambda known: plan)
    config.unlock()
    config.ctr.epochs, config.evaluation.bootstrap, config.alignment.epochs, config.seeds = 1, 20, 0.2, (0, 1)
    commands.reproduce(config, tmp_path / "two", processes=2)
    assert "never: cannot be run on these data" in (tmp_path / "two" / "report.md").read_text()
    with monkeypatch.context() as none_left:
        none_left.setattr(jobs, "run", lambda *_, **__: pytest.fail("a finished cell was run again"))
        none_left.setattr(pipeline, "train_stage", lambda *_: pytest.fail("a finished stage was run again"))
        commands.reproduce(config, tmp_path / "two", parts="suited", processes=2)
    commands.reproduce(config, tmp_path / "one")
    for name in ("few", "suited"):
        one, two = (json.loads((tmp_path / folder / "cells" / f"{name}.json").read_text()) for folder in ("one", "two"))
        kept = "rows", "comparisons", "search", "validation", "by_length"
        one, two = ([report[key] for key in kept] for report in (one, two))
        assert jax.tree.structure(one) == jax.tree.structure(two)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            # A product of two threads is summed in another order than one of a single thread.
            assert a == (b if isinstance(b, str | bool) else pytest.approx(b, rel=1e-6, abs=1e-7))


@pytest.mark.parametrize("processes", [1, 2])
def test_cells_that_ask_for_the_same_are_run_once(config, tmp_path, monkeypatch, processes):
    config.unlock()
    config.ctr.epochs, config.evaluation.bootstrap, config.seeds = 1, 20, (0,)
    by_default = {"alignment.beta": str(config.alignment.beta)}
    cells = [study.Cell(name, name, ("base",), changes) for name, changes in (("a", {}), ("b", by_default))]
    parts = tuple(study.Part(f"of_{cell.name}", "Methods", "methods", "One.", (cell,)) for cell in cells)
    monkeypatch.setattr(study, "full", lambda known: parts)
    planned_jobs, finish, finished = of_study.cell_jobs, of_study.finish_cell, []
    monkeypatch.setattr(of_study, "cell_jobs", lambda some: finished.extend(some) or planned_jobs(some))
    if processes == 1:
        monkeypatch.setattr(of_study, "finish_cell", lambda shelf, one: finished.append(one) or finish(shelf, one))
    commands.reproduce(config, tmp_path, parts="of_a", processes=processes)
    assert not (tmp_path / "cells" / "b.json").exists()  # it was not asked for
    commands.reproduce(config, tmp_path, processes=processes)
    assert len(finished) == 1
    assert (tmp_path / "cells" / "a.json").read_bytes() == (tmp_path / "cells" / "b.json").read_bytes()
    (tmp_path / "cells" / "a.json").unlink()
    (tmp_path / "cells" / "b.json").unlink()
    commands.reproduce(config, tmp_path, processes=processes)
    assert len(finished) == 2
    assert (tmp_path / "cells" / "a.json").read_bytes() == (tmp_path / "cells" / "b.json").read_bytes()


def test_opinions_are_learnt_once_for_all_methods_and_none_is_changed_by_that(config, tmp_path, monkeypatch):
    config = pipeline.with_changes(config, {"alignment.epochs": "0", "ctr.inputs": "strong"})
    context = pipeline.Context(config, pipeline.load(config), Stages(tmp_path), 0)
    other = context._replace(config=pipeline.with_changes(config, {"alignment.epochs": "0.2"}))
    learn, learnt = posterior.learn_opinions, []
    monkeypatch.setattr(posterior, "learn_opinions", lambda *a, **k: learnt.append(a) or learn(*a, **k))
    donation = pipeline.borrow(context)
    given = {
        name: pipeline.treat(context, donation, name)
        for name in ("mars_posterior", "mars_short_posterior", "collaborative_posterior")
    }
    pipeline.treat(other, pipeline.borrow(other), "collaborative_short_posterior")
    assert len(learnt) == 2  # with the aligned space and without it
    pipeline.treat(other, pipeline.borrow(other), "mars_posterior")
    assert len(learnt) == 3  # another space
    monkeypatch.setattr(pipeline, "opinions_stage", lambda stages, *a, **k: learn(*a, **k))
    for name, treatment in given.items():
        anew = pipeline.treat(context, donation, name)
        np.testing.assert_allclose(treatment.dense_EJ, anew.dense_EJ, atol=1e-5)
        assert treatment.opinions is not None


def test_a_search_chooses_on_validation_rows_and_trains_all_seeds_with_that(config, tmp_path, monkeypatch):
    """With a training that only draws scores: the better, the nearer the epochs are to what suits the method."""
    config.unlock()
    config.seeds, config.evaluation.bootstrap, config.evaluation.methods = (0, 1), 20, ("base", "mars")
    loaded, asked = pipeline.load(config), []
    loaded = loaded._replace(dataset=loaded.dataset._replace(oracle_E=None))

    def drawn(method, epochs, seed):
        rng = np.random.default_rng((len(method), epochs, seed))
        label_B = np.tile([0.0, 1.0], 200).astype(np.float32)
        skill = 2.0 - abs(epochs - {"base": 2, "mars": 5}[method]) / 3
        user_B = np.repeat(np.arange(40, dtype=np.int32), 10)
        score_B = skill * label_B + rng.normal(size=400)
        return Predictions(user_B, user_B, label_B, score_B.astype(np.float32), np.zeros(400, np.int8))

    def train_stage(context, donation, method):
        asked.append((method, context.config.ctr.epochs, context.seed))
        valid, test = (drawn(*asked[-1][:2], 10 * number + context.seed) for number in (1, 2))
        return pipeline.Trained(test, valid, dict, "drawn")

    monkeypatch.setattr(pipeline, "train_stage", train_stage)
    monkeypatch.setattr(pipeline, "borrow", lambda context: None)
    settings = {f"{epochs} epochs": {"ctr.epochs": str(epochs)} for epochs in (1, 2, 5)}
    best = {"base": 2, "mars": 5}
    found = of_study.run_cell(config, Stages(tmp_path), loaded, command="", settings=settings)
    assert asked == [(m, epochs, 0) for m in best for epochs in (1, 2, 5)] + [
        (method, best[method], seed) for seed in (0, 1) for method in best
    ]
    for row in found["search"]:
        valid = drawn(row["method"], int(row["changes"]["ctr.epochs"]), 10)
        np.testing.assert_allclose(row["auc_low"], auc(valid.label_B, valid.score_B), rtol=1e-12)
        assert row["chosen"] == (row["setting"] == f"{best[row['method']]} epochs")
    for method, epochs in best.items():
        tests = [drawn(method, epochs, 20 + seed) for seed in (0, 1)]
        (row,) = [r for r in found["rows"] if (r["method"], r["group"], r["metric"]) == (method, "all", "auc")]
        np.testing.assert_allclose(row["mean"], np.mean([auc(t.label_B, t.score_B) for t in tests]), rtol=1e-12)
    with pytest.raises(ValueError, match="search: expected settings of the training .* found ctr.inputs in 'wrong'"):
        of_study.run_cell(config, Stages(tmp_path), loaded, command="", settings={"wrong": {"ctr.inputs": "strong"}})
    cell = study.Cell("search", "5 events", ("base", "mars"), {}, 5.0, settings)
    part = study.Part("search", "Search", "search", "All.", (cell,), "events")
    table = study_page.section(part, {"search": found}, {}).parts[0]
    assert table.header == ("method", *settings)
    assert [[value.endswith("(chosen)") for value in line] for line in table.lines] == [
        [False, False, True, False], [False, False, False, True]
    ]  # fmt: skip


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


def test_labels_permuted_over_the_log_keep_its_count_and_no_user_s():
    whole = make_synthetic(n_users=60, n_items=40, n_types=4, n_topics=8, topics_per_type=2, high_events=(20, 30))
    part = permute_labels(whole, "log", seed=0)
    assert part.log.label_E.sum() == whole.log.label_E.sum()
    start_U = whole.log.start_U1[:-1]
    moved_U = np.add.reduceat(part.log.label_E - whole.log.label_E, start_U) != 0
    assert moved_U.mean() > 0.5
    assert len({dataset.fingerprint for dataset in (whole, part, permute_labels(whole, "users", seed=0))}) == 3
    np.testing.assert_array_equal(part.log.item_E, whole.log.item_E)
    assert permute_labels(whole, "", seed=0) is whole


def test_permuted_labels_keep_every_user_s_count_and_nothing_else_changes():
    whole = make_synthetic(n_users=60, n_items=40, n_types=4, n_topics=8, topics_per_type=2, high_events=(20, 30))
    part = permute_labels(whole, "users", seed=0)
    for user in range(60):
        mine = slice(whole.log.start_U1[user], whole.log.start_U1[user + 1])
        assert part.log.label_E[mine].sum() == whole.log.label_E[mine].sum()
    assert (part.log.label_E != whole.log.label_E).any()
    assert part.fingerprint != whole.fingerprint
    assert part.oracle_E is None
    np.testing.assert_array_equal(part.log.item_E, whole.log.item_E)


@pytest.mark.parametrize("among", ["users", "log"])
def test_what_was_just_liked_puts_permuted_labels_on_the_wrong_side(among):
    """Why a GAUC of the part `leak` may not be 0.5: rates of likes hold the labels of the user's earlier rows. Pooled
    over users, as AUC is, they say nothing of labels that are permuted over the log."""
    n_users, n_events, n_test = 2000, 20, 5
    dataset = make_synthetic(n_users=60, n_items=40, n_types=4, n_topics=8, topics_per_type=2, high_events=(20, 30))
    rng = np.random.default_rng(0)
    log = dataset.log._replace(
        start_U1=np.arange(n_users + 1) * n_events,
        label_E=(rng.random(n_users * n_events) < 0.5).astype(np.float32),
        grade_E=None,
    )
    label_UE = permute_labels(dataset._replace(log=log), among, seed=1).log.label_E.reshape(n_users, n_events)
    rate_UE = (np.cumsum(label_UE, axis=1) - label_UE) / np.maximum(np.arange(n_events), 1)
    user_B = np.repeat(np.arange(n_users), n_test)
    seen, unseen = (
        gauc(user_B, label_UE[:, -n_test:].ravel(), score_UE[:, -n_test:].ravel()).value
        for score_UE in (rate_UE, rng.random(rate_UE.shape))
    )
    assert seen < 0.3
    assert abs(unseen - 0.5) < 0.03
    if among == "log":
        assert abs(auc(label_UE[:, -n_test:].ravel(), rate_UE[:, -n_test:].ravel()) - 0.5) < 0.02


def test_a_cell_with_a_modality_that_the_data_lack_is_refused_and_the_rest_runs(config, tmp_path, monkeypatch):
    dataset = make_synthetic(**pipeline.to_json(config.data.synthetic))
    text_only = dataset.items._replace(modalities={"text": dataset.items.modalities["text"]})
    monkeypatch.setitem(pipeline.SOURCES, "synthetic", lambda data, made: dataset._replace(items=text_only))
    found = {"rows": [], "comparisons": [], "commit": "c", "wall_seconds": 3600.0}
    monkeypatch.setattr("marsjax.cells.run_cell", lambda *_, **__: found)
    cells = tuple(study.Cell(name, name, ("base",), {"alignment.modalities": name}) for name in ("text", "image"))
    monkeypatch.setattr(study, "full", lambda known: (study.Part("table3", "Table 3", "statistics", "Parts.", cells),))
    config.alignment.modalities = ("text",)
    commands.reproduce(config, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "image: cannot be run on these data (alignment.modalities: expected modalities of the data" in text
    assert "hours of work in the cells, one process: 1.0" in text
    assert (tmp_path / "cells" / "text.json").is_file()


def test_without_low_active_users_there_are_no_cases(config, tmp_path):
    config.unlock()
    config.split.low_fraction, config.alignment.epochs = 0.0, 0.0
    assert commands.cases(pipeline.Context(config, pipeline.load(config), Stages(tmp_path), 0)) == ()


def test_without_epochs_the_encoder_stays_as_it_was_drawn(config, tmp_path):
    spaces = []
    for epochs in (0.0, 0.01):
        config.unlock()
        config.alignment.epochs = epochs
        context = pipeline.Context(config, pipeline.load(config), Stages(tmp_path), 0)
        spaces.append(pipeline.align_stage(context))
    drawn = spaces[0].encoder.init(jax.random.key(0), _first_batch(context), spaces[0].tables)["params"]
    untrained, trained = (jax.tree.leaves(space.params) for space in spaces)
    for expected, found in zip(jax.tree.leaves(drawn), untrained, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)  # drawn by one program, here op by op
    assert any((np.abs(a - b) > 1e-4).any() for a, b in zip(trained, untrained, strict=True))


def _first_batch(context):
    source, _ = batches.alignment_source(
        context.loaded.dataset.log, context.loaded.rows, blocks=2, targets=2, length=3, stein_items=4, steps=1, seed=0
    )
    return source[0]


def test_users_without_training_events_have_a_place_in_the_plot_of_lengths():
    user_B, label_B = np.repeat(np.arange(4, dtype=np.int32), 5), np.tile([0, 1, 0, 1, 1], 4).astype(np.float32)
    score_B, group_B = np.linspace(0.1, 0.9, 20), np.zeros(20, np.int8)
    seeds = [Predictions(user_B, user_B, label_B, score_B, group_B)]
    results = {"base": seeds, "mars": seeds}
    for length_U in ([0, 2, 3, 4], [1, 2, 3, 4]):
        found = {"by_length": report.length_rows(results, np.array(length_U), bins=4)}
        (plot,) = study_page.by_length(found)
        assert "no data" not in svg(plot)
        assert plot.log_x == (length_U[0] > 0)


def test_the_ceiling_of_sparse_users_is_one_stage_whatever_they_keep(config, tmp_path):
    config.unlock()
    config.ctr.epochs, config.split.kind, config.split.sparse_fraction = 1, "last_fraction", 0.3
    for count in (3, 6):
        config.split.sparse_events = count
        of_study.full_history(config, Stages(tmp_path), pipeline.load(config))
    assert len(list((tmp_path / "stages").glob("base-*"))) == 1


def test_what_donors_do_later_is_refused_where_it_is_to_be_left_out(config):
    changes = {"augmentation.time_safe": "true", "evaluation.methods": "base,mars_posterior"}
    with pytest.raises(
        ValueError, match="augmentation.time_safe: expected .* found mars_posterior in evaluation.methods"
    ):
        pipeline.check(pipeline.with_changes(config, changes))
    pipeline.check(pipeline.with_changes(config, {**changes, "evaluation.methods": "base,mars"}))
