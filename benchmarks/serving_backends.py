"""The same DIN in eager PyTorch and in ONNX Runtime behind the same server, beside marsjax's own scoring.

    pip install torch onnx onnxruntime
    python -m benchmarks.serving_backends --bundle=BUNDLE --output=benchmarks/results/serving_backends.json

Three services run on the same two cores, with the clients, and are asked the same requests by turns, as in
`serving_load`, where what a user borrows is remembered ("warm"). HTTP, histories, lending and batching are marsjax's in
all of them: a service differs in what stands behind `scoring.score_rows` alone.

marsjax   compiled shapes, to which requests are padded
torch     `benchmarks/torch_din.py` in eager mode, in inference mode; with 1 or 2 threads, whichever answers 8 clients
          faster before it is measured
onnx      the same module, exported for any number of candidates and length of the history; one thread computes
          (`intra_op_num_threads`)

All keep the memory that they free (`marsjax.allocator`), as marsjax's service does; eager PyTorch gains most from it.
Before anything is measured all services answer the same requests, whose scores must not differ by 1e-5.

    python -m benchmarks.serving_backends serve --backend=torch --threads=1 --root=ROOT [flags of `marsjax serve`]

is one of these services; with --backend=onnx also --model=FILE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import backends, clients, service, serving_load
from benchmarks.serving_load import Services
from marsjax.allocator import keep_freed_memory
from marsjax.main import main as marsjax_main
from marsjax.serving import scoring
from marsjax.serving.bundle import load_bundle

WARM: dict[str, object] = {"live": "true", "cache": "true"}
THREADS = (1, 2)  # of PyTorch
COMPARED, ALLOWED = 200, 1e-5
TURNS, TRIED = 5, 8  # blocks and clients that decide between numbers of threads


def main() -> None:
    arguments = serving_load.make_parser(__doc__).parse_args()
    backends.need("torch", "onnx", "onnxruntime")
    began = time.monotonic()
    requests = serving_load.make_requests(arguments.bundle, arguments.candidates)
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "din.onnx"
        backends.export_onnx(load_bundle(arguments.bundle), model)
        cases = {"marsjax": serving_load.Service(WARM)}
        for threads in THREADS:
            cases[_torch_case(threads)] = _service("--backend=torch", f"--threads={threads}")
        cases["onnx"] = _service("--backend=onnx", f"--model={model}")
        with serving_load.serving(arguments.bundle, cases, arguments.cores) as services:
            rows = compare(services, requests[:COMPARED])
            services, tried = choose_threads(services, requests, size=arguments.requests)
            found = serving_load.measure(services, requests, size=arguments.requests, blocks=arguments.blocks)
            compiled = serving_load.compilations(services)
    rows += [*tried, *make_rows(found, arguments.candidates)]
    rows.append(service.row("compilations while serving", "all", compiled, None, "", 0))
    service.write_results(arguments.output, rows, began, module="benchmarks.serving_backends")


def serve(words: Sequence[str]) -> int:
    """`marsjax serve` in which another backend scores; returns the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--backend", choices=("torch", "onnx"), required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=pathlib.Path, help="an ONNX file of the bundle that is served")
    arguments, others = parser.parse_known_args(words)
    if arguments.backend == "onnx" and arguments.model is None:
        parser.error("--backend=onnx: expected --model=FILE, found none")
    keep_freed_memory()  # before any thread of a backend starts
    if arguments.backend == "torch":
        backends.need("torch")
        made = backends.score_rows_with(lambda bundle: backends.torch_run(bundle, threads=arguments.threads))
    else:
        backends.need("onnxruntime")
        made = backends.score_rows_with(lambda _: backends.onnx_run(arguments.model, threads=arguments.threads))
    setattr(scoring, "score_rows", made)  # noqa: B010 - for mypy another function is another type
    return marsjax_main(["serve", *others])


def compare(services: Services, requests: Sequence[bytes]) -> list[dict[str, Any]]:
    """How far apart the scores of any two services are. Raises AssertionError where that is too far."""
    scores, lent = {}, 0
    for case, (port, _) in services.items():
        answers = [json.loads(answer.content) for answer in clients.load(port, requests, clients=1)]
        scores[case] = np.array([answer["scores"] for answer in answers])
        lent = sum(answer["borrowed"] > 0 for answer in answers)
    about = f"{len(requests)} requests, {lent} of them with borrowed items"
    rows = []
    for one, other in itertools.combinations(scores, 2):
        worst = float(np.abs(scores[one] - scores[other]).max())
        assert worst < ALLOWED, f"scores of {one} and {other}: expected a difference below {ALLOWED}, found {worst}"
        rows.append(
            service.row("difference of scores, at most", f"{one} and {other}, {about}", worst, None, "", ALLOWED)
        )
    return rows


def choose_threads(
    services: Services, requests: Sequence[bytes], *, size: int
) -> tuple[Services, list[dict[str, Any]]]:
    """The services with one of PyTorch, the number of whose threads answers more requests a second, and what was tried;
    the other ones of PyTorch are stopped."""
    tried = {threads: services[_torch_case(threads)] for threads in THREADS}
    rates: dict[int, list[float]] = {threads: [] for threads in tried}
    for turn in range(1 + TURNS):
        for threads, (port, started) in tried.items():
            rate = serving_load.block(port, started, requests[:size], TRIED).throughput
            if turn:  # the first one counts nowhere
                rates[threads].append(rate)
    found = {threads: statistics.median(values) for threads, values in rates.items()}
    best = max(found, key=lambda threads: found[threads])
    for threads, (_, started) in tried.items():
        if threads != best:
            started.terminate()
            started.wait()
    rows = [
        service.row(
            "requests a second, to choose threads", f"{_torch_case(threads)}, {TRIED} clients", rate, None, "", None
        )
        | {"chosen": threads == best}
        for threads, rate in found.items()
    ]
    return {"marsjax": services["marsjax"], "torch": tried[best], "onnx": services["onnx"]}, rows


def make_rows(found: dict[tuple[str, int], list[serving_load.Block]], candidates: int) -> list[dict[str, Any]]:
    """Medians over the blocks, with quartiles, and ratios to marsjax of blocks of one turn."""
    rows = []
    for (case, number), blocks in found.items():
        label = serving_load.label_of(case, number, candidates)
        rows += serving_load.block_rows(label, blocks, targets={})
        if case != "marsjax":
            for column in ("p50", "p99", "throughput", "service"):
                question = f"{serving_load.COLUMNS[column].partition(', ms')[0]}, over that of marsjax"
                rows.append(serving_load.ratio_row(question, label, column, blocks, found["marsjax", number]))
    return rows


def _service(*flags: str) -> serving_load.Service:
    return serving_load.Service(WARM, ("benchmarks.serving_backends", *flags))


def _torch_case(threads: int) -> str:
    return f"torch, {threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(sys.argv[2:]))
    main()
