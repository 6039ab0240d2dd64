"""The benchmark of leaks: donors by prefixes see nothing of a row's label, and those by whole histories do."""

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
    """They lend what a training row was liked for, more than test rows are ever lent; those of prefixes do not."""
    prefix, whole = leak.rows_of("configs/synthetic.py", SMALL, tmp_path, 2)
    assert set(prefix) >= PERFORMANCE
    assert whole["gap"] > 0.03
    assert prefix["gap"] < 0.01
    # On test rows both choose the same donors, by the whole training history.
    assert (prefix["other"], prefix["lent_test"]) == (whole["other"], whole["lent_test"])


def test_there_is_something_to_compare_with(tmp_path):
    with pytest.raises(SystemExit, match="expected retrieval.prefix_stride of 1 or more"):
        leak.rows_of("configs/synthetic.py", SMALL | {"retrieval.prefix_stride": "0"}, tmp_path, 1).__next__()


def test_no_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        leak.parse(["--seeds=0"])
    assert "--seeds: expected 1 or more, found 0" in capsys.readouterr().err
