"""All benchmarks by one command.

    python -m benchmarks [NAMES] [--quick] [--folder=PATH/ml-1m] [--bundle=BUNDLE] [--results=benchmarks/results]

runs each in a process of its own, prints its tables, and writes NAME.json into --results; with --quick, which takes
minutes, nothing is written. What needs data, a bundle or a package that is not there is told and left out.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple


class Benchmark(NamedTuple):
    """A module of this package that answers one question."""

    question: str
    flags: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    needs: str = ""  # "folder" or "bundle"


BENCHMARKS = {
    "din_step": Benchmark(
        "how fast is a training step of a DIN, and an epoch, against FuxiCTR's?", ("--epoch",),
        ("--batches=512", "--histories=50", "--activations=prelu", "--turns=3", "--alone"),
    ),
    "stein": Benchmark("how fast is the Stein score, against a naive one, SSGE and what the machine allows?"),
    "encoding": Benchmark("what does it take to embed users, against the equations as they are written?"),
    "retrieval": Benchmark(
        "how fast and how right are retrieval and borrowing, against faiss and hnswlib?",
        quick=("--quick", "--alone"),
    ),
    "input_pipeline": Benchmark("how much longer does a step take when its batches are made as it goes?"),
    "tables": Benchmark("how much faster is a step on the rows that its batch names than on whole tables?"),
    "devices": Benchmark("what do more devices cost on the same cores, and what is bfloat16 worth?"),
    "hosts": Benchmark("what does training over two processes cost, and does it give the parameters of one?"),
    "scale": Benchmark("how do time and memory grow with the users?"),
    "leak": Benchmark("does the choice of a donor see the label?", quick=("--seeds=1",), needs="folder"),
    "serving_load": Benchmark(
        "how long does a request take, for 1, 8 and 32 clients, and what does augmentation add?",
        quick=("--requests=100",), needs="bundle",
    ),
    "serving_backends": Benchmark(
        "how long does a request take where PyTorch or ONNX Runtime scores in the same service?",
        quick=("--requests=100", "--blocks=3"), needs="bundle",
    ),
    "serving_parity": Benchmark(
        "are scores of the service those of `marsjax score`?", quick=("--requests=200",), needs="bundle"
    ),
    "allocator": Benchmark("what is keeping freed memory worth?", quick=()),
}  # fmt: skip


def words_of(name: str, arguments: argparse.Namespace) -> list[str] | None:
    """The flags of one benchmark; None where it needs what was not given."""
    benchmark = BENCHMARKS[name]
    words = list(benchmark.quick if arguments.quick else benchmark.flags)
    given = getattr(arguments, benchmark.needs) if benchmark.needs else None
    if benchmark.needs and given is None:
        return None
    if given is not None:
        words.append(f"--{benchmark.needs}={given}")
    if name == "din_step" and arguments.folder and not arguments.quick:
        words.append(f"--folder={arguments.folder}")
    if not arguments.quick:
        words.append(f"--output={arguments.results / name}.json")
    return words


def main(words: list[str] | None = None) -> int:
    """Runs them one after the other; 1 where one of them failed."""
    listed = "\n".join(f"  {name:16} {benchmark.question}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", metavar="NAMES", help="these alone (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing")
    parser.add_argument("--folder", help="MovieLens-1M, for the benchmarks that need real data")
    parser.add_argument("--bundle", help="what `marsjax export` wrote, for the benchmarks of the service")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("benchmarks/results"), metavar="DIR")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"expected some of {', '.join(BENCHMARKS)}, found {', '.join(sorted(unknown))}")
    failed = []
    for name in arguments.names or BENCHMARKS:
        flags = words_of(name, arguments)
        if flags is None:
            sys.stdout.write(f"\n{name}: left out, since it needs --{BENCHMARKS[name].needs}\n")
            continue
        sys.stdout.write(f"\n{name}: {BENCHMARKS[name].question}\n")
        sys.stdout.flush()
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=False)
        sys.stdout.write(
            f"{name}: {'done' if done.returncode == 0 else 'FAILED'} in {time.monotonic() - began:.0f} s\n"
        )
        if done.returncode:
            failed.append(name)
    if failed:
        sys.stdout.write(f"\nfailed: {', '.join(failed)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
