"""What all benchmarks share: two things measured by turns, what the machine does at best, and rows of results."""

from __future__ import annotations

import argparse
import logging
import math
import os
import pathlib
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from marsjax import files
from marsjax.provenance import current_commit, machine_description

PATHS = re.compile(r"^(--(?:bundle|folder|data|workdir)=).*?(/ml-1m)?/?$")  # where data lie on a machine says nothing
WARM = 3


class Machine(NamedTuple):
    """What it does at best, all cores together, and with what it was measured."""

    flops: float  # of a float32 matrix product, a second
    bytes: float  # of a copy, a second, read and written
    threads: str

    def describe(self) -> str:
        """For a person."""
        return f"{self.threads}, {self.flops / 1e9:.0f} GFLOP/s in float32, {self.bytes / 1e9:.1f} GB/s of copies"


class Timed(NamedTuple):
    """Turns of one side, in seconds of one call."""

    turns: list[float]
    processor: list[float]  # of all threads together; empty: not measured

    @property
    def median(self) -> float:
        """Seconds of the middle turn."""
        return statistics.median(self.turns)


def measure_machine(torch: Any = None) -> Machine:
    """The rates that work is held against: the better one of NumPy's and, where it is given, PyTorch's."""
    width, count = 2048, 64 << 20
    a, b, c = (np.ones((width, width), np.float32) for _ in range(3))
    source, target = np.ones(count, np.float32), np.zeros(count, np.float32)
    products: list[Callable[[], Any]] = [lambda: np.matmul(a, b, out=c)]
    copies: list[Callable[[], Any]] = [lambda: np.copyto(target, source)]
    if torch is not None:
        x, y, z, from_, to = (torch.from_numpy(value) for value in (a, b, c, source, target))
        products.append(lambda: torch.matmul(x, y, out=z))
        copies.append(lambda: to.copy_(from_))
    flops = 2 * width**3 / min(quickest(work) for work in products)
    moved = 2 * source.nbytes / min(quickest(work) for work in copies)
    cores = len(os.sched_getaffinity(0))
    threads = f"{cores} cores" + ("" if torch is None else f", {torch.get_num_threads()} threads of PyTorch")
    return Machine(flops, moved, threads)


def measure_device(torch: Any = None, *, precision: str = "default") -> Machine:
    """The rates of the device that JAX computes on: those of `measure_machine` on a CPU.

    `precision` is that of the product, as `jax.numpy.matmul` takes it: by default an accelerator rounds float32 (a GPU
    to TF32).
    """
    import jax
    import jax.numpy as jnp

    if jax.default_backend() == "cpu":
        return measure_machine(torch)
    width, count = 8192, 256 << 20
    of_a, of_b = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (width, width), jnp.float32) for key in (of_a, of_b))
    source = jax.random.normal(of_a, (count,), jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    copy = jax.jit(lambda source: -source)
    for work in (lambda: product(a, b), lambda: copy(source)):
        jax.block_until_ready(work())
    flops = 2 * width**3 / quickest(lambda: jax.block_until_ready(product(a, b)))
    moved = 2 * source.nbytes / quickest(lambda: jax.block_until_ready(copy(source)))
    return Machine(flops, moved, f"{jax.devices()[0].device_kind}, products at precision {precision}")


def bound(machine: Machine, flops: float, moved: float) -> float:
    """Seconds that the machine needs at least: whichever takes longer, operations or bytes."""
    return max(flops / machine.flops, moved / machine.bytes)


def quickest(work: Callable[[], Any], *, times: int = 7) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def repeated(work: Callable[[], Any]) -> Callable[[int], None]:
    """A side for `take_turns` that does its work, of jax, so many times, and waits for each."""
    import jax

    def run(times: int) -> None:
        for _ in range(times):
            jax.block_until_ready(work())

    return run


def take_turns(
    sides: Mapping[str, Callable[[int], Any]], *, turns: int, seconds: float, warm: int = WARM
) -> dict[str, Timed]:
    """Seconds of one call of each side, `turns` times in turns of about `seconds`, after a warm-up.

    A side is a function that does its work so many times and returns when it is done (of jax: `block_until_ready`).
    """
    calls, found = {}, {name: Timed([], []) for name in sides}
    for name, run in sides.items():
        run(warm)
        began = time.perf_counter()
        run(1)
        calls[name] = max(1, math.ceil(seconds / max(time.perf_counter() - began, 1e-6)))
    for _ in range(turns):
        for name, run in sides.items():
            began, before = time.perf_counter(), time.process_time()
            run(calls[name])
            found[name].processor.append((time.process_time() - before) / calls[name])
            found[name].turns.append((time.perf_counter() - began) / calls[name])
    return found


def compare(
    question: str,
    case: str,
    ours: Timed,
    other: Timed | None,
    name: str | None,
    *,
    scale: float = 1e3,
    target: float | None = None,
) -> dict[str, Any]:
    """A row of times (milliseconds, by `scale`), with the least and the most of the turns.

    `ratio` says how many times as fast ours is, and `met` whether that is at least the target.
    """
    ratio = None if other is None else other.median / ours.median
    row: dict[str, Any] = {
        "question": question, "case": case, "ours": ours.median * scale,
        "other": None if other is None else other.median * scale, "other_name": name, "ratio": ratio,
        "target": target, "met": None if ratio is None or target is None else bool(ratio >= target),
    }  # fmt: skip
    row["turns"] = len(ours.turns)
    for label, side in (("ours", ours), ("other", other)):
        row[f"{label}_least"] = None if side is None else min(side.turns) * scale
        row[f"{label}_most"] = None if side is None else max(side.turns) * scale
        if side is not None and side.processor:
            row[f"{label}_processor"] = statistics.median(side.processor) * scale
    of_turns = [] if other is None else [b / a for a, b in zip(ours.turns, other.turns, strict=True)]
    if "other_processor" in row:
        row["processor_ratio"] = row["other_processor"] / row["ours_processor"]
    return row | {"ratio_least": min(of_turns, default=None), "ratio_most": max(of_turns, default=None)}


def whole_numbers(parser: argparse.ArgumentParser, flags: str, text: str, *, least: int = 1) -> list[int]:
    """The numbers that `flags` were given, joined by commas; else the program ends with what was expected of them."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        parser.error(f"{flags}: expected whole numbers from {least} on, joined by commas, found {text}")
    return found


def log_progress(*names: str) -> None:
    """What these loggers tell goes to the standard error, and of all others warnings alone."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for name in names:
        logging.getLogger(name).setLevel(logging.INFO)


def by_question(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each question together, in the order in which questions and rows came."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["question"], []).append(row)
    return [row for group in groups.values() for row in group]


def number(value: float | None) -> str:
    """Four digits."""
    return "" if value is None else f"{value:.4g}"


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each question. A row may have a `note`, such as how near it comes to what the machine can do."""
    lines: list[str] = []
    asked = ""
    for row in rows:
        if row["question"] != asked:
            asked = row["question"]
            lines += [
                "",
                f"{asked}:",
                "",
                "| case | ours | other | | ratio | of turns | target | met | |",
                "|---" * 9 + "|",
            ]
        low, high = row.get("ratio_least"), row.get("ratio_most")
        met = {None: "", True: "yes", False: "no"}[row.get("met")]
        cells = [
            row["case"], number(row["ours"]), number(row.get("other")), row.get("other_name") or "",
            number(row.get("ratio")), "" if low is None else f"{low:.2f} to {high:.2f}", number(row.get("target")), met,
            row.get("note", ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


class Began(NamedTuple):
    """When a benchmark was started, and with which code: what is committed later is not what ran."""

    seconds: float
    commit: str


def begin() -> Began:
    """To be called first."""
    return Began(time.perf_counter(), current_commit())


def write_results(
    output: pathlib.Path | None,
    rows: Iterable[dict[str, Any]],
    began: Began,
    *,
    program: str,
    words: Sequence[str] | None = None,
    machine: str = "",
) -> list[dict[str, Any]]:
    """Measures the rows, one after the other, and gives them back by question. They are printed, and written with the
    command, the commit, the machine and how busy it was; until the last one is there, in OUTPUT.unfinished.

    `program` is what `python` is given before the flags `words` (those of this process by default).
    """
    given = sys.argv[1:] if words is None else words
    kept = [PATHS.sub(lambda found: f"{found[1]}PATH{found[2] or ''}", word) for word in given]

    def write(path: pathlib.Path) -> None:
        busy = f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}"
        content = {
            "command": shlex.join(["python", *program.split(), *kept]),
            "commit": began.commit,
            "machine": "; ".join(part for part in (machine_description(), machine, busy) if part),
            "wall_seconds": time.perf_counter() - began.seconds,
            "rows": by_question(measured),
        }
        files.write_json(path, content)

    measured: list[dict[str, Any]] = []
    unfinished = None if output is None else output.with_name(f"{output.name}.unfinished")
    try:
        for row in rows:
            measured.append(row)
            if unfinished is not None:
                write(unfinished)
    finally:
        found = by_question(measured)
        sys.stdout.write(as_markdown(found))
    if output is not None and unfinished is not None:
        write(output)
        unfinished.unlink(missing_ok=True)
    return found
