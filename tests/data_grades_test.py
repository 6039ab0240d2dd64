"""Grades are ranks that stay with their events, enter nothing that does not ask for them, and tell more than labels."""

import numpy as np
import pytest

from marsjax import commands, pipeline
from marsjax.augmentation.donors import find_donors
from marsjax.augmentation.methods import METHODS
from marsjax.augmentation.posterior import Settings, expect, learn_opinions
from marsjax.cells import plan_cell
from marsjax.data import batches
from marsjax.data.cleaning import build_dataset
from marsjax.data.grades import (
    grade_marks,
    graded_log,
    graded_rows,
    grades_fingerprint,
    middle_grades,
    rank_grades,
)
from marsjax.data.permutation import permute_labels
from marsjax.data.sampling import sample_users
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.records import GRADE_MARKS, TEST, Log
from marsjax.study import Cell
from tests.pipeline_test import small_config


def test_a_grade_is_the_share_below_and_half_of_the_equal():
    np.testing.assert_allclose(rank_grades(np.array([3.0, 1.0, 1.0, 7.0])), [2.5 / 4, 0.25, 0.25, 3.5 / 4])


def test_any_scale_that_keeps_the_order_has_the_same_grades():
    value_R = np.random.default_rng(0).exponential(size=100)
    np.testing.assert_array_equal(rank_grades(np.exp(3 * value_R)), rank_grades(value_R))


@pytest.mark.parametrize("values", [[0, 1, 1, 0], [3, 3, 3], [-2, 5]])
def test_two_values_are_labels_and_no_grades(values):
    assert rank_grades(np.array(values, float)) is None


def ratings(seed=0, n=400):
    rng = np.random.default_rng(seed)
    return {
        "user_R": rng.integers(0, 30, n).astype(str),
        "item_R": rng.integers(0, 20, n).astype(str),
        "label_R": rng.integers(1, 6, n).astype(float),
        "time_R": rng.permutation(n),
    }


def read(columns):
    return build_dataset(
        name="rated", **columns, where=lambda row_R: [f"row {row}" for row in row_R], items=None, features={},
        label_threshold=4.0, min_item_events=2,
    )  # fmt: skip


def test_grades_stay_with_their_events():
    columns = ratings()
    log = read(columns).log
    value_of = dict(zip(columns["time_R"].tolist(), columns["label_R"].tolist(), strict=True))
    value_E = np.array([value_of[time] for time in log.time_E.tolist()])
    np.testing.assert_array_equal(log.label_E, value_E >= 4)
    np.testing.assert_array_equal(log.grade_E, rank_grades(value_E))
    assert len(np.unique(log.grade_E)) == 5


def test_the_fingerprint_of_the_data_is_that_of_labels_and_grades_have_their_own():
    columns = ratings()
    finer = columns | {"label_R": columns["label_R"] + 0.25 * (columns["label_R"] > 4)}
    coarse = columns | {"label_R": np.where(columns["label_R"] >= 4, 5.0, 1.0)}
    same, other, labels = read(columns), read(columns | {"label_R": 6 - columns["label_R"]}), read(coarse)
    assert read(finer).fingerprint == same.fingerprint == labels.fingerprint != other.fingerprint
    assert labels.log.grade_E is None
    assert grades_fingerprint(read(finer).log) == grades_fingerprint(same.log) != grades_fingerprint(labels.log)


def planted(**changes):
    return make_synthetic(**{"n_users": 300, "n_items": 80, "high_events": (30, 40), "low_events": (5, 8)} | changes)


def test_samples_and_permuted_labels_keep_grades_and_labels_together():
    dataset = planted()
    threshold = dataset.log.grade_E[dataset.log.label_E > 0].min()
    assert (dataset.log.grade_E[dataset.log.label_E == 0] < threshold).all()
    for changed in (sample_users(dataset, 50, seed=0), permute_labels(dataset, "log", seed=0)):
        np.testing.assert_array_equal(changed.log.label_E > 0, changed.log.grade_E >= threshold)
    assert not np.array_equal(permute_labels(dataset, "log", seed=0).log.grade_E, dataset.log.grade_E)


def test_histories_hold_the_grades_of_their_entries():
    log = planted().log
    for history in ("all", "positives"):
        histories = make_rows(log, split="leave_one_out", history=history).histories
        kept_E = log.label_E > (0.5 if history == "positives" else -1)
        np.testing.assert_array_equal(histories.grade_H, log.grade_E[kept_E])
        np.testing.assert_array_equal(histories.item_H, log.item_E[kept_E])


def test_each_of_a_few_grades_has_its_mark_and_of_many_each_fifth():
    stars_E = np.repeat([1.0, 2, 3, 4, 5], [1, 1, 3, 4, 2])
    log = planted().log._replace(grade_E=rank_grades(stars_E))
    np.testing.assert_array_equal(grade_marks(log, log.grade_E), stars_E)
    log = log._replace(grade_E=rank_grades(np.arange(100.0)))
    np.testing.assert_array_equal(np.bincount(grade_marks(log, log.grade_E)), [0, 20, 20, 20, 20, 20])


def expectations(log, rows):
    user_P, settings = find_donors(rows, cap=50).user_P, Settings(components=8)
    opinions = learn_opinions(log, rows, user_P, None, n_items=int(log.item_E.max()) + 1, settings=settings)
    return opinions, expect(log, rows, opinions, np.arange(len(log.item_E)), settings=settings)[:, 0]


def test_grades_tell_more_than_labels_where_liking_is_a_matter_of_degree():
    """Tastes of two dimensions, and noise as large: the expectation is nearer to what is liked without the noise."""
    rng = np.random.default_rng(0)
    n_users, n_items, each = 1000, 60, 20
    taste_U2, trait_I2 = rng.normal(size=(n_users, 2)), rng.normal(size=(n_items, 2))
    item_E = np.concatenate([rng.permutation(n_items)[:each] for _ in range(n_users)])
    liking_E = (np.repeat(taste_U2, each, axis=0) * trait_I2[item_E]).sum(axis=1)
    value_E = liking_E + rng.normal(size=len(item_E))
    log = Log(
        np.arange(n_users + 1) * each, (item_E + 1).astype(np.int32), (value_E > 0).astype(np.float32),
        np.tile(np.arange(each), n_users), np.arange(n_users).astype(str), rank_grades(value_E),
    )  # fmt: skip
    rows = make_rows(log, split="leave_one_out")
    test_E = rows.split_E == TEST
    by_label, by_grade = (
        np.corrcoef(expectations(*shown)[1][test_E], liking_E[test_E])[0, 1]
        for shown in ((log, rows), (graded_log(log), graded_rows(rows)))
    )
    assert by_label > 0.5
    assert by_grade > by_label + 0.02


def test_grades_are_noise_where_a_user_likes_an_item_or_does_not():
    """Planted types like an item with one of two probabilities, and how much says nothing beyond whether."""
    dataset = planted(n_users=1000)
    log, rows = dataset.log, make_rows(dataset.log, split="leave_one_out")
    test_E = rows.split_E == TEST
    by_label, by_grade = (
        np.corrcoef(expectations(*shown)[1][test_E], dataset.oracle_E[test_E])[0, 1]
        for shown in ((log, rows), (graded_log(log), graded_rows(rows)))
    )
    assert by_label > by_grade > 0.2


def test_grades_that_are_coins_tell_nothing():
    dataset = planted(n_users=1500)
    rng = np.random.default_rng(1)
    coin_E = rng.random(len(dataset.log.item_E)).astype(np.float32)
    log = dataset.log._replace(label_E=(coin_E > 0.5).astype(np.float32), grade_E=coin_E)
    rows = make_rows(log, split="leave_one_out")
    _, expected_E = expectations(graded_log(log), graded_rows(rows))
    correlation = np.corrcoef(expected_E, coin_E)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(coin_E))


def test_grades_that_are_labels_change_nothing():
    log = planted().log
    log = log._replace(grade_E=log.label_E)
    rows = make_rows(log, split="leave_one_out")
    one, two = expectations(log, rows), expectations(graded_log(log), graded_rows(rows))
    np.testing.assert_array_equal(two[1], one[1])
    assert one[0].scale_F is None


def test_the_variance_of_grades_is_told_beside_that_of_labels():
    """Of grades that are even on 0..1 a user's opinion has a third of the variance that a label has, at the most."""
    log = planted().log
    rows = make_rows(log, split="leave_one_out")
    opinions, _ = expectations(graded_log(log), graded_rows(rows))
    assert ((opinions.scale_F > 0.1) & (opinions.scale_F < 0.4)).all()


def test_inputs_by_grade_have_marks_in_levels_and_mean_grades():
    config = small_config(**{"ctr.inputs": "graded", "split.history": "all"})
    loaded = pipeline.load(config)
    log, rows, inputs = loaded.dataset.log, loaded.rows, loaded.inputs
    assert set(np.unique(inputs.mark_H)) == set(range(1, 1 + GRADE_MARKS))
    strong = pipeline.load(small_config(**{"ctr.inputs": "strong", "split.history": "all"})).inputs
    assert set(np.unique(strong.mark_H)) == {1, 2}
    assert inputs.dense_EJ.shape[1] == 9
    np.testing.assert_array_equal(inputs.dense_EJ[:, :6], strong.dense_EJ)
    # The user's mean grade, shrunk to that of all; both by hand.
    overall, event = log.grade_E[rows.split_E == 0].mean(), 200
    seen = slice(rows.histories.start_E[event], rows.histories.end_E[event])
    mean = (rows.histories.grade_H[seen].sum() + 10 * overall) / (seen.stop - seen.start + 10)
    np.testing.assert_allclose(inputs.dense_EJ[event, 6], 4 * (mean - overall), atol=1e-5)


GRADED = sorted(name for name, method in METHODS.items() if method.graded)


@pytest.mark.parametrize("changes", [{"ctr.inputs": "graded"}, {"evaluation.methods": f"base,{GRADED[0]}"}])
def test_a_log_of_labels_alone_is_refused(changes):
    dataset = planted()
    labels = dataset._replace(log=dataset.log._replace(grade_E=None))
    with pytest.raises(ValueError, match=r"expected a log with grades .* found labels alone"):
        pipeline.load(small_config(**changes), labels)


def test_a_model_whose_inputs_are_grades_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"expected ctr.inputs=ids or strong, found graded"):
        commands.export(small_config(**{"ctr.inputs": "graded"}), tmp_path)


def test_methods_that_ask_for_grades_by_name_are_refused_and_else_left_out(tmp_path, monkeypatch, caplog):
    dataset = planted()
    monkeypatch.setattr(pipeline, "read", lambda *_: dataset._replace(log=dataset.log._replace(grade_E=None)))
    config = small_config()
    with pytest.raises(ValueError, match=f"{GRADED[0]}: expected a log with grades"):
        commands.reproduce(config, tmp_path, methods=f"base,{GRADED[0]}", parts="table1")
    with caplog.at_level("INFO"):
        commands.reproduce(config, tmp_path, parts="table1")
    assert f"left out: {', '.join(GRADED)}" in caplog.text


@pytest.mark.parametrize("method", ["base", "mars", "ran_budget", "cmr"])
def test_models_that_read_grades_train_and_see_the_mean_grade_of_what_is_lent(tmp_path, method, monkeypatch):
    seen = []
    batch_of = batches.ctr_batch

    def watched(*args, **keys):
        seen.append(batch_of(*args, **keys))
        return seen[-1]

    monkeypatch.setattr(batches, "ctr_batch", watched)
    changes = {
        "ctr.inputs": "graded",
        "split.history": "all",
        "evaluation.methods": f"base,{method}",
        "ctr.epochs": "1",
    }
    config = small_config(**changes)
    context = pipeline.Context(config, pipeline.load(config), pipeline.Stages(tmp_path), seed=0)
    trained = pipeline.train_stage(context, pipeline.borrow(context), method)
    assert np.ptp(trained.predictions.score_B) > 0.01
    seen = [batch for batch in seen if batch.feedback_BL is not None]  # some only count what is lent
    own = np.concatenate([batch.feedback_BL[(batch.history_BL > 0) & ~batch.borrowed_BL] for batch in seen])
    lent = np.concatenate([batch.feedback_BL[batch.borrowed_BL] for batch in seen])
    assert set(np.unique(own)) <= set(range(GRADE_MARKS + 1))
    assert len(np.unique(own[own > 0])) == GRADE_MARKS
    log, rows = context.loaded.dataset.log, context.loaded.rows
    if method == "mars":
        middle = grade_marks(log, middle_grades(log, rows))
        assert set(np.unique(lent)) == set(middle.tolist())
        assert middle[0] < middle[1]


def test_a_cell_is_known_by_the_grades_if_it_reads_them(tmp_path):
    dataset = planted()
    turned = dataset._replace(log=dataset.log._replace(grade_E=dataset.log.grade_E**2))

    def key(dataset, *methods, **changes):
        cell = Cell("cell", "", ("base", *methods), changes)
        return plan_cell(small_config(), dataset, cell, tmp_path, "").fingerprint

    assert key(turned) == key(dataset)
    for methods, changes in ((GRADED[:1], {}), ((), {"ctr.inputs": "graded"})):
        assert key(turned, *methods, **changes) != key(dataset, *methods, **changes)


def test_a_training_is_done_again_where_its_grades_are_others(tmp_path):
    config = small_config(**{"evaluation.methods": f"base,{GRADED[0]}", "ctr.epochs": "1"})
    dataset = planted()
    turned = dataset._replace(log=dataset.log._replace(grade_E=dataset.log.grade_E**2))

    def trained(dataset):
        context = pipeline.Context(config, pipeline.load(config, dataset), pipeline.Stages(tmp_path), seed=0)
        donation = pipeline.borrow(context)
        for method in config.evaluation.methods:
            pipeline.train_stage(context, donation, method)
        names = [path.parent.name for path in tmp_path.glob("stages/*/done.json")]
        return {method: sum(name.startswith(f"{method}-seed") for name in names) for method in ("base", GRADED[0])}

    assert trained(dataset) == {"base": 1, GRADED[0]: 1}
    assert trained(turned) == {"base": 1, GRADED[0]: 2}
