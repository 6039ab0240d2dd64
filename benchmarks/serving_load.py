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
from collections.abc import Sequence
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
SLOW = {"deadline_ms": 1e6, "store_deadline_ms": 1e4, "rate": 1e9}


class Block(NamedTuple):
    """What one block of requests measured."""

    p50: float  # ms
    p99: float  # ms
    throughput: float  # requests a second
    service: float  # ms of processor time of the service for a request
    clients: float  # ms of processor time of the clients for a request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=pathlib.Path, required=True)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--requests", type=int, default=400, help="of a block; a quarter of it for one client")
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    began = time.monotonic()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # what is started inherits it
    requests = make_requests(arguments.bundle, arguments.candidates)
    with contextlib.ExitStack() as stack:
        services, root = {}, pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        versions.publish(root, arguments.bundle, keep=1)
        for case, settings in CASES.items():
            port = service.free_port()
            started = stack.enter_context(service.process("serve", root, port=port, **SLOW, **settings))
            service.wait_ready(port, started)
            services[case] = port, started
        found = measure(services, requests, size=arguments.requests, blocks=arguments.blocks)
        compiled = max(service.metrics(port)["marsjax_compilations_while_serving"] for port, _ in services.values())
    rows = make_rows(found, arguments.candidates)
    rows.append(service.row("compilations while serving", "all", compiled, None, "", 0))
    service.write_results(arguments.output, rows, began, module="benchmarks.serving_load")


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
    services: dict[str, tuple[int, subprocess.Popen[bytes]]], requests: Sequence[bytes], *, size: int, blocks: int
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
        label = f"{case}, {number} client{'s' if number > 1 else ''}, {candidates} candidates"
        for column, unit, target in (
            ("p50", "p50, ms", None), ("p99", "p99, ms", 25.0 if number == 8 else None),
            ("throughput", "requests a second", None), ("service", "processor time of the service, ms a request", None),
            ("clients", "processor time of the clients, ms a request", None),
        ):  # fmt: skip
            rows.append(_row(unit, label, [getattr(one, column) for one in blocks], target))
        if case != "without":
            pairs = zip(blocks, found["without", number], strict=True)
            ratios = [one.p50 / other.p50 for one, other in pairs]
            rows.append(_row("p50 over that without augmentation", label, ratios, 1.3))
    return rows


def _row(question: str, label: str, values: Sequence[float], target: float | None) -> dict[str, Any]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return service.row(question, label, middle, None, "", target) | {"quartiles": [low, high], "blocks": len(values)}


def _processor_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
