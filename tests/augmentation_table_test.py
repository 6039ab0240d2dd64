"""What is said about the candidates: a summary by hand, and a Parquet file that another stack can read."""

import numpy as np
import pyarrow.parquet
import pytest

from marsjax import files
from marsjax.augmentation import table
from marsjax.augmentation.mars import Candidates
from marsjax.data.cleaning import RawItems, build_dataset
from marsjax.data.splits import make_rows
from marsjax.records import LOW, TEST, TRAIN, Queries

# User a has 5 events (low-active), user b 7 (high-active); leave-one-out keeps 3 and 5 for training.
USER = ["a"] * 5 + ["b"] * 7
ITEM = ["i1", "i2", "i3", "i4", "i5", "i1", "i2", "i3", "i4", "i5", "i6", "i7"]
LABEL = [1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 1]


@pytest.fixture(scope="module")
def case():
    dataset = build_dataset(
        name="log",
        user_R=np.array(USER),
        item_R=np.array(ITEM),
        label_R=np.array(LABEL),
        time_R=np.arange(12),
        where=lambda row_R: [str(row) for row in row_R],
        items=RawItems(np.unique(ITEM), np.unique(ITEM), [()] * 7),
        features={},
    )
    rows = make_rows(dataset.log, split="leave_one_out", low_fraction=0.5, high_fraction=0.5)
    assert rows.group_U[0] == LOW
    # Prefixes of 1 item and of all 3 training items. Row 1 borrows through the first, rows 3 and 4 through the second.
    queries = Queries(np.array([0, 0], np.int32), np.array([1, 3]), np.full(12, -1, np.int32))
    queries.query_E[[1, 2]] = 0
    queries.query_E[[3, 4]] = 1
    candidates = Candidates(
        item_QS=np.array([[2, 3, 0], [5, 6, 7]], np.int32),
        time_QS=np.array([[6, 7, 0], [9, 10, 11]]),
        donor_QS=np.array([[1, 1, -1], [1, 1, 1]], np.int32),
        donor_similarity_QS=np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.25]], np.float32),
        similarity_QS=np.array([[0.1, 0.2, -np.inf], [0.3, 0.4, 0.9]], np.float32),
        kept_QS=np.array([[False, True, False], [True, False, True]]),
    )
    return dataset, rows, queries, candidates


def test_summary_by_hand(case):
    dataset, rows, queries, candidates = case
    assert [int(rows.split_E[event]) for event in (1, 2, 4)] == [TRAIN, TRAIN, TEST]
    found = table.statistics(candidates, queries, rows, dataset.log)
    assert found["queries"] == 2
    assert found["candidates_per_query"] == 2.5
    assert found["borrowed_per_query"] == 1.5
    assert found["keep_rate"] == pytest.approx(3 / 5)
    assert found["donor_similarity"] == pytest.approx((0.5 * 2 + 0.25 * 3) / 5)
    assert found["distinct_donors"] == 1
    assert found["rows_that_borrow_train"] == pytest.approx(2 / 3)  # not the first event
    assert found["rows_that_borrow_test"] == 1
    # Training rows 1 (i2, label 0) and 2 (i3, label 1) borrow i3 only: the target on the positive row alone.
    assert found["borrows_target_train"] == 0.5
    assert found["borrows_target_auc_train"] == 1.0
    assert "borrows_target_auc_test" not in found  # one class


def test_parquet_holds_the_candidates_with_the_ids_of_the_source(case, tmp_path):
    dataset, rows, queries, candidates = case
    table.write_parquet(tmp_path / "new" / "b.parquet", candidates, queries, rows, dataset)
    found = pyarrow.parquet.read_table(tmp_path / "new" / "b.parquet").to_pydict()
    assert found["user"] == ["a"] * 5
    assert found["history_length"] == [1, 1, 3, 3, 3]
    assert found["donor"] == ["b"] * 5
    np.testing.assert_allclose(found["similarity"], [0.5, 0.5, 0.25, 0.25, 0.25])
    assert found["item"] == ["i2", "i3", "i5", "i6", "i7"]
    assert found["donor_time"] == [6, 7, 9, 10, 11]
    assert found["donor_label"] == [1, 1, 1, 0, 1]
    np.testing.assert_allclose(found["item_similarity"], [0.1, 0.2, 0.3, 0.4, 0.9], rtol=1e-6)
    assert found["kept"] == [False, True, True, False, True]
    assert found["position"] == [-1, 0, 0, -1, 1]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.parquet"]


def test_candidates_round_trip(case, tmp_path):
    candidates = case[-1]
    files.write_arrays(tmp_path / "c.npz", **candidates._asdict())
    for name, value in table.read_candidates(tmp_path / "c.npz")._asdict().items():
        np.testing.assert_array_equal(value, getattr(candidates, name))
