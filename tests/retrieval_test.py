"""Search: one shape of answer whatever is asked, nothing unsound in the graph, and damage found before it is opened."""

import json

import numpy as np
import pytest

from marsjax import retrieval


def vectors(n, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


BASE, USERS = vectors(200), np.arange(200) * 3 + 5


def brute(query_BD, base_PD, user_P, k):
    a = query_BD / np.linalg.norm(query_BD, axis=1, keepdims=True)
    b = base_PD / np.linalg.norm(base_PD, axis=1, keepdims=True)
    similarity = a @ b.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return user_P[order], np.take_along_axis(similarity, order, axis=1)


def searches():
    index = retrieval.build_index(BASE, USERS)
    return {
        "exact": lambda q, **kw: retrieval.exact_search(q, BASE, USERS, **kw),
        "usearch": lambda q, **kw: retrieval.search(index, q, expansion_search=400, **kw),
    }


@pytest.mark.parametrize("backend", ["exact", "usearch"])
@pytest.mark.parametrize("k", [1, 7, 199])
def test_equals_brute_force(backend, k):
    query_BD = vectors(30, seed=1)
    found = searches()[backend](query_BD, k=k)
    user_BK, similarity_BK = brute(query_BD, BASE, USERS, k)
    np.testing.assert_allclose(found.similarity_BK, similarity_BK, atol=1e-5)
    assert (found.user_BK == user_BK).mean() > 0.999
    assert found.valid_BK.all()


@pytest.mark.parametrize("backend", ["exact", "usearch"])
@pytest.mark.parametrize("b", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_shape_is_always_b_by_k(backend, b, k):
    found = searches()[backend](vectors(b, seed=1), k=k)
    assert found.user_BK.shape == found.similarity_BK.shape == found.valid_BK.shape == (b, k)
    np.testing.assert_array_equal(found.valid_BK, np.arange(k)[None, :].repeat(b, 0) < 200)
    assert (found.user_BK[~found.valid_BK] == -1).all()
    assert (found.similarity_BK[~found.valid_BK] == -np.inf).all()


@pytest.mark.parametrize("backend", ["exact", "usearch"])
def test_excluded_user_is_never_returned(backend):
    found = searches()[backend](BASE[:50], k=4, exclude_B=USERS[:50])
    assert (found.user_BK != USERS[:50, None]).all()
    assert found.valid_BK.all()
    itself = searches()[backend](BASE[:50], k=1)
    np.testing.assert_array_equal(itself.user_BK[:, 0], USERS[:50])


def test_ties_go_to_the_lower_user():
    base = np.ones((5, 3), np.float32)
    found = retrieval.exact_search(np.ones((1, 3)), base, np.array([9, 3, 7, 1, 5]), k=3)
    np.testing.assert_array_equal(found.user_BK, [[1, 3, 5]])


def test_no_unsound_vector_enters_the_graph():
    """A NaN in the graph damages every later search; with 5 bad rows among 2,000 the good ones find themselves."""
    base = vectors(2000)
    base[[3, 50, 700]] = np.nan
    base[900, 4] = np.inf
    base[1500] = 0.0
    index = retrieval.build_index(base, np.arange(2000))
    assert index.left_out == 5
    good = np.delete(np.arange(2000), [3, 50, 700, 900, 1500])
    found = retrieval.search(index, base[good], k=1)
    assert (found.user_BK[:, 0] == good).mean() > 0.99
    assert np.isfinite(found.similarity_BK).all()
    assert not np.isin(found.user_BK, [3, 50, 700, 900, 1500]).any()


@pytest.mark.parametrize("backend", ["exact", "usearch"])
def test_bad_queries_are_refused(backend):
    query_BD = vectors(4)
    query_BD[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 4 with NaN or infinity, the first in row 2"):
        searches()[backend](query_BD, k=1)
    with pytest.raises(ValueError, match=r"expected queries \[B, 16\].*found \(4, 3\)"):
        searches()[backend](vectors(4, 3), k=1)


@pytest.mark.parametrize("backend", ["exact", "usearch"])
def test_zero_query_has_no_neighbours(backend):
    assert not searches()[backend](np.zeros((2, 16)), k=3).valid_BK.any()


def test_empty_index_answers_nothing():
    index = retrieval.build_index(np.zeros((0, 16)), np.zeros(0, int))
    found = retrieval.search(index, vectors(3), k=2)
    assert found.user_BK.shape == (3, 2)
    assert not found.valid_BK.any()


def test_recall_of_approximate_against_exact():
    base, query = vectors(5000, 32), vectors(300, 32, seed=1)
    exact = retrieval.exact_search(query, base, np.arange(5000), k=10)
    found = retrieval.search(retrieval.build_index(base, np.arange(5000)), query, k=10, expansion_search=400)
    assert retrieval.recall(found, exact) > 0.95
    assert retrieval.recall(exact, exact) == 1.0
    nothing = exact._replace(valid_BK=np.zeros_like(exact.valid_BK))
    assert retrieval.recall(nothing, exact) == 0.0
    half = exact._replace(valid_BK=exact.valid_BK & (np.arange(10) < 5))
    assert retrieval.recall(half, exact) == pytest.approx(0.5)


def test_build_is_deterministic():
    query = vectors(100, seed=2)
    first, second = (retrieval.search(retrieval.build_index(BASE, USERS), query, k=5) for _ in range(2))
    np.testing.assert_array_equal(first.user_BK, second.user_BK)


def test_saved_index_answers_the_same(tmp_path):
    index = retrieval.build_index(BASE, USERS)
    retrieval.save_index(index, tmp_path / "index")
    retrieval.save_index(index, tmp_path / "index")  # replaces
    query = vectors(50, seed=1)
    before, after = (retrieval.search(i, query, k=5) for i in (index, retrieval.load_index(tmp_path / "index")))
    np.testing.assert_array_equal(before.user_BK, after.user_BK)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("name", ["graph.usearch", "vectors.npz"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damage_is_found_before_it_is_opened(tmp_path, name, how):
    retrieval.save_index(retrieval.build_index(BASE, USERS), tmp_path / "index")
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    {"flip": lambda: path.write_bytes(data), "truncate": lambda: path.write_bytes(data[:100]), "remove": path.unlink}[
        how
    ]()
    with pytest.raises(ValueError, match=f"{name}: expected sha256 .* build the index again"):
        retrieval.load_index(tmp_path / "index")


def test_truncated_description_is_refused(tmp_path):
    retrieval.save_index(retrieval.build_index(BASE, USERS), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="index.json: expected JSON"):
        retrieval.load_index(tmp_path / "index")


def test_another_count_is_refused(tmp_path):
    retrieval.save_index(retrieval.build_index(BASE, USERS), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"count": 7}))
    with pytest.raises(ValueError, match="expected 7 vectors"):
        retrieval.load_index(tmp_path / "index")
