"""Rows of results, and what they are made of."""

import json

import pytest

from benchmarks import harness
from tests.readme_test import PERFORMANCE


def test_a_ratio_says_how_much_faster_ours_is():
    ours, other = harness.Timed([1.0, 3.0, 2.0], [2.0]), harness.Timed([5.0, 6.0, 8.0], [3.0])
    row = harness.compare("q", "c", ours, other, "FuxiCTR", target=2.0)
    assert set(row) >= PERFORMANCE
    assert (row["ours"], row["other"], row["ratio"], row["met"]) == (2000.0, 6000.0, 3.0, True)
    assert (row["ratio_least"], row["ratio_most"]) == (2.0, 5.0)
    assert (row["ours_processor"], row["processor_ratio"]) == (2000.0, 1.5)
    assert not harness.compare("q", "c", other, ours, "FuxiCTR", target=2.0)["met"]
    assert harness.compare("q", "c", ours, None, None)["met"] is None
    table = harness.as_markdown([row, harness.compare("r", "d", ours, None, None)])
    assert "| c | 2000 | 6000 | FuxiCTR | 3 | 2.00 to 5.00 | 2 | yes |  |" in table
    assert table.index("q:") < table.index("| c |") < table.index("r:") < table.index("| d |")


def test_sides_are_called_by_turns_as_often_as_a_turn_is_long():
    called = []
    sides = {name: lambda times, name=name: called.append((name, times)) for name in ("a", "b")}
    timed = harness.take_turns(sides, turns=2, seconds=0.0, warm=5)
    assert called == [("a", 5), ("a", 1), ("b", 5), ("b", 1), ("a", 1), ("b", 1), ("a", 1), ("b", 1)]
    assert [len(side.turns) for side in timed.values()] == [2, 2]


def test_the_floor_is_whichever_takes_longer():
    machine = harness.Machine(flops=10.0, bytes=4.0, threads="1 core")
    assert harness.bound(machine, 20.0, 4.0) == 2.0
    assert harness.bound(machine, 20.0, 12.0) == 3.0


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--folder=/home/me/data/ml-1m", "--folder=PATH/ml-1m"),
        ("--bundle=runs/bundle", "--bundle=PATH"),
        ("--turns=3", "--turns=3"),
    ],
)
def test_results_name_the_command_and_no_folder_of_the_machine(tmp_path, given, kept):
    row = harness.compare("q", "c", harness.Timed([1.0], []), None, None)
    harness.write_results(tmp_path / "r.json", [row], harness.begin(), program="-m benchmarks.x", words=[given])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["command"] == f"python -m benchmarks.x {kept}"
    assert found["rows"] == [row]
    assert set(found) == {"command", "commit", "machine", "wall_seconds", "rows"}


def test_what_was_measured_before_a_failure_is_kept(tmp_path, capsys):
    row = harness.compare("q", "c", harness.Timed([1.0], []), None, None)

    def rows():
        yield row
        raise KeyboardInterrupt

    output, unfinished = tmp_path / "r.json", tmp_path / "r.json.unfinished"
    output.write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        harness.write_results(output, rows(), harness.begin(), program="-m benchmarks.x", words=[])
    assert output.read_text() == "of an earlier run"
    assert "| c | " in capsys.readouterr().out
    assert json.loads(unfinished.read_text())["rows"] == [row]
    assert harness.write_results(output, [row], harness.begin(), program="-m benchmarks.x", words=[]) == [row]
    assert json.loads(output.read_text())["rows"] == [row]
    assert not unfinished.exists()
