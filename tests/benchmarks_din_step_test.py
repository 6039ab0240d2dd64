"""The benchmark against FuxiCTR, whose own side needs no FuxiCTR."""

import json
import math
import sys

import numpy as np
import pytest

from benchmarks import din_step, harness
from tests.readme_test import PERFORMANCE

SMALL = din_step.Size(4, 3, "dice", users=5, items=6, categories=2, attention=(3, 2), tower=(4, 2))
MACHINE = harness.Machine(1e9, 1e9, "1 core")


@pytest.fixture
def without_fuxictr(monkeypatch):
    for name in ("fuxictr", "fuxictr.features", "model_zoo"):
        monkeypatch.setitem(sys.modules, name, None)


def test_our_side_alone_is_measured_without_fuxictr(without_fuxictr):
    row = din_step.step_row(SMALL, None, MACHINE, turns=2, seconds=0.0)
    assert set(row) >= PERFORMANCE
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert 0 < row["ours_least"] <= row["ours"] <= row["ours_most"]
    assert row["other"] is row["ratio"] is row["met"] is None
    assert row["turns"] == 2
    depth = 2 * din_step.EMBEDDING
    tables = (5 + 1 + 6 + 1 + 2 + 1) * din_step.EMBEDDING
    attention = (4 * depth * 3 + 3 + 3) + (3 * 2 + 2 + 2) + 2
    features = 3 * depth + din_step.EMBEDDING
    tower = (features * 4 + 4 + 4) + (4 * 2 + 2 + 2) + (2 + 1)
    assert row["ours_parameters"] == tables + attention + tower
    assert f"| {SMALL.case} |" in harness.as_markdown([row])


def test_the_operations_are_those_of_the_products():
    entries, depth, rows = 12, 20, 4
    attention = entries * 2 * (4 * depth * 3 + 3 * 2 + 2 * 1 + depth)
    tower = rows * 2 * (50 * 4 + 4 * 2 + 2)
    assert math.isclose(din_step.matmul_flops(SMALL, folded=False, tower_input=50), 3 * (attention + tower))
    saved = entries * 2 * 3 * depth * 3 - rows * 2 * depth * 3
    folded = din_step.matmul_flops(SMALL, folded=True, tower_input=50)
    assert math.isclose(folded, 3 * (attention + tower - saved))


def test_both_sides_read_the_same_ids():
    category_NG, drawn = din_step.draw(SMALL)
    assert (category_NG[0] == 0).all()
    assert (category_NG[1:, 0] > 0).all()  # the first category, which FuxiCTR reads, is there
    for rows in drawn:
        assert rows.history_BL.min() >= 1
        assert rows.history_BL.max() <= SMALL.items
    again = din_step.draw(SMALL)[1]
    for a, b in zip(drawn, again, strict=True):
        np.testing.assert_array_equal(a.history_BL, b.history_BL)


def test_without_fuxictr_one_line_says_what_to_install(without_fuxictr):
    with pytest.raises(SystemExit) as stopped:
        din_step.main(["--turns=1"])
    message = str(stopped.value.code)
    assert "pip install fuxictr" in message
    assert "--alone" in message
    assert "\n" not in message


@pytest.mark.parametrize("words", [["--users=5"], ["--users=-5", "--folder=ml-1m"]])
def test_users_are_some_of_a_folder(words, capsys):
    with pytest.raises(SystemExit):
        din_step.parse(words)
    assert "--users: expected a number from 1 on with --folder" in capsys.readouterr().err
    config = din_step.epoch_config("ml-1m", 1, din_step.parse(["--users=5", "--folder=ml-1m"]).users)
    assert config.data.sample_users == 5
