"""Vectors of all users anew, in one process or on Ray Data (`ray_rebuild`), without a machine that holds all of them.

histories/00007.jsonl      a line a user, {"user": ID, "history": [[time, event id, item, label], ...]}, by time
vectors/VERSION/00007.npz   raw_user_U [U] str, history_U [U] str (`vectors.digest`), vector_UD [U, D] float32

A shard is the unit of work. It has a file of its own, which appears whole, so a job that was stopped goes on with the
shards that are missing; and its bytes follow from the shard and the model alone, so who makes it does not matter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from marsjax import files
from marsjax.serving import versions
from marsjax.serving.events import Entry, check_id, decode_history, encode_history, read_history
from marsjax.serving.runner import Model, embed_histories, load_model
from marsjax.serving.storage import Storage, chunks
from marsjax.serving.vectors import Vector, digest, encode_vector

log = logging.getLogger(__name__)

HISTORIES, VECTORS = "histories", "vectors"
BATCH = 1000  # users that are asked of the store at a time
PART = 10_000  # users that are embedded at a time: their histories are in memory, and no others


class Shard(NamedTuple):
    """Where a shard is read, and where its vectors go."""

    source: str
    target: str


def write_shards(storage: Storage, folder: pathlib.Path, *, count: int) -> int:
    """Writes the histories of the store as `count` shards, by a hash of the user and sorted; returns how many users.

    Raises:
        ValueError: fewer than one shard, or `folder` exists.
        StorageError: the store does not answer.
        OSError: the disk is full; nothing is left behind.
    """
    if count < 1:
        raise ValueError(f"serving.shards: expected 1 or more, found {count}")
    if folder.exists():
        raise ValueError(f"{folder}: expected no folder yet, found one; give another --output")
    users = 0
    with files.write_folder(folder) as partial:
        paths = [partial / f"{number:05d}.jsonl" for number in range(count)]
        for path in paths:
            path.touch()
        for names in chunks(storage.users(), 64 * BATCH):
            lines: list[list[bytes]] = [[] for _ in paths]
            for some in chunks(names, BATCH):
                for user, data in zip(some, storage.histories(some), strict=True):
                    entries = read_history(data, user)
                    if entries is not None:
                        lines[_shard_of(user, count)].append(_encode(user, entries))
            for path, written in zip(paths, lines, strict=True):  # opened in turn: there may be thousands
                with path.open("ab") as file:
                    file.writelines(written)
        for path in paths:  # a store may name a user twice
            found = {json.loads(line)["user"]: line for line in path.read_bytes().splitlines(keepends=True)}
            files.write_bytes(path, b"".join(found[user] for user in sorted(found)))
            users += len(found)
    return users


def embed_shard(model: Model, shard: Shard) -> int:
    """Writes the vectors of one shard, unless they are there; returns how many users it has.

    Raises:
        ValueError: a line that is no history.
        OSError: the disk is full; nothing is left behind.
    """
    target = pathlib.Path(shard.target)
    if not target.exists():
        users, digests, parts = [], [], [np.zeros((0, model.encoder.module.width), np.float32)]
        for part in chunks(_read(pathlib.Path(shard.source)), PART):
            users += [user for user, _ in part]
            digests += [digest(encode_history(entries)) for _, entries in part]
            parts.append(embed_histories(model.bundle, model.encoder, [entries for _, entries in part]))
        files.write_arrays(
            target,
            raw_user_U=np.array(users, str),
            history_U=np.array(digests, str),
            vector_UD=np.concatenate(parts),
        )
    with np.load(target) as arrays:
        return len(arrays["history_U"])


def embed_shards(root: pathlib.Path, version: str, output: pathlib.Path, *, workers: int) -> int:
    """Writes the vectors of all shards of `output` by a version of `root`; returns how many users these are.

    Args:
        workers: processes on Ray Data, each of which loads the version; all machines must find `root` and `output` at
            the same place. 0: this process alone. The files are the same, byte for byte.

    Raises:
        ValueError: no shards, or a line that is no history.
        ImportError: workers without the package for them.
        OSError: the disk is full.
    """
    source, target = (pathlib.Path(output).absolute() / name for name in (HISTORIES, VECTORS))
    paths = sorted(source.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"{source}: expected shards of histories (*.jsonl), found none; give an --output without them")
    shards = [Shard(str(path), str(target / version / f"{path.stem}.npz")) for path in paths]
    if not workers:
        model = load_model(root, version)
        return sum(embed_shard(model, shard) for shard in shards)
    try:
        from marsjax.serving import ray_rebuild
    except ImportError as error:
        raise ImportError(f"serving.workers needs the extra `ray`: pip install marsjax[ray] ({error})") from error
    return ray_rebuild.embed_shards(pathlib.Path(root).absolute(), version, shards, workers=workers)


def load_vectors(storage: Storage, version: str, output: pathlib.Path) -> tuple[int, int]:
    """Puts the vectors of a version into the store, of all whose history is still the one they were made of; returns
    how many, and how many not: who has gone on since is the runner's."""
    written = total = 0
    for path in sorted((output / VECTORS / version).glob("*.npz")):
        with np.load(path) as arrays:
            user_U, history_U, vector_UD = (arrays[name] for name in ("raw_user_U", "history_U", "vector_UD"))
        total += len(user_U)
        for begin in range(0, len(user_U), BATCH):
            some = slice(begin, begin + BATCH)
            made = {
                str(user): Vector(version, vector_D, str(history), time.time())
                for user, history, vector_D in zip(user_U[some], history_U[some], vector_UD[some], strict=True)
            }
            made = {user: made[user] for user in _unchanged(storage, made)}
            storage.write_vectors(version, {user: encode_vector(vector) for user, vector in made.items()}, [])
            # Who went on just now may have got a newer vector of the runner, and this one over it.
            if overtaken := made.keys() - _unchanged(storage, made):
                storage.touch(sorted(overtaken))
            written += len(made) - len(overtaken)
    return written, total - written


def rebuild(
    root: pathlib.Path, storage: Storage, output: pathlib.Path, *, shards: int, workers: int
) -> tuple[int, int]:
    """All three: shards of the store, unless `output` has some, their vectors, and these in the store. As
    `load_vectors`.

    Raises ValueError where nothing is published, or where another version is served at the end than at the beginning.
    """
    current = versions.read_current(root)
    if current is None:
        raise ValueError(f"{root}: expected a published bundle, found none; run `marsjax publish`")
    if not (output / HISTORIES).exists():
        log.info("%d users in %d shards", write_shards(storage, output / HISTORIES, count=shards), shards)
    began = time.monotonic()
    users = embed_shards(root, current.version, output, workers=workers)
    log.info("%d vectors in %.0f s", users, time.monotonic() - began)
    now = versions.read_current(root)
    if now is None or now.version != current.version:
        raise ValueError(
            f"{root}: expected {current.version} to be served still, found {now and now.version}; run again, with "
            "serving.train_seconds=0 for a runner that publishes faster than this"
        )
    return load_vectors(storage, current.version, output)


def _unchanged(storage: Storage, made: dict[str, Vector]) -> set[str]:
    stored = storage.histories(list(made))
    return {
        user
        for (user, vector), data in zip(made.items(), stored, strict=True)
        if data is not None and digest(data) == vector.history
    }


def _shard_of(user: str, count: int) -> int:
    return int.from_bytes(hashlib.blake2b(user.encode(), digest_size=8).digest()) % count


def _encode(user: str, entries: Sequence[Entry]) -> bytes:
    return json.dumps({"user": user, "history": entries}, separators=(",", ":")).encode() + b"\n"


def _read(path: pathlib.Path) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
                check_id("user", value["user"])
                yield value["user"], decode_history(json.dumps(value["history"]).encode())
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}:{number}: expected user and history as JSON, found {line[:60]!r} ({error})"
                ) from error
