"""The benchmark of the encoder: its equations are the encoder's, and it stops where vectors differ."""

import json

import pytest

from benchmarks import encoding, harness
from tests.readme_test import PERFORMANCE

MACHINE = harness.Machine(1e9, 1e9, "1 core")
SMALL = ["--lengths=7", "--batch=2", "--items=50", "--turns=2", "--seconds=0"]


def test_rows_of_a_length():
    rows = list(encoding.rows_of(MACHINE, encoding.parse(SMALL)))
    names = [None, "features projected for each entry", "the equations as written"]
    assert [row["other_name"] for row in rows] == names
    assert all(set(row) >= PERFORMANCE for row in rows)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


@pytest.mark.parametrize("attention", ["self_attention", "modal_attention", "id_attention"])
@pytest.mark.parametrize("matrix", ["to_query", "to_key", "to_value"])
def test_other_vectors_stop_the_run(attention, matrix, monkeypatch):
    """Each matrix of each attention counts."""
    written = encoding.as_written

    def another(params, tables, history_BL):
        changed = {**params[attention], matrix: {"kernel": 1.05 * params[attention][matrix]["kernel"]}}
        return written({**params, attention: changed}, tables, history_BL)

    monkeypatch.setattr(encoding, "as_written", another)
    with pytest.raises(SystemExit, match="the equations as written: expected the same user vectors, found a differ"):
        list(encoding.rows_of(MACHINE, encoding.parse(SMALL)))


def test_operations_of_one_entry():
    """Width 3, ids of 2, one entry: each attention is a query, two products with one key and a value, and before them
    the product of two matrices."""
    entry = (2 * 9 + 4 * 3 + 2 * 9) + (2 * 4 + 4 * 2 + 2 * 4) + (2 * 6 + 4 * 2 + 2 * 6)
    matrices = 2 * 3 * 3 * 3 + 2 * 2 * 2 * 2 + 2 * 3 * 3 * 2
    assert encoding.flops(1, 1, width=3, id_width=2) == entry + matrices


def test_wrong_sizes_are_refused(capsys):
    for flag in ("--lengths=0", "--batch=0", "--items=1"):
        with pytest.raises(SystemExit):
            encoding.parse([flag])
    assert "--lengths: expected whole numbers from 1 on" in capsys.readouterr().err
