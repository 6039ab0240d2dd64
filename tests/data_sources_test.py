"""MovieLens, tables, feature files, images and planted data: what is read, and how what is broken is refused."""

import os
import pathlib

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from marsjax.data.feature_files import image_folder_problems, read_features
from marsjax.data.inspection import describe, statistics
from marsjax.data.movielens import load_movielens
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.data.tabular import load_tabular
from marsjax.evaluation.metrics import auc

COLUMNS = {"user": "who", "item": "what", "label": "clicked", "time": "at"}


def write(path, **columns):
    table = pyarrow.table(columns)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


def events(path, **changes):
    columns = {"who": [1, 1, 2, 2], "what": ["a", "b", "a", "c"], "clicked": [1, 0, 1, 1], "at": [1, 2, 1, 2]}
    return write(path, **(columns | changes))


def load(path, **options):
    return load_tabular(events_path=path, columns=COLUMNS, features={}, **options)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_tables_are_read(tmp_path, ending):
    dataset = load(events(tmp_path / f"log.{ending}"))
    assert list(dataset.log.raw_user_U) == ["1", "2"]
    assert list(dataset.items.raw_id_N) == ["", "a", "b", "c"]
    np.testing.assert_array_equal(dataset.log.label_E, [1, 0, 1, 1])


def test_items_titles_and_categories(tmp_path):
    items = write(tmp_path / "items.parquet", what=["a", "b", "c"], name=["A", "B", None], kind=["x|y", "", None])
    dataset = load_tabular(
        events_path=events(tmp_path / "log.parquet"),
        items_path=items,
        columns=COLUMNS | {"title": "name", "categories": "kind"},
        features={},
    )
    assert list(dataset.items.title_N) == ["", "A", "B", ""]
    assert dataset.items.category_names == ("", "x", "y")


def test_timestamps_become_seconds_and_nulls_are_dropped(tmp_path):
    times = np.array(["1970-01-01T00:00:05", "1970-01-02", "NaT", "1970-01-01T00:00:01.5"], "datetime64[us]")
    dataset = load(events(tmp_path / "log.parquet", at=pyarrow.array(times, from_pandas=True)))
    np.testing.assert_array_equal(dataset.log.time_E, [5, 86400, 1])
    assert dataset.problems[0].kind == "missing_time"


def test_missing_ids_in_a_numeric_column(tmp_path):
    dataset = load(events(tmp_path / "log.parquet", who=pyarrow.array([1, None, 2, 2])))
    assert list(dataset.log.raw_user_U) == ["1", "2"]
    assert dataset.problems[0].kind == "missing_id"


def test_missing_column_is_named_with_the_remedy(tmp_path):
    path = write(tmp_path / "log.parquet", who=[1], what=["a"], at=[1])
    with pytest.raises(ValueError, match=r"column 'clicked' for label, found who, what, at; .*columns.label=NAME"):
        load(path)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_missing_file_is_named(tmp_path, ending):
    with pytest.raises(ValueError, match=f"log.{ending}: expected a Parquet or CSV file, found none"):
        load(tmp_path / f"log.{ending}")


def test_truncated_parquet_is_refused(tmp_path):
    path = events(tmp_path / "log.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="log.parquet: the file is damaged, truncated"):
        load(path)


def test_words_where_numbers_belong_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected numbers .* for label, found .'yes'"):
        load(events(tmp_path / "log.parquet", clicked=["yes", "no", "yes", "yes"]))


# --- features


def test_feature_files_of_all_kinds_agree(tmp_path):
    ids, vectors = np.array(["a", "b", "c"]), np.arange(6, dtype=np.float16).reshape(3, 2)
    np.savez(tmp_path / "f.npz", item_id=ids, embedding=vectors)
    np.save(tmp_path / "f.npy", vectors)
    write(tmp_path / "f.parquet", id=ids, embedding=[list(row) for row in vectors.astype(float)])
    for name in ("f.npz", "f.npy", "f.parquet"):
        found = read_features(tmp_path / name, item_ids=ids)
        np.testing.assert_array_equal(found.raw_id, ids)
        np.testing.assert_array_equal(found.feature, vectors)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.npz", "expected a feature file, found none"),
        ("cut.npz", "damaged or truncated"),
        ("keys.npz", "expected arrays embedding and one of .* found .'vectors'"),
        ("ragged.parquet", r"expected vectors of one width, found widths \[1, 2\]"),
        ("f.txt", "expected .npz, .npy or .parquet, found .txt"),
    ],
)
def test_bad_feature_files_are_refused(tmp_path, name, message):
    np.savez(tmp_path / "cut.npz", item_id=np.arange(50), embedding=np.ones((50, 8)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    np.savez(tmp_path / "keys.npz", vectors=np.ones((2, 2)))
    write(tmp_path / "ragged.parquet", id=["a", "b"], embedding=[[1.0], [1.0, 2.0]])
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / name)


def test_image_folder_with_a_truncated_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 picture \xff\xd9\0\0")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8 pict")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n data IEND\xaeB`\x82")
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n dat")
    missing, truncated = image_folder_problems(tmp_path, np.array(["a", "b", "c", "d", "e"]))
    assert (missing.kind, missing.occurrences, missing.where) == ("missing_image", 1, ("item e",))
    assert (truncated.kind, truncated.occurrences, truncated.where) == ("truncated_image", 2, ("b.jpg", "d.png"))
    with pytest.raises(ValueError, match="expected a folder of images"):
        image_folder_problems(tmp_path / "nowhere", np.array(["a"]))


# --- MovieLens


def movielens_folder(tmp_path, ratings=None):
    lines = ratings or [f"{u}::{m}::{1 + (u + m) % 5}::{100 + m}" for u in range(1, 8) for m in range(1, 6)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n")
    titles = [f"{m}::Caf\xe9 {m} (1990)::Drama|Comedy" for m in range(1, 7)]
    (tmp_path / "movies.dat").write_bytes("\n".join(titles).encode("latin-1"))
    return tmp_path


def test_movielens_layout(tmp_path):
    dataset = load_movielens(movielens_folder(tmp_path))
    assert dataset.items.title_N[1] == "Caf\xe9 1 (1990)"
    assert dataset.items.category_names == ("", "Comedy", "Drama")
    expected = [float(1 + (1 + m) % 5 >= 4) for m in range(1, 6)]
    np.testing.assert_array_equal(dataset.log.label_E[:5], expected)
    (differs,) = [p for p in dataset.problems if p.kind == "count_differs"]
    assert "35 ratings, officially 1000209" in differs.where
    with pytest.raises(ValueError, match="count_differs"):
        load_movielens(tmp_path, strict=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1::2::3::4", "1::2::3"], r"ratings.dat:2: expected user::movie::rating::time, found '1::2::3'"),
        (["1::2::x::4"], "expected whole numbers"),
    ],
)
def test_malformed_ratings_are_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_movielens(movielens_folder(tmp_path, lines))


def test_missing_movielens_tells_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="ratings.dat.*grouplens.org"):
        load_movielens(tmp_path)


@pytest.mark.skipif(
    "MARSJAX_DATA" not in os.environ, reason="needs MovieLens-1M: set MARSJAX_DATA to a folder with ml-1m/"
)
def test_real_movielens_has_the_known_counts():
    dataset = load_movielens(pathlib.Path(os.environ["MARSJAX_DATA"]) / "ml-1m")
    assert len(dataset.log.raw_user_U) == 6040
    assert len(dataset.items.raw_id_N) - 1 == 3416
    assert len(dataset.items.category_names) - 1 == 18
    assert abs(len(dataset.log.item_E) - 999_611) <= 6


# --- planted data


def test_planted_data_are_what_they_say():
    dataset = make_synthetic(n_users=400, n_items=200, seed=1)
    log = dataset.log
    assert dataset.fingerprint == make_synthetic(n_users=400, n_items=200, seed=1).fingerprint
    assert dataset.fingerprint != make_synthetic(n_users=400, n_items=200, seed=2).fingerprint
    length_U = np.diff(log.start_U1)
    assert set(np.unique(length_U)) <= set(range(12, 17)) | set(range(70, 101))
    assert 0.6 < (length_U <= 16).mean() < 0.8
    for user in range(20):  # items of a user are distinct, and times do not fall
        part = slice(log.start_U1[user], log.start_U1[user + 1])
        assert len(set(log.item_E[part])) == length_U[user]
        assert (np.diff(log.time_E[part]) >= 0).all()
    # Labels are draws of the true probabilities, which score best.
    p, y = dataset.oracle_E.astype(float), log.label_E
    assert abs((y - p).sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    assert auc(y, p) > 0.85
    assert auc(y, p) > auc(y, p + np.random.default_rng(0).normal(size=len(p)) * 0.2)


def test_modalities_share_the_latent_unless_shuffled():
    """Items of one topic are near one another in both modalities; permuting the features undoes it."""
    for shuffle, near in ((False, True), (True, False)):
        items = make_synthetic(n_users=300, n_items=200, shuffle_features=shuffle, seed=0).items
        topic = items.title_N[1:]
        for name in ("text", "image"):
            x = items.modalities[name].feature_NF[1:]
            present = items.modalities[name].present_N[1:]
            assert 0.9 < present.mean() < 1
            x = (x - x[present].mean(0))[present]
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            same = topic[present][:, None] == topic[present][None]
            np.fill_diagonal(same, False)
            assert ((x @ x.T)[same].mean() > 0.5) == near


def test_inspection_counts():
    dataset = make_synthetic(n_users=100, n_items=80, high_events=(20, 30), seed=0)
    rows = make_rows(dataset.log, split="leave_one_out")
    found = statistics(dataset, rows)
    assert found["users"] == 100
    assert found["events"] == len(dataset.log.item_E)
    assert found["splits"] == {"train": found["events"] - 200, "valid": 100, "test": 100}
    assert found["sparsity_percent"] == pytest.approx(100 - found["events"] / found["items"])
    assert [group["users"] for group in found["groups"].values()] == [30, 40, 30]
    text = describe(dataset, rows)
    for word in ("low-active", "sparse", "text", "image", "problems", "item_without_text"):
        assert word in text
