"""The check that fails where something became slow, and the one command for all benchmarks."""

import argparse
import pathlib
import time

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import regressions
from marsjax import files


def case(ours, reference):
    def sides():
        return (lambda times: time.sleep(ours * times)), (lambda times: time.sleep(reference * times))

    return regressions.Case("sleep", "sleeping longer", sides)


@pytest.mark.parametrize(("ours", "code"), [(0.001, 0), (0.01, 1)])
def test_a_fall_of_more_than_a_third_fails_loudly(tmp_path, monkeypatch, capsys, ours, code):
    files.write_json(tmp_path / "held.json", {"rows": [{"case": "sleep", "ratio_least": 3.0}]})
    monkeypatch.setattr(regressions, "HELD", tmp_path / "held.json")
    monkeypatch.setattr(regressions, "CASES", (case(ours, 0.01),))
    monkeypatch.setattr(regressions, "keep_freed_memory", lambda: None)  # of this process, which is the tests'
    assert regressions.main(["--turns=2", "--seconds=0.01"]) == code
    assert ("SLOW: sleep: expected at least 2.00 times" in capsys.readouterr().out) == bool(code)


def test_the_references_compute_the_same(monkeypatch):
    for make in (regressions.stein_sides, regressions.expectation_sides):
        for run in make():  # which compares them
            run(1)


def arguments(**changes):
    given = {"quick": False, "folder": None, "bundle": None, "results": pathlib.Path("out")} | changes
    return argparse.Namespace(**given)


def test_each_benchmark_has_its_flags(monkeypatch):
    found = benchmarks.Benchmark("?", ("--long",), ("--quick",), "bundle")
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"served": found})
    assert benchmarks.words_of("served", arguments()) is None
    assert benchmarks.words_of("served", arguments(bundle="b")) == ["--long", "--bundle=b", "--output=out/served.json"]
    assert benchmarks.words_of("served", arguments(bundle="b", quick=True)) == ["--quick", "--bundle=b"]


def test_every_benchmark_is_a_module_that_explains_itself():
    folder = pathlib.Path(benchmarks.__file__).parent
    for name in benchmarks.BENCHMARKS:
        assert (folder / f"{name}.py").read_text().startswith('"""')
    with pytest.raises(SystemExit):
        benchmarks.main(["no_such"])
