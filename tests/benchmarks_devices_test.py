"""The benchmarks of devices and hosts: sides train the same, and other parameters stop the run."""

import json

import numpy as np
import pytest

from benchmarks import devices, harness, hosts
from tests.readme_test import PERFORMANCE


def assert_row(row):
    assert set(row) >= PERFORMANCE
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_rows_of_devices_are_made_of_processes_that_train_the_same():
    """Batches of 6 rows over 4 devices: some are padded."""
    arguments = devices.parse(["--batch=6", "--lengths=6", "--users=40", "--counts=4", "--turns=2", "--seconds=0"])
    one, modes = devices.device_rows(arguments)
    for row in (one, modes):
        assert_row(row)
        assert 0 < row["largest_difference"] < 1e-5
    assert one["met"] == (one["time_ratio"] <= 1.3)
    assert (one["other_name"], modes["other_name"]) == ("one device", "shard_map")
    assert "4 devices" in harness.as_markdown([one, modes])


def test_a_row_of_hosts_is_made_of_processes_that_train_the_same():
    arguments = hosts.parse(["--batches=6", "--length=6", "--users=40", "--modes=pmap", "--turns=2", "--seconds=0"])
    (row,) = hosts.step_rows(arguments)
    assert_row(row)
    assert row["largest_difference"] < 1e-5
    assert row["bytes"] > 2 * 4 * 4000 * 10


def test_other_parameters_stop_the_run():
    one = {"a": np.array([1.0, -4.0]), "b": np.zeros(2)}
    assert devices.difference(one, one) == 0
    other = one | {"a": np.array([1.0, -4.1])}
    assert devices.difference(one, other) == pytest.approx(0.025)
    with pytest.raises(SystemExit, match="found a difference of 0.025"):
        devices.check("case", devices.difference(one, other))
    with pytest.raises(SystemExit):
        devices.check("case", float("nan"))


def test_half_precision_learns_as_much():
    arguments = devices.parse(["--quick", "--batch=8", "--lengths=6", "--users=40", "--turns=2", "--seconds=0"])
    arguments.lengths, arguments.planted = [6], 150
    time, auc = devices.dtype_rows(arguments)
    for row in (time, auc):
        assert_row(row)
    assert 0.5 < auc["other"] < 1
    assert auc["ours"] != auc["other"]


def test_wrong_flags_are_refused(capsys):
    for parse, word in ((devices.parse, "--counts=two"), (hosts.parse, "--batches=0")):
        with pytest.raises(SystemExit):
            parse([word])
        assert word.split("=")[0] in capsys.readouterr().err
