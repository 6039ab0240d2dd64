"""Stream and store in one SQLite file: no server, and one transaction for an effect and its receipt."""

from __future__ import annotations

import contextlib
import pathlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from marsjax.serving.events import Entry, encode_history, merge, read_history
from marsjax.serving.storage import ALONE, TRAINER, Changed, Dead, Message, StorageError

SCHEMA = """
CREATE TABLE IF NOT EXISTS stream(id INTEGER PRIMARY KEY AUTOINCREMENT, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS consumers(name TEXT PRIMARY KEY, done INTEGER NOT NULL, tries INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS dead(id INTEGER PRIMARY KEY, data BLOB NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS histories(user TEXT PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS vectors(
    version TEXT, user TEXT, data BLOB NOT NULL, PRIMARY KEY(version, user)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS changed(user TEXT PRIMARY KEY, stamp TEXT NOT NULL, since REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS waiting ON changed(since);
"""
POLL = 0.02  # seconds between two looks at an empty stream


class SqliteStorage:
    """See `storage.Storage`. A group has one consumer at a time; threads have connections of their own."""

    def __init__(self, path: str, *, timeout: float):
        self._path, self._timeout, self._local = path, timeout, threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self._answering() as connection:
            self._prepare(connection)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        until = time.monotonic() + self._timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(SCHEMA)
                return
            except sqlite3.OperationalError as error:
                # SQLite doesn't wait for another one that is turning the file to WAL: it says "busy" at once.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
            time.sleep(POLL)

    def append(self, data: Sequence[bytes]) -> None:
        with self._writing() as connection:
            connection.executemany("INSERT INTO stream(data) VALUES(?)", [(item,) for item in data])

    def join(self, group: str) -> None:
        with self._writing() as connection:
            connection.execute("INSERT OR IGNORE INTO consumers VALUES(?, 0, 0)", (group,))

    def leave(self, group: str) -> None:
        with self._writing() as connection:
            connection.execute("DELETE FROM consumers WHERE name = ?", (group,))

    def read(self, group: str, *, count: int, wait: float) -> list[Message]:
        until = time.monotonic() + wait
        while True:
            if self._after(group):
                with self._writing() as connection:
                    connection.execute("INSERT OR IGNORE INTO consumers VALUES(?, 0, 0)", (group,))
                    connection.execute("UPDATE consumers SET tries = tries + 1 WHERE name = ?", (group,))
                    ((done, tries),) = connection.execute("SELECT done, tries FROM consumers WHERE name = ?", (group,))
                    found = connection.execute(
                        "SELECT id, data FROM stream WHERE id > ? ORDER BY id LIMIT ?",
                        (done, 1 if tries > ALONE and group != TRAINER else count),
                    ).fetchall()
                return [Message(str(number), data, tries) for number, data in found]
            if time.monotonic() >= until:
                return []
            time.sleep(POLL)

    def _after(self, group: str) -> bool:
        with self._answering() as connection:
            query = "SELECT 1 FROM stream WHERE id > coalesce((SELECT done FROM consumers WHERE name = ?), 0) LIMIT 1"
            return connection.execute(query, (group,)).fetchone() is not None

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
        now = time.time()
        with self._writing() as connection:
            for user, more in entries.items():
                row = connection.execute("SELECT data FROM histories WHERE user = ?", (user,)).fetchone()
                found = None if row is None else read_history(row[0], user)
                before = tuple(seed(user)) if found is None else found
                data = encode_history(merge(before, more, cap=cap))
                if row is None or data != row[0]:
                    connection.execute("INSERT OR REPLACE INTO histories VALUES(?, ?)", (user, data))
                    self._mark(connection, user, now)
            connection.executemany(
                "INSERT OR REPLACE INTO dead VALUES(?, ?, ?)",
                [(int(item.id), item.data, item.reason) for item in dead],
            )
            last = max((int(number) for number in (*done, *(item.id for item in dead))), default=None)
            if last is not None:
                connection.execute("UPDATE consumers SET done = max(done, ?), tries = 0 WHERE name = ?", (last, group))

    @staticmethod
    def _mark(connection: sqlite3.Connection, user: str, now: float) -> None:
        connection.execute(
            "INSERT INTO changed VALUES(?, ?, ?) ON CONFLICT(user) DO UPDATE SET stamp = excluded.stamp",
            (user, secrets.token_hex(8), now),
        )

    def lookup(self, user: str, version: str) -> tuple[bytes | None, bytes | None]:
        with self._answering() as connection:
            query = "SELECT (SELECT data FROM histories WHERE user = ?), "
            query += "(SELECT data FROM vectors WHERE version = ? AND user = ?)"
            history, vector = connection.execute(query, (user, version, user)).fetchone()
            return history, vector

    def histories(self, users: Sequence[str]) -> list[bytes | None]:
        with self._answering() as connection:
            rows = (
                connection.execute("SELECT data FROM histories WHERE user = ?", (user,)).fetchone() for user in users
            )
            return [None if row is None else row[0] for row in rows]

    def users(self) -> Iterator[str]:
        last = ""
        while True:  # page by page: a query that stays open keeps the log of writes from being emptied
            with self._answering() as connection:
                query = "SELECT user FROM histories WHERE user > ? ORDER BY user LIMIT 1000"
                found = [user for (user,) in connection.execute(query, (last,))]
            yield from found
            if not found:
                return
            last = found[-1]

    def changed(self, count: int) -> list[Changed]:
        with self._answering() as connection:
            query = "SELECT user, stamp, since FROM changed ORDER BY since LIMIT ?"
            return [Changed(*row) for row in connection.execute(query, (count,))]

    def write_vectors(self, version: str, vectors: Mapping[str, bytes], done: Sequence[Changed]) -> None:
        with self._writing() as connection:
            rows = [(version, user, data) for user, data in vectors.items()]
            connection.executemany("INSERT OR REPLACE INTO vectors VALUES(?, ?, ?)", rows)
            keys = [(item.user, item.stamp) for item in done]
            connection.executemany("DELETE FROM changed WHERE user = ? AND stamp = ?", keys)

    def touch(self, users: Iterable[str]) -> None:
        now = time.time()
        with self._writing() as connection:
            for user in users:
                self._mark(connection, user, now)

    def touch_all(self) -> None:
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO changed SELECT user, lower(hex(randomblob(8))), ? FROM histories WHERE true "
                "ON CONFLICT(user) DO UPDATE SET stamp = excluded.stamp", (time.time(),),
            )  # fmt: skip

    def forget_versions(self, keep: Sequence[str]) -> None:
        with self._writing() as connection:
            marks = ", ".join("?" * len(keep))
            connection.execute(f"DELETE FROM vectors WHERE version NOT IN ({marks})", tuple(keep))

    def trim(self) -> None:
        with self._writing() as connection:
            connection.execute("DELETE FROM stream WHERE id <= (SELECT coalesce(min(done), 0) FROM consumers)")

    def backlog(self, group: str) -> int:
        with self._answering() as connection:
            query = "SELECT count(*) FROM stream WHERE id > coalesce((SELECT done FROM consumers WHERE name = ?), 0)"
            return int(connection.execute(query, (group,)).fetchone()[0])

    def dead_letters(self, count: int) -> list[Dead]:
        with self._answering() as connection:
            query = "SELECT id, data, reason FROM dead ORDER BY id DESC LIMIT ?"
            return [Dead(str(number), data, reason) for number, data, reason in connection.execute(query, (count,))]

    def dead_count(self) -> int:
        with self._answering() as connection:
            return int(connection.execute("SELECT count(*) FROM dead").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._local = threading.local()

    @contextlib.contextmanager
    def _answering(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = sqlite3.connect(
                    self._path, timeout=self._timeout, isolation_level=None, check_same_thread=False
                )
                # FULL: what is committed survives the loss of power. In WAL mode NORMAL would not promise that.
                connection.execute("PRAGMA synchronous = FULL")
                self._local.connection = connection
                with self._lock:
                    self._connections.append(connection)
            yield connection
        except sqlite3.Error as error:
            raise StorageError(f"the store failed: {type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that has the file to itself from its beginning: reading and then writing cannot interleave."""
        with self._answering() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
