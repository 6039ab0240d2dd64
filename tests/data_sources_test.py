"""MovieLens, tables, feature files, images and planted data: what is read, and how what is broken is refused."""

import os
import pathlib
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from marsjax.configuration import load_config
from marsjax.data.content import find_images, image_problems
from marsjax.data.feature_files import read_features
from marsjax.data.inspection import describe, statistics
from marsjax.data.movielens import load_movielens
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.data.tabular import load_tabular, read_ids, tabular_content
from marsjax.evaluation.metrics import auc
from marsjax.sources import SOURCES

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


def test_categories_may_be_lists(tmp_path):
    items = write(tmp_path / "items.parquet", what=["a", "b", "c"], kind=[["x", "y"], [], None])
    dataset = load_tabular(
        events_path=events(tmp_path / "log.parquet"),
        items_path=items,
        columns=COLUMNS | {"categories": "kind"},
        features={},
    )
    assert dataset.items.category_names == ("", "x", "y")
    np.testing.assert_array_equal(dataset.items.category_NG, [[0, 0], [1, 2], [0, 0], [0, 0]])


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_times_with_a_zone_are_utc(tmp_path, ending):
    cells = ["1970-01-01T00:00:01Z", "1970-01-01T02:00:05+02:00", "1970-01-01T00:00:07Z", "1970-01-01T00:00:08+00:00"]
    np.testing.assert_array_equal(load(events(tmp_path / f"log.{ending}", at=cells)).log.time_E, [1, 5, 7, 8])


@pytest.mark.parametrize(("last", "unit"), [("1970-01-01T00:00:01", 1), ("1970-01-01T00:00:01.5", 1_000_000)])
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_timestamps_become_seconds_or_microseconds_and_nulls_are_dropped(tmp_path, ending, last, unit):
    times = np.array(["1970-01-01T00:00:05", "1970-01-02", "NaT", last], "datetime64[us]")
    dataset = load(events(tmp_path / f"log.{ending}", at=pyarrow.array(times, from_pandas=True)))
    assert list(dataset.log.time_E) == [5 * unit, 86400 * unit, 1 if unit == 1 else 1_500_000]
    assert dataset.problems[0].kind == "missing_time"


def test_times_do_not_pass_through_floats(tmp_path):
    """A microsecond of the year 2255 is beyond 2^53, as are nanoseconds of any year."""
    micro = 9_007_199_254_740_993 + np.array([0, 2, 4, 0])
    stamps = pyarrow.array([*micro[:3].tolist(), None], pyarrow.timestamp("us"))
    np.testing.assert_array_equal(load(events(tmp_path / "a.parquet", at=stamps)).log.time_E, micro[:3])
    whole = pyarrow.array([*micro[:3].tolist(), None], pyarrow.int64())
    np.testing.assert_array_equal(load(events(tmp_path / "b.parquet", at=whole)).log.time_E, micro[:3])
    fine = pyarrow.array([1_500, 2_000, 3_999, None], pyarrow.timestamp("ns"))
    np.testing.assert_array_equal(load(events(tmp_path / "c.parquet", at=fine)).log.time_E, [1, 2, 3])


def test_missing_ids_in_a_numeric_column(tmp_path):
    dataset = load(events(tmp_path / "log.parquet", who=pyarrow.array([1, None, 2, 2])))
    assert list(dataset.log.raw_user_U) == ["1", "2"]
    assert dataset.problems[0].kind == "missing_id"


def test_long_whole_ids_with_gaps_stay_apart(tmp_path):
    """Floats, in which NumPy would hold a column with gaps, merge whole numbers from 2^53 on."""
    who = [9_007_199_254_740_992, 9_007_199_254_740_993, None, 9_007_199_254_740_994]
    dataset = load(events(tmp_path / "log.parquet", who=pyarrow.array(who)))
    assert list(dataset.log.raw_user_U) == [str(user) for user in who if user]


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (pyarrow.array([1.0, None, 20.0, -3.0]), ["-3", "1", "20"]),
        (pyarrow.array([1.0, np.nan, 20.0, -3.0], pyarrow.float32()), ["-3", "1", "20"]),
        (pyarrow.array([1.5, None, 2.25, 1.5]), ["1.5", "2.25"]),
        (pyarrow.array([1.0, None, 1e30, 1.0]), ["1.0", "1e+30"]),
        (pyarrow.array(["1.0", "", "2.0", "1.0"]), ["1.0", "2.0"]),
    ],
)
def test_floats_that_are_whole_lose_their_fraction_and_text_does_not(tmp_path, who, expected):
    dataset = load(events(tmp_path / "log.parquet", who=who))
    assert list(dataset.log.raw_user_U) == expected
    assert dataset.problems[0][:2] == ("missing_id", 1)


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (["1.0", "", "20.0", "-3.0"], ["-3", "1", "20"]),
        (["1.0", "nan", "20.0", "1.0"], ["1", "20"]),
        (["007", "NA", "7", "07"], ["007", "07", "7"]),
        (["1.5", "", "2.0", "1.5"], ["1.5", "2.0"]),
        (["1.0", "", "2.0-b", "nan"], ["1.0", "2.0-b", "nan"]),
        (["NA", "", "null", "NA"], ["NA", "null"]),
    ],
)
def test_gaps_and_whole_floats_of_a_csv(tmp_path, who, expected):
    path = tmp_path / "log.csv"
    rows = [f"{user},a,{number % 2},{number}" for number, user in enumerate(who)]
    path.write_text("\n".join(["who,what,clicked,at", *rows]) + "\n")
    dataset = load(path)
    assert list(dataset.log.raw_user_U) == expected
    assert dataset.problems[0][:2] == ("missing_id", 1)


def test_ids_of_a_csv_are_text_and_empty_ones_missing(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("who,what,clicked,at\n007,01,1,1\n7,1,1,2\n07,01,0,3\n,1,1,4\n7,,1,5\n7-,1,0,6\n")
    items = tmp_path / "items.csv"
    items.write_text("what,name,kind\n01,0042,00|1\n1,,\n")
    columns = COLUMNS | {"title": "name", "categories": "kind"}
    dataset = load_tabular(events_path=path, items_path=items, columns=columns, features={})
    assert list(dataset.log.raw_user_U) == ["007", "07", "7", "7-"]
    assert list(dataset.items.raw_id_N) == ["", "01", "1"]
    assert list(dataset.items.title_N) == ["", "0042", ""]
    assert dataset.items.category_names == ("", "00", "1")
    assert dataset.problems[0][:2] == ("missing_id", 2)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["b", "a", None, "b"]).dictionary_encode(),
        pyarrow.chunked_array([pyarrow.array(["b", "a"]), pyarrow.array([None, "b"])]),
        pyarrow.array(["b", "a", None, "b"], pyarrow.large_string()),
        pyarrow.array(["b", "a", None, "b"]).cast(pyarrow.binary()),
        pyarrow.array(["b", "a", None, "b"]).cast(pyarrow.string_view()),
    ],
    ids=lambda column: str(column.type),
)
def test_ids_are_read_from_every_kind_of_text(column):
    column = pyarrow.chunked_array([column]) if isinstance(column, pyarrow.Array) else column
    assert list(read_ids(column, "user", "log.parquet").strings()) == ["b", "a", "", "b"]


def test_ids_of_many_categories_in_narrow_numbers():
    """What a pandas column of 128 categories becomes; one more for "missing" would not fit int8."""
    names = [f"{i:03}" for i in range(128)]
    column = pyarrow.array([*names, None]).cast(pyarrow.dictionary(pyarrow.int8(), pyarrow.string()))
    assert list(read_ids(pyarrow.chunked_array([column]), "user", "log.parquet").strings()) == [*names, ""]


def test_lists_are_no_ids(tmp_path):
    with pytest.raises(
        ValueError, match="log.parquet: expected text or numbers for user, found list.* write it as text"
    ):
        load(events(tmp_path / "log.parquet", who=[[1], [2], [1], [2]]))


def test_a_column_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("who,what,clicked,at,who\n1,a,1,1,2\n")
    with pytest.raises(ValueError, match=r"expected one column 'who' for user, found who, what, clicked, at, who"):
        load(path)


def test_no_loop_over_rows_of_ids(tmp_path):
    """What grows with the rows is arrays of numbers: no text and no Python object for each row."""
    n = 50_000
    row = np.arange(n)
    user = np.char.add("a user with quite a long name ", (row % 100).astype(str))
    path = events(tmp_path / "log.parquet", who=user, what=row % 7, clicked=row % 2, at=row)
    tracemalloc.start()
    load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * user.dtype.itemsize


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_line_breaks_in_quotes_are_read_in_files_of_any_size(tmp_path, ending):
    """pyarrow reads blocks of 1 MB, and looks for rows that lie across two of them only where it is told to."""
    text = "two\nlines, or more\n" * 10
    path = tmp_path / f"items.{ending}"
    separator = {"csv": ",", "tsv": "\t"}[ending]
    path.write_text(f"what{separator}text\n" + "".join(f'i{n}{separator}"{text}"\n' for n in range(8000)))
    assert path.stat().st_size > 1 << 20
    content = tabular_content(items_path=path, item="what", fields=["text"])
    assert len(content.raw_id_I) == 8000
    assert set(content.fields["text"]) == {text}


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


NANO = 1_700_000_000_000_000_000  # differences of 1 are lost in a float


@pytest.mark.parametrize(
    ("column", "cells", "kind", "expected"),
    [
        ("clicked", ["1", "0", " 1", "oops"], "label_not_0_or_1", [1, 0, 1]),
        ("clicked", ["true", "False", "true", "maybe"], "label_not_0_or_1", [1, 0, 1]),
        ("at", ["1", "2.5e1", "3", "oops"], "missing_time", [1, 25, 3]),
        ("at", [str(NANO), str(NANO + 1), str(NANO), "oops"], "missing_time", [NANO, NANO + 1, NANO]),
        (
            "at",
            ["1970-01-01T00:00:01Z", "1970-01-01T02:00:05+02:00", "1970-01-01T00:00:07Z", "oops"],
            "missing_time",
            [1, 5, 7],
        ),
        ("at", ["1970-01-01", "1970-01-01 00:00:09", "1970-01-01", "oops"], "missing_time", [0, 9, 0]),
    ],
)
def test_one_bad_cell_drops_its_row(tmp_path, column, cells, kind, expected):
    dataset = load(events(tmp_path / "log.csv", **{column: cells}))
    found = dataset.log.label_E if column == "clicked" else dataset.log.time_E
    np.testing.assert_array_equal(found, expected)
    assert (dataset.problems[0].kind, dataset.problems[0].where) == (kind, ("log.csv row 4",))


def test_labels_of_minus_one_hint_at_the_threshold(tmp_path):
    dataset = load(events(tmp_path / "log.parquet", clicked=[1, -1, 1, 1]))
    assert dataset.problems[0].where[-1].startswith("labels are -1, 1: ")


def test_labels_of_many_values_hint_at_the_threshold(tmp_path):
    dataset = load(events(tmp_path / "log.parquet", clicked=[1, 0, 3, 5]))
    assert dataset.problems[0].where[-1].startswith("labels are 0, 1, 3, 5: --config.data.label_threshold=VALUE")
    assert not [p for p in load(events(tmp_path / "log.parquet"), label_threshold=1.0).problems if "label" in p.kind]


def test_no_rows_are_said_to_be_none(tmp_path):
    (tmp_path / "log.csv").write_text("who,what,clicked,at\n")
    with pytest.raises(ValueError, match="log.csv: expected events, found a header and no rows"):
        load(tmp_path / "log.csv")


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


@pytest.mark.parametrize("ids", [["007", "7"], [2**53, 2**53 + 1, None], [1.0, 2.0]])
def test_ids_of_parquet_features_are_the_ids_of_the_tables(tmp_path, ids):
    path = write(tmp_path / "f.parquet", id=pyarrow.array(ids), embedding=[[1.0]] * len(ids))
    expected = {float: "{:.0f}", int: "{}", str: "{}"}[type(ids[0])]
    assert list(read_features(path).raw_id) == ["" if i is None else expected.format(i) for i in ids]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.npz", "expected a feature file, found none"),
        ("cut.npz", "damaged, truncated"),
        ("keys.npz", "expected arrays embedding and one of .* found .'vectors'"),
        ("ragged.parquet", r"expected vectors of one width, found widths \[1, 2\]"),
        ("f.txt", "expected .npz, .npy or .parquet, found .txt"),
        ("garbage.npz", "garbage.npz: the file is damaged, truncated or no .npz .*write it again"),
        ("objects.npz", "objects.npz: the file is damaged, truncated or no .npz .*write it again"),
        ("scalars.parquet", "scalars.parquet: expected a column embedding of lists of numbers, found double"),
        ("empty.parquet", "empty.parquet: expected vectors of one width, found widths"),
        ("words.parquet", "words.parquet: expected a column embedding of lists of numbers, found list"),
        ("words.npz", "words.npz: expected vectors of numbers, found <U1"),
        ("cut.npy", "cut.npy: the file is damaged, truncated or no .npy .*write it again"),
    ],
)
def test_bad_feature_files_are_refused(tmp_path, name, message):
    np.savez(tmp_path / "cut.npz", item_id=np.arange(50), embedding=np.ones((50, 8)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    np.savez(tmp_path / "keys.npz", vectors=np.ones((2, 2)))
    write(tmp_path / "ragged.parquet", id=["a", "b"], embedding=[[1.0], [1.0, 2.0]])
    (tmp_path / "f.txt").write_text("x")
    (tmp_path / "garbage.npz").write_bytes(b"no archive at all")
    np.savez(tmp_path / "objects.npz", id=np.arange(2), embedding=np.array([None, 1], object))
    np.savez(tmp_path / "words.npz", id=np.arange(2), embedding=np.array([["a"], ["b"]]))
    write(tmp_path / "scalars.parquet", id=["a"], embedding=[1.0])
    write(
        tmp_path / "empty.parquet",
        id=pyarrow.array([], "string"),
        embedding=pyarrow.array([], pyarrow.list_(pyarrow.float32())),
    )
    write(tmp_path / "words.parquet", id=["a"], embedding=[["x", "y"]])
    np.save(tmp_path / "cut.npy", np.ones((50, 8)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / name, item_ids=np.arange(50).astype(str))


def test_missing_vectors_are_nan(tmp_path):
    write(tmp_path / "f.parquet", id=[7.0, None, 9.0], embedding=[[1.0, 2.0], None, [None, 4.0]])
    found = read_features(tmp_path / "f.parquet")
    assert list(found.raw_id) == ["7", "", "9"]
    np.testing.assert_array_equal(found.feature, [[1, 2], [np.nan, np.nan], [np.nan, 4]])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7, 9], ["7", "9"]),
        ([7, np.nan, 9], ["7", "", "9"]),
        ([7, 0.5], ["7.0", "0.5"]),
        ([2.0**63, 1], ["9.223372", "1.0"]),  # would overflow as a whole number
    ],
)
def test_float_ids_are_the_same_from_every_file(tmp_path, ids, expected, kind):
    ids = np.array(ids, kind)
    np.savez(tmp_path / "f.npz", id=ids, embedding=np.ones((len(ids), 1)))
    write(tmp_path / "f.parquet", id=ids, embedding=[[1.0]] * len(ids))
    found, also = (read_features(tmp_path / name).raw_id for name in ("f.npz", "f.parquet"))
    assert list(found) == list(also)
    assert [name[:8] for name in found] == expected


def test_image_folder_with_a_truncated_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 picture \xff\xd9\0\0")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8 pict")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n data IEND\xaeB`\x82")
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n dat")
    for name, head in (("f.webp", b"RIFF"), ("g.gif", b"GIF89a"), ("h.tif", b"II*\0"), ("i.bmp", b"BM")):
        (tmp_path / name).write_bytes(head + b" picture")
    (tmp_path / "j.webp").write_bytes(b"<html>")
    ids = np.array(list("abcdefghij"))
    missing, truncated = image_problems(ids, find_images(tmp_path, ids))
    assert (missing.kind, missing.occurrences, missing.where) == ("missing_image", 1, ("item e",))
    assert truncated == ("truncated_image", 3, "noted", ("b.jpg", "d.png", "j.webp"))


def test_a_cut_image_is_refused_by_strict_and_costs_no_feature_otherwise(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 pict")
    np.savez(tmp_path / "f.npz", id=np.array(["a", "b", "c"]), embedding=np.ones((3, 2)))
    path, options = events(tmp_path / "log.parquet"), {"columns": COLUMNS, "image_folder": tmp_path}
    dataset = load_tabular(events_path=path, features={"image": tmp_path / "f.npz"}, **options)
    assert dataset.items.modalities["image"].present_N[1:].all()
    with pytest.raises(ValueError, match=r"refuses 1 x truncated_image .a.jpg.. Mend .* to have them noted"):
        load_tabular(events_path=path, features={}, strict=True, **options)


@pytest.mark.parametrize("head", [b"\xff\xd8", b"\x89PNG\r\n\x1a\n"])
def test_only_the_ends_of_an_image_are_read(tmp_path, head):
    size = 32 << 20
    with (tmp_path / "a.png").open("wb") as file:
        file.write(head)
        file.seek(size)
        file.write(b"\xff\xd9" if head == b"\xff\xd8" else b"IEND\xaeB`\x82")
    tracemalloc.start()
    assert image_problems(np.array(["a"]), [tmp_path / "a.png"]) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 100


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


def test_users_of_few_ratings_are_left_out_where_the_configuration_says_so(tmp_path):
    lines = [f"{u}::{m}::5::{100 + m}" for u in range(1, 8) for m in range(1, 6)] + ["8::1::5::1"]
    config = load_config("configs/ml1m.py", {"data.folder": str(movielens_folder(tmp_path, lines))})
    config.data.update(text_features="", image_features="", image_folder="", min_user_events=2)
    dataset = SOURCES["movielens"](config.data, {})
    assert list(dataset.log.raw_user_U) == [str(u) for u in range(1, 8)]
    assert {p.kind: p.occurrences for p in dataset.problems}["rare_user"] == 1


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
    assert list(found["groups"]) == ["low", "middle", "high"]
    assert "no training events" not in text


def test_inspection_shows_new_users_where_there_are_any():
    dataset = make_synthetic(n_users=100, n_items=80, high_events=(20, 30), seed=0)
    rows = make_rows(dataset.log, split="global_time", fraction_test=0.4, fraction_valid=0.3)
    count = int((rows.train_length_U == 0).sum())
    assert count > 0
    groups = statistics(dataset, rows)["groups"]
    assert groups["new"] == {"users": count, "training_events": [0, 0]}
    assert groups["low"]["training_events"][0] > 0
    (line,) = [line for line in describe(dataset, rows).splitlines() if line.startswith("new ")]
    assert line == f"new           {count} users, no training events"
