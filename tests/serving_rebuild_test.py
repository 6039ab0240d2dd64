"""Vectors made shard by shard, by one process or by many, are those of the runner, and the files are the same bytes."""

import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from marsjax.serving import rebuild, runner, versions
from marsjax.serving.events import Entry, decode_history
from marsjax.serving.storage import RUNNER, open_storage
from marsjax.serving.vectors import decode_vector, digest


@pytest.fixture
def root(tmp_path, bundle_folder):
    versions.publish(tmp_path / "root", bundle_folder, keep=3)
    return tmp_path / "root"


@pytest.fixture
def model(root):
    return runner.load_model(root, versions.read_current(root).version)


@pytest.fixture
def storage(root):
    opened = open_storage(f"sqlite:{root / 'storage.sqlite'}", timeout=5.0, ttl=1000.0)
    opened.join(RUNNER)
    yield opened
    opened.close()


def fill(storage, model, users=60):
    """Histories of new users, of all lengths."""
    rng, names = np.random.default_rng(0), model.bundle.items.raw_id_N[1:]
    entries = {
        f"u{user}": [
            Entry(10**6 + i, f"e{user}-{i}", str(rng.choice(names)), float(rng.random() < 0.8))
            for i in range(int(rng.integers(1, 30)))
        ]
        for user in range(users)
    }
    storage.apply(RUNNER, entries, [], cap=100, seed=lambda user: [])
    return entries


def sums(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.*")
    }


def test_vectors_in_the_store_are_those_of_the_runner(storage, model, root, tmp_path):
    entries = fill(storage, model)
    found = rebuild.rebuild(root, storage, tmp_path / "out", shards=4, workers=0)
    assert found == (len(entries), 0)
    stored = [storage.lookup(user, model.version) for user in entries]
    alone = runner.embed_histories(model.bundle, model.encoder, [decode_history(history) for history, _ in stored])
    for (history, data), vector_D in zip(stored, alone, strict=True):
        vector = decode_vector(data, width=len(vector_D))
        assert (vector.version, vector.history) == (model.version, digest(history))
        np.testing.assert_allclose(vector.vector_D, vector_D, atol=1e-6)
    assert np.abs(alone).max() > 0


def test_shards_hold_every_user_once_and_nothing_else(storage, model, tmp_path, monkeypatch):
    entries = fill(storage, model)
    twice = [*storage.users(), *storage.users()]
    monkeypatch.setattr(storage, "users", lambda: iter(twice))  # as Redis may
    assert rebuild.write_shards(storage, tmp_path / "out", count=7) == len(entries)
    lines = [json.loads(line) for path in (tmp_path / "out").iterdir() for line in path.read_text().splitlines()]
    assert {line["user"]: [Entry(*entry) for entry in line["history"]] for line in lines} == entries
    assert len(lines) == len(entries)
    with pytest.raises(ValueError, match="expected no folder yet"):
        rebuild.write_shards(storage, tmp_path / "out", count=7)
    with pytest.raises(ValueError, match=r"serving.shards: expected 1 or more, found 0"):
        rebuild.write_shards(storage, tmp_path / "other", count=0)


def test_what_was_stopped_goes_on_with_the_shards_that_are_missing(storage, model, root, tmp_path, monkeypatch):
    fill(storage, model)
    rebuild.write_shards(storage, tmp_path / "whole" / "histories", count=4)
    rebuild.embed_shards(root, model.version, tmp_path / "whole", workers=0)
    rebuild.write_shards(storage, tmp_path / "stopped" / "histories", count=4)
    made, embed = [], rebuild.embed_histories

    def stop(*arguments):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return embed(*arguments)

    monkeypatch.setattr(rebuild, "embed_histories", stop)
    with pytest.raises(KeyboardInterrupt):
        rebuild.embed_shards(root, model.version, tmp_path / "stopped", workers=0)
    assert rebuild.embed_shards(root, model.version, tmp_path / "stopped", workers=0) == 60
    assert len(made) == 5  # two before, the one that was stopped, and the last two
    assert sums(tmp_path / "stopped") == sums(tmp_path / "whole")


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: `tools/setup ray`")


@needs_ray
def test_ray_writes_the_bytes_of_one_process(storage, model, root, tmp_path):
    entries = fill(storage, model)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "RAY_USAGE_STATS_ENABLED": "0"}
    for workers in (0, 2):
        flags = [
            f"--output={tmp_path / str(workers)}",
            "--config.serving.shards=5",
            f"--config.serving.workers={workers}",
        ]
        run = subprocess.run(
            [sys.executable, "-m", "marsjax.main", "rebuild", f"--root={root}", *flags],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        said = f"{len(entries)} vectors are in the store; 0 users have gone on since, and are the runner's\n"
        assert run.stdout == said
    assert len(sums(tmp_path / "0")) == 10
    assert sums(tmp_path / "2") == sums(tmp_path / "0")


@needs_ray
def test_a_worker_of_ray_tells_what_is_wrong_with_a_shard(model, root, tmp_path):
    from marsjax.serving import ray_rebuild

    (tmp_path / "good").write_text('{"user": "a", "history": []}\n')
    (tmp_path / "bad").write_text("no history\n")
    batch = {
        "source": np.array([str(tmp_path / name) for name in ("good", "bad", "none")]),
        "target": np.array([str(tmp_path / name) for name in ("good.npz", "bad.npz", "none.npz")]),
    }
    found = ray_rebuild.Embedder(str(root), model.version)(batch)
    assert found["users"].tolist() == [1, 0, 0]
    assert found["error"][0] == ""
    assert "bad:1: expected user and history as JSON" in found["error"][1]
    assert "No such file" in found["error"][2]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="the extra `ray` is here")
def test_workers_without_ray_are_told_what_to_install(storage, model, root, tmp_path):
    fill(storage, model, users=1)
    with pytest.raises(ImportError, match=r"serving.workers needs the extra `ray`: pip install marsjax\[ray\]"):
        rebuild.rebuild(root, storage, tmp_path / "out", shards=1, workers=2)


def test_who_goes_on_meanwhile_is_left_to_the_runner(storage, model, root, tmp_path, monkeypatch):
    """Before the vectors come into the store, and between a look at the history and the writing of the vector."""
    fill(storage, model)
    for change in storage.changed(100):
        storage.write_vectors("none", {}, [change])
    rebuild.write_shards(storage, tmp_path / "out" / "histories", count=2)
    rebuild.embed_shards(root, model.version, tmp_path / "out", workers=0)

    def go_on(user):
        storage.apply(RUNNER, {user: [Entry(10**7, f"more {user}", "i", 1.0)]}, [], cap=100, seed=lambda _: [])
        runner.embed_changed(storage, model, count=100)
        assert storage.changed(1) == []

    go_on("u3")
    write = storage.write_vectors

    def overtaken(*arguments):
        monkeypatch.setattr(storage, "write_vectors", write)
        if "u5" in arguments[1]:
            go_on("u5")
        write(*arguments)
        monkeypatch.setattr(storage, "write_vectors", overtaken)

    monkeypatch.setattr(storage, "write_vectors", overtaken)
    assert rebuild.load_vectors(storage, model.version, tmp_path / "out") == (58, 2)
    monkeypatch.setattr(storage, "write_vectors", write)
    assert [change.user for change in storage.changed(10)] == ["u5"]
    runner.embed_changed(storage, model, count=10)
    for user in ("u3", "u5"):
        history, data = storage.lookup(user, model.version)
        assert decode_vector(data, width=len(model.bundle.lenders.centre_D)).history == digest(history)


def test_another_version_at_the_end_loads_nothing(storage, model, root, bundle_folder, tmp_path, monkeypatch):
    fill(storage, model)
    embed = rebuild.embed_shards

    def publish(*arguments, **named):
        versions.publish(root, bundle_folder, keep=3)
        return embed(*arguments, **named)

    monkeypatch.setattr(rebuild, "embed_shards", publish)
    with pytest.raises(ValueError, match=f"expected {model.version} to be served still, found 000002"):
        rebuild.rebuild(root, storage, tmp_path / "out", shards=2, workers=0)
    assert storage.lookup("u1", model.version)[1] is None
    with pytest.raises(ValueError, match="expected a published bundle, found none"):
        rebuild.rebuild(tmp_path / "nothing", storage, tmp_path / "out", shards=2, workers=0)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"user": "u"}',
        '{"user": 1, "history": []}',
        '{"user": "u", "history": [1]}',
        '{"user": "u", "history": 1}',
    ],
)
def test_a_line_that_is_no_history_is_named(model, root, tmp_path, line):
    (tmp_path / "histories").mkdir()
    with pytest.raises(ValueError, match=r"histories: expected shards of histories"):
        rebuild.embed_shards(root, model.version, tmp_path, workers=0)
    (tmp_path / "histories" / "00000.jsonl").write_text('{"user": "a", "history": []}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"00000.jsonl:2: expected user and history as JSON"):
        rebuild.embed_shards(root, model.version, tmp_path, workers=0)
    assert not (tmp_path / "vectors").exists()
