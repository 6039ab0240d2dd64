"""The benchmark of scale: what it fits, and that it stops where something is wrong."""

import json

import numpy as np
import pytest

from benchmarks import scale
from tests.readme_test import PERFORMANCE


def run_of(users, seconds, peak):
    stages = {"data": scale.Stage(seconds, 0.0, peak), "training": scale.Stage(99.0, 9.0, peak)}
    return {
        "users": users, "events": 9 * users, "queries": 1, "donors": 1, "start": 1e9, "drawn": 1e9, "recall": 1.0,
        "borrowed": 3.0, "stages": {name: stage._asdict() for name, stage in stages.items()},
    }  # fmt: skip


BASE = run_of(1000, 0.0, 1e9)


def test_exponents_are_slopes_without_what_does_not_grow():
    base = run_of(1000, 3.0, 1.5e9)
    runs = [run_of(n, 3.0 + 2e-3 * n, 1.5e9 + 500 * n) for n in (10_000, 1_000_000, 4_000_000, 16_000_000)]
    rows = list(scale.rows_of(runs, base, 100_000_000))
    for row in rows:
        assert set(row) >= PERFORMANCE
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    found = {row["case"].split(",")[0]: row for row in rows if row["question"].startswith("exponent")}
    assert [found[name]["ours"] for name in ("time", "memory")] == pytest.approx([1.0, 1.0])
    assert found["time"]["met"]
    assert found["memory"]["case"] == "memory, 1000000 to 16000000 users"  # 10,000 are chance
    estimates = {row["case"]: row for row in rows if "not run" in row["question"]}
    assert estimates["memory, GB"]["ours"] == pytest.approx(51.5)
    assert estimates["memory, GB"]["met"] is False
    assert estimates["time, seconds"]["ours"] == pytest.approx(200_003)
    assert all("an estimate" in row["note"] for row in estimates.values())


def test_what_grows_with_the_square_is_seen_and_what_was_run_is_not_estimated():
    runs = [run_of(n, 1e-9 * n**2, 1e9 + 1500 * n) for n in (100_000, 10_000_000)]
    rows = list(scale.rows_of(runs, BASE, 10_000_000))
    (time,) = (row for row in rows if row["case"].startswith("time"))
    assert time["ours"] == pytest.approx(2.0)
    assert time["met"] is False
    assert not [row for row in rows if "not run" in row["question"]]
    (largest,) = (row for row in rows if row["question"].startswith("peak") and row["target"])
    assert largest["met"]


def test_the_log_is_in_order_of_time_and_shows_types():
    raw = scale.draw(600)
    assert (np.diff(raw.time_R) >= 0).all()
    count_U = np.bincount(raw.user_R, minlength=600)
    assert set(count_U) <= {*range(scale.LOW[0], scale.LOW[1] + 1), *range(scale.HIGH[0], scale.HIGH[1] + 1)}
    assert raw.item_R.max() < len(raw.item_name_I) == scale.ITEMS
    topic_R = raw.item_R // (scale.ITEMS // scale.TOPICS)
    of_most = [np.sort(np.bincount(topic_R[raw.user_R == user]))[-4:].sum() for user in np.flatnonzero(count_U > 20)]
    assert np.mean(of_most) > 0.8 * count_U[count_U > 20].mean()


def test_all_stages_of_a_small_size_are_measured():
    found = scale.measure(300, width=8, steps=2, recall=0.9)
    assert list(found["stages"]) == ["data", "histories", "user vectors", "index and borrowing", "training"]
    assert found["donors"] > 0
    assert found["borrowed"] > 1
    assert all(stage["seconds"] >= stage["compiling"] >= 0 for stage in found["stages"].values())
    assert scale.peak_of(found) >= found["start"]
    with pytest.raises(SystemExit, match="expected recall of 1.1"):
        scale.measure(300, width=8, steps=0, recall=1.1)


def test_sizes_are_checked(capsys):
    assert scale.parse(["--sizes=4000,1000"]).sizes == [1000, 4000]
    with pytest.raises(SystemExit):
        scale.parse(["--sizes=many"])
    assert "--sizes: expected whole numbers" in capsys.readouterr().err
