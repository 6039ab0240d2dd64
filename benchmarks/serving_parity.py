"""Random requests, scored by the service over HTTP and offline by `scoring.score`: how far apart are they?

    python -m benchmarks.serving_parity --bundle=BUNDLE --requests=10000 --output=benchmarks/results/serving_parity.json

The service looks up anew what everybody borrows (`serving.live`), offline what a user borrows is read from the bundle,
as the pipeline found it. So this compares retrieval, filter and scores of both at once.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import numpy as np

from benchmarks import service
from marsjax.serving import scoring, versions
from marsjax.serving.bundle import load_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=pathlib.Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    began, bundle = time.monotonic(), load_bundle(arguments.bundle)
    rng = np.random.default_rng(0)
    names, users = bundle.items.raw_id_N[1:], bundle.users.raw_user_U
    requests = []
    for _ in range(arguments.requests):
        user = "nobody" if rng.random() < 0.05 else str(rng.choice(users))
        candidates = tuple(map(str, rng.choice(names, rng.integers(1, arguments.candidates + 1))))
        history = tuple(map(str, rng.choice(names, rng.integers(0, 60)))) if rng.random() < 0.2 else None
        requests.append(scoring.Request(user, candidates, history))
    bodies = [
        {"user": user, "candidates": items} | ({} if history is None else {"history": history})
        for user, items, history, _ in requests
    ]
    with tempfile.TemporaryDirectory() as folder:
        root, port = pathlib.Path(folder), service.free_port()
        versions.publish(root, arguments.bundle, keep=1)
        slow = {"deadline_ms": 1e6, "store_deadline_ms": 1e5, "rate": 1e9}
        with service.process("serve", root, port=port, live="true", **slow) as started:
            service.wait_ready(port, started)
            online = service.ask(port, bodies, clients=8)
            compiled = service.metrics(port)["marsjax_compilations_while_serving"]
    offline = scoring.score(bundle, requests)
    failed = sum(answer.status != 200 for answer in online)
    worst = max(float(np.abs(np.array(a.body["scores"]) - b).max()) for a, b in zip(online, offline, strict=True))
    lent = sum(answer.body["borrowed"] > 0 for answer in online)
    case = f"{len(requests)} random requests, {lent} of them with borrowed items"
    rows = [
        service.row("how far online scores are from offline ones, at most", case, worst, 1e-5, "allowed", 1e-5),
        service.row("requests that failed", case, failed, None, "", 0),
        service.row("compilations while serving", case, compiled, None, "", 0),
    ]
    service.write_results(arguments.output, rows, began, module="benchmarks.serving_parity")


if __name__ == "__main__":
    main()
