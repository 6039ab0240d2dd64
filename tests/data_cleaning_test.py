"""Bad input: each kind is counted, placed and dropped or masked, or refused; nothing is lost in silence."""

import numpy as np
import pytest

from marsjax.data.cleaning import Ids, RawFeatures, RawItems, build_dataset
from marsjax.records import Problem

ITEMS = RawItems(np.array(["a", "b", "c"]), np.array(["A", "B", "C"]), [("x", "y"), ("x",), ()])
GOOD = [("u1", "a", 1, 10), ("u1", "b", 0, 20), ("u2", "c", 1, 5), ("u2", "a", 0, 6)]


def build(rows=GOOD, items=ITEMS, features=None, time_R=None, **options):
    user, item, label, time = zip(*rows, strict=True)
    return build_dataset(
        name="test",
        user_R=np.array(user),
        item_R=np.array(item),
        label_R=np.array(label, float),
        time_R=np.array(time, float) if time_R is None else time_R,
        where=lambda row_R: [f"log:{row + 1}" for row in row_R],
        items=items,
        features=features or {},
        **options,
    )


def problem(dataset, kind):
    (found,) = [p for p in dataset.problems if p.kind == kind]
    return found


def raw_events(dataset):
    log = dataset.log
    user = np.repeat(log.raw_user_U, np.diff(log.start_U1))
    return list(zip(user, dataset.items.raw_id_N[log.item_E], log.label_E, log.time_E, strict=True))


def test_clean_data_have_no_problems():
    dataset = build(strict=True)
    assert dataset.problems == ()
    assert raw_events(dataset) == GOOD
    names = [[dataset.items.category_names[g] for g in row if g] for row in dataset.items.category_NG]
    assert names == [[], ["x", "y"], ["x"], []]
    assert dataset.items.raw_id_N[0] == ""


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (("u1", "z", 1, 30), "unknown_item"),
        (("", "a", 1, 30), "missing_id"),
        (("u1", "", 1, 30), "missing_id"),
        (("u1", "c", 2, 30), "label_not_0_or_1"),
        (("u1", "c", np.nan, 30), "label_not_0_or_1"),
        (("u1", "c", 1, np.nan), "missing_time"),
        (("u1", "a", 1, 10), "duplicate_event"),
        (("u1", "a", 0, 10), "conflicting_label"),
        (("u1", "c", 1, 1e30), "missing_time"),
    ],
)
def test_bad_rows_are_dropped_counted_and_placed(row, kind):
    dataset = build([*GOOD, row])
    found = problem(dataset, kind)
    assert (found.occurrences, found.action) == (1, "dropped")
    assert found.where[0] == "log:5"
    assert raw_events(dataset) == GOOD
    with pytest.raises(ValueError, match=f"strict reading refuses .*1 x {kind} .log:5."):
        build([*GOOD, row], strict=True)


def test_labels_of_three_values_need_a_threshold():
    rows = [(u, i, label, t) for (u, i, _, t), label in zip(GOOD, (0, 1, 2, 1), strict=True)]
    assert problem(build(rows), "label_not_0_or_1").occurrences == 1
    np.testing.assert_array_equal(build(rows, label_threshold=1.0).log.label_E, [0, 1, 1, 1])


def test_unsorted_log_is_reordered_by_user_and_time():
    dataset = build([GOOD[1], GOOD[0], *GOOD[2:]])
    assert raw_events(dataset) == GOOD
    assert problem(dataset, "unsorted_event").action == "reordered"
    with pytest.raises(ValueError, match="unsorted_event"):
        build([GOOD[1], GOOD[0]], strict=True)


def test_equal_times_keep_the_order_of_the_file():
    rows = [("u", "b", 1, 7), ("u", "a", 1, 7), ("u", "c", 1, 7)]
    assert [event[1] for event in raw_events(build(rows))] == ["b", "a", "c"]
    assert build(rows, strict=True).problems == ()


def test_same_item_at_another_time_is_kept():
    rows = [*GOOD, ("u2", "a", 1, 99)]
    assert len(raw_events(build(rows, strict=True))) == 5


def test_repeats_are_told_apart_by_the_label_of_the_first_in_the_file():
    rows = [("u", "a", 1, 7), ("u", "a", 0, 7), ("u", "b", 0, 7), ("u", "a", 1, 7), ("u", "a", 0, 7), ("u", "b", 0, 7)]
    dataset = build([*rows, ("u", "b", 1, 7)])
    assert raw_events(dataset) == [("u", "a", 1, 7), ("u", "b", 0, 7)]
    assert problem(dataset, "conflicting_label").where == ("log:2", "log:5", "log:7")
    assert problem(dataset, "duplicate_event").where == ("log:4", "log:6")
    # What a threshold makes one label is no conflict.
    dataset = build([("u", "a", 5, 7), ("u", "a", 4, 7)], label_threshold=4.0)
    assert [p.kind for p in dataset.problems if p.action == "dropped"] == ["duplicate_event"]


def seconds(*values):
    return np.array(np.array(values) * 1e6, "datetime64[us]")


@pytest.mark.parametrize("kind", ["float", "datetime"])
def test_parts_of_seconds_order_and_tell_events_apart(kind):
    """Cut to seconds, u's history of b would hold a, which comes later, and one of the two c would be a duplicate."""
    rows = [("u", "a", 1, 5.75), ("u", "b", 1, 5.25), ("u", "c", 1, 6.0), ("u", "c", 1, 6.5)]
    time_R = seconds(5.75, 5.25, 6.0, 6.5) if kind == "datetime" else None
    dataset = build(rows, time_R=time_R)
    assert [event[1] for event in raw_events(dataset)] == ["b", "a", "c", "c"]
    np.testing.assert_array_equal(dataset.log.time_E, [5_250_000, 5_750_000, 6_000_000, 6_500_000])
    assert dataset.log.time_E.dtype == np.int64
    assert [p.kind for p in dataset.problems if p.action != "kept"] == ["unsorted_event"]


@pytest.mark.parametrize(
    ("time_R", "expected"),
    [
        (seconds(10, 20, 5, 6), [10, 20, 5, 6]),
        (np.array([10.0, 20.0, 5.0, 6.0], np.float16), [10, 20, 5, 6]),
        (2**60 + np.array([1, 2, 5, 6]), 2**60 + np.array([1, 2, 5, 6])),  # floats would merge these
        (np.array([1.5, 2.0, 5.0, 4e15]), [2, 2, 5, 4 * 10**15]),  # microseconds would overflow
    ],
)
def test_times_that_stay_whole(time_R, expected):
    dataset = build(time_R=time_R)
    np.testing.assert_array_equal(dataset.log.time_E, expected)
    assert dataset.log.time_E.dtype == np.int64


@pytest.mark.parametrize(
    "missing", [np.datetime64("NaT"), np.iinfo(np.int64).min, np.nan, np.inf], ids=["NaT", "int", "nan", "inf"]
)
def test_missing_times_of_every_type(missing):
    time_R = np.array([10, 20, 5, missing]) if not isinstance(missing, np.datetime64) else seconds(10, 20, 5, 0)
    time_R[3] = missing
    found = problem(build(time_R=time_R), "missing_time")
    assert (found.occurrences, found.where) == (1, ("log:4",))


def test_numbered_ids_are_the_ids():
    """Names in any order, repeated and unused, with a missing one."""
    rows = [*GOOD, ("", "a", 1, 1)]
    user = Ids(np.array([3, 1, 0, 0, 2]), np.array(["u2", "u1", "", "u1", "u0"]))
    item = Ids(np.array([0, 2, 1, 3, 0]), np.array(["a", "c", "b", "a", "", "q"]))
    np.testing.assert_array_equal(user.strings(), [row[0] for row in rows])
    np.testing.assert_array_equal(item.strings(), [row[1] for row in rows])
    for items in (ITEMS, None):
        plain = build(rows, items=items)
        numbered = build_dataset(
            name="test",
            user_R=user,
            item_R=item,
            label_R=np.array([row[2] for row in rows]),
            time_R=np.array([row[3] for row in rows]),
            where=lambda row_R: [f"log:{row + 1}" for row in row_R],
            items=items,
            features={},
        )
        assert raw_events(numbered) == raw_events(plain) == GOOD
        assert numbered.problems == plain.problems
        assert numbered.fingerprint == plain.fingerprint


def test_user_of_one_event_is_kept_and_noted():
    dataset = build([*GOOD, ("u3", "a", 1, 1)], strict=True)
    assert problem(dataset, "user_of_one_event").where == ("user u3",)
    assert len(dataset.log.raw_user_U) == 3


def test_rare_items_then_rare_users_are_dropped_once():
    rows = [("u1", "a", 1, 1), ("u1", "b", 1, 2), ("u2", "a", 1, 1), ("u2", "a", 0, 2), ("u1", "a", 0, 3)]
    assert list(build(rows, min_item_events=2).items.raw_id_N) == ["", "a"]
    dataset = build([*rows, ("u3", "a", 1, 4)], min_item_events=2, min_user_events=2)
    assert list(dataset.log.raw_user_U) == ["u1", "u2"]


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="expected events, found none after dropping 4 x unknown_item"):
        build(items=RawItems(np.array(["q"]), np.array([""]), [()]))


def test_duplicate_items_keep_the_first():
    items = RawItems(np.array(["a", "b", "c", "a"]), np.array(["A", "B", "C", "again"]), [(), (), (), ()])
    dataset = build(items=items)
    assert problem(dataset, "duplicate_item").occurrences == 1
    assert "again" not in dataset.items.title_N


def test_no_nan_feature_passes():
    feature = np.ones((3, 2))
    feature[1, 0] = np.nan
    feature[2, 1] = np.inf
    dataset = build(features={"text": RawFeatures(np.array(["a", "b", "c"]), feature, "text.npz")})
    text = dataset.items.modalities["text"]
    np.testing.assert_array_equal(text.present_N, [False, True, False, False])
    np.testing.assert_array_equal(text.feature_NF, [[0, 0], [1, 1], [0, 0], [0, 0]])
    found = problem(dataset, "non_finite_text_feature")
    assert (found.occurrences, found.action) == (2, "masked")
    assert found.where == ("text.npz item b", "text.npz item c")
    with pytest.raises(ValueError, match="non_finite_text_feature"):
        build(features={"text": RawFeatures(np.array(["a", "b", "c"]), feature, "text.npz")}, strict=True)


def test_no_zero_feature_passes():
    """It has no direction, and stands for "none" in files of other programs."""
    raw = RawFeatures(np.array(["a", "b", "c"]), np.array([[1.0, 0], [0, 0], [0, 1e-60]]), "text.npz")
    dataset = build(features={"text": raw})
    np.testing.assert_array_equal(dataset.items.modalities["text"].present_N, [False, True, False, False])
    assert problem(dataset, "zero_text_feature")[1:] == (2, "masked", ("text.npz item b", "text.npz item c"))
    with pytest.raises(ValueError, match="refuses 2 x zero_text_feature"):
        build(features={"text": raw}, strict=True)


def test_missing_and_foreign_features():
    raw = RawFeatures(np.array(["c", "zz", "a"]), np.array([[3.0], [9.0], [1.0]]), "f.npz")
    dataset = build(features={"image": raw}, strict=True)
    image = dataset.items.modalities["image"]
    np.testing.assert_array_equal(image.feature_NF[:, 0], [0, 1, 0, 3])
    np.testing.assert_array_equal(image.present_N, [False, True, False, True])
    found = problem(dataset, "image_of_unknown_item")
    assert found[1:] == (1, "ignored", ("f.npz item zz",))
    assert problem(dataset, "item_without_image")[1:] == (1, "kept", ("item b",))


def test_features_of_filtered_items_are_ignored():
    raw = RawFeatures(np.array(["a", "b", "c"]), np.ones((3, 2)), "f.npz")
    dataset = build(features={"text": raw}, min_item_events=2, strict=True)
    assert problem(dataset, "text_of_unknown_item").occurrences == 2


def test_of_features_of_one_item_the_first_stays():
    raw = RawFeatures(np.array(["a", "c", "a", "b", "a"]), np.array([[1.0], [3], [8], [np.nan], [np.nan]]), "f.npz")
    dataset = build(features={"text": raw})
    text = dataset.items.modalities["text"]
    np.testing.assert_array_equal(text.feature_NF[:, 0], [0, 1, 0, 3])
    np.testing.assert_array_equal(text.present_N, [False, True, False, True])
    assert problem(dataset, "duplicate_text_feature")[1:] == (2, "dropped", ("f.npz item a", "f.npz item a"))
    assert problem(dataset, "non_finite_text_feature").where == ("f.npz item b",)
    with pytest.raises(ValueError, match="duplicate_text_feature"):
        build(features={"text": raw._replace(feature=np.ones((5, 1)))}, strict=True)


@pytest.mark.parametrize("action", ["dropped", "masked", "reordered", "noted", "kept", "filtered", "ignored"])
def test_strict_refuses_by_what_was_done(action):
    found = Problem("odd", 3, action, ("here",))
    if action in ("kept", "filtered", "ignored"):
        assert build(strict=True, problems=[found]).problems == (found,)
    else:
        with pytest.raises(ValueError, match=f"strict reading refuses 3 x odd .here.. Mend .* to have them {action}"):
            build(strict=True, problems=[found])


@pytest.mark.parametrize("shape", [(2, 4), (3,), (3, 0), (3, 2, 2)])
def test_features_of_the_wrong_shape_are_refused(shape):
    raw = RawFeatures(np.array(["a", "b", "c"]), np.ones(shape), "f.npz")
    with pytest.raises(ValueError, match=r"f.npz: expected one text vector for each of 3 ids.*found shape"):
        build(features={"text": raw})


def test_fingerprint_sees_content_not_row_order_between_users():
    same = build([GOOD[2], GOOD[3], GOOD[0], GOOD[1]])
    assert same.fingerprint == build().fingerprint
    assert build([*GOOD, ("u3", "a", 1, 1)]).fingerprint != build().fingerprint


def test_fingerprint_forgets_what_was_dropped():
    """A dropped row with a long id must not leave wider strings behind."""
    long = build([*GOOD, ("a user of a very long name", "a", 1, float("nan"))])
    assert long.fingerprint == build(GOOD).fingerprint
