"""Latency and throughput of the service, with and without augmentation.

    python -m benchmarks.serving_load --bundle=BUNDLE --output=benchmarks/results/serving_load.json

Each request has 100 candidates for a low-active user. "with" looks up and filters for every request (`serving.live`, no
cache); "cached" remembers what users borrow, the default; "without" scores the own history alone. Clients and service
share the machine.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import numpy as np

from benchmarks import service
from marsjax.records import LOW
from marsjax.serving import versions
from marsjax.serving.bundle import load_bundle

CASES = {
    "without": {"augment": "false"},
    "cached": {"live": "true", "cache": "true"},
    "with": {"live": "true", "cache": "false"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=pathlib.Path, required=True)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--requests", type=int, default=1000, help="for 8 clients; fewer for one")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    began, bundle = time.monotonic(), load_bundle(arguments.bundle)
    users = bundle.users.raw_user_U[bundle.users.group_U == LOW]
    names, rng = bundle.items.raw_id_N[1:], np.random.default_rng(0)
    bodies = [
        {"user": str(rng.choice(users)), "candidates": [str(name) for name in rng.choice(names, arguments.candidates)]}
        for _ in range(arguments.requests)
    ]
    del bundle
    found: dict[tuple[str, int], tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        versions.publish(root, arguments.bundle, keep=1)
        for case, settings in CASES.items():
            port = service.free_port()
            slow = {"deadline_ms": 1e6, "store_deadline_ms": 1e4, "rate": 1e9}
            with service.process("serve", root, port=port, **slow, **settings) as started:
                service.wait_ready(port, started)
                service.ask(port, bodies[:50], clients=4)  # connections, caches of the file system
                for clients in (1, 8, 32):
                    asked = bodies[: len(bodies) // 4] if clients == 1 else bodies
                    at = time.monotonic()
                    answers = service.ask(port, asked, clients=clients)
                    seconds = time.monotonic() - at
                    assert all(answer.status == 200 for answer in answers)
                    p50, p99 = np.quantile([answer.seconds * 1e3 for answer in answers], (0.5, 0.99))
                    found[case, clients] = float(p50), float(p99), len(asked) / seconds
                assert service.metrics(port)["marsjax_compilations_while_serving"] == 0
    rows = []
    for (case, clients), (p50, p99, throughput) in found.items():
        label = f"{case} augmentation, {clients} client(s), {arguments.candidates} candidates"
        base = found["without", clients][0]
        rows += [
            service.row("p50, ms", label, p50, base, "without augmentation", 1.3 * base if case == "with" else None),
            service.row("p99, ms", label, p99, None, "", 25.0 if clients == 8 else None),
            service.row(
                "requests a second", label, throughput, found["without", clients][2], "without augmentation", None
            ),
        ]
    service.write_results(arguments.output, rows, began, module="benchmarks.serving_load")


if __name__ == "__main__":
    main()
