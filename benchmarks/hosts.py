"""What does training over two processes cost, and does it give the parameters of one?

    python -m benchmarks.hosts [--output=benchmarks/results/hosts.json]

Two processes on one machine, joined by `jax.distributed`, sum their gradients over gloo, as processes on two hosts do;
the network between them is the machine's own, so a real one costs more. They share the cores with nothing else: the
other side is one process with two devices, on the same cores. Both take the same steps on the same batches, by turns.

A whole training is measured too, as a user starts it: `marsjax train` on the planted data, in two processes and in one
with two devices, from the start of Python to the end, with all that is compiled.

The floor of the sums: every gradient goes to the other process and comes back, all of it, since an embedding table
has a dense gradient. The table says how many bytes that are in a step.

Asserted beside the time: parameters after some steps, and at the end of the training, are those of one process to 1e-3
and 1e-4 of the largest number of an array, both processes hold the same to the bit, and the validation AUC is the same
to 1e-3.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import harness, service
from benchmarks.devices import STEPS, Work, Workers, check, difference, timed

WHOLE_TOLERANCE, SAME_AUC = 1e-4, 1e-3


def free_address() -> str:
    """Where a coordinator can listen."""
    return f"{service.HOST}:{service.free_port()}"


def step_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of a step for each mode and batch."""
    for mode in arguments.modes.split(","):
        for batch in arguments.batches:
            one = Work(mode, batch, arguments.length, arguments.users)
            joined = one._replace(coordinator=free_address(), processes=2)
            sides = {
                "ours": Workers([joined._replace(process=number) for number in (0, 1)], devices=1),
                "other": Workers([one], devices=2),
            }
            try:
                for side in sides.values():
                    side.run(STEPS)
                parameters = {name: side.parameters() for name, side in sides.items()}
                found = check(f"{mode}, batch {batch}", difference(parameters["other"], parameters["ours"]))
                times = timed(sides, arguments)
            finally:
                for side in sides.values():
                    side.close()
            moved = 2 * sum(value.nbytes for value in parameters["ours"].values())
            row = harness.compare(
                "milliseconds of a training step of two processes against one with two devices",
                f"{mode}, batch {batch}, history {arguments.length}, {arguments.users} users",
                times["ours"], times["other"], "one process",
            )  # fmt: skip
            yield row | {
                "time_ratio": times["ours"].median / times["other"].median,
                "largest_difference": found,
                "bytes": moved,
                "note": f"{moved / 1e6:.1f} MB of gradients; after {STEPS} steps parameters differ by {found:.1g}",
            }


def train(folder: pathlib.Path, processes: int, arguments: argparse.Namespace) -> float:
    """Seconds of `marsjax train` in so many processes, which have two devices together."""
    command = [
        sys.executable, "-m", "marsjax.main", "train", "--config=configs/synthetic.py:1seed", f"--workdir={folder}",
        "--config.evaluation.methods=base", "--config.training.sharding=pmap",
        f"--config.data.synthetic.n_users={arguments.planted}",
    ]  # fmt: skip
    address = free_address()
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    began = time.perf_counter()
    started = [
        subprocess.Popen(
            [*command, f"--coordinator={address}", f"--num_processes={processes}", f"--process_id={number}"]
            if processes > 1
            else command,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("\n".join(said))
    return time.perf_counter() - began


def training_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of the whole training."""
    from marsjax import files
    from marsjax.training import checkpoint

    with tempfile.TemporaryDirectory() as root:
        folders = {"ours": pathlib.Path(root) / "two", "other": pathlib.Path(root) / "one"}
        seconds = {
            "ours": harness.Timed([train(folders["ours"], 2, arguments)], []),
            "other": harness.Timed([train(folders["other"], 1, arguments)], []),
        }
        params, auc = {}, {}
        for name, folder in folders.items():
            (stage,) = folder.glob("stages/base-*")
            params[name] = checkpoint.load_params(stage / "params")
            auc[name] = max(one["valid_auc"] for one in files.read_json(stage / "evaluations.json"))
    found = check("the whole training", difference(params["other"], params["ours"]), WHOLE_TOLERANCE)
    check("its AUC", abs(auc["ours"] - auc["other"]), SAME_AUC)
    row = harness.compare(
        "seconds of `marsjax train` by two processes against one with two devices",
        f"planted data, {arguments.planted} users", seconds["ours"], seconds["other"], "one process", scale=1.0,
    )  # fmt: skip
    yield row | {
        "auc": auc,
        "largest_difference": found,
        "note": f"validation AUC {auc['ours']:.4f} and {auc['other']:.4f}; parameters differ by {found:.1g}",
    }


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="512,4096", help="rows of a batch, joined by commas (default: 512,4096)")
    parser.add_argument("--modes", default="pmap,shard_map", help="of the sharding (default: both)")
    parser.add_argument("--length", type=int, default=50, help="of histories (default: 50)")
    parser.add_argument("--users", type=int, default=6000, help="who have an id embedding (default: 6000)")
    parser.add_argument("--planted", type=int, default=2000, help="users of the planted data (default: 2000)")
    parser.add_argument("--turns", type=int, default=9, help="repeats of each case, by turns (default: 9)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a turn takes at least (default: 2)")
    parser.add_argument("--quick", action="store_true", help="small sizes, in some minutes")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.batches, arguments.users, arguments.planted, arguments.modes = "128", 500, 200, "pmap"
        arguments.turns, arguments.seconds = 3, 0.2
    arguments.batches = harness.whole_numbers(parser, "--batches", arguments.batches)
    if min(arguments.length, arguments.users, arguments.turns) < 1:
        parser.error("--length, --users and --turns: expected 1 or more")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes the rows."""
    arguments = parse(words)
    harness.log_progress()
    began = harness.begin()
    machine = harness.measure_machine()
    rows = itertools.chain(step_rows(arguments), training_rows(arguments))
    harness.write_results(
        arguments.output, rows, began, program="-m benchmarks.hosts", words=words, machine=machine.describe()
    )


if __name__ == "__main__":
    main()
