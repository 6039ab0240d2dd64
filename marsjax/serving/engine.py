"""Scores requests of many clients together, on one thread, in batches of shapes that are compiled before the first."""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from marsjax.ctr import objective
from marsjax.records import CtrBatch
from marsjax.serving import lending, scoring
from marsjax.serving.bundle import Bundle
from marsjax.serving.knowledge import dense_width, numbers
from marsjax.serving.lending import Lenders, Lent, lend

log = logging.getLogger(__name__)

CACHED = 20_000  # users whose borrowed items are remembered


class Snapshot(NamedTuple):
    """What one request is answered with, from its first look to its last."""

    version: str
    bundle: Bundle
    lenders: Lenders
    lenders_version: str  # "bundle": those in it
    published: float  # seconds since the epoch


class Task(NamedTuple):
    """A request on its way."""

    snapshot: Snapshot
    row: scoring.Row
    vector_D: np.ndarray | None  # look up anew what this user borrows; None: what the row has is right
    until: float  # time.monotonic() after which nothing is looked up any more
    came: float  # time.monotonic()


class Answer(NamedTuple):
    """Scores, and how they came about."""

    score_C: np.ndarray  # [C] float32
    lent: Lent  # what was offered
    borrowed: int  # how much of it found room in the history
    late: bool  # there was no time to look up what to borrow
    seconds: dict[str, float]  # by stage: queue, lend, score


class Engine:
    """One thread that takes all waiting tasks at once: while it works on some, the next ones gather."""

    def __init__(self, *, most_rows: int, cache: bool = True):
        self._tasks: queue.SimpleQueue[tuple[Task, Future[Answer]] | None] = queue.SimpleQueue()
        self._most_rows, self._rows, self._lock = most_rows, 0, threading.Lock()
        self._cache: collections.OrderedDict[tuple[str, str, bytes], Lent] = collections.OrderedDict()
        self._caches = cache
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> Future[Answer] | None:
        """A future for the answer; None where too much is waiting already."""
        rows = rows_of(task)
        with self._lock:
            if self._rows and self._rows + rows > self._most_rows:
                return None
            self._rows += rows
        future: Future[Answer] = Future()
        self._tasks.put((task, future))
        return future

    def close(self) -> None:
        """Answers what was submitted, and ends the thread."""
        self._tasks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            first = self._tasks.get()
            if first is None:
                return
            taken, ends = [first], False
            count = rows_of(first[0])
            while count < scoring.SIZES[-1] or len(taken) < lending.SIZES[-1]:
                try:
                    more = self._tasks.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    ends = True
                    break
                taken.append(more)
                count += rows_of(more[0])
            for group in by_snapshot(taken):
                try:
                    for (task, future), answer in zip(group, self.answer([task for task, _ in group]), strict=True):
                        with self._lock:
                            self._rows -= rows_of(task)
                        future.set_result(answer)
                except Exception as error:
                    log.exception("a batch of %d requests failed", len(group))
                    for task, future in group:
                        if not future.done():
                            with self._lock:
                                self._rows -= rows_of(task)
                            future.set_exception(error)
            if ends:
                return

    def answer(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Answers tasks of one snapshot, in order: Eqs. 15-18 for all that ask, then scores, some tasks at a time, so
        that the first need not wait for the last."""
        snapshot, began = tasks[0].snapshot, time.monotonic()
        late = [task.vector_D is not None and began > task.until for task in tasks]
        lent = self._lend(
            snapshot, [None if is_late else task.vector_D for task, is_late in zip(tasks, late, strict=True)]
        )
        rows = [
            task.row if found is None else task.row._replace(profile=task.row.profile._replace(lent=found))
            for task, found in zip(tasks, lent, strict=True)
        ]
        lent_at = time.monotonic()
        for part in in_parts(rows):
            scores = scoring.score_rows(snapshot.bundle, rows[part])
            ended = time.monotonic()
            for task, row, score_C, is_late in zip(tasks[part], rows[part], scores, late[part], strict=True):
                yield Answer(
                    score_C, row.profile.lent, scoring.room(snapshot.bundle, row), is_late,
                    {"queue": began - task.came, "lend": lent_at - began, "score": ended - lent_at},
                )  # fmt: skip

    def _lend(self, snapshot: Snapshot, vectors: Sequence[np.ndarray | None]) -> list[Lent | None]:
        head = (snapshot.version, snapshot.lenders_version)
        keys = [None if vector_D is None else (*head, vector_D.tobytes()) for vector_D in vectors]
        found: dict[tuple[str, str, bytes], Lent] = {}
        for key in keys:
            if key is not None and key in self._cache:
                self._cache.move_to_end(key)
                found[key] = self._cache[key]
        missing = {
            key: vector_D
            for key, vector_D in zip(keys, vectors, strict=True)
            if key is not None and vector_D is not None and key not in found
        }
        if missing:
            config = snapshot.bundle.manifest["config"]
            found |= dict(zip(missing, lend(snapshot.lenders, config, np.stack([*missing.values()])), strict=True))
            if self._caches:
                self._cache.update({key: found[key] for key in missing})
                while len(self._cache) > CACHED:
                    self._cache.popitem(last=False)
        return [None if key is None else found[key] for key in keys]


def rows_of(task: Task) -> int:
    """How much a task counts among those that wait: one that has nothing to score is looked up all the same."""
    return max(1, len(task.row.target_C))


def in_parts(rows: Sequence[scoring.Row]) -> Iterator[slice]:
    """Rows that are scored together, in order: about as many items as a batch holds."""
    begin = count = 0
    for end, row in enumerate(rows, start=1):
        count += len(row.target_C)
        if count >= scoring.SIZES[-1] or len(row.target_C) > scoring.FEW or end == len(rows):
            yield slice(begin, end)
            begin, count = end, 0


def by_snapshot(
    taken: Sequence[tuple[Task, Future[Answer]]],
) -> Iterator[list[tuple[Task, Future[Answer]]]]:
    """Tasks of one snapshot together: no answer mixes two."""
    groups: dict[int, list[tuple[Task, Future[Answer]]]] = {}
    for task, future in taken:
        groups.setdefault(id(task.snapshot), []).append((task, future))
    yield from groups.values()


class Compilations:
    """Counts what XLA compiles, save on threads that are warming up."""

    def __init__(self) -> None:
        self.serving = 0
        self._here = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and not getattr(self._here, "warming", False):
            self.serving += 1

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        """What this thread compiles meanwhile is expected."""
        self._here.warming = True
        try:
            yield
        finally:
            self._here.warming = False


def warm_up(snapshot: Snapshot) -> None:
    """Runs every shape once, so that no request waits for a compilation. One that is compiled already costs little."""
    bundle, config = snapshot.bundle, snapshot.bundle.manifest["config"]
    marked, width = config["ctr"]["inputs"] == "strong", dense_width(bundle.known)
    for size in scoring.SIZES:
        target_C, nothing_L = np.zeros(size, np.int32), np.zeros(0, np.int32)
        cap = int(config["retrieval"]["history"])
        numbers(
            bundle.known,
            -1,
            nothing_L,
            nothing_L.astype(np.int8),
            nothing_L.astype(np.float32),
            target_C,
            cap=cap,
            size=size,
        )
    for length in scoring.lengths(bundle):
        for rows, targets in (*((size, size) for size in scoring.SIZES), (1, objective.CANDIDATES)):
            user_B, target_B = np.zeros(rows, np.int32), np.zeros(targets, np.int32)
            weight_B, history_BL = np.zeros(rows, np.float32), np.zeros((rows, length), np.int32)
            marks_BL = history_BL.astype(np.int8) if marked else None
            dense_BJ = np.zeros((targets, width), np.float32) if width else None
            batch = CtrBatch(user_B, target_B, weight_B, weight_B, history_BL, history_BL > 0, marks_BL, dense_BJ)
            if rows == 1:
                scoring.score_alone(bundle, batch, 1).block_until_ready()
            else:
                objective.score(bundle.model, bundle.params, bundle.statistics, bundle.tables, [batch])
    if len(snapshot.lenders.user_index.user_P):
        for size in lending.SIZES:
            lend(snapshot.lenders, config, np.ones((size, snapshot.lenders.centre_D.shape[0]), np.float32))
