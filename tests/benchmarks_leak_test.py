"""The benchmark of leaks: donors of prefixes see nothing of a row's label, and those of whole histories do."""

import pytest

from benchmarks import leak
from tests.readme_test import PERFORMANCE

SMALL = {
    "data.synthetic.n_users": "400",
    "data.synthetic.n_items": "120",
    "alignment.epochs": "0",
    "retrieval.backend": "exact",
}


def test_donors_of_whole_histories_see_the_label(tmp_path):
    prefix, whole = leak.rows_of("configs/synthetic.py", SMALL, tmp_path, 2)
    for row in (prefix, whole):
        assert set(row) >= PERFORMANCE
        assert row["gap"] == pytest.approx(row["ours"] - row["other"])
        assert 0 < row["lent_train"] < 1
    # On test rows both choose the same donors, by the whole training history.
    assert prefix["other"] == whole["other"]
    assert whole["lent_train"] > prefix["lent_train"]


def test_no_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        leak.parse(["--seeds=0"])
    assert "--seeds: expected 1 or more, found 0" in capsys.readouterr().err
