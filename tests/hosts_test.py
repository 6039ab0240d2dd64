"""Several processes train as one does, each on its own rows; what goes wrong says so."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from marsjax.training import checkpoint
from tests.pipeline_test import SMALL

ROOT = pathlib.Path(__file__).parent.parent


def free_port():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        return free.getsockname()[1]


def start(folder, *flags, devices=1, **changes):
    """`marsjax train` on small planted data."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    values = SMALL | {"evaluation.methods": "base", "ctr.epochs": "2", "training.sharding": "pmap"} | changes
    command = [sys.executable, "-m", "marsjax.main", "train", "--config=configs/synthetic.py", f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in values.items()] + list(flags)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_both(folder, *, second=None, **changes):
    port = free_port()
    flags = f"--coordinator=127.0.0.1:{port}", "--num_processes=2"
    return [
        start(folder, *flags, "--process_id=0", **changes),
        start(folder, *flags, "--process_id=1", **(changes | (second or {}))),
    ]


def finish(*processes):
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    for process, _ in zip(processes, outputs, strict=True):
        assert process.returncode == 0, "\n".join(outputs)
    return outputs


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
    finish(*start_both(folder))
    return folder


def test_two_processes_train_the_parameters_of_one_with_two_devices(tmp_path, both):
    finish(start(tmp_path, devices=2))
    one, two = parameters(tmp_path), parameters(both)
    assert set(one) == set(two)
    assert {name.split("-")[0] for name in one} == {"alignment", "base"}
    for name, leaf in one.items():
        scale = np.abs(leaf).max() + 1e-12
        assert np.abs(two[name] - leaf).max() / scale < 1e-5, name
    scores = [np.load(next(folder.glob("stages/base-*/scores.npz"))) for folder in (tmp_path, both)]
    np.testing.assert_allclose(scores[1]["test"], scores[0]["test"], rtol=1e-4)
