"""Stream and store in Redis, for many machines: a stream with groups of consumers, and values that expire.

An effect and its receipt are one MULTI/EXEC, so a message is acknowledged when its effect is there and never before.
What Redis promises of durability is up to it: with `appendfsync always` an answer means that it is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import redis

from marsjax.serving.events import Entry, encode_history, merge, read_history
from marsjax.serving.storage import ALONE, TRAINER, Changed, Dead, Message, StorageError, chunks

STREAM, DEAD, CHANGED, STAMPS = "marsjax:events", "marsjax:dead", "marsjax:changed", "marsjax:stamps"
HISTORY, VECTOR = "marsjax:history:", "marsjax:vector:"
FIELD = b"data"
LONGEST_DEAD = 100_000  # dead letters that are kept, about
# Seconds after which a message that a consumer has not acknowledged is taken over by another one. A training has its
# messages in hand from its beginning to its end, and must not lose them to a runner that only looks in.
CLAIM, CLAIM_TRAINER = 60.0, 6 * 3600.0
MOST_TAKEN = 100_000  # messages that are taken over at a time
RETRIES = 20  # of a transaction that another writer got in the way of


class RedisStorage:
    """See `storage.Storage`."""

    def __init__(self, url: str, *, timeout: float, append_timeout: float, ttl: float, consumer: str):
        self._redis, self._appends = (
            redis.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds)
            for seconds in (timeout, append_timeout)
        )
        self._timeout, self._ttl, self._consumer = timeout, max(int(ttl), 1), consumer
        self._pending: dict[str, bool] = {}  # group -> whether this consumer may have messages not acknowledged
        self._looked: dict[str, float] = {}  # group -> time.monotonic() of the last look for messages to take over

    def append(self, data: Sequence[bytes]) -> None:
        with _answering(), self._appends.pipeline(transaction=True) as pipe:
            for item in data:
                pipe.xadd(STREAM, {FIELD: item})
            pipe.execute()

    def join(self, group: str) -> None:
        with _answering():
            try:
                self._redis.xgroup_create(STREAM, group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise

    def leave(self, group: str) -> None:
        with _answering():
            if self._redis.exists(STREAM):
                self._redis.xgroup_destroy(STREAM, group)

    def read(self, group: str, *, count: int, wait: float) -> list[Message]:
        with _answering():
            # Whether or not there is something new: where there always is, nobody else's would ever be taken over.
            if self._take_over(group) or self._pending.get(group, True):
                found = self._again(group, count)
                if found:
                    return found
                self._pending[group] = False
            # Longer than the socket waits, the answer would be taken for none.
            block = max(1, int(1000 * min(wait, self._timeout / 2)))
            try:
                answer: Any = self._redis.xreadgroup(group, self._consumer, {STREAM: ">"}, count=count, block=block)
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                self.join(group)  # the server lost its data
                return []
            new = _pairs(answer)
            self._pending[group] = bool(new)
            return [Message(name, data, 1) for name, data in new]

    def _take_over(self, group: str) -> bool:
        """Takes over what other consumers have had for too long, in every half of that time; whether there was any."""
        claim, now = CLAIM_TRAINER if group == TRAINER else CLAIM, time.monotonic()
        if now - self._looked.get(group, -math.inf) < claim / 2:
            return False
        self._looked[group] = now
        try:
            # Only named here: that they are handed out is counted where they are.
            return bool(
                self._redis.xautoclaim(STREAM, group, self._consumer, int(1000 * claim), count=MOST_TAKEN, justid=True)
            )
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.join(group)
            return False

    def _again(self, group: str, count: int) -> list[Message]:
        """Messages that were handed to this consumer and not acknowledged."""
        try:
            listed: Any = self._redis.xpending_range(STREAM, group, "-", "+", count, consumername=self._consumer)
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.join(group)
            return []
        if not listed:
            return []
        times = {item["message_id"].decode(): int(item["times_delivered"]) for item in listed}
        alone = group != TRAINER and max(times.values()) >= ALONE
        names = list(times)[: 1 if alone else count]
        # Claiming counts as a delivery; reading them once more would not.
        claimed: Any = self._redis.xclaim(STREAM, group, self._consumer, 0, names)
        found = dict(_pairs([[STREAM, claimed]]))
        lost = [name for name in names if name not in found]  # trimmed by somebody else
        if lost:
            self._redis.xack(STREAM, group, *lost)
        return [Message(name, found[name], times[name] + 1) for name in names if name in found]

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
        users, now = list(entries), time.time()
        names = [*done, *(item.id for item in dead)]
        with _answering(), self._redis.pipeline(transaction=True) as pipe:
            for _ in range(RETRIES):
                try:
                    if users:
                        pipe.watch(*(HISTORY + user for user in users))
                        found: Any = pipe.mget([HISTORY + user for user in users])
                    else:
                        found = []
                    pipe.multi()
                    for user, before in zip(users, found, strict=True):
                        known = read_history(before, user)
                        known = tuple(seed(user)) if known is None else known
                        data = encode_history(merge(known, entries[user], cap=cap))
                        pipe.set(HISTORY + user, data, ex=self._ttl)
                        if data != before:
                            pipe.zadd(CHANGED, {user: now}, nx=True)
                            pipe.hset(STAMPS, user, secrets.token_hex(8))
                    for item in dead:
                        kept: Any = {FIELD: item.data, b"reason": item.reason, b"id": item.id}
                        pipe.xadd(DEAD, kept, maxlen=LONGEST_DEAD, approximate=True)
                    if names:
                        pipe.xack(STREAM, group, *names)
                    pipe.execute()
                    return
                except redis.WatchError:
                    continue
        raise StorageError(f"the store failed: {RETRIES} transactions in a row met another writer")

    def lookup(self, user: str, version: str) -> tuple[bytes | None, bytes | None]:
        with _answering():
            found: Any = self._redis.mget([HISTORY + user, f"{VECTOR}{version}:{user}"])
            return found[0], found[1]

    def histories(self, users: Sequence[str]) -> list[bytes | None]:
        with _answering():
            found: Any = self._redis.mget([HISTORY + user for user in users]) if users else []
            return list(found)

    def users(self) -> Iterator[str]:
        with _answering():
            for key in self._redis.scan_iter(HISTORY + "*", count=1000):
                yield key.decode().removeprefix(HISTORY)

    def changed(self, count: int) -> list[Changed]:
        with _answering():
            found: Any = self._redis.zrange(CHANGED, 0, count - 1, withscores=True)
            users = [user.decode() for user, _ in found]
            stamps: Any = self._redis.hmget(STAMPS, users) if users else []
            return [
                Changed(user, (stamp or b"").decode(), float(since))
                for user, stamp, (_, since) in zip(users, stamps, found, strict=True)
            ]

    def write_vectors(self, version: str, vectors: Mapping[str, bytes], done: Sequence[Changed]) -> None:
        with _answering(), self._redis.pipeline(transaction=True) as pipe:
            for user, data in vectors.items():
                pipe.set(f"{VECTOR}{version}:{user}", data, ex=self._ttl)
            # Compared and removed in one step on the server: a change that comes between must not be lost.
            for item in done:
                pipe.eval(FINISH, 2, CHANGED, STAMPS, item.user, item.stamp)
            pipe.execute()

    def touch(self, users: Iterable[str]) -> None:
        with _answering():
            now = time.time()
            for names in chunks(users, 1000):
                with self._redis.pipeline(transaction=True) as pipe:
                    for user in names:
                        pipe.zadd(CHANGED, {user: now}, nx=True)
                        pipe.hset(STAMPS, user, secrets.token_hex(8))
                    pipe.execute()

    def touch_all(self) -> None:
        self.touch(self.users())

    def forget_versions(self, keep: Sequence[str]) -> None:
        # They would expire, but a version may come every few minutes: all that came in `ttl` would be there at once.
        kept = tuple(f"{VECTOR}{version}:".encode() for version in keep)
        with _answering():
            found = self._redis.scan_iter(VECTOR + "*", count=1000)
            for keys in chunks((key for key in found if not key.startswith(kept)), 1000):
                self._redis.unlink(*keys)

    def trim(self) -> None:
        with _answering():
            groups: Any = self._redis.xinfo_groups(STREAM)
            oldest = []
            for group in groups:
                summary: Any = self._redis.xpending(STREAM, group["name"])
                last = group["last-delivered-id"].decode()
                oldest.append(summary["min"].decode() if summary["pending"] else _next(last))
            if oldest:
                self._redis.xtrim(STREAM, minid=min(oldest, key=_place), approximate=False)

    def backlog(self, group: str) -> int:
        with _answering():
            for found in self._redis.xinfo_groups(STREAM) if self._redis.exists(STREAM) else []:
                if found["name"].decode() == group:
                    after: Any = self._redis.xrange(STREAM, min="(" + found["last-delivered-id"].decode())
                    return int(found["pending"]) + (len(after) if found.get("lag") is None else int(found["lag"]))
            return int(self._redis.xlen(STREAM))

    def dead_letters(self, count: int) -> list[Dead]:
        with _answering():
            found: Any = self._redis.xrevrange(DEAD, count=count)
            return [Dead(kept[b"id"].decode(), kept[FIELD], kept[b"reason"].decode()) for _, kept in found]

    def dead_count(self) -> int:
        with _answering():
            return int(self._redis.xlen(DEAD))

    def close(self) -> None:
        self._redis.close()
        self._appends.close()


FINISH = """
if redis.call('HGET', KEYS[2], ARGV[1]) == ARGV[2] then
    redis.call('ZREM', KEYS[1], ARGV[1])
    redis.call('HDEL', KEYS[2], ARGV[1])
end
"""


def _pairs(answer: Any) -> list[tuple[str, bytes]]:
    """Names and data of messages. One without our field, which somebody else wrote, comes as JSON of what it has."""
    found = []
    for _, messages in answer or []:
        for name, fields in messages:
            if fields is None:
                continue
            data = fields.get(FIELD)
            if data is None:
                data = json.dumps({key.decode(errors="replace"): str(value) for key, value in fields.items()}).encode()
            found.append((name.decode(), data))
    return found


def _place(name: str) -> tuple[int, int]:
    milliseconds, _, number = name.partition("-")
    return int(milliseconds), int(number or 0)


def _next(name: str) -> str:
    milliseconds, number = _place(name)
    return f"{milliseconds}-{number + 1}"


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise StorageError(f"the store failed: {type(error).__name__}: {error}") from error
