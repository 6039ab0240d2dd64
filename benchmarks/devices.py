"""What do more devices cost on the same cores, pmap against shard_map, and bfloat16 against float32?

    python -m benchmarks.devices [--output=benchmarks/results/devices.json]

1, 2, 4 and 8 host devices (XLA's virtual ones) share the cores of the machine, so they can gain nothing: the question
is what splitting a batch, and summing gradients over devices, adds. Each number of devices has a process of its own,
which trains on the same batches from the same parameters; the processes take turns, and one waits while another works.
The model is the DIN of the default configuration with PReLU, at `--batch` rows (of all devices together) and histories
of `--length`. The target is at most 1.3 times the time of one device for eight.

pmap and shard_map: the same, of the same number of devices.

bfloat16 and float32: the same step with `ctr.dtype`, in one process on the devices that JAX finds (an accelerator where
there is one), and the validation AUC of both after a training on the planted data, for `--seeds` seeds. A CPU without
instructions for bfloat16 converts it, and is slower with it.

Asserted beside the time: losses of some steps are those of one device to 1e-5, the parameters after them to 1e-3 of the
largest number of an array, and the AUC of bfloat16 is no more than 0.01 below that of float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness, input_pipeline

TARGET = 1 / 1.3
TOLERANCE = 1e-3  # of the largest number of an array: where a gradient is nearly 0, AdamW makes a step of its rounding
LOSS_TOLERANCE = 1e-5
WORST_AUC = 0.01  # that bfloat16 may lose
STEPS = 20  # before parameters are compared
SEED = 0


class Work(NamedTuple):
    """What a process trains."""

    mode: str  # pmap, shard_map, single
    batch: int
    length: int
    users: int
    dtype: str = "float32"
    coordinator: str = ""  # HOST:PORT; "": it trains alone
    processes: int = 1
    process: int = 0


# --- in the process that trains


class Trainer:
    """Trains on batches that are ready, as the loop of the training does: metrics are read one step late."""

    def __init__(self, work: Work):
        from marsjax.configuration import to_json
        from marsjax.ctr import objective
        from marsjax.ctr.backbones import make_backbone
        from marsjax.data import batches as batching
        from marsjax.defaults import default_config
        from marsjax.records import ItemTables
        from marsjax.training.optimizer import AdamW, adamw
        from marsjax.training.step import init_state

        cfg = default_config().ctr
        settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
        model = make_backbone(
            to_json(cfg) | {"dtype": work.dtype},
            n_items=input_pipeline.ITEMS, n_categories=1, n_users=work.users, n_features=0,
        )  # fmt: skip
        tables = ItemTables(np.zeros((input_pipeline.ITEMS, 1), np.int32))
        variables = objective.init_model(model, tables, seed=SEED)
        self.lifted = objective.lifted_step(model, settings, work.mode)
        case = input_pipeline.Case("", (work.length,), work.length // 2 + 1, work.length)
        data = input_pipeline.draw(case, batch=work.batch, users=work.users, batches=4)
        source, per_epoch = batching.ctr_source(
            data.log, data.rows, data.row_R, epochs=1, seed=SEED, own=self.lifted.own, **data.gather
        )
        self.batches = [source[index] for index in range(per_epoch)]
        self.tables = self.lifted.replicate(tables)
        self.state = self.lifted.replicate(
            init_state(variables["params"], variables["statistics"], adamw(settings), seed=SEED)
        )
        self.done = 0

    def run(self, steps: int) -> list[float]:
        """The loss of each."""
        losses: list[float] = []
        before = None
        for _ in range(steps):
            batch = self.lifted.split(self.batches[self.done % len(self.batches)])
            self.state, metrics = self.lifted.step(self.state, batch, self.tables)
            self.done += 1
            if before is not None:
                losses.append(self._read(before))
            before = metrics
        return [*losses, self._read(before)]

    def _read(self, metrics: Any) -> float:
        loss = float(np.ravel(self.lifted.collect(metrics)["loss"])[0])
        if not math.isfinite(loss):
            raise SystemExit(f"expected a finite loss, found {loss}")
        return loss

    def parameters(self) -> dict[str, np.ndarray]:
        """By their paths."""
        from marsjax.training import checkpoint

        return checkpoint.flatten(self.lifted.collect(self.state.params))


def serve(work: Work) -> None:
    """Answers lines of the standard input: `run N`, and `save FILE.npz` for the parameters."""
    if work.coordinator:
        from marsjax import hosts

        hosts.join(work.coordinator, work.processes, work.process)
    trainer = Trainer(work)
    answer({"devices": trainer.lifted.n_devices, "rows": len(trainer.batches[0].label_B)})
    for line in sys.stdin:
        what, argument = line.split()
        if what == "run":
            before = time.process_time()
            losses = trainer.run(int(argument))
            answer({"losses": losses, "processor": (time.process_time() - before) / int(argument)})
        else:
            np.savez(argument, **trainer.parameters())  # type: ignore[arg-type]
            answer({})


def answer(value: Mapping[str, Any]) -> None:
    """A line, which the parent waits for."""
    sys.stdout.write("answer " + json.dumps(value) + "\n")
    sys.stdout.flush()


# --- in the process that measures


class Workers:
    """Processes that train one model together; one alone, most often."""

    def __init__(self, works: Sequence[Work], *, devices: int):
        self.processes = []
        self.processor: list[float] = []  # seconds of a step of each run, of all threads of all processes
        for work in works:
            environment = os.environ | {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.devices", f"--work={json.dumps(work._asdict())}"]
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            self.processes.append(process)
        self.about = [self._answer(process) for process in self.processes]

    def ask(self, line: str) -> list[dict[str, Any]]:
        """What each of them answers, when all have."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
        return [self._answer(process) for process in self.processes]

    def run(self, steps: int) -> list[float]:
        """The losses of so many steps."""
        answers = self.ask(f"run {steps}")
        self.processor.append(sum(answer["processor"] for answer in answers))
        return answers[0]["losses"]

    def parameters(self) -> dict[str, np.ndarray]:
        """Those of the first; stops where another one has others."""
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for number, process in enumerate(self.processes):
                assert process.stdin is not None
                path = pathlib.Path(folder) / f"{number}.npz"
                process.stdin.write(f"save {path}\n")
                self._answer(process)
                with np.load(path) as arrays:
                    found.append(dict(arrays))
        for other in found[1:]:
            if any(not np.array_equal(other[name], value) for name, value in found[0].items()):
                raise SystemExit("expected the same parameters in all processes, found others")
        return found[0]

    def close(self) -> None:
        """Ends them."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"a process that trains ended with {process.wait()}; what it said is above")


def difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """The largest one between two trees of parameters, as a share of the largest number of its array."""
    return max(float(np.abs(other[name] - value).max() / (np.abs(value).max() + 1e-12)) for name, value in one.items())


def check(name: str, found: float, most: float = TOLERANCE) -> float:
    """Stops where parameters differ by more than they may."""
    if not found <= most:
        raise SystemExit(f"{name}: expected what one device has to {most:g}, found a difference of {found:.2g}")
    return found


def timed(sides: Mapping[str, Workers], arguments: argparse.Namespace) -> dict[str, harness.Timed]:
    """Seconds of a step of each side, and of the processors in those that train: the process that waits needs none."""
    found = harness.take_turns(
        {name: side.run for name, side in sides.items()}, turns=arguments.turns, seconds=arguments.seconds
    )
    return {name: harness.Timed(side.turns, sides[name].processor[-arguments.turns :]) for name, side in found.items()}


def device_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of each number of devices, and of pmap against shard_map.

    Stops where parameters or losses are not those of one device.
    """
    for length in arguments.lengths:
        work = Work("pmap", arguments.batch, length, arguments.users)
        sides = {"single": Workers([work._replace(mode="single")], devices=1)}
        for count in arguments.counts:
            for mode in ("pmap", "shard_map"):
                sides[f"{mode} {count}"] = Workers([work._replace(mode=mode)], devices=count)
        try:
            losses = {name: side.run(STEPS) for name, side in sides.items()}
            one = sides["single"].parameters()
            differences = {
                name: check(f"length {length}, {name}", difference(one, side.parameters()))
                for name, side in sides.items()
            }
            for name, found in losses.items():
                check(
                    f"losses, length {length}, {name}",
                    float(np.abs(np.subtract(found, losses["single"])).max()),
                    LOSS_TOLERANCE,
                )
            times = timed(sides, arguments)
        finally:
            for side in sides.values():
                side.close()
        case = f"batch {arguments.batch}, history {length}"
        for count in arguments.counts:
            row = harness.compare(
                "milliseconds of a training step on host devices that share the cores, pmap, against jit on one device",
                f"{case}, {count} devices", times[f"pmap {count}"], times["single"], "one device",
                target=TARGET,
            )  # fmt: skip
            yield row | {
                "time_ratio": times[f"pmap {count}"].median / times["single"].median,
                "largest_difference": differences[f"pmap {count}"],
                "note": f"parameters after {STEPS} steps differ by {differences[f'pmap {count}']:.1g} at most",
            }
        for count in arguments.counts:
            row = harness.compare(
                "milliseconds of a training step under pmap against shard_map", f"{case}, {count} devices",
                times[f"pmap {count}"], times[f"shard_map {count}"], "shard_map",
            )  # fmt: skip
            yield row | {"largest_difference": differences[f"shard_map {count}"]}


def dtype_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of bfloat16 against float32: time of a step, and AUC."""
    import jax

    from marsjax.defaults import default_config

    platform = jax.devices()[0].device_kind
    for length in arguments.lengths:
        work = Work(default_config().training.sharding, arguments.batch, length, arguments.users)
        sides = {name: Trainer(work._replace(dtype=dtype)) for name, dtype in DTYPES.items()}
        times = harness.take_turns(
            {name: side.run for name, side in sides.items()}, turns=arguments.turns, seconds=arguments.seconds
        )
        yield harness.compare(
            "milliseconds of a training step in bfloat16 against float32",
            f"batch {arguments.batch}, history {length}, {platform}", times["ours"], times["other"], "float32",
        )  # fmt: skip
    found: dict[str, list[float]] = {
        name: [train_planted(dtype, seed, users=arguments.planted) for seed in range(arguments.seeds)]
        for name, dtype in DTYPES.items()
    }
    ours, other = (statistics.mean(found[name]) for name in ("ours", "other"))
    spread = max(max(aucs) - min(aucs) for aucs in found.values())
    if ours < other - WORST_AUC:
        raise SystemExit(f"bfloat16: expected an AUC of at least {other:.4f} - {WORST_AUC}, found {ours:.4f}")
    yield {
        "question": "validation AUC after training in bfloat16 against float32, planted data",
        "case": f"{arguments.seeds} seeds", "ours": ours, "other": other, "other_name": "float32",
        "ratio": ours / other, "target": 1 - WORST_AUC, "met": ours >= other * (1 - WORST_AUC),
        "turns": arguments.seeds, "auc": found,
        "note": f"differs by {ours - other:+.4f}; seeds of one type by up to {spread:.4f}",
    }  # fmt: skip


DTYPES = {"ours": "bfloat16", "other": "float32"}


def train_planted(dtype: str, seed: int, *, users: int) -> float:
    """The validation AUC of a DIN that was trained on the planted data."""
    from marsjax import pipeline
    from marsjax.defaults import default_config
    from marsjax.evaluation import metrics
    from marsjax.stages import Stages

    changes = {
        "ctr.dtype": dtype, "ctr.batch_size": "256", "ctr.epochs": "5", "ctr.cap": "50", "ctr.buckets": "50",
        "split.history": "positives", "data.synthetic.n_users": str(users),
    }  # fmt: skip
    config = pipeline.with_changes(default_config(), changes)
    with tempfile.TemporaryDirectory() as folder:
        context = pipeline.Context(config, pipeline.load(config), Stages(pathlib.Path(folder)), seed)
        valid = pipeline.train_stage(context, None, "base").valid
    return float(metrics.auc(valid.label_B, valid.score_B))


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="rows of a batch (default: 512)")
    parser.add_argument("--lengths", default="50,200", help="of histories, joined by commas (default: 50,200)")
    parser.add_argument("--users", type=int, default=6000, help="who have an id embedding (default: 6000)")
    parser.add_argument("--counts", default="1,2,4,8", help="of devices, joined by commas (default: 1,2,4,8)")
    parser.add_argument("--planted", type=int, default=2000, help="users of the planted data (default: 2000)")
    parser.add_argument("--seeds", type=int, default=5, help="of the AUC (default: 5)")
    parser.add_argument("--turns", type=int, default=9, help="repeats of each case, by turns (default: 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a turn takes at least (default: 2)")
    parser.add_argument("--parts", default="devices,dtype", help="of devices, dtype (default: both)")
    parser.add_argument("--quick", action="store_true", help="small sizes, in some minutes")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # of a process that trains
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.lengths, arguments.counts, arguments.seeds, arguments.planted = "50", "1,8", 1, 300
        arguments.turns, arguments.seconds = 3, 0.2
    arguments.lengths = harness.whole_numbers(parser, "--lengths", arguments.lengths)
    arguments.counts = harness.whole_numbers(parser, "--counts", arguments.counts)
    arguments.parts = arguments.parts.split(",")
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    if min(arguments.batch, arguments.turns, arguments.seeds) < 1:
        parser.error("--batch, --turns and --seeds: expected 1 or more")
    return arguments


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "devices": device_rows,
    "dtype": dtype_rows,
}


def main(words: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes the rows."""
    arguments = parse(words)
    from marsjax.allocator import keep_freed_memory

    keep_freed_memory()  # as `marsjax` trains
    if arguments.work:
        serve(Work(**json.loads(arguments.work)))
        return
    harness.log_progress()
    began = harness.begin()
    machine = harness.measure_machine()
    rows = (row for part in arguments.parts for row in PARTS[part](arguments))
    harness.write_results(
        arguments.output, rows, began, program="-m benchmarks.devices", words=words, machine=machine.describe()
    )


if __name__ == "__main__":
    main()
