"""How fast are vectors of all users made anew, and how much memory does a user take?

    python -m benchmarks.serving_rebuild --bundle=BUNDLE --output=benchmarks/results/serving_rebuild.json
        [--users=50000] [--entries=30] [--workers=2]

The parts of `marsjax rebuild`: shards out of the store, their vectors (in one process, and with --workers on Ray Data
if that is installed), and these into the store, a real Redis where one is on the PATH. Whether Ray writes the bytes of
one process is looked at too. The plan for 100 million users in docs/serving.md is made of these rates.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import pathlib
import shutil
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import service, stores
from marsjax import files, retrieval
from marsjax.serving import rebuild, versions
from marsjax.serving.bundle import Bundle, load_bundle
from marsjax.serving.events import Entry
from marsjax.serving.runner import load_model
from marsjax.serving.storage import RUNNER, Storage

SHARDS = 8


def fill(storage: Storage, bundle: Bundle, users: int, entries: int) -> None:
    """Histories of new users, half to one and a half times as long as `entries`."""
    rng, names = np.random.default_rng(0), bundle.items.raw_id_N[1:]
    for begin in range(0, users, 1000):
        made = {}
        for user in range(begin, min(begin + 1000, users)):
            item_L = rng.choice(names, rng.integers(entries // 2, entries * 3 // 2 + 1))
            made[f"user{user:09d}"] = [
                Entry(10**9 + i, f"{user:09d}-{i:06d}", str(item), float(i % 2)) for i, item in enumerate(item_L)
            ]
        storage.apply(RUNNER, made, [], cap=10_000, seed=lambda user: [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=pathlib.Path, required=True)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--entries", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    began, bundle, rows = time.monotonic(), load_bundle(arguments.bundle), []
    redis = shutil.which("redis-server") is not None
    case = f"{arguments.users} users, {arguments.entries} entries each, {'Redis' if redis else 'SQLite'}"

    def rate(question: str, seconds: float, users: int = arguments.users, more: str = "") -> None:
        rows.append(service.row(question, case + more, users / seconds, None, "", None))

    with tempfile.TemporaryDirectory() as name, stores.stored(pathlib.Path(name), redis) as (url, _):
        root, alone, many = (pathlib.Path(name) / part for part in ("root", "alone", "many"))
        version, storage = versions.publish(root, arguments.bundle, keep=1), stores.opened(url)
        before = used(url)
        at = time.monotonic()
        fill(storage, bundle, arguments.users, arguments.entries)
        rate("histories written a second", time.monotonic() - at)
        with_histories = used(url)
        at = time.monotonic()
        rebuild.write_shards(storage, alone / rebuild.HISTORIES, count=SHARDS)
        rate("histories read into shards a second", time.monotonic() - at)
        model = load_model(root, version)
        shards = [
            rebuild.Shard(str(path), str(alone / rebuild.VECTORS / version / f"{path.stem}.npz"))
            for path in sorted((alone / rebuild.HISTORIES).iterdir())
        ]
        first = rebuild.embed_shard(model, shards[0])  # compiles
        at = time.monotonic()
        made = sum(rebuild.embed_shard(model, shard) for shard in shards[1:])
        rate("vectors made a second by one process, compiled", time.monotonic() - at, users=made)
        assert first + made == arguments.users, (first, made)
        if arguments.workers and importlib.util.find_spec("ray") is not None:
            shutil.copytree(alone / rebuild.HISTORIES, many / rebuild.HISTORIES)
            at = time.monotonic()
            rebuild.embed_shards(root, version, many, workers=arguments.workers)
            words = f", {arguments.workers} workers"
            rate(
                "vectors made a second on Ray Data, its start and compiling with it", time.monotonic() - at, more=words
            )
            rows.append(
                service.row(
                    "files that differ from those of one process", case + words, differ(alone, many), None, "", 0
                )
            )
        at = time.monotonic()
        written, _ = rebuild.load_vectors(storage, version, alone)
        assert written == arguments.users, written
        rate("vectors put into the store a second", time.monotonic() - at)
        if redis:
            for what, more in (("a history", with_histories - before), ("a vector", used(url) - with_histories)):
                rows.append(service.row(f"bytes of {what} in Redis", case, more / arguments.users, None, "", None))
        storage.close()
    width = len(bundle.lenders.centre_D)
    vector_PD = np.random.default_rng(0).normal(size=(arguments.users, width)).astype(np.float32)
    at = time.monotonic()
    retrieval.build_index(vector_PD, np.arange(arguments.users))
    seconds = time.monotonic() - at
    rows.append(
        service.row(
            "donors put into an index a second", f"{arguments.users} donors, {width} numbers each",
            arguments.users / seconds, None, "", None,
        )
    )  # fmt: skip
    service.write_results(arguments.output, rows, began, module="benchmarks.serving_rebuild")


def used(url: str) -> float:
    """Bytes that a Redis uses; 0 for another store."""
    if not url.startswith("redis:"):
        return 0.0
    import redis

    with redis.Redis.from_url(url) as client:
        memory: Any = client.info("memory")
        return float(memory["used_memory"])


def differ(one: pathlib.Path, other: pathlib.Path) -> int:
    """How many files of both folders are not the same in both."""
    found = [{path.relative_to(folder): path for path in folder.rglob("*.*")} for folder in (one, other)]
    names = set(itertools.chain(*found))
    return sum(
        not all(name in paths for paths in found)
        or files.sha256_file(found[0][name]) != files.sha256_file(found[1][name])
        for name in names
    )


if __name__ == "__main__":
    main()
