"""The loop of both stages: batches in, best parameters out; killed at any moment it continues to the same end."""

from __future__ import annotations

import logging
import math
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from marsjax import hosts
from marsjax.progress import progress
from marsjax.training import checkpoint
from marsjax.training.metrics_log import metrics_log
from marsjax.training.sharding import Lifted
from marsjax.training.step import TrainState

log = logging.getLogger(__name__)

PyTree = Any
Evaluate = Callable[[PyTree, PyTree], dict[str, float]]  # params, statistics -> metrics


class Schedule(NamedTuple):
    """When to evaluate, to lower the learning rate, to stop and to save."""

    steps: int  # steps in all
    steps_per_evaluation: int
    metric: str | None = None  # name in the evaluation, higher is better; None: no early stopping
    patience: int = 1  # evaluations without improvement before the training stops
    plateau_factor: float = 1.0  # the learning rate is multiplied by it after an evaluation without improvement
    checkpoint_seconds: float = 30.0
    log_steps: int = 50


class Best(NamedTuple):
    """The parameters that evaluated best so far (the latest ones where nothing is compared)."""

    params: PyTree
    statistics: PyTree


class Saved(NamedTuple):
    """What a checkpoint holds, beside its JSON (data position, best metric, evaluations without improvement)."""

    train: TrainState
    best: Best


class Fitted(NamedTuple):
    params: PyTree
    statistics: PyTree
    steps: int
    best_metric: float | None
    evaluations: list[dict[str, float]]


class NonFiniteLoss(ValueError):
    """The loss is NaN or infinite; the message names the step."""


def fit(
    lifted: Lifted,
    state: TrainState,
    batches: Any,
    tables: PyTree,
    *,
    schedule: Schedule,
    folder: pathlib.Path,
    title: str,
    evaluate: Evaluate | None = None,
) -> Fitted:
    """Trains for `schedule.steps` steps or until validation stands still.

    Of several processes all must call it. The first one evaluates, decides and saves, and tells the others.

    Args:
        lifted: the step over devices.
        state: the state before the first step, on the host.
        batches: an iterator with `get_state` and `set_state` (Grain).
        tables: constants given to every step.
        folder: metrics and checkpoints go there; if it holds a checkpoint, training continues from it.
        evaluate: called every `steps_per_evaluation` steps and at the end.

    Raises:
        NonFiniteLoss: the loss of a step is NaN or infinite.
    """
    best = Best(jax.device_get(state.params), jax.device_get(state.statistics))
    best_metric, stale, evaluations = -math.inf, 0, []  # type: float, int, list[dict[str, float]]
    saved = Saved(jax.device_get(state), best)
    manager = checkpoint.open_manager(folder / "checkpoints") if hosts.is_first() else None
    restored = None if manager is None else checkpoint.restore_latest(manager, saved)
    meta = hosts.from_first(None if restored is None else restored.meta)
    if meta is not None:
        state, best = hosts.arrays_from_first(saved if restored is None else restored.state)
        batches.set_state(meta["data"])
        best_metric = -math.inf if meta["best_metric"] is None else meta["best_metric"]
        stale, evaluations = meta["stale"], meta["evaluations"]
        log.info("%s: continuing after step %d", title, int(state.step))
    step = int(state.step)
    device_state, device_tables = lifted.replicate(state), lifted.replicate(tables)
    saved_at = time.monotonic()

    def save() -> None:
        if manager is None:
            return
        meta = {
            "data": batches.get_state(),
            "best_metric": best_metric if math.isfinite(best_metric) else None,
            "stale": stale,
            "evaluations": evaluations,
        }
        checkpoint.save(manager, step, Saved(lifted.collect(device_state), best), meta)

    with (
        metrics_log(folder, from_step=step) as write,
        progress(title, schedule.steps, done=step) as advance,
    ):
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        window: list[dict[str, float]] = []
        window_began = time.monotonic()

        def settle(keep: int) -> None:
            """Reads the metrics of all but the last `keep` steps. Reading one step late keeps the device busy."""
            nonlocal window, window_began
            while len(pending) > keep:
                number, metrics = pending.pop(0)
                values = {name: float(np.ravel(value)[0]) for name, value in lifted.collect(metrics).items()}
                if not math.isfinite(values["loss"]):
                    raise NonFiniteLoss(
                        f"{title}: the loss of step {number} is {values['loss']}, expected a finite number. What "
                        f"{folder} holds is from before it; lower the learning rate, or look for extreme "
                        "features with `marsjax inspect`"
                    )
                window.append(values)
                if number % schedule.log_steps == 0:
                    means = {name: float(np.mean([value[name] for value in window])) for name in values}
                    means["steps_per_second"] = len(window) / max(time.monotonic() - window_began, 1e-9)
                    write(number, means)
                    window, window_began = [], time.monotonic()

        done = step >= schedule.steps or stale >= schedule.patience
        while not done:
            batch = lifted.split(next(batches))
            device_state, metrics = lifted.step(device_state, batch, device_tables)
            step += 1
            pending.append((step, metrics))
            settle(1)
            advance(1)
            due = step % schedule.steps_per_evaluation == 0 or step == schedule.steps
            if due:
                settle(0)
                latest = Best(lifted.collect(device_state.params), lifted.collect(device_state.statistics))
                # By one process alone: the last digits of two may differ, and their decisions must not.
                values = hosts.from_first(evaluate(*latest) if evaluate is not None and hosts.is_first() else {})
                value = values[schedule.metric] if schedule.metric is not None else math.inf
                if schedule.metric is None or value > best_metric:
                    best, stale = latest, 0
                    best_metric = value if schedule.metric is not None else best_metric
                else:
                    stale += 1
                    scale = lifted.collect(device_state.rate_scale) * np.float32(schedule.plateau_factor)
                    device_state = device_state._replace(rate_scale=lifted.replicate(scale))
                if values:
                    evaluations = [*evaluations, {"step": step, **values}]
                    write(step, values)
                    advance(0, " ".join(f"{name} {value:.4f}" for name, value in values.items()))
            done = step >= schedule.steps or stale >= schedule.patience
            if done or time.monotonic() - saved_at >= schedule.checkpoint_seconds:
                settle(0)
                save()
                saved_at = time.monotonic()
    return Fitted(best.params, best.statistics, step, best_metric if math.isfinite(best_metric) else None, evaluations)


def forget(folder: pathlib.Path) -> None:
    """Removes the checkpoints of a finished stage: its result is written elsewhere."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
