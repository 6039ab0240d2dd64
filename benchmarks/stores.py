"""Empty storages for the benchmarks of faults, a real Redis among them, and events to put into them."""

from __future__ import annotations

import contextlib
import pathlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator

from benchmarks import service
from marsjax.serving.bundle import Bundle
from marsjax.serving.events import Event
from marsjax.serving.storage import RUNNER, Storage, StorageError, open_storage

LATER = 1_500_000_000  # than all that bundles know, or a full history would rightly leave new events out


class Redis:
    """A server that writes every command to the disk before it answers."""

    def __init__(self, folder: pathlib.Path):
        if shutil.which("redis-server") is None:
            raise SystemExit("--redis: expected a redis-server on the PATH, found none; install Redis")
        self.folder, self.port = folder, service.free_port()
        self.url = f"redis://{service.HOST}:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, with what its folder holds."""
        flags = ["--port", str(self.port), "--bind", service.HOST, "--dir", str(self.folder), "--save", ""]
        flags += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(["redis-server", *flags], stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self, seconds: float) -> None:
        """Answers nobody for so long."""
        import redis

        with redis.Redis.from_url(self.url) as client:
            client.client_pause(int(1000 * seconds))


@contextlib.contextmanager
def stored(folder: pathlib.Path, redis: bool) -> Iterator[tuple[str, Redis | None]]:
    """The URL of an empty storage, and its server."""
    if not redis:
        yield f"sqlite:{folder / 'storage.sqlite'}", None
        return
    server = Redis(folder)
    server.start()
    try:
        yield server.url, server
    finally:
        server.kill()


def opened(url: str) -> Storage:
    """The storage, once it answers."""
    storage = open_storage(url, timeout=30.0, ttl=1e6)
    for _ in range(100):
        try:
            storage.join(RUNNER)
            return storage
        except StorageError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def drawn(bundle: Bundle, rng: random.Random, number: int, *, users: int = 0) -> Event:
    """An event of one of the first `users` known users (0: all) or a new one of as many (0: 1000); clocks step back at
    times."""
    known, names = bundle.users.raw_user_U, bundle.items.raw_id_N
    new = rng.random() < 0.6
    user = f"new{rng.randrange(users or 1000)}" if new else str(known[rng.randrange(users or len(known))])
    item = str(names[1 + rng.randrange(len(names) - 1)])
    return Event(
        f"e{number}", user, item, float(rng.random() < 0.5), LATER + number - (1000 if rng.random() < 0.05 else 0)
    )
