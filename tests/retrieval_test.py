"""Search: one shape of answer whatever is asked, nothing unsound in the graph, and damage found before it is opened."""

import json
from typing import NamedTuple

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


@pytest.mark.parametrize("count", [300, 3000])
def test_an_index_of_several_threads_finds_as_many(count, tmp_path):
    base, query = vectors(count), vectors(200, seed=1)
    exact = retrieval.exact_search(query, base, np.arange(count), k=5)
    for threads in (8, 8, 8, 0):
        index = retrieval.build_index(base, np.arange(count), threads=threads)
        assert retrieval.recall(retrieval.search(index, query, k=5), exact) > 0.98
        itself = retrieval.search(index, base, k=1)
        assert (itself.user_BK[:, 0] == np.arange(count)).all()  # without another look some are lost
    retrieval.save_index(index, tmp_path / "index")
    assert retrieval.load_index(tmp_path / "index").graph.size == count
    with pytest.raises(ValueError, match="threads: expected 0 .* or more, found -1"):
        retrieval.build_index(base, np.arange(count), threads=-1)


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 7}, "vectors in the graph: expected 7, found 200"),
        ({"width": 4}, "width of the graph: expected 4, found 16"),
        ({"metric": "l2sq"}, "metric: expected ip, found l2sq"),
        ({"dtype": "f32"}, "dtype of the graph: expected f32, found f16"),
        ({"sha256": {}}, "graph.usearch: expected sha256 no sum"),
        ({"width": None}, r"index.json: expected width \(int\), found None"),
    ],
)
def test_another_description_is_refused_before_the_graph_is_loaded(tmp_path, monkeypatch, changed, message):
    retrieval.save_index(retrieval.build_index(BASE, USERS), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    monkeypatch.setattr(retrieval, "_graph", lambda *_: pytest.fail("USearch was reached"))
    with pytest.raises(ValueError, match=message):
        retrieval.load_index(tmp_path / "index")


def test_description_that_is_no_object_is_refused(tmp_path):
    retrieval.save_index(retrieval.build_index(BASE, USERS), tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text("[]")
    with pytest.raises(ValueError, match="index.json: expected an object, found list"):
        retrieval.load_index(tmp_path / "index")


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_precision_of_the_graph_survives_and_leaves_the_similarities_alone(tmp_path, dtype):
    index = retrieval.build_index(BASE, USERS, dtype=dtype)
    retrieval.save_index(index, tmp_path / "index")
    query = vectors(20, seed=1)
    found = retrieval.search(retrieval.load_index(tmp_path / "index"), query, k=5, expansion_search=400)
    exact = retrieval.exact_search(query, BASE, USERS, k=200)
    by_user = [dict(zip(*pair, strict=True)) for pair in zip(exact.user_BK, exact.similarity_BK, strict=True)]
    for users, similarities, expected in zip(found.user_BK, found.similarity_BK, by_user, strict=True):
        np.testing.assert_array_equal(similarities, [expected[user] for user in users])


def test_full_disk_says_so_and_keeps_the_index(small_disk):
    retrieval.save_index(retrieval.build_index(BASE, USERS), small_disk / "index")
    with pytest.raises(OSError, match="no space left while writing .*index"):
        retrieval.save_index(retrieval.build_index(vectors(20_000, 32), np.arange(20_000)), small_disk / "index")
    assert [path.name for path in small_disk.iterdir()] == ["index"]
    np.testing.assert_array_equal(retrieval.load_index(small_disk / "index").user_P, USERS)


def test_equal_vectors_are_ties_whatever_the_shapes():
    """A matmul gives equal columns unequal products at some shapes; the lowest users must come first at all of them."""
    rng = np.random.default_rng(1)
    for _ in range(150):
        n, d, b = (int(rng.integers(*limits)) for limits in [(20, 3000), (3, 140), (1, 40)])
        base = np.repeat(rng.normal(size=(1, d)).astype(np.float32), n, axis=0)
        users = rng.permutation(n) * 2
        found = retrieval.exact_search(rng.normal(size=(b, d)), base, users, k=7)
        np.testing.assert_array_equal(found.user_BK, np.tile(np.arange(7) * 2, (b, 1)))
        assert (found.similarity_BK == found.similarity_BK[:, :1]).all()


def test_ties_in_a_search_come_in_order():
    base = np.concatenate([BASE, BASE])
    users = np.random.default_rng(0).permutation(400)
    found = retrieval.search(retrieval.build_index(base, users), vectors(40, seed=1), k=400, expansion_search=400)
    tied_BK = found.valid_BK[:, 1:] & (found.similarity_BK[:, 1:] == found.similarity_BK[:, :-1])
    assert tied_BK.sum() >= 40 * 150
    assert (np.diff(found.user_BK, axis=1)[tied_BK] > 0).all()


def test_similarities_are_those_of_the_oracle_and_of_no_batch():
    """To the bit: approximate or exact, one query or many, in chunks or not."""
    query = vectors(33, seed=1)
    exact = retrieval.exact_search(query, BASE, USERS, k=9)
    found = retrieval.search(retrieval.build_index(BASE, USERS), query, k=9, expansion_search=400)
    chunked = retrieval.exact_search(query, BASE, USERS, k=9, chunk=4)
    for i in range(33):
        alone = retrieval.exact_search(query[i : i + 1], BASE, USERS, k=9)
        np.testing.assert_array_equal(alone.similarity_BK[0], exact.similarity_BK[i])
    for other in (found, chunked):
        for a, b in zip(other, exact, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
def test_length_does_not_matter_however_extreme(scale):
    query = vectors(5, seed=1)
    expected = retrieval.exact_search(query, BASE, USERS, k=5)
    for found in (
        retrieval.exact_search(query * np.float32(scale), BASE, USERS, k=5),
        retrieval.exact_search(query, BASE * np.float32(scale), USERS, k=5),
    ):
        np.testing.assert_array_equal(found.user_BK, expected.user_BK)
        np.testing.assert_allclose(found.similarity_BK, expected.similarity_BK, atol=1e-5)


@pytest.mark.parametrize("backend", ["exact", "usearch"])
def test_query_beyond_float32_is_refused(backend):
    with pytest.raises(ValueError, match="NaN or infinity"):
        searches()[backend](np.full((1, 16), 1e300), k=1)


@pytest.mark.parametrize("backend", ["exact", "usearch"])
@pytest.mark.parametrize("k", [0, -1])
def test_no_neighbours_asked_is_refused(backend, k):
    with pytest.raises(ValueError, match=f"expected k of 1 or more, found {k}"):
        searches()[backend](vectors(2), k=k)


@pytest.mark.parametrize("backend", ["exact", "usearch"])
def test_exclusion_of_another_shape_is_refused(backend):
    with pytest.raises(ValueError, match=r"expected one user to exclude a query, \(3,\), found \(1,\)"):
        searches()[backend](vectors(3), k=2, exclude_B=np.array([1]))


def test_excluding_nobody_excludes_nobody():
    for name, found in searches().items():
        a, b = found(vectors(4), k=5), found(vectors(4), k=5, exclude_B=np.full(4, -1))
        np.testing.assert_array_equal(a.user_BK, b.user_BK, err_msg=name)


def test_user_with_two_vectors_is_refused():
    users = np.where(np.arange(200) == 7, USERS[3], USERS)
    with pytest.raises(ValueError, match=f"found user {USERS[3]} more than once"):
        retrieval.build_index(BASE, users)
    with pytest.raises(ValueError, match="more than once"):
        retrieval.exact_search(vectors(1), BASE, users, k=1)


def test_nothing_sound_to_search_answers_nothing(tmp_path, caplog):
    base = np.full((5, 16), np.nan)
    index = retrieval.build_index(base, np.arange(5))
    assert index.left_out == 5
    assert "5 of 5 user vectors" in caplog.text
    retrieval.save_index(index, tmp_path / "index")
    for found in (
        retrieval.search(retrieval.load_index(tmp_path / "index"), vectors(3), k=2),
        retrieval.exact_search(vectors(3), base, np.arange(5), k=2),
    ):
        assert found.user_BK.shape == (3, 2)
        assert not found.valid_BK.any()


def test_slots_that_the_graph_left_unfilled_are_padding():
    """USearch fills them with key 0, which is a user; only its counts tell."""

    class Matches(NamedTuple):
        keys: np.ndarray
        counts: np.ndarray

    class Poor:
        expansion_search = 0
        dtype = "f16"

        def search(self, query_BD, count, *, threads):
            keys_BK = np.zeros((len(query_BD), count), np.uint64)
            keys_BK[0, 0] = 5
            return Matches(keys_BK, np.array([1, 0]))

    found = retrieval.search(retrieval.build_index(BASE, USERS)._replace(graph=Poor()), vectors(2), k=3)
    np.testing.assert_array_equal(found.user_BK, [[USERS[5], -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(found.valid_BK, [[True, False, False], [False, False, False]])


def test_recall_of_other_queries_is_refused():
    found = retrieval.exact_search(vectors(4), BASE, USERS, k=2)
    with pytest.raises(ValueError, match="expected answers to the same queries"):
        retrieval.recall(found, retrieval.exact_search(vectors(5), BASE, USERS, k=2))


def test_queries_are_asked_some_at_a_time(monkeypatch):
    whole, found = retrieval.nearest(vectors(20), BASE, USERS, k=3, backend="usearch")
    monkeypatch.setattr(retrieval, "CHUNK", 7)
    parts, again = retrieval.nearest(vectors(20), BASE, USERS, k=3, backend="usearch")
    assert found == again
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    nobody, _ = retrieval.nearest(vectors(20)[:0], BASE, USERS, k=3, backend="usearch")
    assert nobody.user_BK.shape == (0, 3)


def test_the_oracle_holds_few_similarities_at_a_time(monkeypatch):
    whole, sizes = retrieval.exact_search(vectors(20), BASE, USERS, k=3), []
    ranked = retrieval._ranked
    monkeypatch.setattr(retrieval, "ENTRIES", 3 * len(USERS))
    monkeypatch.setattr(retrieval, "_ranked", lambda x, *given: sizes.append(x.shape) or ranked(x, *given))
    for a, b in zip(retrieval.exact_search(vectors(20), BASE, USERS, k=3), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    assert max(rows * columns for rows, columns in sizes) <= 3 * len(USERS)
