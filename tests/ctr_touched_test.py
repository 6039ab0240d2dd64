"""Steps on the rows that a batch names: they are the ordinary steps, and leave all other rows alone."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from marsjax.ctr import objective, touched
from marsjax.ctr.backbones import make_backbone
from marsjax.records import CtrBatch, ItemTables, Views
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.step import init_state

ITEMS, USERS, CATEGORIES, ROWS, LENGTH = 60, 40, 4, 8, 5
SETTINGS = AdamW(1e-2, 0.0, 0.5)  # the gradient is clipped, so its norm over all tables counts
MODEL = {
    "backbone": "din", "user_id": True, "inputs": "strong", "content": 3, "embedding": 4, "tower": (8,),
    "attention": (8,), "softmax": True, "apart": False, "activation": "prelu", "dtype": "float32",
}  # fmt: skip


def tables():
    rng = np.random.default_rng(0)
    return ItemTables(
        rng.integers(1, CATEGORIES, (ITEMS, 2)).astype(np.int32), rng.normal(size=(ITEMS, 6)).astype(np.float32)
    )


def make_model(backbone="din", **changes):
    sizes = {"n_items": ITEMS, "n_categories": CATEGORIES, "n_users": USERS, "n_features": 6}
    return make_backbone(MODEL | {"backbone": backbone} | changes, **sizes)


def make_batch(seed, *, rows=ROWS, highest=ITEMS):
    """Histories with padding, a repeated item, and a row of weight 0."""
    rng = np.random.default_rng(seed)
    history_BL = rng.integers(1, highest, (rows, LENGTH)).astype(np.int32)
    history_BL[:, 3:] *= rng.integers(0, 2, (rows, 2), dtype=np.int32)
    history_BL[0] = history_BL[0, 0]
    weight_B = np.ones(rows, np.float32)
    weight_B[-1] = 0
    return CtrBatch(
        user_B=rng.integers(0, min(USERS + 1, highest), rows).astype(np.int32),
        target_B=rng.integers(1, highest, rows).astype(np.int32),
        label_B=rng.integers(0, 2, rows).astype(np.float32),
        weight_B=weight_B,
        history_BL=history_BL,
        borrowed_BL=np.zeros((rows, LENGTH), bool),
        feedback_BL=np.where(history_BL > 0, 1 + rng.integers(0, 2, history_BL.shape), 0).astype(np.int8),
    )


def touch(batch):
    return touched.touch(batch, n_items=ITEMS, n_users=USERS + 1)


def named(batch):
    """Which rows of the tables a batch names."""
    return {
        touched.ITEMS: np.union1d(batch.target_B, batch.history_BL),
        touched.USERS: np.unique(batch.user_B),
    }


def leaves_of_tables(state):
    for part in (state.params, optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")):
        for path in (touched.ITEMS, touched.USERS):
            yield path, part[path[0]][path[1]]


def test_a_batch_names_its_rows_and_counts_within_them():
    batch = make_batch(1)
    found = touch(batch)
    assert found.item_X[0] == found.user_Y[0] == 0
    np.testing.assert_array_equal(found.item_X[found.batch.history_BL], batch.history_BL)
    np.testing.assert_array_equal(found.item_X[found.batch.target_B], batch.target_B)
    np.testing.assert_array_equal(found.user_Y[found.batch.user_B], batch.user_B)
    inside_X = found.item_X < ITEMS
    np.testing.assert_array_equal(found.item_X[inside_X], np.union1d([0], named(batch)[touched.ITEMS]))


@pytest.mark.parametrize("some", [True, False])
def test_views_and_the_rows_that_have_them_count_within_the_same_rows(some):
    batch = make_batch(1)
    rows = jax.tree.map(lambda leaf: leaf[2:7], batch)
    item_BVW = np.random.default_rng(3).integers(0, ITEMS, (5 if some else len(batch.user_B), 2, 3)).astype(np.int32)
    weight_B, rate_BV = np.ones(len(item_BVW), np.float32), np.zeros(item_BVW.shape[:2], np.float32)
    found = touch(batch._replace(views=Views(item_BVW, None, rate_BV, weight_B, rows if some else None)))
    seen = found.batch.views
    pairs = [(found.batch, batch), (seen.rows, rows)] if some else [(found.batch, batch)]
    assert (seen.rows is not None) == some
    np.testing.assert_array_equal(found.item_X[seen.item_BVW], item_BVW)
    size = 1 + batch.target_B.size + batch.history_BL.size + item_BVW.size
    assert len(found.item_X) == min(size, ITEMS) + -min(size, ITEMS) % 8
    for one, other in pairs:
        np.testing.assert_array_equal(found.item_X[one.history_BL], other.history_BL)
        np.testing.assert_array_equal(found.item_X[one.target_B], other.target_B)
        np.testing.assert_array_equal(found.user_Y[one.user_B], other.user_B)
        np.testing.assert_array_equal(one.label_B, other.label_B)


def test_shapes_do_not_depend_on_what_is_named():
    few, many = touch(make_batch(1, highest=3)), touch(make_batch(2))
    assert [value.shape for value in jax.tree.leaves(few)] == [value.shape for value in jax.tree.leaves(many)]


@pytest.mark.parametrize("backbone", ["din", "dnn"])
def test_a_step_is_the_ordinary_step_on_the_rows_it_names(backbone):
    """Ten steps; after each, the rows that its batch does not name are as they were before, moments included."""
    model = make_model(backbone)
    dense, lazy = (make(model, SETTINGS, "single") for make in (objective.lifted_step, touched.touched_step))
    variables = objective.init_model(model, tables(), seed=0)
    state = init_state(variables["params"], variables["statistics"], adamw(SETTINGS), seed=0)
    for seed in range(10):
        batch = make_batch(seed)
        before = jax.device_get(state)
        found, found_metrics = lazy.step(lazy.replicate(before), touch(batch), tables())
        full, metrics = dense.step(dense.replicate(before), batch, tables())
        state = jax.device_get(found)
        np.testing.assert_allclose(found_metrics["loss"], metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(found_metrics["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)
        triples = zip(*(leaves_of_tables(value) for value in (before, jax.device_get(full), state)), strict=True)
        stood_still = 0
        for (path, old), (_, expected), (_, new) in triples:
            is_named = np.isin(np.arange(len(old)), named(batch)[path])
            np.testing.assert_allclose(new[is_named], expected[is_named], rtol=1e-4, atol=1e-7)
            np.testing.assert_array_equal(new[~is_named], old[~is_named])
            stood_still += int((expected[~is_named] != old[~is_named]).any())
        assert seed == 0 or stood_still  # the momentum of the ordinary step moves such rows on
        for tree, other in ((state.params["score"], full.params["score"]),):
            for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-7)


def test_scores_are_those_of_all_rows():
    model = make_model()
    variables = jax.device_get(objective.init_model(model, tables(), seed=0))
    batches = [make_batch(seed) for seed in range(3)]
    values = model, variables["params"], variables["statistics"], tables()
    np.testing.assert_allclose(touched.touched_score(*values, batches), objective.score(*values, batches), rtol=1e-5)


def test_nothing_is_compiled_for_another_batch():
    model = make_model()
    lazy = touched.touched_step(model, SETTINGS, "single")
    variables = objective.init_model(model, tables(), seed=0)
    state = lazy.replicate(init_state(variables["params"], variables["statistics"], adamw(SETTINGS), seed=0))
    for seed in range(3):
        state, _ = lazy.step(state, touch(make_batch(seed)), tables())
    assert lazy.step._cache_size() == 1


@pytest.mark.parametrize(
    ("tables_", "changes", "sharding", "message"),
    [
        ("lazy", {"weight_decay": 0.1}, "single", "every row at every step, found 0.1 and 0"),
        ("sharded", {"id_decay": 2.0}, "shard_map", "found 0 and 2"),
        ("sharded", {}, "pmap", "expected training.sharding=shard_map, found pmap"),
    ],
)
def test_what_few_rows_cannot_follow_is_refused(tables_, changes, sharding, message):
    with pytest.raises(ValueError, match=message):
        touched.check_tables(tables_, SETTINGS._replace(**changes), sharding=sharding)


def compare():
    """In a process of 8 devices: the state after some steps, with every way to spread it."""
    model = make_model()
    variables = objective.init_model(model, tables(), seed=0)
    ways = {"single": {}, "pmap": {}, "shard_map": {}, "sharded": {"apart": True}}
    for name, options in ways.items():
        lazy = touched.touched_step(model, SETTINGS, "shard_map" if options else name, **options)
        state = lazy.replicate(init_state(variables["params"], variables["statistics"], adamw(SETTINGS), seed=0))
        placed = lazy.replicate(tables())
        for seed in range(10):
            state, metrics = lazy.step(state, lazy.split(touch(make_batch(seed, rows=13))), placed)
            jax.block_until_ready(metrics)
        if options:
            for path, leaf in leaves_of_tables(state):
                assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {
                    -(-(60, 41)[path[0] == "users"] // 8)
                }
            assert {shard.data.shape[0] for shard in placed.feature_NF.addressable_shards} == {-(-60 // 8)}
        yield name, lazy.collect(state), float(lazy.collect(metrics)["loss"])


def test_one_device_equals_eight_and_tables_in_parts():
    """13 rows do not divide by 8, nor do 60 items and 41 users."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["pmap", "shard_map", "sharded"]


if __name__ == "__main__":
    (_, first, first_loss), *others = compare()
    for way, other, loss in others:
        assert jax.tree.map(np.shape, other.params) == jax.tree.map(np.shape, first.params), way
        np.testing.assert_allclose(loss, first_loss, rtol=1e-5)
        for one, two in zip(jax.tree.leaves(first.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5, err_msg=way)
        sys.stdout.write(f"{way}\n")
