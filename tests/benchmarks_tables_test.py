"""The benchmark of tables: both sides take the same first step, and it stops where they do not."""

import json

import numpy as np
import pytest

from benchmarks import harness, tables
from tests.readme_test import PERFORMANCE

MACHINE = harness.Machine(1e9, 1e9, "1 core")


def test_a_row_counts_what_batches_name():
    arguments = tables.parse(["--sizes=40", "--batch=8", "--length=3", "--turns=2", "--seconds=0"])
    (row,) = tables.rows_of(40, MACHINE, arguments)
    assert set(row) >= PERFORMANCE
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    batches = [tables.draw(40, batch=8, length=3, seed=seed) for seed in range(tables.BATCHES)]
    assert all((batch.target_B > 0).all() and batch.history_BL.max() < 40 for batch in batches)
    named = [len(np.union1d([0], np.union1d(batch.target_B, batch.history_BL))) for batch in batches]
    assert row["items_named"] == pytest.approx(np.mean(named))


def test_another_first_step_stops_the_run():
    values = np.zeros(3), {"w": np.ones((4, 2))}
    tables.check_equal(values, values)
    with pytest.raises(SystemExit, match="the same first step"):
        tables.check_equal(values, (np.zeros(3), {"w": np.full((4, 2), 1.1)}))


def test_wrong_sizes_are_refused(capsys):
    for sizes in ("1", "a", ""):
        with pytest.raises(SystemExit):
            tables.parse([f"--sizes={sizes}"])
        assert "--sizes: expected whole numbers from 2 on" in capsys.readouterr().err
