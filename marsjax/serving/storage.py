"""The event stream and the key-value store of a service, behind one set of methods: SQLite or Redis.

They are one thing because an event is done with only once its effect is durable: `apply` writes both at once.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from marsjax.serving.events import Entry

T = TypeVar("T")

RUNNER = "runner"  # the group of consumers that keeps histories and vectors
TRAINER = "trainer"  # the one that continues the training
# After so many tries that were not acknowledged, messages are handed out one by one: one of them may kill. Not to the
# trainer, which takes all that came in an hour at once and gives up by itself.
ALONE = 3


class Message(NamedTuple):
    """An event as it came, not yet looked at."""

    id: str  # its place in the stream
    data: bytes
    deliveries: int  # how often it was handed out, this time included


class Dead(NamedTuple):
    """A message that nothing can be made of, and why."""

    id: str
    data: bytes
    reason: str


class Changed(NamedTuple):
    """A user whose vector is to be made anew."""

    user: str
    stamp: str  # of the change; a later change has another one
    since: float  # seconds since the epoch, when the oldest change that is not done came


class StorageError(Exception):
    """The store did not answer, or not in time."""


class Storage(Protocol):
    """Every method raises StorageError where the store does not answer in time."""

    def append(self, data: Sequence[bytes]) -> None:
        """Adds events to the stream; they are durable when this returns."""

    def read(self, group: str, *, count: int, wait: float) -> list[Message]:
        """The next messages of a group of consumers, those first that were handed out before and not acknowledged.
        A group sees all messages from its first `read` (or `join`) on; `wait` is how many seconds to wait for one."""

    def join(self, group: str) -> None:
        """Makes the group, if it is not there, from the beginning of the stream."""

    def leave(self, group: str) -> None:
        """Removes the group, if it is there: trimming waits for all that are."""

    def apply(
        self,
        group: str,
        entries: Mapping[str, Sequence[Entry]],
        done: Sequence[str],
        *,
        cap: int,
        seed: Callable[[str], Sequence[Entry]],
        dead: Sequence[Dead] = (),
    ) -> None:
        """Merges entries into the histories of their users, marks these as changed, keeps dead letters, and
        acknowledges `done` (with the dead), all or nothing. `seed` gives the history of a user who has none here, or
        one that cannot be read."""

    def lookup(self, user: str, version: str) -> tuple[bytes | None, bytes | None]:
        """History and vector of a user; the vector is of this model version or None."""

    def histories(self, users: Sequence[str]) -> list[bytes | None]:
        """Histories of users."""

    def users(self) -> Iterator[str]:
        """All users with a history, once or more often, in any order; also those who come meanwhile, or not."""

    def changed(self, count: int) -> list[Changed]:
        """Some users whose vectors are to be made, those who wait longest first."""

    def write_vectors(self, version: str, vectors: Mapping[str, bytes], done: Sequence[Changed]) -> None:
        """Writes vectors of a model version; a user who has changed again since stays marked."""

    def touch(self, users: Iterable[str]) -> None:
        """Marks users as changed."""

    def touch_all(self) -> None:
        """Marks all users with a history as changed: a new model needs vectors of them."""

    def forget_versions(self, keep: Sequence[str]) -> None:
        """Removes vectors of other versions."""

    def trim(self) -> None:
        """Removes messages that all groups are done with."""

    def backlog(self, group: str) -> int:
        """Messages that the group has not acknowledged."""

    def dead_letters(self, count: int) -> list[Dead]:
        """The latest dead letters."""

    def dead_count(self) -> int:
        """How many dead letters are kept."""

    def close(self) -> None:
        """Lets go of files and connections."""


def open_storage(
    url: str, *, timeout: float, ttl: float, consumer: str = "runner", append_timeout: float = 0.0
) -> Storage:
    """Opens `sqlite:PATH`, or `redis://HOST:PORT/DB` (also rediss:// and unix://).

    Args:
        timeout: seconds a call may take before it raises StorageError.
        append_timeout: seconds for `append`, where that is more: a disk writes slower than memory is read, and an event
            whose answer was not waited for is sent again though it is there. In SQLite of all calls: only writers wait.
        ttl: seconds a value that is not written lives in Redis.
        consumer: the name of this process among the consumers of a group in Redis.

    Raises:
        ValueError: another kind of URL.
        ImportError: Redis without the package for it.
    """
    kind, _, path = url.partition(":")
    if kind == "sqlite" and path:
        from marsjax.serving.sqlite_storage import SqliteStorage

        return SqliteStorage(path, timeout=max(timeout, append_timeout))
    if kind in ("redis", "rediss", "unix"):
        if importlib.util.find_spec("redis") is None:
            raise ImportError("a store in Redis needs the redis package: pip install marsjax[redis]")
        from marsjax.serving.redis_storage import RedisStorage

        return RedisStorage(
            url, timeout=timeout, append_timeout=max(timeout, append_timeout), ttl=ttl, consumer=consumer
        )
    raise ValueError(f"serving.storage: expected sqlite:PATH or redis://HOST:PORT/DB, found {url!r}")


def chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """The values, so many at a time, as they come."""
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
