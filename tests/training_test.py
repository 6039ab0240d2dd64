"""Training: devices agree, an interruption changes nothing, and what goes wrong says so."""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from marsjax.ctr.din import Din
from marsjax.ctr.dnn import Dnn
from marsjax.ctr.items import ID_TABLES
from marsjax.ctr.objective import init_model
from marsjax.records import ItemTables
from marsjax.training import loop, sharding
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.step import Share, init_state, make_step, total

WORKER = pathlib.Path(__file__).with_name("training_worker.py")


class Counter:
    """Batches made from their number alone, with the state of a Grain iterator."""

    def __init__(self, make):
        self.make, self.position = make, 0

    def __next__(self):
        self.position += 1
        return self.make(self.position - 1)

    def get_state(self):
        return {"next_index": self.position}

    def set_state(self, state):
        self.position = state["next_index"]


def linear_batch(i, rows=8):
    rng = np.random.default_rng(i)
    x_BF = rng.normal(size=(rows, 3)).astype(np.float32)
    return {"x": x_BF, "y": (x_BF @ [1.0, -2.0, 0.5]).astype(np.float32), "weight": np.ones(rows, np.float32)}


class Stop(Exception):
    """An interruption."""


def stopping(at):
    """Batches as ever until number `at`, which raises Stop."""

    def make(i):
        if i == at:
            raise Stop
        return linear_batch(i)

    return make


def linear_step(optimizer, poison=None):
    def make(axis):
        def loss(params, statistics, batch, tables, key):
            error_B = batch["x"] @ params["w"] - batch["y"]
            if poison is not None:
                error_B = error_B + jax.numpy.where(jax.numpy.any(batch["y"] == poison), np.nan, 0.0)
            n = total(batch["weight"].sum(), axis)
            return Share((error_B**2 * batch["weight"]).sum() / n, statistics, {})

        return make_step(loss, optimizer, axis_name=axis)

    return make


def fit(folder, *, steps=20, evaluate=None, make=linear_batch, poison=None, **schedule):
    optimizer = adamw(AdamW(0.05, 0.0, 10.0))
    lifted = sharding.lift(linear_step(optimizer, poison), mode="single")
    return loop.fit(
        lifted,
        init_state({"w": np.zeros(3, np.float32)}, {}, optimizer, seed=0),
        Counter(make),
        {},
        schedule=loop.Schedule(**({"steps": steps, "steps_per_evaluation": 5, "log_steps": 2} | schedule)),
        folder=folder,
        title="test",
        evaluate=evaluate,
    )


def test_learns_and_logs(tmp_path):
    fitted = fit(tmp_path, steps=400)
    np.testing.assert_allclose(fitted.params["w"], [1, -2, 0.5], atol=0.05)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 401, 2))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"steps_per_second", "gradient_norm"} <= set(lines[0])
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_early_stopping_returns_the_best_parameters(tmp_path):
    """Validation rises, falls twice, and would rise again: patience 2 stops and takes the peak."""
    scores = iter([0.6, 0.7, 0.65, 0.64, 0.9])
    seen = []

    def evaluate(params, statistics):
        seen.append(params["w"].copy())
        return {"auc": next(scores)}

    fitted = fit(tmp_path, steps=25, evaluate=evaluate, metric="auc", patience=2)
    assert len(seen) == 4
    assert fitted.steps == 20
    assert fitted.best_metric == 0.7
    np.testing.assert_array_equal(fitted.params["w"], seen[1])


def test_plateau_lowers_the_learning_rate(tmp_path):
    """With factor 0 the parameters stand still after the first evaluation that does not improve."""
    seen = []

    def evaluate(params, statistics):
        seen.append(params["w"].copy())
        return {"auc": 0.5}

    fit(tmp_path, steps=20, evaluate=evaluate, metric="auc", patience=9, plateau_factor=0.0)
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[1], seen[3])


def test_non_finite_loss_stops_with_the_step_named(tmp_path):
    def make(i):
        batch = linear_batch(i)
        if i == 6:
            batch["y"][0] = 77.0
        return batch

    with pytest.raises(loop.NonFiniteLoss, match="loss of step 7 is nan"):
        fit(tmp_path, make=make, poison=77.0, checkpoint_seconds=0.0)
    # What was saved is from before, and finite.
    again = fit(tmp_path, steps=6)
    assert np.isfinite(again.params["w"]).all()


@pytest.mark.parametrize("stop", [1, 7, 13])
def test_interrupted_training_ends_with_the_same_parameters(tmp_path, stop):
    def evaluate(params, statistics):
        return {"auc": float(-np.abs(params["w"] - [1, -2, 0.5]).sum())}

    options = {"evaluate": evaluate, "metric": "auc", "plateau_factor": 0.5, "patience": 3}
    whole = fit(tmp_path / "whole", **options)
    with pytest.raises(Stop):
        fit(tmp_path / "cut", make=stopping(stop), checkpoint_seconds=0.0, **options)
    resumed = fit(tmp_path / "cut", **options)
    np.testing.assert_array_equal(resumed.params["w"], whole.params["w"])
    assert resumed.evaluations == whole.evaluations
    first, second = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut"))
    assert [json.loads(line)["step"] for line in first] == [json.loads(line)["step"] for line in second]


@pytest.mark.parametrize("stop", [6, 12, 19])
def test_a_peak_before_the_interruption_is_returned(tmp_path, stop):
    """Validation peaks at step 5: the parameters of that step come back, whenever the training was cut after it."""
    seen = {}

    def run(folder, scores, **options):
        def evaluate(params, statistics):
            score = next(scores)
            seen[score] = params["w"].copy()
            return {"auc": score}

        return fit(folder, evaluate=evaluate, metric="auc", patience=9, plateau_factor=0.5, **options)

    whole = run(tmp_path / "whole", iter([0.9, 0.6, 0.7, 0.8]))
    np.testing.assert_array_equal(whole.params["w"], seen[0.9])
    assert not np.array_equal(seen[0.8], seen[0.9])
    scores = iter([0.9, 0.6, 0.7, 0.8])
    with pytest.raises(Stop):
        run(tmp_path / "cut", scores, make=stopping(stop), checkpoint_seconds=0.0)
    for fitted in (run(tmp_path / "cut", scores), run(tmp_path / "cut", scores)):  # continued, then read once more
        np.testing.assert_array_equal(fitted.params["w"], whole.params["w"])
        assert (fitted.best_metric, fitted.evaluations) == (0.9, whole.evaluations)


def test_weight_decay_falls_on_matrices_only():
    """Without a gradient AdamW moves a parameter by -rate * decay * parameter: matrices shrink, vectors stay."""
    params = {"kernel": np.full((2, 3), 2.0, np.float32), "bias": np.ones(3, np.float32), "scale": np.float32(4.0)}
    optimizer = adamw(AdamW(learning_rate=0.1, weight_decay=0.5, clip=10.0))
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * params["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_array_equal(updates["scale"], 0)


@pytest.mark.parametrize("backbone", ["din", "dnn"])
def test_decay_of_ids_falls_on_the_tables_of_users_and_items_alone(backbone):
    model = {"din": Din, "dnn": Dnn}[backbone](n_items=7, n_categories=3, n_users=5)
    tables = ItemTables(np.zeros((7, 1), np.int32), None)
    params = jax.device_get(init_model(model, tables, seed=0)["params"])
    optimizer = adamw(AdamW(0.1, 0.0, 10.0, id_decay=0.5, id_tables=ID_TABLES))
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    moved = [path for path, update in jax.tree_util.tree_leaves_with_path(updates) if np.any(update)]
    assert {tuple(key.key for key in path) for path in moved} == {("items", "item"), ("users", "table")}
    np.testing.assert_allclose(updates["users"]["table"], -0.1 * 0.5 * params["users"]["table"], rtol=1e-6)


# --- real stages in processes of their own


def work(*arguments, devices=1, **options):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(WORKER.parent.parent),
    }
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(
    # That devices agree on the losses on views is tested where these are, without processes.
    ("stage", "after_steps"),
    [("alignment", 1e-5), ("dice", 1e-5)],
)
def test_one_device_equals_eight(tmp_path, stage, after_steps):
    """Losses, gradients, and parameters after 20 steps agree for one device, pmap and shard_map over 8.

    Gradients are read off Adam's first moment after one step, since the parameters hardly depend on their scale.
    13 rows a batch do not divide by 8, so padding is in it too.
    """
    finish(work("compare", stage, tmp_path / "out.npz", devices=8))
    with np.load(tmp_path / "out.npz") as out:
        for mode in ("pmap", "shard_map"):
            np.testing.assert_allclose(out[f"{mode}_loss"], out["single_loss"], rtol=1e-5)
            np.testing.assert_allclose(out[f"{mode}_gradient_norm"], out["single_gradient_norm"], rtol=1e-5)
            names = [name for name in out if name.startswith(("single_params", "single_gradients"))]
            assert sum(name.startswith("single_gradients") and out[name].any() for name in names) > 8
            for name in names:
                other = out[name.replace("single", mode)]
                scale = np.abs(out[name]).max() + 1e-12
                tolerance = after_steps if name.startswith("single_params") else 1e-5
                assert np.abs(other - out[name]).max() / scale < tolerance, name


@pytest.mark.parametrize(("stage", "kills"), [("dice", 3), ("alignment", 2)])
def test_killed_training_ends_with_the_same_parameters(tmp_path, stage, kills):
    """SIGKILL at moments spread over the run; the parameters are the same bit for bit."""
    cut = tmp_path / "cut"
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        whole = beside.submit(finish, work("train", stage, tmp_path / "whole"))
        for number in range(kills):
            process = work("train", stage, cut)
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                steps = [int(path.name) for path in cut.glob("checkpoints/*") if path.name.isdigit()]
                if steps and max(steps) >= 8 * (number + 1):
                    break
                time.sleep(0.01)
            time.sleep(0.03 * number)
            assert process.poll() is None, process.communicate()[0]
            process.send_signal(signal.SIGKILL)
            process.communicate()
        output = finish(work("train", stage, cut))
        assert "continuing after step" in output
        whole.result()
    with np.load(tmp_path / "whole" / "result.npz") as first, np.load(cut / "result.npz") as second:
        assert set(first) == set(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_wrong_sum_over_devices_would_show(mode):
    """Two devices with different rows: the gradient is that of the mean over all rows, not n times it."""
    optimizer = optax.sgd(1.0)
    lifted = sharding.lift(linear_step(optimizer), mode=mode)
    assert lifted.n_devices == 2
    batch = linear_batch(0)
    state = lifted.replicate(init_state({"w": np.zeros(3, np.float32)}, {}, optimizer, seed=0))
    state, metrics = lifted.step(state, lifted.split(batch), lifted.replicate({}))
    expected = 2 * (batch["y"][:, None] * batch["x"]).mean(axis=0)
    np.testing.assert_allclose(lifted.collect(state.params)["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(lifted.collect(metrics)["loss"], (batch["y"] ** 2).mean(), rtol=1e-5)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="pmap.*found 'tpu'"):
        sharding.lift(linear_step(optax.sgd(1.0)), mode="tpu")
