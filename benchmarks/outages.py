"""Service and runner under load while what they rest on is injured: the store, the disk, a bundle, the donors.

Part of `python -m benchmarks.serving_faults`. Clients ask for scores and a sender sends events, again and again those
that got no 202; after each injury the next one waits until events are taken and histories are written again.
"""

from __future__ import annotations

import contextlib
import http.client
import pathlib
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import service, stores
from marsjax import files
from marsjax.serving import snapshots, versions
from marsjax.serving.bundle import Bundle
from marsjax.serving.events import Event, decode_history
from marsjax.serving.storage import RUNNER, Storage, StorageError

SECONDS = 5.0  # that an injury lasts
REFUSED = 'marsjax_swaps_total{result="refused"}'


class Load:
    """Clients of a service, and what they got."""

    def __init__(self, bundle: Bundle, port: int, *, clients: int = 3):
        self.statuses: list[int] = []  # of scores
        self.without: list[str | None] = []  # why nothing was borrowed
        self.sent: list[Event] = []  # acknowledged
        self.refused = 0  # batches that got no 202
        self.wrong = ""  # what the service said against an event
        self._bundle, self._port, self._stop = bundle, port, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(client,)) for client in range(clients)]
        self._threads.append(threading.Thread(target=self._send))
        for thread in self._threads:
            thread.start()

    def _ask(self, client: int) -> None:
        rng, connection = random.Random(client), service.Connection(self._port)
        names, users = self._bundle.items.raw_id_N[1:], self._bundle.users.raw_user_U
        while not self._stop.is_set():
            user = str(users[rng.randrange(len(users))])
            candidates = [str(names[rng.randrange(len(names))]) for _ in range(20)]
            answer = connection.call("POST", "/v1/score", {"user": user, "candidates": candidates})
            self.statuses.append(answer.status)
            self.without.append(answer.body.get("fallback"))
            self._stop.wait(0.01)

    def _send(self) -> None:
        rng, connection, number = random.Random(0), service.Connection(self._port), 0
        while not self._stop.is_set():
            batch = [stores.drawn(self._bundle, rng, number + i) for i in range(5)]
            while not self._stop.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):  # no answer is none either
                    body = {"events": [event._asdict() | {"label": int(event.label)} for event in batch]}
                    answer = connection.call("POST", "/v1/events", body)
                    if answer.status == 202:
                        self.sent += batch
                        break
                    if answer.status < 500:  # it will say so for ever
                        self.wrong = f"the service answered {answer.status} to events: {answer.body}"
                        return
                self.refused += 1
                self._stop.wait(0.1)
            number += len(batch)
            self._stop.wait(0.05)

    def stop(self) -> None:
        """Ends all clients."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Injured(NamedTuple):
    """A service that is about to be injured."""

    root: pathlib.Path
    bundle: Bundle
    port: int
    redis: stores.Redis | None
    disk: bool  # whether the root is a disk of its own, which may be filled

    def wait_refused(self, since: float) -> None:
        """Until the service has refused something that was published."""
        until = time.monotonic() + 60
        while service.metrics(self.port).get(REFUSED, 0.0) <= since:
            if time.monotonic() > until:
                raise RuntimeError("the service has refused nothing; it should have")
            time.sleep(0.1)

    def refused(self) -> float:
        """How many versions and donors the service has refused."""
        return service.metrics(self.port).get(REFUSED, 0.0)


def stop_redis(it: Injured) -> None:
    """Redis is killed, stays away, and comes again."""
    assert it.redis is not None
    it.redis.kill()
    time.sleep(SECONDS)
    it.redis.start()


def slow_redis(it: Injured) -> None:
    """Redis answers nobody for a while."""
    assert it.redis is not None
    it.redis.pause(SECONDS)
    time.sleep(SECONDS)


def damaged_bundle(it: Injured) -> None:
    """A version with one flipped byte is pointed to."""
    before, current = it.refused(), versions.read_current(it.root)
    assert current is not None
    damaged = "000900-flipped"
    folder = versions.folder_of(it.root, damaged)
    shutil.copytree(versions.folder_of(it.root, current.version), folder)
    _flip(folder / "users.npz")
    pointer = {"version": damaged, "published": {damaged: time.time()}, "earlier": [*current.earlier, current.version]}
    files.write_json(it.root / versions.POINTER, pointer)
    it.wait_refused(before)
    time.sleep(SECONDS)
    versions.rollback(it.root)


def truncated_index(it: Injured) -> None:
    """Donors whose index lost its last byte are pointed to."""
    before, current = it.refused(), versions.read_current(it.root)
    assert current is not None
    name = "000900"
    with contextlib.ExitStack() as stack:
        scratch = it.root / "scratch"
        stack.callback(files.remove_folder, scratch)
        made = snapshots.publish_lenders(scratch, current.version, it.bundle.lenders)
        graph = scratch / snapshots.FOLDER / made / "index" / "graph.usearch"
        graph.write_bytes(graph.read_bytes()[:-1])
        shutil.copytree(scratch / snapshots.FOLDER / made, it.root / snapshots.FOLDER / name)
    files.write_json(it.root / snapshots.POINTER, {"version": current.version, "lenders": name})
    it.wait_refused(before)


def full_disk(it: Injured) -> None:
    """The disk of stream, store and versions fills, and is emptied again."""
    ballast = it.root / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(512)):
            pass
    time.sleep(SECONDS)
    with contextlib.suppress(OSError):
        versions.publish(it.root, it.bundle.folder, keep=3)
        raise RuntimeError("a bundle was published on a full disk")
    ballast.unlink()


def outages(bundle: Bundle, folder: pathlib.Path, redis: bool) -> list[dict[str, Any]]:
    """Rows of each injury, and of what was lost in all of them."""
    rows: list[dict[str, Any]] = []
    kind = "Redis" if redis else "SQLite"
    # Versions, and donors old and new, are each about as large as the bundle.
    size = 2**28 + 10 * sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file())
    with _disk(folder / "disk", size) as (root, own), stores.stored(root, redis) as (url, server):
        injuries: list[Callable[[Injured], None]] = [damaged_bundle, truncated_index]
        injuries += [stop_redis, slow_redis] if redis else []
        # A Redis that is to write every command and cannot ends itself: that is `stop_redis`.
        injuries += [full_disk] if own and not redis else []
        storage, port = stores.opened(url), service.free_port()
        versions.publish(root, bundle.folder, keep=3)
        loose = {"storage": url, "rate": 1e9}
        serving = service.process("serve", root, port=port, poll_seconds=0.2, deadline_ms=1e4, **loose)
        running = service.process("runner", root, train_seconds=0, lenders_seconds=20, rebuild_hour=-1, **loose)
        with serving as started, running as runner:
            service.wait_ready(port, started)
            load = Load(bundle, port)
            try:
                _wait_for_more(load, storage)
                for injure in injuries:
                    asked, refused = len(load.statuses), load.refused
                    injure(Injured(root, bundle, port, server, own))
                    ended = time.monotonic()
                    _wait_for_more(load, storage)
                    failed = sum(status != 200 for status in load.statuses[asked:])
                    without = sum(why == "store" for why in load.without[asked:])
                    case = (
                        f"{kind}, {injure.__name__.replace('_', ' ')}: {len(load.statuses) - asked} scores, {without} "
                        f"without a loan for want of the store; {load.refused - refused} sendings refused"
                    )
                    after = time.monotonic() - ended
                    rows.append(service.row("scores that failed", case, failed, None, "", 0))
                    rows.append(service.row("seconds until events and histories go on", case, after, None, "", 60.0))
            finally:
                load.stop()
            _wait(lambda: storage.backlog(RUNNER) == 0, "the runner does not come to the end of the stream")
            ended_early = int(started.poll() is not None) + int(runner.poll() is not None)
        users = sorted({event.user for event in load.sent})
        found = [entry.id for data in storage.histories(users) for entry in decode_history(data or b"[]") if entry.id]
        storage.close()
    lost = len({event.id for event in load.sent} - set(found))
    case = f"{kind}, {len(injuries)} injuries, {len(load.sent)} events"
    rows.append(service.row("acknowledged events that were lost", case, lost, None, "", 0))
    twice = len(found) - len(set(found))
    rows.append(service.row("events that were applied more than once", case, twice, None, "", 0))
    rows.append(service.row("processes that ended", case, ended_early, None, "", 0))
    return rows


@contextlib.contextmanager
def _disk(folder: pathlib.Path, size: int) -> Iterator[tuple[pathlib.Path, bool]]:
    """A folder, and whether it is a file system of its own in memory, of so many bytes, which takes root to mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _wait_for_more(load: Load, storage: Storage, *, events: int = 50) -> None:
    """Until so many more events are taken, and were in the hands of the runner."""
    sent = len(load.sent)
    _wait(lambda: len(load.sent) >= sent + events or bool(load.wrong), "no events are taken any more")
    if load.wrong:
        raise RuntimeError(load.wrong)
    _wait(lambda: storage.backlog(RUNNER) < 500, "the runner takes no events any more")


def _wait(done: Callable[[], bool], otherwise: str, *, seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StorageError):
            if done():
                return
        if time.monotonic() > until:
            raise RuntimeError(otherwise)
        time.sleep(0.1)


def _flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
