"""Published data in their official formats: small files that are written here."""

import gzip
import hashlib
import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from marsjax.configuration import load_config
from marsjax.data.amazon import amazon_content, load_amazon
from marsjax.data.checks import k_core, sum_problems
from marsjax.data.microlens import draw_negatives, load_microlens, microlens_content
from marsjax.data.mind import load_mind, mind_content
from marsjax.data.movielens import movielens_content
from marsjax.data.tabular import load_tabular, tabular_content


def kinds(dataset):
    return {problem.kind: problem.occurrences for problem in dataset.problems}


# --- Amazon ---------------------------------------------------------------------------------------------------------


def review_2014(user, item, rating=5.0, time=1):
    return {
        "reviewerID": user, "asin": item, "reviewerName": "A", "helpful": [0, 0], "reviewText": "t", "overall": rating,
        "summary": "s", "unixReviewTime": time, "reviewTime": "01 1, 2014",
    }  # fmt: skip


def review_2023(user, item, rating=5.0, time=1):
    return {
        "rating": rating, "title": "s", "text": "t", "images": [], "asin": f"{item}-blue", "parent_asin": item,
        "user_id": user, "timestamp": 1_000 * time, "helpful_vote": 0, "verified_purchase": True,
    }  # fmt: skip


META_2014 = (
    "{'asin': 'a', 'title': \"It's a soap\", 'imUrl': 'http://x/a.jpg', 'categories': [['Beauty', 'Bath']], "
    "'description': 'Washes.', 'brand': 'Bo', 'salesRank': {'Beauty': 1}}\n"
    "{'asin': 'b', 'categories': [['Beauty']]}\n"
)
META_2023 = [
    {
        "main_category": "All Beauty", "title": "It's a soap", "average_rating": 4.5, "rating_number": 3,
        "features": ["soft", "blue"], "description": ["Washes."], "price": None, "videos": [], "store": "Bo",
        "images": [{"thumb": "http://x/t.jpg", "large": "http://x/a.jpg", "variant": "MAIN", "hi_res": None}],
        "categories": ["Beauty", "Bath"], "details": {}, "parent_asin": "a", "bought_together": None,
    },
    {"title": None, "features": [], "description": [], "images": [], "store": None, "parent_asin": "b"},
]  # fmt: skip


def write_lines(path, lines):
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(("review", "meta", "unit"), [(review_2014, META_2014, 1), (review_2023, META_2023, 1000)])
@pytest.mark.parametrize("ending", ["json.gz", "jsonl"])
def test_amazon_of_both_years(tmp_path, review, meta, unit, ending):
    reviews = [review("u", "a", 5.0, 20), review("u", "b", 3.0, 10), review("v", "c", 4.0, 30)]
    dataset = load_amazon(
        write_lines(tmp_path / f"reviews.{ending}", reviews),
        metadata=write_lines(tmp_path / f"meta.{ending}", meta),
        features={},
        strict=True,
    )
    assert list(dataset.items.raw_id_N) == ["", "a", "b", "c"]
    assert list(dataset.items.title_N) == ["", "It's a soap", "", ""]
    assert [dataset.items.category_names[g] for g in dataset.items.category_NG[1] if g] in (["Beauty", "Bath"],)
    np.testing.assert_array_equal(dataset.log.item_E, [2, 1, 3])  # by time
    np.testing.assert_array_equal(dataset.log.label_E, [0, 1, 1])
    np.testing.assert_array_equal(dataset.log.time_E, np.array([10, 20, 30]) * unit)
    assert kinds(dataset)["item_without_metadata"] == 1


@pytest.mark.parametrize("meta", [META_2014, META_2023])
def test_amazon_content(tmp_path, meta):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    content = amazon_content(write_lines(tmp_path / "m.json.gz", meta), image_folder=tmp_path / "images")
    row = {name: column[0] for name, column in content.fields.items()}
    assert row | {"features": ""} == {
        "title": "It's a soap", "categories": "Beauty, Bath", "brand": "Bo", "description": "Washes.", "features": "",
        "image_url": "http://x/a.jpg",
    }  # fmt: skip
    assert [path and path.name for path in content.image_I] == ["a.jpg", None]
    reviews = write_lines(tmp_path / "r.json.gz", [review_2014("u", "b")])
    assert list(amazon_content(tmp_path / "m.json.gz", reviews=reviews).raw_id_I) == ["b"]


def test_amazon_core_and_counts(tmp_path):
    """v has one review and goes; then b has one, and goes too."""
    reviews = [review_2014(u, i) for u, i in [("u", "a"), ("u", "c"), ("w", "a"), ("w", "c"), ("w", "b"), ("v", "b")]]
    path = write_lines(tmp_path / "reviews_Beauty_5.json.gz", reviews)
    good = {"events": 4, "users": 2, "items": 2}
    dataset = load_amazon(path, features={}, core=2, expected=good, strict=True)
    assert (dataset.name, list(dataset.items.raw_id_N)) == ("reviews_Beauty_5", ["", "a", "c"])
    assert kinds(dataset) == {"outside_core": 2}
    (problem, *_) = load_amazon(path, features={}, core=2, expected=good | {"users": 3}).problems
    assert (problem.kind, problem.where) == ("count_differs", ("2 users, expected 3",))
    with pytest.raises(ValueError, match="strict reading refuses 1 x count_differs .2 users, expected 3"):
        load_amazon(path, features={}, core=2, expected=good | {"users": 3}, strict=True)


def test_a_repeated_review_of_2023_does_not_count_for_the_core(tmp_path):
    """w reviews only one product, twice; u reviews one again, later in time and earlier in the file."""
    pairs = [("u", "a", 9), ("u", "a", 1), ("u", "b", 2), ("v", "a", 3), ("v", "b", 4), ("w", "b", 5), ("w", "b", 6)]

    def load(review, core):
        path = write_lines(tmp_path / "All_Beauty.jsonl", [review(user, item, 5.0, time) for user, item, time in pairs])
        return load_amazon(path, features={}, core=core, strict=True), path

    dataset, path = load(review_2023, 2)
    assert list(dataset.log.raw_user_U) == ["u", "v"]
    np.testing.assert_array_equal(dataset.log.time_E, np.array([1, 2, 3, 4]) * 1000)
    assert kinds(dataset) == {"later_review": 2, "outside_core": 1}
    meta = write_lines(tmp_path / "meta.jsonl", [{"parent_asin": name} for name in "abc"])
    assert list(amazon_content(meta, reviews=path, core=2).raw_id_I) == ["a", "b"]
    assert list(amazon_content(meta, reviews=path, core=3).raw_id_I) == []
    assert len(load(review_2023, 0)[0].log.item_E) == 7
    assert len(load(review_2014, 2)[0].log.item_E) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"asin": "a"}\n', "reviews.json:1: expected a review of 2014"),
        ('{"reviewerID": "u", "asin": "a", "overall": 5}\n', "found no unixReviewTime"),
        ("[1]\n", "reviews.json:1: expected one JSON object a line"),
        ("{}\n{'a': 1}\n", "reviews.json:1: expected a review"),
        ("__import__('os').abort()\n", "reviews.json:1: expected one JSON object a line"),
    ],
)
def test_other_lines_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_amazon(write_lines(tmp_path / "reviews.json", text), features={})


def test_metadata_are_read_and_never_run(tmp_path):
    path = write_lines(tmp_path / "meta.json", "{'asin': __import__('os').abort()}\n")
    with pytest.raises(ValueError, match="meta.json:1: expected one JSON object a line"):
        amazon_content(path)


def test_a_truncated_dump_is_named(tmp_path):
    path = write_lines(tmp_path / "reviews.json.gz", [review_2014(f"u{n}", "a") for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="reviews.json.gz: the file is damaged or truncated after line"):
        load_amazon(path, features={})
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="damaged or truncated after line 0"):
        load_amazon(path, features={})


@pytest.mark.parametrize("k", [2, 3, 4])
def test_k_core_is_the_largest_set_with_k_each(k):
    rng = np.random.default_rng(k)
    user_R, item_R = rng.integers(0, 15, 60), rng.integers(0, 12, 60)
    keep_R = k_core(user_R, item_R, k)
    left = set(range(len(user_R)))
    while True:  # one row at a time, in any order, leads to the same set
        bad = [
            row for row in left
            if sum(user_R[row] == user_R[other] for other in left) < k
            or sum(item_R[row] == item_R[other] for other in left) < k
        ]  # fmt: skip
        if not bad:
            break
        left.remove(bad[-1])
    assert set(np.flatnonzero(keep_R)) == left


@pytest.mark.parametrize(
    ("variant", "expected"), [("beauty", (7, 60_276, 4_322, 2_423)), ("toys", (5, 167_597, 19_412, 11_924))]
)
def test_the_papers_amazon_data_are_variants(variant, expected):
    data = load_config(f"configs/amazon.py:{variant},minilm", {}).data
    assert (data.core, data.expected_events, data.expected_users, data.expected_items) == expected


# --- long texts ------------------------------------------------------------------------------------------------------

LONG = "x" * 100_000


def table_of_texts(folder):
    columns = {"what": [str(n) for n in range(300)], "text": [LONG, *["short"] * 299]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "items.parquet")
    return tabular_content(items_path=folder / "items.parquet", item="what", fields=["text"]).fields["text"]


def titles_of_a_table(folder):
    table_of_texts(folder)
    events = {"who": ["u"] * 300, "what": [str(n) for n in range(300)], "label": [1] * 300, "time": list(range(300))}
    pyarrow.parquet.write_table(pyarrow.table(events), folder / "events.parquet")
    columns = {"user": "who", "item": "what", "title": "text", "categories": "text"}
    dataset = load_tabular(
        events_path=folder / "events.parquet", items_path=folder / "items.parquet", columns=columns, features={}
    )
    return dataset.items.title_N[1:]


def texts_of_amazon(folder):
    lines = [{"parent_asin": str(n), "title": "t", "description": "short" if n else LONG} for n in range(300)]
    return amazon_content(write_lines(folder / "meta.jsonl", lines)).fields["description"]


def texts_of_mind(folder):
    news = [f"N{n}\tsports\tfootball\tA match\t{'short' if n else LONG}\thttps://x\t[]\t[]" for n in range(300)]
    return mind_content([write_mind(folder / "mind", [""], news)]).fields["abstract"]


def texts_of_microlens(folder):
    rows = "".join(f"{n},{'short' if n else LONG}\n" for n in range(300))
    (folder / "titles.csv").write_text(f"item,title\n{rows}")
    return microlens_content(folder / "titles.csv").fields["title"]


def texts_of_movielens(folder):
    (folder / "movies.dat").write_text("".join(f"{n}::title::Action\n" for n in range(300)))
    texts = write_lines(folder / "texts.jsonl", [{"id": n, "text": "short" if n else LONG} for n in range(300)])
    return movielens_content(folder, texts=texts).fields["text"]


@pytest.mark.parametrize(
    "read",
    [table_of_texts, titles_of_a_table, texts_of_amazon, texts_of_mind, texts_of_microlens, texts_of_movielens],
)
def test_one_long_text_does_not_widen_all_others(tmp_path, read):
    """300 texts that are held in the width of the longest are 120 MB."""
    tracemalloc.start()
    texts = read(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (texts[0], list(texts[1:])) == (LONG, ["short"] * 299)
    assert peak < 12e6


# --- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_files_are_held_against_their_sums(tmp_path, kind):
    (tmp_path / "a.dat").write_bytes(b"abc")
    (tmp_path / "b.dat").write_bytes(b"xyz")
    lines = [f"{hashlib.new(kind, data).hexdigest()}  {name}" for name, data in (("a.dat", b"abc"), ("b.dat", b"xyz"))]
    sums = tmp_path / "SUMS"
    sums.write_text("\n".join(lines) + "\n")
    assert sum_problems(sums) == []
    (tmp_path / "b.dat").write_bytes(b"xy")
    (problem,) = sum_problems(sums)
    assert (problem.kind, problem.action, problem.where) == ("checksum_differs", "noted", ("b.dat",))


@pytest.mark.parametrize("line", ["abc  a.dat", "", "x" * 64])
def test_a_list_of_sums_that_is_none_is_refused(tmp_path, line):
    (tmp_path / "SUMS").write_text(f"{line or '0' * 64 + '  absent'}\n")
    with pytest.raises(ValueError, match="SUMS:1: expected"):
        sum_problems(tmp_path / "SUMS")


# --- MicroLens ------------------------------------------------------------------------------------------------------


def write_microlens(folder):
    pairs = folder / "MicroLens-50k_pairs.csv"
    rows = [
        f"{u},{i},{1_600_000_000_000 + n}" for n, (u, i) in enumerate((u, i) for u in range(6) for i in range(u, u + 4))
    ]
    pairs.write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    titles = folder / "MicroLens-50k_titles.csv"
    titles.write_text(
        'item,title\n0,"Soap, soft #shorts"\n1,\N{PILE OF POO}\n' + "".join(f"{i},t{i}\n" for i in range(2, 9))
    )
    return pairs, titles


def test_microlens_has_as_many_clicks_as_drawn_videos_that_were_never_met(tmp_path):
    pairs, titles = write_microlens(tmp_path)
    dataset, again = (load_microlens(pairs, titles=titles, features={}, strict=True) for _ in range(2))
    assert dataset.fingerprint == again.fingerprint
    log = dataset.log
    user_E = np.repeat(np.arange(6), np.diff(log.start_U1))
    clicked = {(u, i) for u, i, y in zip(user_E, log.item_E, log.label_E, strict=True) if y}
    drawn = {(u, i) for u, i, y in zip(user_E, log.item_E, log.label_E, strict=True) if not y}
    assert clicked == {(u, i + 1) for u in range(6) for i in range(u, u + 4)}
    assert not clicked & drawn
    assert log.label_E.mean() == 0.5
    assert dataset.items.title_N[1] == "Soap, soft #shorts"
    content = microlens_content(titles)
    assert content.fields["title"][1] == "\N{PILE OF POO}"


def test_what_is_drawn_stands_before_a_click_as_often_as_after():
    user_R = np.arange(2000)
    item_R = user_R % 50
    drawn_R = draw_negatives(user_R, item_R, 1, seed=0)
    assert (drawn_R != item_R).all()
    assert len(np.unique(drawn_R)) == 50


def test_order_of_click_and_drawn_video_tells_nothing(tmp_path):
    rows = [f"{u},{(u * 7) % 40},{u}" for u in range(1000)]
    (tmp_path / "M_pairs.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    dataset = load_microlens(tmp_path / "M_pairs.csv", features={}, strict=False)
    first_U = dataset.log.label_E[dataset.log.start_U1[:-1]]
    assert 0.45 < first_U.mean() < 0.55


def test_microlens_of_users_who_met_everything_is_refused():
    with pytest.raises(ValueError, match="found 1 who met nearly all"):
        draw_negatives(np.zeros(4, int), np.arange(4), 1, seed=0)


def test_other_microlens_files_are_named(tmp_path):
    (tmp_path / "p.csv").write_text("a,b,c\n1,2,3\n")
    with pytest.raises(ValueError, match="p.csv:1: expected the columns user,item,timestamp, found a,b,c"):
        load_microlens(tmp_path / "p.csv", features={})
    (tmp_path / "p.csv").write_text("user,item,timestamp\n1,2\n")
    with pytest.raises(ValueError, match="p.csv:2: expected user,item,timestamp"):
        load_microlens(tmp_path / "p.csv", features={})


# --- MIND -----------------------------------------------------------------------------------------------------------

NEWS = [
    "N1\tsports\tfootball\tA match\tTwo teams.\thttps://x\t[]\t[]",
    "N2\tnews\tworld\tAn election\t\thttps://y\t[]\t[]",
    "N3\tfood\trecipes\tPasta\tHow to cook.\thttps://z\t[]\t[]",
]


def write_mind(folder, behaviors, news=NEWS):
    folder.mkdir()
    (folder / "news.tsv").write_text("\n".join(news) + "\n", encoding="utf-8")
    (folder / "behaviors.tsv").write_text("\n".join(behaviors) + "\n", encoding="utf-8")
    return folder


def test_mind_impressions_are_events(tmp_path):
    train = write_mind(
        tmp_path / "train",
        ["1\tU7\t11/12/2019 6:11:30 PM\tN9 N8\tN1-0 N2-1", "2\tU8\t11/11/2019 12:00:01 AM\t\tN3-1"],
    )
    dev = write_mind(tmp_path / "dev", ["1\tU7\t11/15/2019 9:00:00 AM\tN9\tN3-0"])
    dataset = load_mind([train, dev], features={}, expected={"events": 3, "users": 2, "items": 3}, strict=True)
    assert list(dataset.log.raw_user_U) == ["U7", "U8"]
    np.testing.assert_array_equal(dataset.log.item_E, [1, 2, 3, 3])
    np.testing.assert_array_equal(dataset.log.label_E, [0, 1, 0, 1])
    stamps = np.array(
        ["2019-11-12T18:11:30", "2019-11-12T18:11:30", "2019-11-15T09", "2019-11-11T00:00:01"], "datetime64[s]"
    )
    np.testing.assert_array_equal(dataset.log.time_E, stamps.astype(np.int64))
    assert dataset.items.title_N[2] == "An election"
    content = mind_content([train, dev])
    assert list(content.raw_id_I) == ["N1", "N2", "N3"]
    assert list(content.fields["abstract"]) == ["Two teams.", "", "How to cook."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\tU\t11/12/2019 6:11:30 PM\tN1", "behaviors.tsv:1: expected 5 columns, found 4"),
        ("1\tU\t2019-11-12\t\tN1-1", "behaviors.tsv:1: expected impression, user, time"),
        ("1\tU\t11/12/2019 6:11:30 PM\t\tN1 N2", "found impressions 'N1 N2'"),
    ],
)
def test_other_mind_lines_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        load_mind([write_mind(tmp_path / "x", [line])], features={})


# --- KuaiRand -------------------------------------------------------------------------------------------------------


def test_kuairand_is_a_table(tmp_path):
    from marsjax import pipeline

    log = tmp_path / "log_standard_4_22_to_5_08_pure.csv"
    head = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,long_view,play_time_ms,duration_ms,tab"
    rows = [
        f"{u},{v},20220422,100,{1650558500000 + 10 * u + v},{(u + v) % 2},0,0,0,1,2,1"
        for u in range(3)
        for v in range(4)
    ]
    log.write_text("\n".join([head, *rows]) + "\n")
    videos = tmp_path / "video_features_basic_pure.csv"
    videos.write_text(
        "video_id,author_id,video_type,upload_dt,tag\n"
        + "".join(f'{v},1,NORMAL,2022-04-01,"{v},7"\n' for v in range(4))
    )
    config = load_config("configs/kuairand.py", {"data.events_file": str(log), "data.items_file": str(videos)})
    dataset = pipeline.read(config)
    assert (len(dataset.log.raw_user_U), len(dataset.items.raw_id_N) - 1, len(dataset.log.item_E)) == (3, 4, 12)
    assert dataset.items.category_names == ("", "0", "1", "2", "3", "7")
    assert dataset.log.time_E[0] == 1650558500000
    assert not {"count_differs", "checksum_differs"} & {*kinds(dataset)}
    (tmp_path / "SUMS").write_text(f"{'0' * 64}  {log.name}\n")
    config.data.update(expected_events=12, expected_users=3, expected_items=7, checksums=str(tmp_path / "SUMS"))
    problems = {problem.kind: problem.where for problem in pipeline.read(config).problems}
    assert problems["count_differs"] == ("4 items, expected 7",)
    assert problems["checksum_differs"] == (log.name,)
    config.data.strict = True
    with pytest.raises(ValueError, match="refuses 1 x checksum_differs .*; 1 x count_differs"):
        pipeline.read(config)
