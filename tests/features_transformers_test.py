"""Encoders of the LLaMA class and the tower of Qwen2.5-VL, as small models with random weights, saved and loaded."""

import json
import shutil
import types

import numpy as np
import PIL.Image
import pytest

from marsjax.defaults import default_config
from marsjax.features.hub import place
from marsjax.features.llama import make_llama
from marsjax.features.qwen_vision import make_qwen_vision
from marsjax.features.signature import Options

torch = pytest.importorskip("torch", reason="PyTorch is absent: tools/setup transformers")
transformers = pytest.importorskip("transformers", reason="transformers is absent: tools/setup transformers")
safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore")  # what other people's packages warn of is theirs

WORDS = ["a", "the", "cat", "sat", "on", "mat", "stars", "night", "sky", "of", "and"]
TEXTS = ["cat", "the cat sat on the mat", "stars of the night and the sky", "a mat"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_llama(folder, **changes):
    torch.manual_seed(0)
    small = {
        "vocab_size": len(WORDS) + 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(small | changes)))
    model.save_pretrained(folder)
    names = ["<unk>", "<s>", "</s>", *WORDS]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return model.eval()


def save_qwen(folder, **changes):
    torch.manual_seed(0)
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 24,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        "vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision |= changes
    text["hidden_size"] = vision["out_hidden_size"]
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=1, video_token_id=2, vision_start_token_id=3,
        vision_end_token_id=4,
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_llama(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, save_qwen(folder)


def images():
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in [(60, 90), (90, 60), (200, 50)]]


def test_llama_is_the_mean_over_the_last_layer_without_padding(llama):
    folder, model = llama
    encoder = make_llama(Options(model=str(folder)), TEXTS)
    row_BF = encoder.encode(TEXTS).row_BF
    for text, row_F in zip(TEXTS, row_BF, strict=True):
        ids = torch.tensor([[1, *(WORDS.index(word) + 3 for word in text.split())]])  # alone: nothing is padded
        with torch.no_grad():
            expected_F = model.model(ids).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(row_F, expected_F, atol=1e-5)
    assert (encoder.width, encoder.facts["computed_in"]) == (16, "float32")
    json.dumps(dict(encoder.facts))


def test_what_lies_beside_the_weights_is_part_of_the_encoder(llama, qwen, tmp_path):
    for make, (folder, _) in ((make_llama, llama), (make_qwen_vision, qwen)):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        before = dict(make(Options(model=str(copy)), []).facts)
        (copy / "generation_config.json").write_text("{}\n")
        after = dict(make(Options(model=str(copy)), []).facts)
        assert {name for name in after if after[name] != before[name]} == {"settings_sha256"}


def test_the_company_in_a_batch_changes_nothing(llama, qwen):
    for make, folder, inputs in ((make_llama, llama[0], TEXTS), (make_qwen_vision, qwen[0], images())):
        encoder = make(Options(model=str(folder)), inputs)
        apart = np.concatenate([encoder.encode([one]).row_BF for one in inputs])
        np.testing.assert_allclose(encoder.encode(inputs).row_BF, apart, atol=1e-5)


def test_llama_cuts_what_is_longer_and_says_so(llama):
    encoder = make_llama(Options(model=str(llama[0]), max_tokens=4), [])
    encoded = encoder.encode(["the cat sat", "the cat sat on", "the cat sat on mat"])
    assert list(encoded.cut_B) == [False, True, True]
    np.testing.assert_allclose(encoded.row_BF[1:], encoded.row_BF[[0, 0]], atol=1e-6)


def test_qwen_is_the_mean_over_merged_patches_of_the_tower_alone(qwen):
    folder, model = qwen
    row_BF = make_qwen_vision(Options(model=str(folder)), []).encode(images()).row_BF
    assert row_BF.shape == (3, 24)
    for image, row_F in zip(images(), row_BF, strict=True):
        seen = transformers.Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28})(
            images=[image], return_tensors="pt"
        )
        with torch.no_grad():
            merged = model.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
        assert len(merged) == seen["image_grid_thw"].prod() / 4
        np.testing.assert_allclose(row_F, merged.mean(dim=0).numpy(), atol=1e-5)


@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", ""])
def test_the_tower_is_found_under_all_names_it_was_published_with(qwen, tmp_path, prefix):
    folder, model = qwen
    shutil.copytree(folder, tmp_path / "model")
    weights = {f"{prefix}{name}": value.contiguous() for name, value in model.model.visual.state_dict().items()}
    safetensors.save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    rows = [
        make_qwen_vision(Options(model=str(where)), []).encode(images()).row_BF
        for where in (folder, tmp_path / "model")
    ]
    np.testing.assert_allclose(*rows, atol=1e-6)


def test_weights_that_lack_a_part_of_the_tower_are_refused(qwen, tmp_path):
    folder, model = qwen
    shutil.copytree(folder, tmp_path / "model")
    weights = {
        f"visual.{name}": value for name, value in model.model.visual.state_dict().items() if "merger" not in name
    }
    safetensors.save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected all weights of the vision tower, found none for merger"):
        make_qwen_vision(Options(model=str(tmp_path / "model")), [])


def test_a_strip_that_the_tower_cannot_take_has_no_vector(qwen):
    row_BF = make_qwen_vision(Options(model=str(qwen[0])), []).encode([PIL.Image.new("RGB", (3000, 10))]).row_BF
    assert np.isnan(row_BF).all()


def test_the_published_widths_are_checked(llama, qwen, tmp_path):
    """4096 and 3584 pass, and nothing else does."""
    cfg = default_config().features
    assert (cfg.text_expected, cfg.image_expected) == (4096, 3584)
    assert transformers.Qwen2_5_VLConfig().vision_config.out_hidden_size == cfg.image_expected
    assert transformers.LlamaConfig().hidden_size == cfg.text_expected
    save_llama(tmp_path / "llama", hidden_size=4096, head_dim=8, num_hidden_layers=1, intermediate_size=8)
    save_qwen(tmp_path / "qwen", out_hidden_size=3584, depth=1)
    text = make_llama(Options(model=str(tmp_path / "llama"), expected_width=cfg.text_expected), [])
    image = make_qwen_vision(Options(model=str(tmp_path / "qwen"), expected_width=cfg.image_expected), [])
    assert text.encode(TEXTS).row_BF.shape == (4, 4096)
    assert image.encode(images()).row_BF.shape == (3, 3584)
    with pytest.raises(ValueError, match="llama: expected a model of width 4096, found 16"):
        make_llama(Options(model=str(llama[0]), expected_width=4096), [])
    with pytest.raises(ValueError, match="qwen_vision: expected a model of width 3584, found 24"):
        make_qwen_vision(Options(model=str(qwen[0]), expected_width=3584), [])


def test_what_is_no_such_model_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="expected a Qwen2.5-VL or its vision tower, found a llama"):
        make_qwen_vision(Options(model=str(llama[0])), [])
    with pytest.raises(ValueError, match="expected features.text_model, a folder or a hub name, found none"):
        make_llama(Options(), [])
    shutil.copytree(llama[0], tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="expected weights in \\*.safetensors, found none"):
        make_llama(Options(model=str(tmp_path / "pickled")), [])


@pytest.mark.parametrize(
    ("has_gpu", "has_bfloat16", "expected"),
    [(False, False, ("cpu", "float32")), (True, False, ("cuda", "float32")), (True, True, ("cuda", "bfloat16"))],
)
def test_bfloat16_where_the_device_has_it(has_gpu, has_bfloat16, expected):
    cuda = types.SimpleNamespace(is_available=lambda: has_gpu, is_bf16_supported=lambda: has_bfloat16)
    assert place(types.SimpleNamespace(cuda=cuda, float32="float32", bfloat16="bfloat16")) == expected


def test_other_weights_are_other_facts(llama, tmp_path):
    save_llama(tmp_path, num_hidden_layers=1)
    one, two = (make_llama(Options(model=str(folder)), []).facts["weights_sha256"] for folder in (llama[0], tmp_path))
    assert one != two
