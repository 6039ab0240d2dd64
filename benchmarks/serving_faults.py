"""What faults cost: kills of the runner, injuries of store, disk and bundles, swaps under load, and a million events.

    python -m benchmarks.serving_faults --bundle=BUNDLE --output=benchmarks/results/serving_faults.json
        [--kills=50] [--swap_seconds=60] [--soak=1000000] [--no-outages] [--redis]

kills: `marsjax runner` gets SIGKILL at random moments while events come; afterwards every acknowledged event is in the
    history of its user, once.
outages: a Redis that is killed and comes again, or answers nobody; a bundle with a flipped byte; donors with a
    truncated index; a disk that fills (needs root, to mount one). Scores go on, and no acknowledged event is lost.
swaps: another version every second while clients ask; no request fails, and each answer is what its version says.
soak: events through stream, histories and vectors in one process; memory at the end beside memory at half. The users
    are few, so that their histories are full by then and nothing is left that should grow.

With --redis, which needs a redis-server on the PATH, kills, outages and soak go through a real Redis.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import resource
import tempfile
import threading
import time
from typing import Any

import numpy as np

from benchmarks import service, stores
from benchmarks.outages import outages
from marsjax.serving import runner, scoring, versions
from marsjax.serving.bundle import Bundle, continue_bundle, load_bundle, load_encoder
from marsjax.serving.events import decode_history, encode_event
from marsjax.serving.storage import RUNNER

SOAKED = 25  # known users of the soak, and as many new ones: a vector is made for each of them once in 1000 events


def kills(bundle: Bundle, folder: pathlib.Path, count: int, redis: bool) -> list[dict[str, Any]]:
    """Few events a user, so that none is cut off a history and all can be looked for."""
    rng, sent, stop = random.Random(0), [], threading.Event()  # type: ignore[var-annotated]
    versions.publish(folder, bundle.folder, keep=1)
    with stores.stored(folder, redis) as (url, _):
        storage = stores.opened(url)
        most, allowed = (len(bundle.users.raw_user_U) + 1000) * 3, [0.0]

        def produce() -> None:
            while not stop.is_set():
                if len(sent) < allowed[0]:
                    batch = [stores.drawn(bundle, rng, len(sent) + i) for i in range(10)]
                    storage.append([encode_event(event) for event in batch])
                    sent.extend(batch)  # acknowledged: from here on none may be lost
                time.sleep(0.005)

        producer = threading.Thread(target=produce)
        producer.start()
        settings = {"storage": url, "train_seconds": 0, "lenders_seconds": 2, "rebuild_hour": -1, "batch": 50}
        during = 0
        for number in range(count):
            allowed[0] = most * (number + 0.5) / count  # what waits when the runner comes up
            while len(sent) < allowed[0]:
                time.sleep(0.01)
            worker = service.start("runner", folder, **settings)
            before, until = storage.backlog(RUNNER), time.monotonic() + 120
            while storage.backlog(RUNNER) >= before and time.monotonic() < until:  # until it is at work
                time.sleep(0.01)
            allowed[0] = most * (number + 1) / count  # and what comes while it works
            time.sleep(rng.random() * 0.5)
            worker.kill()
            worker.wait()
            during += storage.backlog(RUNNER) > 0
        stop.set()
        producer.join()
        with service.process("runner", folder, **(settings | {"lenders_seconds": 0, "batch": 1000})):  # only the rest
            until = time.monotonic() + 600
            while (storage.backlog(RUNNER) or storage.changed(1)) and time.monotonic() < until:
                time.sleep(0.1)
        found: list[str] = []
        users = sorted({event.user for event in sent})
        for data in storage.histories(users):
            found += [entry.id for entry in decode_history(data or b"[]") if entry.id]
        storage.close()
    lost = len({event.id for event in sent} - set(found))
    case = f"{count} SIGKILLs, {during} with events waiting, {len(sent)} events, {'Redis' if redis else 'SQLite'}"
    return [
        service.row("acknowledged events that were lost", case, lost, None, "", 0),
        service.row("events that were applied more than once", case, len(found) - len(set(found)), None, "", 0),
    ]


def swaps(bundle: Bundle, folder: pathlib.Path, seconds: float) -> list[dict[str, Any]]:
    """Three sets of parameters, published in turn."""
    made, said = [], {}
    rng, names = random.Random(0), [str(name) for name in bundle.items.raw_id_N[1:21]]
    user = str(bundle.users.raw_user_U[int(np.argmax(np.diff(bundle.users.borrowed_U1)))])
    for number, factor in enumerate((1.0, 0.5, 2.0)):
        ctr = {"params": scaled(bundle.params, factor), "statistics": bundle.statistics}
        continue_bundle(folder / f"bundle{number}", bundle, ctr=ctr, trained={"factor": factor})
        made.append(folder / f"bundle{number}")
    scores = [scoring.score(load_bundle(path), [scoring.Request(user, tuple(names))])[0] for path in made]
    answers: list[service.Answer] = []
    stop, port = threading.Event(), service.free_port()
    said[versions.publish(folder, made[0], keep=3)] = scores[0]

    def ask() -> None:
        connection = service.Connection(port)
        while not stop.is_set():
            answers.append(connection.call("POST", "/v1/score", {"user": user, "candidates": names}))

    loose = {"deadline_ms": 1e6, "store_deadline_ms": 1e5, "rate": 1e9}
    with service.process("serve", folder, port=port, poll_seconds=0.1, **loose) as started:
        service.wait_ready(port, started)
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        until, count = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            at, number = time.monotonic(), rng.randrange(3)
            said[versions.publish(folder, made[number], keep=3)] = scores[number]
            count += 1
            time.sleep(max(0.0, 1.0 - (time.monotonic() - at)))
        stop.set()
        for thread in threads:
            thread.join()
        compiled = service.metrics(port)["marsjax_compilations_while_serving"]
    failed = sum(answer.status != 200 for answer in answers)
    mixed = sum(
        np.abs(np.array(answer.body["scores"]) - said[answer.body["version"]]).max() > 1e-5
        for answer in answers
        if answer.status == 200
    )
    seen = len({answer.body["version"] for answer in answers if answer.status == 200})
    case = f"{count} versions in {seconds:.0f} s, {seen} of them seen in {len(answers)} answers, 4 clients"
    return [
        service.row("requests that failed", case, failed, None, "", 0),
        service.row("answers that are not what the version they name says", case, int(mixed), None, "", 0),
        service.row("compilations while serving", case, compiled, None, "", 0),
    ]


def scaled(tree: Any, factor: float) -> Any:
    if hasattr(tree, "items"):
        return {name: scaled(value, factor) for name, value in tree.items()}
    return np.asarray(tree) * np.float32(factor)


def soak(bundle: Bundle, folder: pathlib.Path, count: int, redis: bool) -> list[dict[str, Any]]:
    """The loop of the runner without its timers, with vectors for all who change."""
    model, rng, marks = runner.Model("soak", bundle, load_encoder(bundle)), random.Random(0), []
    with stores.stored(folder, redis) as (url, _):
        storage, began, done = stores.opened(url), time.monotonic(), 0
        embedded, oldest = 0, 0.0
        while done < count:
            batch = [encode_event(stores.drawn(bundle, rng, done + i, users=SOAKED)) for i in range(1000)]
            storage.append(batch)
            while storage.backlog(RUNNER):
                runner.consume(storage, bundle, count=1000, wait=0.0, most_deliveries=10)
            for change in storage.changed(1):
                oldest = max(oldest, time.time() - change.since)
            while found := runner.embed_changed(storage, model, count=1000):
                embedded += found
            storage.trim()
            done += len(batch)
            if done % max(count // 10, 1000) < 1000:
                marks.append(memory())
        seconds = time.monotonic() - began
        storage.close()
    kind = "Redis" if redis else "SQLite"
    case = f"{count} events, {embedded} vectors, {kind}"
    return [
        service.row(
            "memory at the end over memory at half", case, marks[-1] / marks[len(marks) // 2 - 1], 1.0, "flat", 1.1
        )
        | {"mebibytes": [round(mark) for mark in marks]},
        service.row("events a second through stream, histories and vectors", case, count / seconds, None, "", None),
        service.row("oldest change that waited for its vector, s", case, oldest, None, "", 60.0),
    ]


def memory() -> float:
    """Resident memory of this process, MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--swap_seconds", type=float, default=60.0)
    parser.add_argument("--soak", type=int, default=1_000_000)
    parser.add_argument("--outages", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--redis", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    began, bundle, rows = time.monotonic(), load_bundle(arguments.bundle), []
    parts = {
        "kills": lambda folder: kills(bundle, folder, arguments.kills, arguments.redis) if arguments.kills else [],
        "outages": lambda folder: outages(bundle, folder, arguments.redis) if arguments.outages else [],
        "swaps": lambda folder: swaps(bundle, folder, arguments.swap_seconds) if arguments.swap_seconds else [],
        "soak": lambda folder: soak(bundle, folder, arguments.soak, arguments.redis) if arguments.soak else [],
    }
    for part in parts.values():
        with tempfile.TemporaryDirectory() as folder:
            found = part(pathlib.Path(folder))
        rows += found
        # After each part: one that fails takes nothing of the others with it.
        printed = len(rows) - len(found)
        service.write_results(arguments.output, rows, began, module="benchmarks.serving_faults", printed=printed)


if __name__ == "__main__":
    main()
