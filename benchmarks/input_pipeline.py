"""How much slower is CTR training on batches that are made as it goes than on one that is ready in memory?

    python -m benchmarks.input_pipeline [--output=benchmarks/results/input_pipeline.json]

Ours is what the pipeline trains with: `batches.ctr_source` over a log of `--users` users, `batches.iterate` with its
prefetching threads, `objective.lifted_step` under `pmap`, metrics read one step late. The other side runs the same step
on batches that were made before, one for each length, in the same order of lengths: so both do the same arithmetic, and
what is between them is the making of batches and their way through the threads. The model is the DIN of the default
configuration with prelu. A call is one epoch; a turn of either side is the same number of epochs.

Cases: histories of one length, of several in one training (as the buckets of the configuration have it), and `mars`
with borrowed items and marks of feedback, the most that a batch gathers. The ratio says how many times as fast ours is,
so 1 / 1.05 is "at most 1.05 times the time".

Asserted beside the time: what the threads serve is bit for bit what `batches.ctr_batch` makes of the same rows, losses
are finite, and nothing is compiled after the first pass over the lengths, on either side.

The floor of making a batch are the bytes of the batch, written, and the cache lines of what is gathered, read, at the
rate of a copy. What one thread takes is a row of its own.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness

log = logging.getLogger("input_pipeline")

TARGET = 1 / 1.05
SEED, ITEMS, EPOCHS, LINE = 0, 4000, 1 << 20, 64
COMPILED = "/jax/core/compile/backend_compile_duration"


class Case(NamedTuple):
    """What is trained on."""

    name: str
    buckets: tuple[int, ...]
    least: int  # entries of the shortest own history
    most: int
    mars: bool = False  # borrowed items, marks of feedback


CASES = (
    Case("length 50", (50,), 26, 50),
    Case("length 200", (200,), 101, 200),
    Case("lengths 25 to 200", (25, 50, 100, 200), 1, 200),
    Case("lengths 50 and 200, mars", (50, 200), 1, 200, mars=True),
)


class Data(NamedTuple):
    """A log whose rows have histories of the wanted lengths, and which of them are trained on."""

    log: Any
    rows: Any
    row_R: np.ndarray
    gather: dict[str, Any]


class Sides(NamedTuple):
    """Both sides, as functions that run so many epochs, and what an epoch has."""

    run: dict[str, Callable[[int], float]]
    per_epoch: int
    batch_bytes: float  # of a batch, on average
    make: Callable[[int], Any]  # batch i, by the calling thread


@functools.cache
def compilations() -> list[float]:
    """Seconds of every compilation since this was called first."""
    import jax

    found: list[float] = []

    def listen(name: str, seconds: float, **_: str | int) -> None:
        if name == COMPILED:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)  # type: ignore[arg-type]  # it is called by place
    return found


def draw(case: Case, *, batch: int, users: int, batches: int) -> Data:
    """A log of `users` users, and of its rows as many as `batches` batches take."""
    from marsjax.data.histories import feedback
    from marsjax.data.splits import make_rows
    from marsjax.records import Augmentation, Borrowed, Inputs, Log, Queries

    rng = np.random.default_rng(SEED)
    length_U = rng.integers(case.least + 3, case.most + 3, users)
    start_U1 = np.concatenate([[0], np.cumsum(length_U)])
    count = int(start_U1[-1])
    events = Log(
        start_U1, rng.integers(1, ITEMS, count).astype(np.int32), rng.integers(0, 2, count).astype(np.float32),
        np.arange(count), np.char.zfill(np.arange(users).astype(str), 8),
    )  # fmt: skip
    rows = make_rows(events, split="leave_one_out")
    own_E = rows.histories.end_E - rows.histories.start_E
    row_R = np.sort(rng.permutation(np.flatnonzero((own_E >= case.least) & (own_E <= case.most)))[: batches * batch])
    gather: dict[str, Any] = {"size": batch, "cap": case.most, "buckets": case.buckets}
    if case.mars:
        query_E = np.where(rng.random(count) < 0.5, rows.user_E, -1).astype(np.int32)
        lent_Q1 = np.concatenate([[0], np.cumsum(rng.integers(0, 50, users))])
        slots = int(lent_Q1[-1])
        borrowed = Borrowed(
            lent_Q1, rng.integers(1, ITEMS, slots).astype(np.int32), rng.integers(0, count, slots),
            np.zeros(slots, np.int32), np.zeros(slots, np.float32), rng.integers(0, 3, slots).astype(np.int8),
        )  # fmt: skip
        queries = Queries(np.arange(users, dtype=np.int32), rows.histories.train_end_U, query_E)
        gather["augmentation"] = Augmentation(queries, borrowed, time_safe=True, drop_target=True)
        gather["inputs"] = Inputs(mark_H=feedback(rows.histories.label_H))
    return Data(events, rows, row_R, gather)


def same(found: Any, expected: Any) -> bool:
    """Whether two batches are equal in every bit and type."""
    pairs = zip(found, expected, strict=True)
    return all(
        a is b or (a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)) for a, b in pairs
    )


def check_batches(served: Iterable[Any], made: Iterable[Any]) -> None:
    """Stops where a batch that the threads serve is not the one that is made of its rows."""
    for index, (found, expected) in enumerate(zip(served, made, strict=True)):
        if not same(found, expected):
            raise SystemExit(f"batch {index}: expected what ctr_batch makes of its rows, found another one")


def sides_of(case: Case, *, batch: int, users: int, batches: int, threads: int) -> Sides:
    """The real input and the cached one, before the same step."""
    import jax

    from marsjax.configuration import to_json
    from marsjax.ctr import objective
    from marsjax.ctr.backbones import make_backbone
    from marsjax.data import batches as batching
    from marsjax.defaults import default_config
    from marsjax.records import ItemTables
    from marsjax.training.optimizer import AdamW, adamw
    from marsjax.training.step import init_state

    data = draw(case, batch=batch, users=users, batches=batches)
    source, per_epoch = batching.ctr_source(data.log, data.rows, data.row_R, epochs=EPOCHS, seed=SEED, **data.gather)
    epoch = [source[index] for index in range(per_epoch)]
    served = batching.iterate(source, threads=threads)
    check_batches((next(served) for _ in epoch), epoch)
    ready = {made.history_BL.shape[1]: made for made in epoch}  # one a length

    cfg = default_config().ctr
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
    chosen = to_json(cfg) | {"inputs": "strong" if case.mars else "ids"}
    model = make_backbone(chosen, n_items=ITEMS, n_categories=1, n_users=users, n_features=0)
    tables = ItemTables(np.zeros((ITEMS, 1), np.int32))
    variables = objective.init_model(model, tables, seed=SEED)
    lifted = objective.lifted_step(model, settings, cfg_sharding())
    placed = lifted.replicate(tables)

    def side(name: str, following: Callable[[int], Any]) -> Callable[[int], float]:
        state = lifted.replicate(init_state(variables["params"], variables["statistics"], adamw(settings), seed=SEED))
        done = 0

        def read(metrics: dict[str, jax.Array]) -> float:
            loss = float(np.ravel(lifted.collect(metrics)["loss"])[0])
            if not math.isfinite(loss):
                raise SystemExit(f"{case.name}, {name}: expected a finite loss, found {loss}")
            return loss

        def run(epochs: int) -> float:
            nonlocal state, done
            before, compiled = None, len(compilations())
            for _ in range(epochs * per_epoch):
                state, metrics = lifted.step(state, lifted.split(following(done)), placed)
                done += 1
                if before is not None:  # one step late, as the training loop reads them
                    read(before)
                before = metrics
                if done == per_epoch:
                    compiled = len(compilations())  # every length has been met
            if (again := len(compilations()) - compiled) and done > per_epoch:
                raise SystemExit(f"{case.name}, {name}: expected no compilation after a pass, found {again}")
            return read(before) if before is not None else math.nan

        return run

    # Epochs differ in the order of lengths, which the source of batches alone knows: the cached side keeps that of one.
    lengths = [made.history_BL.shape[1] for made in epoch]
    following = batching.iterate(source, threads=threads)
    return Sides(
        {
            "ours": side("ours", lambda _: next(following)),
            "other": side("cached", lambda done: ready[lengths[done % per_epoch]]),
        },
        per_epoch,
        float(np.mean([sum(leaf.nbytes for leaf in made if leaf is not None) for made in epoch])),
        source.__getitem__,
    )


def cfg_sharding() -> str:
    """How the configuration lifts a step."""
    from marsjax.defaults import default_config

    return default_config().training.sharding


def per_step(timed: harness.Timed, steps: int) -> harness.Timed:
    """Seconds of a step, of turns that count epochs."""
    return harness.Timed([turn / steps for turn in timed.turns], [turn / steps for turn in timed.processor])


def rows_of(case: Case, machine: harness.Machine, arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A row for the step, and one for the making of a batch."""
    log.info("%s", case.name)
    sides = sides_of(
        case, batch=arguments.batch, users=arguments.users, batches=arguments.batches, threads=arguments.threads
    )
    timed = harness.take_turns(sides.run, turns=arguments.turns, seconds=arguments.seconds, warm=1)
    steps = {name: per_step(side, sides.per_epoch) for name, side in timed.items()}
    name = f"batch {arguments.batch}, {case.name}, {sides.per_epoch} batches an epoch"
    question = "milliseconds of a training step, batches made as it goes, against one that is ready"
    row = harness.compare(question, name, steps["ours"], steps["other"], "cached batch", target=TARGET)
    share = steps["ours"].median / steps["other"].median
    yield row | {
        "time_ratio": share,
        "compilations_after_the_first_pass": 0,
        "note": f"{share:.3f} times the time of a cached batch; nothing compiled after the first pass",
    }

    at = 0

    def make(times: int) -> None:
        nonlocal at
        for _ in range(times):
            sides.make(at % sides.per_epoch)
            at += 1

    alone = harness.take_turns({"ours": make}, turns=arguments.turns, seconds=arguments.seconds / 4)["ours"]
    # Of a row a line of each column is read, and of its history the entries and the lines where it begins and ends.
    moved = 2 * sides.batch_bytes + arguments.batch * 8 * LINE
    reached = harness.bound(machine, 0.0, moved) / alone.median
    row = harness.compare("milliseconds to make a batch, by one thread", name, alone, None, None)
    yield row | {
        "bytes": sides.batch_bytes,
        "reached": reached,
        "of_the_step": alone.median / steps["other"].median,
        "note": f"{reached:.0%} of what bytes allow; {alone.median / steps['other'].median:.1%} of the step",
    }


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="rows of a batch (default: 512)")
    parser.add_argument("--users", type=int, default=20_000, help="users of the log (default: 20000)")
    parser.add_argument("--batches", type=int, default=40, help="batches of an epoch, about (default: 40)")
    parser.add_argument("--threads", type=int, default=2, help="that make batches ahead (default: 2, as trained with)")
    parser.add_argument("--turns", type=int, default=9, help="repeats of each case, by turns (default: 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a turn takes at least (default: 2)")
    parser.add_argument("--cases", default="", help="numbers of cases, from 0, joined by commas (default: all)")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept", help="freed memory (default: kept)")
    parser.add_argument("--quick", action="store_true", help="small sizes, in less than a minute")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.users, arguments.batches, arguments.turns, arguments.seconds = 2000, 6, 3, 0.2
        arguments.cases = arguments.cases or "0,3"
    if min(arguments.batch, arguments.users, arguments.batches, arguments.turns, arguments.threads) < 1:
        parser.error("--batch, --users, --batches, --turns and --threads: expected 1 or more")
    try:
        arguments.cases = [CASES[int(part)] for part in arguments.cases.split(",") if part] or list(CASES)
    except (ValueError, IndexError):
        parser.error(f"--cases: expected numbers from 0 to {len(CASES) - 1}, found {arguments.cases}")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name)
    if arguments.allocator == "kept":  # as `marsjax` trains
        from marsjax.allocator import keep_freed_memory

        keep_freed_memory()
    began = harness.begin()
    machine = harness.measure_machine()
    rows = (row for case in arguments.cases for row in rows_of(case, machine, arguments))
    harness.write_results(
        arguments.output, rows, began, program="-m benchmarks.input_pipeline", words=words, machine=machine.describe()
    )


if __name__ == "__main__":
    main()
