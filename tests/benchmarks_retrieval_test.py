"""The benchmark of retrieval, whose own side needs neither faiss nor hnswlib."""

import json
import sys

import numpy as np
import pytest

from benchmarks import harness, retrieval
from tests.readme_test import PERFORMANCE

MACHINE = harness.Machine(1e9, 1e9, "1 core")


@pytest.fixture
def without_others(monkeypatch):
    for name in ("faiss", "hnswlib"):
        monkeypatch.setitem(sys.modules, name, None)


def test_users_of_one_type_are_nearer_than_others():
    planted = retrieval.plant(400, queries=20, width=32)
    unit_PD = planted.base_PD / np.linalg.norm(planted.base_PD, axis=1, keepdims=True)
    unit_QD = planted.query_QD / np.linalg.norm(planted.query_QD, axis=1, keepdims=True)
    cosine_QP = unit_QD @ unit_PD.T
    assert cosine_QP.max(axis=1).mean() > 0.6
    assert abs(cosine_QP.mean()) < 0.3
    again = retrieval.plant(400, queries=20, width=32)
    np.testing.assert_array_equal(planted.base_PD, again.base_PD)


def test_recall_counts_by_similarity():
    unit_PD = np.eye(4, dtype=np.float32)
    unit_BD = np.float32([[0.8, 0.6, 0, 0], [0, 0, 1, 0]])
    exact_BK = np.float32([[0.8, 0.6], [1, 0]])
    assert retrieval.recalls(np.array([[0, 1], [2, 3]]), unit_PD, unit_BD, exact_BK) == (1.0, 1.0)
    assert retrieval.recalls(np.array([[1, 0], [2, 0]]), unit_PD, unit_BD, exact_BK) == (1.0, 1.0)  # order is ours
    assert retrieval.recalls(np.array([[1, 3], [2, -1]]), unit_PD, unit_BD, exact_BK) == (0.5, 0.5)


@pytest.mark.parametrize("needed", [8, 9, 100, retrieval.LADDER[-1]])
def test_the_least_number_of_candidates_is_found(needed):
    unit_PD = np.eye(3, dtype=np.float32)

    def ask(query_BD, k, ef):
        return np.full((len(query_BD), 1), 0 if ef >= needed else 1), None

    made = retrieval.Engine("planted", ask, 0.0, 0, None)
    found = retrieval.tune(made, unit_PD, unit_PD[:1], np.ones((1, 1), np.float32))
    assert found.ef == min(ef for ef in retrieval.LADDER if ef >= needed)
    assert found.at_1 == 1.0


def test_an_index_that_never_finds_them_stops_the_run():
    made = retrieval.Engine("blind", lambda query_BD, k, ef: (np.ones((1, 1), int), None), 0.0, 0, None)
    unit_PD, exact_BK = np.eye(3, dtype=np.float32), np.ones((1, 1), np.float32)
    with pytest.raises(SystemExit, match="blind: expected recall@1 of 0.99, found 0.0000"):
        retrieval.tune(made, unit_PD, unit_PD[:1], exact_BK)
    assert retrieval.tune(made, unit_PD, unit_PD[:1], exact_BK, must=False).at_1 == 0.0


def test_our_side_alone_is_measured_without_the_others(without_others):
    words = ["--counts=300", "--queries=40", "--width=16", "--history=7", "--turns=2", "--seconds=0", "--alone"]
    rows = list(retrieval.search_rows(300, MACHINE, retrieval.parse(words)))
    for row in rows:
        assert set(row) >= PERFORMANCE
        assert json.loads(json.dumps(row, allow_nan=False)) == row
    names = {"USearch f32", "USearch i8", "exact_search", "one thread", "search alone"}
    assert {row["other_name"] for row in rows} == names
    searches = [row for row in rows if "ours_ef" in row]
    assert all(row["ours_recall_1"] >= retrieval.RECALL for row in searches)
    assert rows[-1]["target"] == retrieval.WHOLE


def test_ours_is_the_default_of_the_product():
    from marsjax import retrieval as product

    planted = retrieval.plant(60, queries=1, width=8)
    kind = str(product.build_index(planted.base_PD, planted.user_P).graph.dtype).rsplit(".", 1)[-1].lower()
    assert kind == retrieval.OURS


def test_another_loan_stops_the_run():
    planted = retrieval.plant(60, queries=30, width=8)
    lent = retrieval.lending(planted, history=6)
    index = retrieval.ours(planted, retrieval.OURS).index
    borrowed, made = retrieval.augment(lent, index, planted, donors=2, cap=16)
    retrieval.check_augmentation(lent, index, planted, borrowed, made, 2)
    wrong = borrowed._replace(item_S=borrowed.item_S[::-1].copy())
    with pytest.raises(SystemExit, match="expected to borrow"):
        retrieval.check_augmentation(lent, index, planted, wrong, made, 2)


def test_without_the_others_one_line_says_what_to_install(without_others):
    with pytest.raises(SystemExit) as stopped:
        retrieval.main(["--quick"])
    message = str(stopped.value.code)
    assert "pip install faiss-cpu hnswlib" in message
    assert "--alone" in message
    assert "\n" not in message
