"""Several processes train as one does, each on its own rows; what goes wrong says so."""

import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from marsjax import hosts, pipeline
from marsjax.data import batches
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.records import TRAIN, Viewed, Viewing
from marsjax.training import checkpoint, sharding
from tests import hosts_worker
from tests.pipeline_test import small_config

WORKER = pathlib.Path(__file__).with_name("hosts_worker.py")


def free_port():
    """Below the ports that Linux gives to whoever asks for any: another test would have it before it is bound."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.closing(socket.create_server(("127.0.0.1", port))):
            return port


def start(folder, where="alone", count=1, number=0, *, devices=1, stages="base", **changes):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(WORKER.parent.parent),
    }
    command = [sys.executable, str(WORKER), stages, str(folder), where, str(count), str(number)]
    command += [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    # A pipe that nobody reads would fill, and stop a process and those it sums with.
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    process.said = said
    return process


def start_both(folder, second=None, **changes):
    """Two processes; the second one with other changes, where they are given."""
    where = f"127.0.0.1:{free_port()}"
    return [start(folder, where, 2, 0, **changes), start(folder, where, 2, 1, **changes, **(second or {}))]


def outputs(processes):
    """What they wrote, once all have ended: by themselves, or since they waited for ever and said where."""
    texts = []
    for process in processes:
        process.wait(timeout=2 * hosts_worker.WAITS)
        with process.said as said:
            said.seek(0)
            texts.append(said.read())
    return texts


def finish(*processes):
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return said


def parameters(folder):
    """Of both stages, by stage and path."""
    found = {}
    for params in sorted(folder.glob("stages/*/params")):
        for name, leaf in checkpoint.load_params(params).items():
            found[params.parent.name + name] = leaf
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The working folder of two processes with a device each."""
    folder = tmp_path_factory.mktemp("both")
    finish(*start_both(folder, stages="alignment,base"))
    return folder


def of_base(found):
    return {name: leaf for name, leaf in found.items() if name.startswith("base")}


def assert_near(one, two):
    assert set(one) == set(two)
    for name, leaf in one.items():
        assert np.abs(two[name] - leaf).max() / (np.abs(leaf).max() + 1e-12) < 1e-5, name


def test_two_processes_train_the_parameters_of_one_with_two_devices(tmp_path, both):
    finish(start(tmp_path, devices=2, stages="alignment,base"))
    assert {name.split("-")[0] for name in parameters(both)} == {"alignment", "base"}
    assert_near(parameters(tmp_path), parameters(both))
    one, two = (np.load(next(folder.glob("stages/base-*/scores.npz"))) for folder in (tmp_path, both))
    np.testing.assert_allclose(two["test"], one["test"], rtol=1e-4)


def test_the_same_under_shard_map_with_two_devices_each(tmp_path, both):
    """Parts of a batch, padded for four devices, are others; sums over all of them are the same."""
    finish(*start_both(tmp_path, devices=2, training__sharding="shard_map"))
    assert_near(of_base(parameters(both)), parameters(tmp_path))


def test_a_process_that_dies_ends_the_others_and_all_continue_to_the_same_parameters(tmp_path, both):
    slow = {"training__checkpoint_seconds": "0"}
    processes = start_both(tmp_path, **slow)
    deadline = time.monotonic() + 200
    while not any(int(path.name) >= 3 for path in tmp_path.glob("stages/base-*/checkpoints/*") if path.name.isdigit()):
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None, None], outputs(processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    said, _ = outputs(processes)
    assert processes[0].returncode != 0, said
    assert not list(tmp_path.glob("stages/base-*/done.json"))
    said = finish(*start_both(tmp_path, **slow))
    assert all("continuing after step" in one for one in said)
    one, two = of_base(parameters(both)), parameters(tmp_path)
    assert set(one) == set(two)
    for name, leaf in one.items():
        np.testing.assert_array_equal(two[name], leaf, err_msg=name)


def test_no_process_waits_for_what_another_one_saves(tmp_path):
    finish(*start_both(tmp_path, stages="saves"))
    assert set(checkpoint.load_params(tmp_path / "first")) == {"['a']"}
    assert not (tmp_path / "others").exists()


def test_processes_that_read_other_data_are_refused(tmp_path):
    processes = start_both(tmp_path, second={"data__permute_labels": "users"})
    said = outputs(processes)
    assert all(process.returncode for process in processes)
    assert "the same flags and the same files" in said[1]


# --- own rows


def planted():
    dataset = make_synthetic(n_users=60, n_items=80, high_events=(20, 30), seed=0)
    return dataset.log, make_rows(dataset.log, split="leave_one_out")


def part_of(index, count):
    """What `Lifted.own` is for process `index` of `count` with a device each."""

    def own(size):
        part = -(-size // count)
        return slice(index * part, (index + 1) * part)

    return own


def sources(own=batches.all_rows, *, log=None, rows=None, **options):
    planted_log, planted_rows = planted()
    train_E = np.flatnonzero(planted_rows.split_E == TRAIN)
    return batches.ctr_source(
        log or planted_log, rows or planted_rows, train_E, size=13, cap=20, buckets=(10, 20), epochs=2, seed=0,
        own=own, **options,
    )  # fmt: skip


def joined(parts, whole):
    """The rows of the processes one after the other, without what pads the last one."""
    return jax.tree.map(lambda leaf, *of_parts: np.concatenate(of_parts)[: len(leaf)], whole, *parts)


def assert_equal(found, expected):
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_of_all_processes_are_the_batch(count):
    whole, per_epoch = sources()
    parts = [sources(part_of(index, count))[0] for index in range(count)]
    for i in range(per_epoch + 1):
        assert_equal(joined([part[i] for part in parts], whole[i]), whole[i])


@pytest.mark.parametrize("some", [False, True])
def test_rows_with_views_of_all_processes_are_the_batch(some):
    def make(tail_BW, length_B, rng):
        return (
            Viewed(np.where(tail_BW > 0, rng.integers(1, 80, tail_BW.shape), 0), length_B, np.full(tail_BW.shape, -1)),
        )

    viewing = Viewing(make=make, length=20, replaces=False, row_E=np.arange(10**5) % 3 == 0 if some else None)
    whole, per_epoch = sources(viewing=viewing)
    parts = [sources(part_of(index, 2), viewing=viewing)[0] for index in range(2)]
    assert whole[0].views.item_BVW.any()
    assert (whole[0].views.rows is not None) == some
    for i in range(per_epoch):
        assert_equal(joined([part[i] for part in parts], whole[i]), whole[i])


def test_blocks_of_all_processes_are_the_batch():
    log, rows = planted()
    settings = {"blocks": 7, "targets": 4, "length": 10, "stein_items": 37, "steps": 3, "seed": 0}
    whole, _ = batches.alignment_source(log, rows, **settings)
    parts = [batches.alignment_source(log, rows, **settings, own=part_of(index, 2))[0] for index in range(2)]
    for i in range(3):
        assert_equal(joined([part[i] for part in parts], whole[i]), whole[i])


class Watched(np.ndarray):
    """Remembers which of its entries were taken."""

    def __array_finalize__(self, other):
        self.taken = getattr(other, "taken", None)

    def __getitem__(self, at):
        if self.taken is not None:
            self.taken.update(np.ravel(at).tolist())
        return np.asarray(self)[at]


def watched(values):
    out = np.asarray(values).view(Watched)
    out.taken = set()
    return out


def test_a_process_reads_its_own_rows_alone():
    """Labels and targets are looked up for one half of the rows by each, and for no row by both."""
    taken = []
    for index in range(2):
        log, rows = planted()
        log = log._replace(item_E=watched(log.item_E), label_E=watched(log.label_E))
        source, per_epoch = sources(part_of(index, 2), log=log, rows=rows)
        for i in range(per_epoch):
            source[i]
        assert log.item_E.taken == log.label_E.taken
        taken.append(log.item_E.taken)
    _, rows = planted()
    assert not taken[0] & taken[1]
    assert taken[0] | taken[1] == set(np.flatnonzero(rows.split_E == TRAIN).tolist())
    assert min(map(len, taken)) > 0.4 * len(taken[0] | taken[1])


def test_processes_encode_one_after_the_other(tmp_path, monkeypatch):
    """The second of three: it waits for the first, and the third waits for it."""
    seen = []
    monkeypatch.setattr(hosts, "count", lambda: 3)
    monkeypatch.setattr(hosts, "index", lambda: 1)
    monkeypatch.setattr(hosts, "from_first", lambda: seen.append("all are here"))
    monkeypatch.setattr(pipeline, "encode_stage", lambda config, workdir: seen.append("encodes") or {})
    pipeline.read(small_config(**{"features.text": "tfidf"}), tmp_path)
    assert seen == ["all are here", "encodes", "all are here", "all are here"]


@pytest.mark.parametrize("mode", ["single", "pmap", "shard_map"])
def test_one_process_owns_all_rows(mode):
    lifted = sharding.lift(lambda axis: lambda state, batch, tables: (state, {}), mode=mode)
    assert lifted.own(8) == slice(0, 8)
    assert lifted.own(7) == slice(0, 7 if mode == "single" else 8)


def test_one_process_needs_no_others():
    assert hosts.count() == jax.process_count() == 1
    assert hosts.is_first()
    assert hosts.from_first({"a": [1, 0.1]}) == {"a": [1, 0.1]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=127.0.0.1:1"], "expected --num_processes and --process_id"),
        (["--coordinator=127.0.0.1:1", "--num_processes=2"], "found no --process_id"),
        (["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "from 0 to 1, found 2"),
        (["--num_processes=2", "--process_id=0"], "--coordinator"),
        (["--coordinator=auto"], "expected all processes that find one another"),
    ],
)
def test_flags_that_join_nobody_are_refused(flags, message, tmp_path):
    command = [sys.executable, "-m", "marsjax.main", "train", "--config=configs/synthetic.py", f"--workdir={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(WORKER.parent.parent)}
    run = subprocess.run(
        [*command, *flags], cwd=WORKER.parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode in (1, 2), run.stderr
    assert message in run.stderr
    assert not list(tmp_path.glob("stages/*"))
