"""Bad input: each kind is counted, placed and dropped or masked, or refused; nothing is lost in silence."""

import numpy as np
import pytest

from marsjax.data.cleaning import RawFeatures, RawItems, build_dataset

ITEMS = RawItems(np.array(["a", "b", "c"]), np.array(["A", "B", "C"]), [("x", "y"), ("x",), ()])
GOOD = [("u1", "a", 1, 10), ("u1", "b", 0, 20), ("u2", "c", 1, 5), ("u2", "a", 0, 6)]


def build(rows=GOOD, items=ITEMS, features=None, **options):
    user, item, label, time = zip(*rows, strict=True)
    return build_dataset(
        name="test",
        user_R=np.array(user),
        item_R=np.array(item),
        label_R=np.array(label, float),
        time_R=np.array(time, float),
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
        (("u1", "a", 0, 10), "duplicate_event"),
    ],
)
def test_bad_rows_are_dropped_counted_and_placed(row, kind):
    dataset = build([*GOOD, row])
    found = problem(dataset, kind)
    assert (found.occurrences, found.action) == (1, "dropped")
    assert found.where == ("log:5",)
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


def test_missing_and_foreign_features():
    raw = RawFeatures(np.array(["c", "zz", "a"]), np.array([[3.0], [9.0], [1.0]]), "f.npz")
    image = build(features={"image": raw}).items.modalities["image"]
    np.testing.assert_array_equal(image.feature_NF[:, 0], [0, 1, 0, 3])
    np.testing.assert_array_equal(image.present_N, [False, True, False, True])


@pytest.mark.parametrize("shape", [(2, 4), (3,), (3, 0), (3, 2, 2)])
def test_features_of_the_wrong_shape_are_refused(shape):
    raw = RawFeatures(np.array(["a", "b", "c"]), np.ones(shape), "f.npz")
    with pytest.raises(ValueError, match=r"f.npz: expected one text vector for each of 3 ids.*found shape"):
        build(features={"text": raw})


def test_fingerprint_sees_content_not_row_order_between_users():
    same = build([GOOD[2], GOOD[3], GOOD[0], GOOD[1]])
    assert same.fingerprint == build().fingerprint
    assert build([*GOOD, ("u3", "a", 1, 1)]).fingerprint != build().fingerprint
