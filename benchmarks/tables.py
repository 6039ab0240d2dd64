"""What does a training step cost that goes through the rows that its batch names, instead of through whole tables?

    python -m benchmarks.tables [--output=benchmarks/results/tables.json]

The DIN of the default configuration with strong inputs, trained by `ctr.tables=lazy` (ours) and `dense`, at `--sizes`
users and as many items, on the same batches: targets, users and histories drawn at random, with popularity as in Zipf's
law. The time of ours holds the renumbering of the batch, which in training a thread does ahead.

Asserted beside the time: the losses of the first step are equal, after it the parameters are too (the momentum of AdamW
is 0 before), and no step compiles anew.

The floor are the bytes of the rows: three arrays (the parameters and both moments) are read and written for each row
that is named, and the constants of items are read, each a line of the cache at least, at the rate of a copy.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks import harness

log = logging.getLogger("tables")

SEED, CATEGORIES, FEATURES, BATCHES, LINE = 0, 19, 64, 8, 64


def draw(size: int, *, batch: int, length: int, seed: int) -> Any:
    """A batch of `size` users and items; a popular item comes often."""
    from marsjax.records import CtrBatch

    rng = np.random.default_rng(seed)

    def number(*shape: int) -> np.ndarray:
        return (1 + (size - 1) ** rng.random(shape)).astype(np.int32) % size

    return CtrBatch(
        rng.integers(1, size, batch).astype(np.int32), np.maximum(number(batch), 1),
        rng.integers(0, 2, batch).astype(np.float32), np.ones(batch, np.float32), np.maximum(number(batch, length), 1),
        np.zeros((batch, length), bool), rng.integers(1, 3, (batch, length)).astype(np.int8),
    )  # fmt: skip


def rows_of(size: int, machine: harness.Machine, arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A row of a size."""
    import jax

    from marsjax.configuration import to_json
    from marsjax.ctr import objective, touched
    from marsjax.ctr.backbones import make_backbone
    from marsjax.defaults import default_config
    from marsjax.records import ItemTables
    from marsjax.training.optimizer import AdamW, adamw
    from marsjax.training.step import init_state

    log.info("%d users, %d items", size, size)
    rng = np.random.default_rng(SEED)
    cfg = default_config().ctr
    settings = AdamW(cfg.learning_rate, 0.0, cfg.clip)
    model = make_backbone(
        to_json(cfg) | {"inputs": "strong"}, n_items=size, n_categories=CATEGORIES, n_users=size, n_features=FEATURES
    )
    tables = ItemTables(
        rng.integers(1, CATEGORIES, (size, 3)).astype(np.int32),
        rng.normal(size=(size, FEATURES)).astype(np.float32),
    )
    variables = jax.device_get(objective.init_model(model, tables, seed=SEED))
    batches = [draw(size, batch=arguments.batch, length=arguments.length, seed=seed) for seed in range(BATCHES)]
    n_users = touched.rows_of_users(model)

    def touch(batch: Any) -> Any:
        return touched.touch(batch, n_items=size, n_users=n_users)

    def side(lifted: Any, renumber: Callable[[Any], Any]) -> tuple[Callable[[int], None], Any]:
        state = lifted.replicate(init_state(variables["params"], variables["statistics"], adamw(settings), seed=SEED))
        placed = lifted.replicate(tables)
        state, metrics = lifted.step(state, renumber(batches[0]), placed)
        first = jax.device_get((metrics["loss"], state.params))
        at = 0

        def run(times: int) -> None:
            nonlocal state, at
            for _ in range(times):
                at += 1
                state, _ = lifted.step(state, renumber(batches[at % BATCHES]), placed)
            jax.block_until_ready(state)

        return run, first

    lazy = touched.touched_step(model, settings, "single")
    dense = objective.lifted_step(model, settings, "single")
    (ours, found), (other, expected) = side(lazy, touch), side(dense, lambda batch: batch)
    check_equal(found, expected)
    timed = harness.take_turns({"ours": ours, "other": other}, turns=arguments.turns, seconds=arguments.seconds, warm=2)
    if (compiled := lazy.step._cache_size()) != 1:  # type: ignore[attr-defined]
        raise SystemExit(f"{size}: expected one program for all batches, found {compiled}")
    named = [touch(batch) for batch in batches]
    items, users = (
        float(np.mean([(row_X < size).sum() for row_X in rows]))
        for rows in ([one.item_X for one in named], [one.user_Y for one in named])
    )
    moved = (items + users) * 6 * LINE + items * (FEATURES * 4 + LINE)
    reached = harness.bound(machine, 0.0, moved) / timed["ours"].median
    row = harness.compare(
        "milliseconds of a training step on the rows that a batch names, against all rows",
        f"{size:,} users and items, batch {arguments.batch}, history {arguments.length}",
        timed["ours"], timed["other"], "dense",
    )  # fmt: skip
    yield row | {
        "items_named": items,
        "users_named": users,
        "reached": reached,
        "note": f"{items:,.0f} items and {users:,.0f} users named; their bytes are {reached:.0%} of the time",
    }


def check_equal(found: Any, expected: Any) -> None:
    """Stops where the first step of both is not the same."""
    import jax

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    # A step of Adam is the sign of the gradient; where that is noise, so is the sign.
    worst = max(float(np.quantile(np.abs(np.asarray(a) - np.asarray(b)), 0.999)) for a, b in pairs)
    if not worst < 1e-4:
        raise SystemExit(f"expected the same first step with all rows and with some, found a difference of {worst}")


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000", help="users, and items (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="rows of a batch (default: 512)")
    parser.add_argument("--length", type=int, default=50, help="of histories (default: 50)")
    parser.add_argument("--turns", type=int, default=7, help="repeats of each case, by turns (default: 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn takes at least (default: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, in less than a minute")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.sizes, arguments.turns, arguments.seconds = "2000,50000", 3, 0.1
    arguments.sizes = harness.whole_numbers(parser, "--sizes", arguments.sizes, least=2)
    if min(arguments.batch, arguments.length, arguments.turns) < 1:
        parser.error("--batch, --length and --turns: expected 1 or more")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measures, prints the table, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name)
    from marsjax.allocator import keep_freed_memory

    keep_freed_memory()  # as `marsjax` trains
    began = harness.begin()
    machine = harness.measure_machine()
    rows = (row for size in arguments.sizes for row in rows_of(size, machine, arguments))
    harness.write_results(
        arguments.output, rows, began, program="-m benchmarks.tables", words=words, machine=machine.describe()
    )


if __name__ == "__main__":
    main()
