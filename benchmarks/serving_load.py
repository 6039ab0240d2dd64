"""Latency and throughput of the service, with and without augmentation, at 1, 8 and 32 clients.

    python -m benchmarks.serving_load --bundle=BUNDLE --output=benchmarks/results/serving_load.json

Each request has 100 candidates for a low-active user. Three services run on the same two cores, with the clients, and
are asked the same requests by turns, a short block each; what is told is the median over the blocks with its quartiles,
so a machine that is busy for a while moves all three:

without   scores the own history alone
warm      borrows; who is asked for has been asked for before, so that what is borrowed is remembered
cold      borrows, and looks up and filters for each request, as for a user's first one: nothing is remembered

No service answers from what the bundle has stored of the users (`serving.live`): that would be as fast as warm for all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import clients, service
from marsjax.records import LOW
from marsjax.serving import versions

CASES: dict[str, dict[str, object]] = {
    "without": {"augment": "false"},
    "warm": {"live": "true", "cache": "true"},
    "cold": {"live": "true", "cache": "false"},
}
CLIENTS = (1, 8, 32)
COLUMNS = {
    "p50": "p50, ms",
    "p99": "p99, ms",
    "throughput": "requests a second",
    "service": "processor time of the service, ms a request",
    "clients": "processor time of the clients, ms a request",
}
SLOW: dict[str, object] = {"deadline_ms": 1e6, "store_deadline_ms": 1e4, "rate": 1e9}


class Block(NamedTuple):
    """What one block of requests measured."""

    p50: float  # ms
    p99: float  # ms
    throughput: float  # requests a second
    service: float  # ms of processor time of the service for a request
    clients: float  # ms of processor time of the clients for a request


class Service(NamedTuple):
    """One that is asked."""

    settings: dict[str, object]
    program: Sequence[str] = service.MARSJAX


Services = dict[str, tuple[int, subprocess.Popen[bytes]]]  # port and process by case


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    began = time.monotonic()
    requests = make_requests(arguments.bundle, arguments.candidates)
    with serving(arguments.bundle, {case: Service(it) for case, it in CASES.items()}, arguments.cores) as services:
        found = measure(services, requests, size=arguments.requests, blocks=arguments.blocks)
        compiled = compilations(services)
    rows = make_rows(found, arguments.candidates)
    rows.append(service.row("compilations while serving", "all", compiled, None, "", 0))
    service.write_results(arguments.output, rows, began, module="benchmarks.serving_load")


def make_parser(text: str | None) -> argparse.ArgumentParser:
    """The flags of a benchmark that asks services by turns."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=pathlib.Path, required=True)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--requests", type=int, default=400, help="of a block; a quarter of it for one client")
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path)
    return parser


@contextlib.contextmanager
def serving(bundle: pathlib.Path, cases: dict[str, Service], cores: int) -> Iterator[Services]:
    """Services of one bundle that are ready, on the first cores of this process, which the clients share with them."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # what is started inherits it
    with contextlib.ExitStack() as stack:
        services, root = {}, pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        versions.publish(root, bundle, keep=1)
        for case, (settings, program) in cases.items():
            port = service.free_port()
            values = {"port": port, **SLOW, **settings}
            started = stack.enter_context(service.process("serve", root, program, **values))
            service.wait_ready(port, started)
            services[case] = port, started
        yield services


def compilations(services: Services) -> float:
    """While serving, of the service with most of them."""
    return max(service.metrics(port)["marsjax_compilations_while_serving"] for port, _ in services.values())


def make_requests(bundle: pathlib.Path, candidates: int) -> list[bytes]:
    """One request for each low-active user of a bundle, in an order that is drawn, with items that are."""
    with np.load(bundle / "users.npz") as arrays:
        users = arrays["raw_user_U"][arrays["group_U"] == LOW]
    with np.load(bundle / "items.npz") as arrays:
        names = arrays["raw_id_N"][1:]
    rng = np.random.default_rng(0)
    return [
        clients.encode("/v1/score", {"user": str(user), "candidates": rng.choice(names, candidates).tolist()})
        for user in rng.permutation(users)
    ]


def measure(
    services: Services, requests: Sequence[bytes], *, size: int, blocks: int
) -> dict[tuple[str, int], list[Block]]:
    """Blocks of the services by turns, by case and number of clients. The first round, in which all are asked for all
    users once, counts nowhere."""
    for port, _ in services.values():
        clients.load(port, requests, clients=8)
    found: dict[tuple[str, int], list[Block]] = {}
    rng = np.random.default_rng(1)
    for number in CLIENTS:
        for turn in range(blocks):
            some = [requests[i] for i in rng.permutation(len(requests))[: size // 4 if number == 1 else size]]
            cases = list(services)
            for case in cases[turn % len(cases) :] + cases[: turn % len(cases)]:  # who begins changes
                found.setdefault((case, number), []).append(block(*services[case], some, number))
    return found


def block(port: int, started: subprocess.Popen[bytes], requests: Sequence[bytes], number: int) -> Block:
    """Asks all once."""
    at, used, own = time.perf_counter(), _processor_seconds(started.pid), time.process_time()
    answers = clients.load(port, requests, clients=number)
    seconds, own = time.perf_counter() - at, time.process_time() - own
    used = _processor_seconds(started.pid) - used
    assert all(answer.status == 200 for answer in answers)
    p50, p99 = np.quantile([answer.seconds * 1e3 for answer in answers], (0.5, 0.99))
    n = len(requests)
    return Block(float(p50), float(p99), n / seconds, 1e3 * used / n, 1e3 * own / n)


def make_rows(found: dict[tuple[str, int], list[Block]], candidates: int) -> list[dict[str, Any]]:
    """Medians over the blocks, with quartiles. What borrowing adds is a ratio of blocks of one turn."""
    rows = []
    for (case, number), blocks in found.items():
        label = label_of(case, number, candidates)
        rows += block_rows(label, blocks, targets={"p99": 25.0} if number == 8 else {})
        if case != "without":
            question = "p50 over that without augmentation"
            rows.append(ratio_row(question, label, "p50", blocks, found["without", number], target=1.3))
    return rows


def label_of(case: str, number: int, candidates: int) -> str:
    """As rows name blocks."""
    return f"{case}, {number} client{'s' if number > 1 else ''}, {candidates} candidates"


def block_rows(label: str, blocks: Sequence[Block], *, targets: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each column of the blocks, with what it must not exceed where `targets` has it."""
    return [
        _row(question, label, [getattr(one, column) for one in blocks], targets.get(column))
        for column, question in COLUMNS.items()
    ]


def ratio_row(
    question: str,
    label: str,
    column: str,
    blocks: Sequence[Block],
    others: Sequence[Block],
    *,
    target: float | None = None,
) -> dict[str, Any]:
    """A column of the blocks over that of others, each over the one of its turn."""
    pairs = zip(blocks, others, strict=True)
    return _row(question, label, [getattr(one, column) / getattr(other, column) for one, other in pairs], target)


def _row(question: str, label: str, values: Sequence[float], target: float | None) -> dict[str, Any]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return service.row(question, label, middle, None, "", target) | {"quartiles": [low, high], "blocks": len(values)}


def _processor_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
