"""How do time and memory of the whole pipeline grow with the number of users?

    python -m benchmarks.scale [--sizes=10000,100000,1000000] [--output=benchmarks/results/scale.json]

Each size is a process of its own, whose peak of resident memory is what the kernel says (`ru_maxrss`). It goes through
the stages as `marsjax run` does, with their files: columns of a log in time order become a data set (`data`), splits
and histories (`histories`), the vectors of all users (`user vectors`), an index over the high-active ones, what each
low-active user borrows, for every prefix of the own history (`index and borrowing`), and training on that (`training`).

Not as in a full run: the encoder is as it was drawn, and the CTR model is trained for `--steps` steps and not for
epochs, without an embedding of the user's id; training is not part of the time that is fitted. The aligned space has
`--width` numbers (64; the default configuration has 256). There are 5,000 items whatever the number of users, and 3 to
5 events of most users, 10 to 30 of the most active third. Drawing the log is not timed; its memory counts where it is
the peak.

The exponents are the slopes of lines by least squares through the logarithms of time and of peak memory, over the
users. What does not grow (compiling, tracing, the libraries) would flatter them: a process with `--base` users goes
first, and what it takes is taken off; a size that takes hardly more than that is left out of the line. Beside it stands
the exponent between the two largest sizes alone. A size that was not run is an estimate, and the row says so: the last
size and as much for each user beyond it as between the last two.

Asserted beside the time: every low-active user with a history borrows, only from high-active users, only what the
donor did before the end of training, and the recall of the index is at least `--recall`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness

log = logging.getLogger("scale")

SIZES, LARGEST = (10_000, 100_000, 1_000_000), 10_000_000
EXPONENT, MEMORY = 1.05, 24e9  # targets
SEED, ITEMS, TOPICS, TYPES, WIDTH, FEATURES = 0, 5000, 50, 200, 64, 32
LOW, HIGH = (3, 5), (10, 30)  # events of a user
COMPILED = "/jax/core/compile/backend_compile_duration"


class Columns(NamedTuple):
    """A log as a file would give it: numbers of names, in the order of time."""

    user_R: np.ndarray  # [R] int32
    item_R: np.ndarray  # [R] int32
    label_R: np.ndarray  # [R] float32
    time_R: np.ndarray  # [R] int64
    user_name_U: np.ndarray
    item_name_I: np.ndarray
    feature_IF: np.ndarray  # of both modalities


def draw(users: int, *, items: int = ITEMS, seed: int = SEED) -> Columns:
    """Planted interests: a user has a type, a type likes four topics, most events are of liked topics."""
    rng = np.random.default_rng(seed)
    is_high_U = rng.random(users) < 1 / 3
    count_U = np.where(is_high_U, rng.integers(*HIGH, users, endpoint=True), rng.integers(*LOW, users, endpoint=True))
    likes_YK = rng.integers(TOPICS, size=(TYPES, 4)).astype(np.int32)
    type_U = rng.integers(TYPES, size=users).astype(np.int32)
    user_R = np.repeat(np.arange(users, dtype=np.int32), count_U)
    # Whoever draws an item at random draws what is read in no order: a file is in the order of time.
    time_R = rng.integers(0, 1 << 30, len(user_R), np.int64)
    order_R = np.argsort(time_R)
    user_R, time_R = user_R[order_R], time_R[order_R]
    del order_R
    topic_R = likes_YK[type_U[user_R], rng.integers(4, size=len(user_R), dtype=np.int8)]
    by_chance_R = rng.random(len(user_R), np.float32) < 0.2
    topic_R = np.where(by_chance_R, rng.integers(TOPICS, size=len(user_R), dtype=np.int32), topic_R)
    each = items // TOPICS
    item_R = topic_R * each + rng.integers(each, size=len(user_R), dtype=np.int32)
    label_R = (rng.random(len(user_R), np.float32) < np.where(by_chance_R, 0.2, 0.8)).astype(np.float32)
    topic_TF = rng.standard_normal((TOPICS, FEATURES), np.float32)
    feature_IF = np.repeat(topic_TF, each, axis=0) + 0.3 * rng.standard_normal((each * TOPICS, FEATURES), np.float32)
    return Columns(
        user_R, item_R, label_R, time_R, np.char.zfill(np.arange(users).astype(str), 8),
        np.char.zfill(np.arange(each * TOPICS).astype(str), 6), feature_IF,
    )  # fmt: skip


def peak() -> float:
    """Bytes that this process had in memory at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def configuration(width: int) -> Any:
    """The default one but for what the top of this file says."""
    from marsjax.configuration import load_config

    return load_config(
        "configs/synthetic.py:1seed",
        {
            "alignment.epochs": "0", "alignment.width": str(width), "alignment.id_width": str(width // 2),
            "alignment.hidden": str(width),
        },
    )  # fmt: skip


class Stage(NamedTuple):
    """What a stage took."""

    seconds: float
    compiling: float  # of these, where nothing else is done
    peak: float  # bytes, after it


def measure(users: int, *, width: int, steps: int, recall: float) -> dict[str, Any]:
    """All stages for so many users, in this process."""
    import jax

    from marsjax import pipeline
    from marsjax.data.cleaning import Ids, RawFeatures, RawItems, build_dataset
    from marsjax.stages import Stages

    compiled: list[float] = []

    def listen(name: str, seconds: float, **_: str | int) -> None:
        if name == COMPILED:
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)  # type: ignore[arg-type]  # it is called by place
    config = configuration(width)
    jax.block_until_ready(jax.numpy.zeros(1))
    start = peak()
    raw = draw(users)
    drawn = peak()
    stages: dict[str, Stage] = {}
    began, before = time.perf_counter(), 0

    def done(name: str) -> None:
        nonlocal began, before
        seconds = time.perf_counter() - began
        # At most all of it: a compilation within another one, or beside it, is counted twice.
        stages[name] = Stage(seconds, min(sum(compiled[before:]), seconds), peak())
        log.info("%d users, %s: %.1f s, %.2f GB", users, name, stages[name].seconds, stages[name].peak / 1e9)
        began, before = time.perf_counter(), len(compiled)

    dataset = build_dataset(
        name="scale",
        user_R=Ids(raw.user_R, raw.user_name_U),
        item_R=Ids(raw.item_R, raw.item_name_I),
        label_R=raw.label_R,
        time_R=raw.time_R,
        where=lambda row_R: [f"row {row}" for row in row_R],
        items=RawItems(raw.item_name_I, np.full(len(raw.item_name_I), ""), [()] * len(raw.item_name_I)),
        features={name: RawFeatures(raw.item_name_I, raw.feature_IF, name) for name in ("text", "image")},
    )
    events = len(raw.user_R)
    del raw
    done("data")
    loaded = pipeline.load(config, dataset)
    done("histories")
    with tempfile.TemporaryDirectory() as work:
        context = pipeline.Context(config, loaded, Stages(pathlib.Path(work)), SEED)
        space = pipeline.align_stage(context)
        vectors, _ = pipeline.embed_stage(context, space)
        done("user vectors")
        donation = pipeline.augment_stage(context, space, vectors)
        done("index and borrowing")
        found = json.loads((donation.folder / "statistics.json").read_text())
    check(loaded, donation, found, recall)
    began = time.perf_counter()
    train(config, loaded, donation, steps)
    done("training")
    return {
        "users": users, "events": events,
        "queries": len(donation.queries.user_Q), "donors": len(donation.donors.user_P),
        "start": start, "drawn": drawn, "recall": found["recall"], "borrowed": found["borrowed_per_query"],
        "stages": {name: stage._asdict() for name, stage in stages.items()},
    }  # fmt: skip


def check(loaded: Any, donation: Any, statistics: dict[str, float], recall: float) -> None:
    """Stops where somebody borrows what may not be borrowed, or where the index finds too little."""
    from marsjax.records import HIGH
    from marsjax.records import LOW as LOW_ACTIVE

    rows, borrowed, queries = loaded.rows, donation.borrowed, donation.queries
    if not (rows.group_U[borrowed.donor_S] == HIGH).all():
        raise SystemExit("expected donors who are high-active, found others")
    if not (rows.group_U[queries.user_Q] == LOW_ACTIVE).all():
        raise SystemExit("expected that low-active users borrow, found others")
    lent_Q = np.diff(borrowed.start_Q1)
    if not lent_Q.all():
        raise SystemExit(f"expected that every query borrows, found {int((lent_Q == 0).sum())} that do not")
    # An item stands in the donor's training history: of some, as the search of all takes long.
    histories = rows.histories
    for slot in np.random.default_rng(SEED).permutation(len(borrowed.item_S))[:100]:
        donor = borrowed.donor_S[slot]
        known = histories.item_H[histories.start_U1[donor] : histories.train_end_U[donor]]
        if borrowed.item_S[slot] not in known:
            raise SystemExit(f"expected items of the donor's training history, found {borrowed.item_S[slot]}")
    if statistics["recall"] < recall:
        raise SystemExit(f"expected recall of {recall}, found {statistics['recall']:.4f}")


def train(config: Any, loaded: Any, donation: Any, steps: int) -> None:
    """So many steps of the CTR model on augmented histories, through the real input."""
    from marsjax.configuration import to_json
    from marsjax.ctr import objective
    from marsjax.ctr.backbones import make_backbone
    from marsjax.data import batches
    from marsjax.pipeline import counts
    from marsjax.records import TRAIN, Augmentation
    from marsjax.training.optimizer import AdamW, adamw
    from marsjax.training.step import init_state

    cfg, rows = config.ctr, loaded.rows
    source, _ = batches.ctr_source(
        loaded.dataset.log, rows, np.flatnonzero(rows.split_E == TRAIN), size=cfg.batch_size, cap=cfg.cap,
        buckets=tuple(cfg.buckets), epochs=1_000, seed=SEED,
        augmentation=Augmentation(donation.queries, donation.borrowed),
    )  # fmt: skip
    # An embedding of the user's id is a row a user, of which Adam has two more and reads all in each step.
    model = make_backbone(to_json(cfg) | {"user_id": False}, **counts(loaded, "mars"))
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
    variables = objective.init_model(model, loaded.tables, seed=SEED)
    lifted = objective.lifted_step(model, settings, config.training.sharding)
    state = lifted.replicate(init_state(variables["params"], variables["statistics"], adamw(settings), seed=SEED))
    tables, served, loss = lifted.replicate(loaded.tables), batches.iterate(source), math.nan
    for _ in range(steps):
        state, metrics = lifted.step(state, lifted.split(next(served)), tables)
        loss = float(np.ravel(lifted.collect(metrics)["loss"])[0])
    if steps and not math.isfinite(loss):
        raise SystemExit(f"expected a finite loss, found {loss}")


# --- what is made of it ---------------------------------------------------------------------------------------------


def exponent(size_X: Sequence[float], value_X: Sequence[float]) -> float:
    """Slope of the line by least squares through the logarithms."""
    return float(np.polyfit(np.log(size_X), np.log(value_X), 1)[0])


def timed_of(run: dict[str, Any]) -> float:
    """Seconds of all stages but for compiling and training, which do not grow with the users by themselves."""
    return sum(stage["seconds"] - stage["compiling"] for name, stage in run["stages"].items() if name != "training")


def peak_of(run: dict[str, Any]) -> float:
    """Bytes at most."""
    return max(run["drawn"], *(stage["peak"] for stage in run["stages"].values()))


def rows_of(measured: Iterable[dict[str, Any]], base: dict[str, Any], largest: int) -> Iterable[dict[str, Any]]:
    """Times, memory, exponents, and the largest size where it was not run. All that was measured stands in the first
    row of each size."""
    blank = {"other": None, "other_name": None, "ratio": None, "target": None, "met": None}
    runs = []
    for run in measured:
        runs.append(run)
        case = f"{run['users']} users, {run['events']} events"
        note = (
            f"{run['donors']} donors, {run['queries']} queries, recall {run['recall']:.4f}, "
            f"{run['borrowed']:.1f} items lent"
        )
        total = {"question": "seconds of the pipeline without compiling and training", "case": case}
        yield {**total, "ours": timed_of(run), **blank, "note": note, "run": run}
    for name in runs[0]["stages"]:
        for run in runs:
            stage = run["stages"][name]
            yield {
                "question": f"seconds of a stage: {name}", "case": f"{run['users']} users",
                "ours": stage["seconds"] - stage["compiling"], **blank,
                "note": f"{stage['compiling']:.1f} s of compiling beside; peak so far {stage['peak'] / 1e9:.2f} GB",
            }  # fmt: skip
    for run in runs:
        fits = peak_of(run) <= MEMORY if run["users"] == LARGEST else None
        yield {
            "question": "peak memory, GB", "case": f"{run['users']} users", "ours": peak_of(run) / 1e9, **blank,
            "target": None if fits is None else MEMORY / 1e9, "met": fits,
            "note": f"{run['start'] / 1e9:.2f} GB before the first event; "
            f"{(peak_of(run) - run['start']) / run['users']:.0f} bytes a user beyond",
        }  # fmt: skip
    sizes = [run["users"] for run in runs]
    for name, unit, scale, of in (("time", "seconds", 1.0, timed_of), ("memory", "GB", 1e-9, peak_of)):
        # Less than a tenth above the base is chance.
        grown = [run for run in runs if of(run) > 1.1 * of(base)]
        if len(grown) < 2:
            continue
        used, added = [run["users"] for run in grown], [of(run) - of(base) for run in grown]
        slope, last = exponent(used, added), exponent(used[-2:], added[-2:])
        yield {
            "question": "exponent of growth with the users", "case": f"{name}, {used[0]} to {used[-1]} users",
            "ours": slope, **blank, "target": EXPONENT, "met": bool(slope <= EXPONENT), "last_two": last,
            "note": f"{last:.3f} between the last two; at most the target is met; less {of(base) * scale:.3g} {unit} "
            f"of {base['users']} users",
        }  # fmt: skip
        if largest in sizes:
            continue
        each = (added[-1] - added[-2]) / (used[-1] - used[-2])
        shown = (of(grown[-1]) + (largest - used[-1]) * each) * scale
        yield {
            "question": f"estimate for {largest} users, not run", "case": f"{name}, {unit}", "ours": shown, **blank,
            "target": MEMORY * scale if name == "memory" else None,
            "met": bool(shown <= MEMORY * scale) if name == "memory" else None,
            "note": f"an estimate: {used[-1]} users, and as much for each beyond as from {used[-2]} to {used[-1]}",
        }  # fmt: skip


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="users (default: 10000,100000,1000000)")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the aligned space (default: 64)")
    parser.add_argument("--steps", type=int, default=50, help="of the CTR training (default: 50)")
    parser.add_argument("--recall", type=float, default=0.9, help="of the index, at least (default: 0.9)")
    parser.add_argument("--base", type=int, default=500, help="users whose cost is taken off (default: 500)")
    parser.add_argument("--largest", type=int, default=LARGEST, help="estimated where not run (default: 10000000)")
    parser.add_argument("--quick", action="store_true", help="4,000 users, in less than a minute")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    for name in ("size", "answer"):  # how this command calls itself for one size
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.sizes, arguments.steps = "4000,", 3
    try:
        arguments.sizes = sorted({int(part) for part in arguments.sizes.split(",") if part})
    except ValueError:
        parser.error(f"--sizes: expected whole numbers joined by commas, found {arguments.sizes}")
    if not arguments.sizes or min(arguments.base, *arguments.sizes) < 100 or arguments.width < 2 or arguments.steps < 0:
        parser.error("expected sizes of 100 or more, a width of 2 or more, and steps from 0")
    return arguments


def measure_apart(arguments: argparse.Namespace, answer: pathlib.Path) -> Iterator[dict[str, Any]]:
    """`measure` of the base and of each size, in a process of its own."""
    for size in (arguments.base, *arguments.sizes):
        call = [
            sys.executable, "-m", "benchmarks.scale", f"--size={size}", f"--answer={answer}",
            f"--width={arguments.width}", f"--steps={arguments.steps}", f"--recall={arguments.recall}",
        ]  # fmt: skip
        # What the stages print goes where progress goes.
        if subprocess.run(call, check=False, stdout=sys.stderr).returncode:
            raise SystemExit(f"{size} users: expected a finished process, found one that failed; see above")
        yield json.loads(answer.read_text())


def main(words: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name)
    if arguments.size:
        from marsjax.allocator import keep_freed_memory

        keep_freed_memory()  # as `marsjax run` has it
        found = measure(int(arguments.size), width=arguments.width, steps=arguments.steps, recall=arguments.recall)
        pathlib.Path(arguments.answer).write_text(json.dumps(found))
        return
    began = harness.begin()
    with tempfile.TemporaryDirectory() as folder:
        runs = measure_apart(arguments, pathlib.Path(folder, "answer.json"))
        rows = rows_of(runs, next(runs), arguments.largest)
        harness.write_results(arguments.output, rows, began, program="-m benchmarks.scale", words=words)


if __name__ == "__main__":
    main()
