"""What is told of features is true of features whose meaning is known."""

import numpy as np
import pytest

from marsjax.evaluation import features_page
from marsjax.evaluation.page import Page, Section, to_html, to_markdown
from marsjax.records import Items, Modality

N, KINDS = 481, 3  # 480 items, each of one of three kinds; row 0 is padding


def make_items(*, informative=True, titles=None, width=6, seed=0):
    rng = np.random.default_rng(seed)
    kind_N = rng.integers(0, KINDS, N)
    centre_KF = 3.0 * rng.normal(size=(KINDS, width))
    modalities = {}
    for name in ("text", "image"):
        feature_NF = rng.normal(size=(N, width)) + (centre_KF[kind_N] if informative else 0) + 100.0
        present_N = np.arange(N) > 0
        present_N[1::20] = False
        modalities[name] = Modality((feature_NF * present_N[:, None]).astype(np.float32), present_N)
    category_NG = (kind_N[:, None] + 1).astype(np.int32)
    category_NG[0] = 0
    ids = np.array(["", *(f"i{n}" for n in range(1, N))])
    titles = np.array(["", *(f"title {n}" for n in range(1, N))]) if titles is None else titles
    return Items(ids, titles, category_NG, ("", "red", "green", "blue"), modalities)


def test_a_probe_tells_kinds_from_features_that_show_them_and_no_others():
    for informative, low, high in ((True, 0.98, 1.0), (False, 0.35, 0.65)):
        items = make_items(informative=informative)
        feature_NF, present_N = items.modalities["text"]
        auc_C = features_page.probe(feature_NF, present_N, features_page.has_category(items), seed=0)
        assert ((low <= auc_C) & (auc_C <= high)).all()


def test_a_probe_says_nothing_of_rare_kinds():
    items = make_items()
    items.category_NG[items.category_NG == 3] = 2
    items.category_NG[1:10] = 3
    auc_C = features_page.probe(*items.modalities["text"], features_page.has_category(items), seed=0)
    assert list(np.isfinite(auc_C)) == [True, True, False]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize(("count", "told"), [(2 * features_page.LEAST, True), (2 * features_page.LEAST - 1, False)])
def test_a_category_is_told_from_as_many_items_as_the_report_says(count, told, others):
    """As evenly dealt to both halves as can be; of what is not of the category as many are needed."""
    items = make_items()
    feature_NF, present_N = items.modalities["text"]
    known = np.random.default_rng(0).permutation(np.flatnonzero(present_N))
    member_NC = np.zeros((N, 2), bool)
    member_NC[known, 1] = True  # everything else has a category too
    member_NC[known[np.linspace(0, len(known) - 1, count).astype(int)], 0] = True
    member_NC[:, 0] ^= others & present_N
    auc_C = features_page.probe(feature_NF, present_N, member_NC, seed=0)
    assert list(np.isfinite(auc_C)) == [told, False]
    assert f"holds {features_page.LEAST} items of it or more, and {features_page.LEAST} or more" in features_page.PROBES


def test_a_probe_does_not_hang_on_the_scale_of_the_features():
    items = make_items(informative=False, seed=3)
    feature_NF, present_N = items.modalities["text"]
    member_NC = features_page.has_category(items)
    scale_F = 10.0 ** np.arange(-3, 3)
    auc_C, scaled_C = (features_page.probe(f, present_N, member_NC, seed=0) for f in (feature_NF, feature_NF * scale_F))
    np.testing.assert_allclose(auc_C, scaled_C, atol=1e-3)


def test_neighbours_are_the_nearest_others_that_are_present():
    items = make_items()
    feature_NF, present_N = items.modalities["image"]
    unit_NF = features_page.cosines(feature_NF, present_N)
    query_Q = np.array([2, 3, 50])
    near_QK, cosine_QK = features_page.nearest(unit_NF, present_N, query_Q, k=4)
    moved_NF = feature_NF - feature_NF[present_N].mean(axis=0)
    for query, near_K, cosine_K in zip(query_Q, near_QK, cosine_QK, strict=True):
        all_N = moved_NF @ moved_NF[query] / np.linalg.norm(moved_NF, axis=1) / np.linalg.norm(moved_NF[query])
        others = [n for n in np.argsort(-all_N) if present_N[n] and n != query][:4]
        assert list(near_K) == others
        np.testing.assert_allclose(cosine_K, all_N[others], atol=1e-4)


def test_neighbours_share_a_kind_where_features_show_it_and_as_often_as_chance_elsewhere():
    for informative in (True, False):
        items = make_items(informative=informative)
        feature_NF, present_N = items.modalities["text"]
        unit_NF = features_page.cosines(feature_NF, present_N)
        near, random = features_page.shared_category(unit_NF, present_N, features_page.has_category(items), seed=0)
        assert random == pytest.approx(1 / 3, abs=0.06)
        assert near > 0.9 if informative else near == pytest.approx(1 / 3, abs=0.06)


def test_the_map_keeps_kinds_apart_that_the_vectors_keep_apart():
    items = make_items()
    plot = features_page.map_of(features_page.cosines(*items.modalities["text"]), items, seed=0)
    middle = {series.name: np.array([np.mean(series.x), np.mean(series.y)]) for series in plot.series}
    spread = max(np.std(series.x) + np.std(series.y) for series in plot.series)
    assert set(middle) == {"red", "green", "blue"}
    assert min(np.linalg.norm(middle[a] - middle[b]) for a, b in (("red", "green"), ("green", "blue"))) > spread / 2


def test_items_without_categories_are_on_the_map_all_the_same():
    items = make_items()
    bare = items._replace(category_NG=np.zeros((N, 1), np.int32), category_names=("",))
    (series,) = features_page.map_of(features_page.cosines(*items.modalities["text"]), bare, seed=0).series
    assert (series.name, len(series.x)) == ("items", N - 1)


def test_the_section_needs_nothing_beside_it_and_shows_pictures_and_titles(tmp_path):
    PIL = pytest.importorskip("PIL.Image")
    items = make_items(titles=np.array(["", *(f"a <b> & {n}" for n in range(1, N))]))
    PIL.new("RGB", (8, 12), "red").save(tmp_path / "i.png")
    spaces = {name: tuple(modality) for name, modality in items.modalities.items()}
    cases = features_page.neighbour_cases(items, spaces, {f"i{n}": tmp_path / "i.png" for n in range(1, N, 2)}, seed=0)
    gap = features_page.gap_table({"modality_gap": 1.2, "gamma": 1.0}, {"modality_gap": 0.4, "gamma": 2.0})
    drawn = (
        *features_page.probe_tables(items, seed=0),
        gap,
        features_page.map_of(spaces["text"][0], items, seed=0),
        *cases,
    )
    html = to_html(Page("t", (), (Section("features", "", drawn),)))
    assert len(cases) == 6
    assert all(
        [name for name, _ in case.strips] == ["the item", "nearest by text", "nearest by image"] for case in cases
    )
    assert "data:image/png;base64," in html
    assert "a &lt;b&gt; &amp; " in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "modality_gap | 1.2000 | 0.4000" in to_markdown(Page("t", (), (Section("f", "", drawn),)), plots=None)
