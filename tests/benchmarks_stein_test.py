"""The benchmark of the Stein score: all sides estimate the same, and it stops where they do not."""

import json

import numpy as np
import pytest

from benchmarks import harness, stein
from tests.readme_test import PERFORMANCE

MACHINE = harness.Machine(1e9, 1e9, "1 core")


def test_rows_of_a_size():
    arguments = stein.parse(["--turns=2", "--seconds=0", "--memory=1", "--spectral=40"])
    rows = list(stein.rows_of(40, 3, MACHINE, arguments))
    assert len(rows) == 4
    for row in rows:
        assert set(row) >= PERFORMANCE
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    of_naive, of_spectral, of_floor, _ = rows
    assert of_naive["other_name"] == "naive"
    assert of_spectral["other_name"] == "SSGE"
    assert 0 < of_naive["errors"]["ours"] < 1  # closer to the true score than zeros are
    assert of_floor["other"] > 4 * 40**2 * 3 / MACHINE.flops * 1e3


def test_what_does_not_fit_is_left_out_and_told():
    arguments = stein.parse(["--turns=1", "--seconds=0", "--memory=0", "--spectral=10"])
    rows = list(stein.rows_of(40, 3, MACHINE, arguments))
    assert len(rows) == 3
    assert rows[0]["other"] is None
    assert "naive left out" in rows[0]["note"]


def test_another_score_stops_the_run():
    score_ND = np.eye(3)
    stein.check_equal(score_ND, score_ND)
    with pytest.raises(SystemExit, match="found a difference of 0.100"):
        stein.check_equal(score_ND * 1.1, score_ND)


def test_the_share_of_a_step_is_measured():
    row = stein.step_row(stein.parse(["--users=80", "--turns=1", "--seconds=0"]))
    assert set(row) >= PERFORMANCE
    assert row["met"] == (row["share"] <= 0.05)


def test_wrong_sizes_are_refused(capsys):
    with pytest.raises(SystemExit):
        stein.parse(["--counts=1"])
    assert "--counts and --widths: expected whole numbers from 2 on" in capsys.readouterr().err
