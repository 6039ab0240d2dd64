"""The benchmark of the encoder: its equations are the encoder's, and it stops where vectors differ."""

import json

import jax.numpy as jnp
import pytest

from benchmarks import encoding, harness
from tests.readme_test import PERFORMANCE

MACHINE = harness.Machine(1e9, 1e9, "1 core")
SMALL = ["--lengths=3", "--batch=2", "--items=50", "--turns=2", "--seconds=0"]


def test_rows_of_a_length():
    rows = list(encoding.rows_of(MACHINE, encoding.parse(SMALL)))
    assert [row["other_name"] for row in rows] == ["features projected for each entry", "the equations as written"]
    assert all(set(row) >= PERFORMANCE for row in rows)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_other_vectors_stop_the_run(monkeypatch):
    written = encoding.as_written
    monkeypatch.setattr(encoding, "as_written", lambda *of: written(*of) + jnp.float32(0.01))
    with pytest.raises(SystemExit, match="the equations as written: expected the same user vectors, found a differ"):
        list(encoding.rows_of(MACHINE, encoding.parse(SMALL)))


def test_operations_of_one_entry():
    """Width 3, ids of 2, one entry: each attention is a query, two products with one key and a value."""
    expected = (2 * 9 + 4 * 3 + 2 * 9) + (2 * 4 + 4 * 2 + 2 * 4) + (2 * 6 + 4 * 2 + 2 * 6)
    assert encoding.flops(1, 1, width=3, id_width=2) == expected


def test_wrong_sizes_are_refused(capsys):
    for flag in ("--lengths=0", "--batch=0", "--items=1"):
        with pytest.raises(SystemExit):
            encoding.parse([flag])
    assert "--lengths: expected whole numbers from 1 on" in capsys.readouterr().err
