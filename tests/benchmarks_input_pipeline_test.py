"""The benchmark of the input: both sides take the same steps, and it stops where something is wrong."""

import json

import numpy as np
import pytest

from benchmarks import harness, input_pipeline
from marsjax.data import batches
from tests.readme_test import PERFORMANCE

TINY = input_pipeline.Case("tiny", (3, 6), 1, 6, mars=True)
MACHINE = harness.Machine(1e9, 1e9, "1 core")


def source_of(case):
    data = input_pipeline.draw(case, batch=4, users=30, batches=5)
    return data, *batches.ctr_source(data.log, data.rows, data.row_R, epochs=9, seed=0, **data.gather)


def test_rows_have_histories_of_the_lengths_of_the_case():
    for case in (TINY, input_pipeline.Case("long", (6,), 4, 6)):
        data, source, per_epoch = source_of(case)
        own_R = (data.rows.histories.end_E - data.rows.histories.start_E)[data.row_R]
        assert (own_R.min() >= case.least) & (own_R.max() <= case.most)
        assert len(data.row_R) == 20
        assert {source[i].history_BL.shape[1] for i in range(per_epoch)} == set(case.buckets)
        assert any(source[i].borrowed_BL.any() for i in range(per_epoch)) == case.mars


def test_another_batch_stops_the_run():
    _, source, per_epoch = source_of(TINY)
    epoch = [source[index] for index in range(per_epoch)]
    input_pipeline.check_batches(iter(epoch), [source[index] for index in range(per_epoch)])
    wrong = epoch[1]._replace(history_BL=epoch[1].history_BL + np.int32(1))
    with pytest.raises(SystemExit, match="batch 1"):
        input_pipeline.check_batches([epoch[0], wrong], epoch[:2])
    with pytest.raises(SystemExit, match="batch 0"):  # equal numbers of another type
        input_pipeline.check_batches([epoch[0]._replace(user_B=epoch[0].user_B.astype(np.int64))], epoch[:1])


def test_a_row_is_made_of_steps_that_compile_nothing_after_a_pass():
    arguments = input_pipeline.parse(["--batch=4", "--users=30", "--batches=2", "--turns=2", "--seconds=0"])
    step, make = input_pipeline.rows_of(TINY, MACHINE, arguments)
    for row in (step, make):
        assert set(row) >= PERFORMANCE
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert step["time_ratio"] == pytest.approx(1 / step["ratio"])
    assert step["met"] == (step["time_ratio"] <= 1.05)
    assert make["other"] is None
    assert "tiny" in harness.as_markdown([step, make])


def test_a_compilation_after_the_first_pass_stops_the_run(monkeypatch):
    """The side is given a batch of another length in its second epoch."""
    sides = input_pipeline.sides_of(TINY, batch=4, users=30, batches=2, threads=1)
    sides.run["other"](1)
    compiled = input_pipeline.compilations()
    real = compiled.__len__
    monkeypatch.setattr(input_pipeline, "compilations", lambda: Growing(real))
    with pytest.raises(SystemExit, match="no compilation after a pass"):
        sides.run["other"](1)


class Growing:
    """As if something were compiled each time that somebody looks."""

    def __init__(self, real):
        self._real = real

    counted = 0

    def __len__(self):
        Growing.counted += 1
        return self._real() + Growing.counted


def test_what_is_compiled_is_counted():
    import jax

    before = len(input_pipeline.compilations())
    jax.jit(lambda x: x * 3.25 + 1.0)(np.ones(7, np.float32))
    assert len(input_pipeline.compilations()) > before


def test_unknown_cases_are_refused(capsys):
    with pytest.raises(SystemExit):
        input_pipeline.parse(["--cases=9"])
    assert "--cases: expected numbers from 0 to 3" in capsys.readouterr().err
