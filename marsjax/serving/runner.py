"""The offline runner of section 3.5.2: histories from the stream, vectors of the users who changed, an index of donors
that is built anew and swapped, and a training that goes on."""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

from marsjax import embeddings, files, retrieval
from marsjax.data.histories import gather_histories
from marsjax.records import Donors, Histories
from marsjax.serving import continuation, people, snapshots, versions
from marsjax.serving.bundle import Bundle, Encoder, item_numbers, load_bundle, load_encoder
from marsjax.serving.events import Entry, decode_event, read_history
from marsjax.serving.lending import Lenders
from marsjax.serving.storage import RUNNER, TRAINER, Dead, Storage, StorageError
from marsjax.serving.vectors import Vector, digest, encode_vector

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LOCK = ".runner"
PAUSE = 1.0  # seconds, after a failure and while nothing is published
SIZE = 64  # users that are embedded at a time
# No user has this id and no version this name: the store has the version there that its users were last marked for.
NOBODY, FOLLOWED = "", "followed"


class Settings(NamedTuple):
    """How the runner behaves."""

    root: pathlib.Path
    batch: int = 1000  # events, and users, at a time
    wait: float = 0.2  # seconds to wait for an event
    most_deliveries: int = 10  # of a message; then it is a dead letter
    lenders_seconds: float = 300.0  # between two indexes; 0: never
    index_threads: int = 1  # that build one; 0: as many as there are processors
    rebuild_hour: int = 3  # local hour after which everything is made anew once a day; -1: never
    trim_seconds: float = 30.0
    follow_seconds: float = 30.0  # after a version that cannot be loaded
    train_seconds: float = 1200.0  # between two published continuations of the training; 0: never
    training: continuation.Settings = continuation.Settings()
    keep: int = 5  # versions


class Model(NamedTuple):
    """The published bundle, with its encoder."""

    version: str
    bundle: Bundle
    encoder: Encoder


def consume(
    storage: Storage,
    bundle: Bundle,
    *,
    count: int,
    wait: float,
    most_deliveries: int,
    refused: set[str] | None = None,
) -> int:
    """Takes events from the stream into the histories of their users; returns how many messages are done with.

    What is no event becomes a dead letter, and so does what was handed out too often without being acknowledged.
    `refused` is kept between calls: messages that the store refused to be done with, which says nothing against them.
    """
    refused = set() if refused is None else refused
    messages = storage.read(RUNNER, count=count, wait=wait)
    entries: dict[str, list[Entry]] = {}
    dead, done = [], []
    for message in messages:
        try:
            if message.deliveries > most_deliveries and message.id not in refused:
                raise ValueError(f"handed out {message.deliveries} times and never acknowledged")
            event = decode_event(message.data)
        except ValueError as error:
            dead.append(Dead(message.id, message.data, str(error)))
            continue
        entry = Entry(event.time, event.id, event.item, event.label, event.grade)
        entries.setdefault(event.user, []).append(entry)
        done.append(message.id)
    if dead:
        log.warning("%d messages became dead letters; the first: %s", len(dead), dead[0].reason)
    if messages:
        try:
            storage.apply(
                RUNNER, entries, done, cap=_cap(bundle), seed=lambda user: people.seed_entries(bundle, user), dead=dead
            )
        except StorageError:
            refused.update(message.id for message in messages)
            raise
        refused.difference_update(message.id for message in messages)
    return len(messages)


def _cap(bundle: Bundle) -> int:
    """Entries of a history that are kept: the longest that anything reads, and what unknown and disliked items take."""
    config = bundle.manifest["config"]
    return 2 * max(int(config["ctr"]["cap"]), int(config["retrieval"]["history"]))


def as_histories(bundle: Bundle, histories: Sequence[Sequence[Entry]]) -> tuple[Histories, np.ndarray]:
    """Histories of some users in the form that the encoder's functions read, one user each, and where each ends."""
    parts = [people.of_entries(bundle, entries) for entries in histories]
    start_U1 = np.concatenate([[0], np.cumsum([len(item_L) for item_L, *_ in parts])]).astype(np.int64)
    item_H = np.concatenate([np.zeros(0, np.int32), *(item_L for item_L, *_ in parts)]).astype(np.int32)
    zero_H = np.zeros(len(item_H), np.int64)
    end_U = start_U1[1:]
    return Histories(start_U1, item_H, zero_H, zero_H.astype(np.float32), end_U, end_U, start_U1[:-1]), end_U


def embed_histories(bundle: Bundle, encoder: Encoder, histories: Sequence[Sequence[Entry]]) -> np.ndarray:
    """Vectors of users by their histories, [U, D] float32, Eq. 13, as the pipeline makes them."""
    found, end_U = as_histories(bundle, histories)
    cap = int(bundle.manifest["config"]["retrieval"]["history"])
    return embeddings.user_vectors(*encoder, found, np.arange(len(end_U)), end_U, cap=cap, size=SIZE)


def embed_changed(storage: Storage, model: Model, *, count: int) -> int:
    """Makes vectors of users who changed, those first who wait longest; returns how many."""
    changed = storage.changed(count)
    if not changed:
        return 0
    stored = storage.histories([item.user for item in changed])
    known, histories = [], []
    for item, data in zip(changed, stored, strict=True):
        entries = read_history(data, item.user)
        if data is not None and entries is not None:
            histories.append(entries)
            known.append((item.user, data))
    vector_UD = embed_histories(model.bundle, model.encoder, histories)
    now = time.time()
    vectors = {
        user: encode_vector(Vector(model.version, vector_D, digest(data), now))
        for (user, data), vector_D in zip(known, vector_UD, strict=True)
    }
    storage.write_vectors(model.version, vectors, changed)
    return len(changed)


def renew_lenders(storage: Storage, model: Model, lenders: Lenders, *, threads: int = 1) -> Lenders | None:
    """The donors with the histories that the store has now, in a new index, built on so many threads; None where these
    are those of `lenders`."""
    bundle, donors = model.bundle, lenders.donors
    names = bundle.users.raw_user_U[donors.user_P]
    stored = [
        data for i in range(0, len(names), 1000) for data in storage.histories([str(n) for n in names[i : i + 1000]])
    ]
    read = [read_history(data, str(name)) for data, name in zip(stored, names, strict=True)]
    at_X = np.flatnonzero([entries is not None for entries in read])
    if not len(at_X):
        return None
    histories = [entries for entries in read if entries is not None]
    found, end_U = as_histories(bundle, histories)
    width = donors.item_PL.shape[1]
    item_PL, time_PL, mark_PL = donors.item_PL.copy(), donors.time_PL.copy(), lenders.mark_PL.copy()
    item_PL[at_X] = gather_histories(found, np.arange(len(end_U)), end_U, cap=width)
    for x, entries in zip(at_X, histories, strict=True):
        time_PL[x], mark_PL[x] = _times_and_marks(bundle, entries, width)
    if np.array_equal(item_PL, donors.item_PL) and np.array_equal(time_PL, donors.time_PL):
        return None
    vector_UD = embed_histories(bundle, model.encoder, histories)
    donor_PD = bundle.users.user_UD[donors.user_P].copy()
    donor_PD[at_X] = vector_UD
    unit_PLD = lenders.unit_PLD
    if unit_PLD is not None:
        unit_PLD = np.array(unit_PLD)
        vector_XLD = embeddings.contextual_vectors(*model.encoder, item_PL[at_X])
        unit_PLD[at_X] = embeddings.units(vector_XLD, lenders.centre_D)
    index = retrieval.build_index(donor_PD - lenders.centre_D, donors.user_P, threads=threads)
    return Lenders(Donors(donors.user_P, item_PL, time_PL), mark_PL, lenders.centre_D, unit_PLD, lenders.unit_ND, index)


def _times_and_marks(bundle: Bundle, entries: Sequence[Entry], width: int) -> tuple[np.ndarray, np.ndarray]:
    """When the items of `people.of_entries` were met, and what was thought of them, the last `width`, padded."""
    liked_only = bundle.manifest["config"]["split"]["history"] == "positives"
    known_X = item_numbers(bundle, [entry.item for entry in entries]) > 0
    kept = [
        entry for entry, known in zip(entries, known_X, strict=True) if known and (entry.label > 0 or not liked_only)
    ]
    time_L, mark_L = np.zeros(width, np.int64), np.zeros(width, np.int8)
    kept = kept[-width:]
    time_L[: len(kept)] = [entry.time for entry in kept]
    mark_L[: len(kept)] = [2 if entry.label > 0 else 1 for entry in kept]
    return time_L, mark_L


def load_model(root: pathlib.Path, version: str) -> Model:
    """A version of `root` with its encoder. Raises ValueError where it is damaged or is not there."""
    bundle = load_bundle(versions.folder_of(root, version))
    return Model(version, bundle, load_encoder(bundle))


def follow(root: pathlib.Path, storage: Storage, model: Model | None) -> Model | None:
    """The published model; users get vectors of a new one again, for it cannot read those of another."""
    current = versions.read_current(root)
    if current is None or (model is not None and model.version == current.version):
        return model
    made = load_model(root, current.version)  # whole, before anything is marked for it
    name = storage.lookup(NOBODY, FOLLOWED)[1] or b""
    # Else this runner was only started again. A version that was followed before does not do: who changed since has a
    # vector of the version that came between.
    if name != current.version.encode():
        storage.touch_all()
        storage.write_vectors(FOLLOWED, {NOBODY: current.version.encode()}, [])
    # The service may still answer with the version before, and go back to the one that was published before.
    storage.forget_versions([FOLLOWED, current.version, *current.earlier[-1:], name.decode()])
    log.info(
        "version %s: %d users, %d donors",
        current.version,
        len(made.bundle.users.raw_user_U),
        len(made.bundle.lenders.mark_PL),
    )
    return made


class Turns:
    """Steps that may fail. A failure is told, takes the turn of its step, and keeps no other step from its own."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._at: dict[str, float] = {}
        self.failed = False  # whether any step has, since this was set to False

    def due(self, step: str, seconds: float) -> bool:
        """Whether it is `seconds` since the last turn of the step, or since the beginning; this is its turn then.
        Never, where `seconds` is 0."""
        now = time.monotonic()
        if not seconds or now - self._at.get(step, self._began) < seconds:
            return False
        self._at[step] = now
        return True

    def attempt(self, step: str, act: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T | None:
        """What the step returns; None where it failed: the store does not answer, a disk is full, a file is damaged."""
        try:
            return act(*arguments, **named)
        except (StorageError, OSError, ValueError) as error:
            log.warning("%s: %s; trying again", step, error)
            self.failed = True
            return None


def _join(storage: Storage, *, trains: bool) -> bool:
    """Groups of the steps that run. One that nobody reads any more would keep the stream from being trimmed."""
    storage.join(RUNNER)
    if trains:
        storage.join(TRAINER)
    else:
        storage.leave(TRAINER)
    return True


def _publish_lenders(settings: Settings, storage: Storage, model: Model, lenders: Lenders) -> Lenders | None:
    renewed = renew_lenders(storage, model, lenders, threads=settings.index_threads)
    if renewed is not None:
        log.info("donors: %s", snapshots.publish_lenders(settings.root, model.version, renewed))
    return renewed


@contextlib.contextmanager
def only_one(root: pathlib.Path) -> Iterator[None]:
    """One runner of a folder at a time: two would share a name among the consumers of the stream, and a candidate.

    Raises ValueError where another runner has it.
    """
    path = pathlib.Path(root) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = path.read_text() if path.exists() else ""
    held = f"{root}: expected no other runner, found {holder or 'one'}; stop it, or give another --root"
    with files.locked(path, held=held):
        path.write_text(f"process {os.getpid()} on {platform.node()}")
        yield


def run(settings: Settings, storage: Storage, stop: threading.Event) -> None:
    """Runs until `stop` is set. A step that fails is tried again at its next turn, and the others go on.

    Raises ValueError where another runner has this folder.
    """
    # Beside the loop: histories and vectors are not to wait for a training. Its end is waited for.
    with only_one(settings.root), futures.ThreadPoolExecutor(1, "training") as aside:
        _run(settings, storage, stop, aside)


def _run(settings: Settings, storage: Storage, stop: threading.Event, aside: futures.Executor) -> None:
    root, turns = settings.root, Turns()
    model: Model | None = None
    joined: bool | None = False
    waits = False  # for a bundle, and has said so
    follows_at = 0.0
    told_at = time.monotonic()
    rebuilt = datetime.date.today()
    events = vectors = 0
    refused: set[str] = set()
    training: futures.Future[str | None] | None = None
    while not stop.is_set():
        if training is not None and training.done():
            training.result()  # what no step may raise ends the runner
            training = None
        if turns.failed:
            stop.wait(PAUSE)
            turns.failed = False
        joined = joined or turns.attempt("joining", _join, storage, trains=settings.train_seconds > 0)
        if joined and time.monotonic() >= follows_at:
            found = turns.attempt("following", follow, root, storage, model)
            if found is None:  # checking all files of a damaged version takes long: not each moment
                follows_at = time.monotonic() + (PAUSE if model is None else settings.follow_seconds)
            elif found is not model:
                model, lenders = found, found.bundle.lenders  # those that were published last
        if model is None:
            if joined and not waits:
                waits = True
                log.info("waiting for a bundle in %s: publish one", root)
            stop.wait(PAUSE)
            continue
        taken = turns.attempt(
            "events", consume, storage, model.bundle,
            count=settings.batch, wait=settings.wait, most_deliveries=settings.most_deliveries, refused=refused,
        )  # fmt: skip
        made = turns.attempt("vectors", embed_changed, storage, model, count=settings.batch)
        events, vectors = events + (taken or 0), vectors + (made or 0)
        now, today = time.monotonic(), datetime.datetime.now()
        rebuild = today.date() > rebuilt and 0 <= settings.rebuild_hour <= today.hour
        if rebuild:
            rebuilt = today.date()
            turns.attempt("rebuilding", storage.touch_all)
        if turns.due("donors", settings.lenders_seconds) or rebuild:
            since = model.bundle.lenders if rebuild else lenders
            renewed = turns.attempt("donors", _publish_lenders, settings, storage, model, since)
            lenders = lenders if renewed is None else renewed
        # Histories first: a row is trained with what its user did before.
        caught_up = taken is not None and taken < settings.batch
        if caught_up and training is None and turns.due("training", settings.train_seconds):
            training = aside.submit(
                turns.attempt, "training", continuation.continue_training, root, storage, model.version, model.bundle,
                settings.training, embed=functools.partial(embed_histories, model.bundle, model.encoder),
                keep=settings.keep,
            )  # fmt: skip
        if turns.due("trimming", settings.trim_seconds):
            turns.attempt("trimming", storage.trim)
        if now - told_at >= 10.0 and events:
            log.info("%d events and %d vectors in %.0f s", events, vectors, now - told_at)
            events = vectors = 0
            told_at = now
