"""Service, runner and clients beside one another, and what they are doing, once a second.

    python -m benchmarks.demo --root=runs/demo/serving --seconds=60

Clients ask for scores and send what was clicked as events; the runner takes them into histories and vectors, renews the
donors every ten seconds, and continues the training every twenty.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import threading
import time

import numpy as np

from benchmarks import service
from marsjax.serving import versions
from marsjax.serving.bundle import load_bundle
from marsjax.serving.storage import RUNNER, open_storage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=4)
    arguments = parser.parse_args()
    root, current = arguments.root, versions.read_current(arguments.root)
    if current is None:
        raise SystemExit(f"{root}: expected a published bundle, found none; run `marsjax publish`")
    bundle = load_bundle(versions.folder_of(root, current.version))
    names, users = bundle.items.raw_id_N[1:], bundle.users.raw_user_U
    now, stop, seconds, head = int(bundle.users.time_H.max(initial=0)), threading.Event(), [], time.time_ns()
    port = service.free_port()

    def work(client: int) -> None:
        rng, connection, count = random.Random(client), service.Connection(port), 0
        while not stop.is_set():
            user = f"visitor{rng.randrange(20)}" if rng.random() < 0.2 else str(users[rng.randrange(len(users))])
            candidates = [str(names[rng.randrange(len(names))]) for _ in range(50)]
            answer = connection.call("POST", "/v1/score", {"user": user, "candidates": candidates})
            if answer.status == 200:
                seconds.append(answer.seconds)
                best = int(np.argmax(answer.body["scores"]))
                label = int(rng.random() < answer.body["scores"][best])
                event = {"id": f"{head}-{client}-{count}", "user": user, "item": candidates[best], "label": label}
                connection.call("POST", "/v1/events", {"events": [event | {"time": now + count}]})
                count += 1
            time.sleep(0.02)

    with (
        service.process("serve", root, port=port) as started,
        service.process("runner", root, lenders_seconds=10, train_seconds=20, train_events=100),
    ):
        service.wait_ready(port, started)
        sys.stdout.write(f"a page of a user: http://{service.HOST}:{port}/explain?user={users[0]}\n")
        threads = [threading.Thread(target=work, args=(client,)) for client in range(arguments.clients)]
        for thread in threads:
            thread.start()
        storage, until = (
            open_storage(f"sqlite:{root / 'storage.sqlite'}", timeout=5.0, ttl=1.0),
            time.monotonic() + arguments.seconds,
        )
        while time.monotonic() < until:
            time.sleep(1.0)
            asked = sorted(seconds)
            seconds.clear()
            said = service.metrics(port)
            ready = service.Connection(port).call("GET", "/readyz").body
            middle = f"{asked[len(asked) // 2] * 1e3:.1f} ms" if asked else "-"
            sys.stdout.write(
                f"version {ready['version']} lenders {ready['lenders']}; {len(asked)} scores/s, median {middle}; "
                f"{said.get('marsjax_events_accepted_total', 0):.0f} events, {storage.backlog(RUNNER)} waiting, "
                f"{len(storage.changed(10_000))} vectors to make; cold {said.get('marsjax_cold_users_total', 0):.0f}\n"
            )
            sys.stdout.flush()
        stop.set()
        for thread in threads:
            thread.join()
        storage.close()


if __name__ == "__main__":
    main()
