"""The stage: what was encoded is not encoded again, and what is broken is told of and left out."""

import errno
import json
import threading

import numpy as np
import PIL.Image
import pytest

from marsjax import files
from marsjax.data.feature_files import read_features
from marsjax.features import encoding
from marsjax.features.encoding import READERS, encode_items
from marsjax.features.images import BrokenImage
from marsjax.features.signature import Encoded, Encoder

IDS = np.array([f"i{number}" for number in range(10)])
TEXTS = [f"text {number}" for number in range(10)]


def letters(seen=None, *, width=4, batch=3, stop_after=None, facts=(), worth=1.0):
    """An encoder whose vector can be worked out by hand; it notes what it was given, and may be killed."""
    seen = [] if seen is None else seen

    def encode(batch_B):
        if stop_after is not None and len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.extend(batch_B)
        row_BF = np.array([[worth * (len(text) + 1), sum(map(ord, text)), 0, 1] for text in batch_B], np.float32)
        return Encoded(row_BF[:, :width], np.array([len(text) > 20 for text in batch_B]))

    return Encoder(width, batch, {"encoder": "letters", **dict(facts)}, encode)


def encode(folder, encoder, *, ids=IDS, texts=TEXTS, reader=READERS["text"], **options):
    return encode_items("text", np.asarray(ids), texts, encoder, reader, folder=folder, facts={}, **options)


def rows(folder):
    """id -> vector, as every other stage reads them."""
    raw_id, feature, _ = read_features(folder / "text.npz")
    return dict(zip(raw_id, feature, strict=True))


def listing(folder):
    """What is there beside locks, which stay for those who wait for them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())["text"]


def test_rows_are_those_of_the_encoder_in_the_order_of_the_items(tmp_path):
    made = encode(tmp_path, letters())
    raw_id, feature, _ = read_features(made.path)
    assert list(raw_id) == list(IDS)
    np.testing.assert_array_equal(feature, letters().encode(TEXTS).row_BF)
    assert sorted(listing(tmp_path)) == ["manifest.json", "text.npz"]
    told = manifest(tmp_path)
    assert (told["encoder"], told["items"], told["vectors"], told["width"]) == ("letters", 10, 10, 4)
    assert told["sha256"] == files.sha256_file(tmp_path / "text.npz")


@pytest.mark.parametrize("stop_after", [0, 3, 9])
def test_killed_and_resumed_is_as_uninterrupted(tmp_path, stop_after):
    encode(tmp_path / "whole", letters())
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "killed", letters(stop_after=stop_after))
    assert not (tmp_path / "killed" / "text.npz").exists()
    seen = []
    encode(tmp_path / "killed", letters(seen))
    assert seen == TEXTS[stop_after:]
    assert listing(tmp_path / "killed") == listing(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_what_was_half_written_when_it_was_killed_is_made_again(tmp_path, damage):
    encode(tmp_path / "whole", letters())
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "killed", letters(stop_after=6))
    (journal,) = (tmp_path / "killed").glob(".text-*.partial")
    data = bytearray(journal.read_bytes())
    if damage == "cut":
        del data[-5:]
    else:
        data[-20] ^= 1
    journal.write_bytes(bytes(data))
    seen = []
    encode(tmp_path / "killed", letters(seen))
    assert seen == TEXTS[5:]
    assert listing(tmp_path / "killed") == listing(tmp_path / "whole")


def test_only_what_changed_is_encoded_again(tmp_path):
    encode(tmp_path, letters())
    seen = []
    encode(tmp_path, letters(seen))
    assert seen == []
    changed = [*TEXTS[:4], "another", *TEXTS[5:], "new"]
    encode(tmp_path, letters(seen), ids=[*IDS, "new"], texts=changed)
    assert seen == ["another", "new"]
    encode(tmp_path / "anew", letters(), ids=[*IDS, "new"], texts=changed)
    assert (tmp_path / "text.npz").read_bytes() == (tmp_path / "anew" / "text.npz").read_bytes()


def test_items_may_be_renamed_reordered_and_removed_for_nothing(tmp_path):
    encode(tmp_path, letters())
    seen = []
    encode(tmp_path, letters(seen), ids=["x", "y"], texts=[TEXTS[7], TEXTS[2]])
    assert seen == []
    np.testing.assert_array_equal(rows(tmp_path)["x"], letters().encode([TEXTS[7]]).row_BF[0])
    assert set(rows(tmp_path)) == {"x", "y"}


@pytest.mark.parametrize("facts", [{}, {"revision": "2"}])
def test_killed_before_the_manifest_is_written_the_vectors_stay_known(tmp_path, monkeypatch, facts):
    def killed(path, value):
        raise KeyboardInterrupt

    encode(tmp_path, letters())
    changed = ["another", *TEXTS[1:]]
    monkeypatch.setattr(files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, letters(facts=facts), texts=changed)
    monkeypatch.undo()
    for journal in tmp_path.glob(".*.partial"):
        journal.unlink()  # the kill may come between this and anything
    seen = []
    encode(tmp_path, letters(seen, facts=facts), texts=changed)
    assert seen == []
    encode(tmp_path / "whole", letters(facts=facts), texts=changed)
    assert (tmp_path / "text.npz").read_bytes() == (tmp_path / "whole" / "text.npz").read_bytes()
    assert manifest(tmp_path)["sha256"] == files.sha256_file(tmp_path / "text.npz")


def test_a_manifest_is_told_and_decides_nothing(tmp_path):
    """Vectors of one encoder are never taken for those of another, whatever the manifest says."""
    encode(tmp_path, letters())
    text = (tmp_path / "manifest.json").read_text().replace('"letters"', '"letters",\n    "revision": "2"')
    (tmp_path / "manifest.json").write_text(text)
    seen = []
    encode(tmp_path, letters(seen, facts={"revision": "2"}))
    assert seen == TEXTS


@pytest.mark.parametrize("change", [{"facts": {"revision": "2"}}, {"width": 3}])
def test_another_encoder_makes_everything_anew(tmp_path, change):
    encode(tmp_path, letters())
    seen = []
    encode(tmp_path, letters(seen, **change))
    assert seen == TEXTS


def test_notes_are_told_and_change_nothing(tmp_path):
    encode(tmp_path, letters(), notes={"loaded_from": "here"})
    seen = []
    encode(tmp_path, letters(seen), notes={"loaded_from": "there"})
    assert (seen, manifest(tmp_path)["loaded_from"]) == ([], "there")


def test_damaged_results_are_made_anew(tmp_path):
    encode(tmp_path, letters())
    whole = listing(tmp_path)
    data = bytearray(whole["text.npz"])
    data[data.index(rows(tmp_path)["i3"].tobytes())] ^= 1
    (tmp_path / "text.npz").write_bytes(bytes(data))
    encode(tmp_path, letters())
    assert listing(tmp_path) == whole


def test_equal_contents_are_encoded_once(tmp_path):
    seen = []
    encode(tmp_path, letters(seen, batch=2), texts=["same"] * 10)
    assert seen == ["same"]
    assert len(rows(tmp_path)) == 10


@pytest.mark.parametrize("batch", [1, 4, 10, 64])
def test_the_size_of_a_batch_changes_nothing(tmp_path, batch):
    encode(tmp_path / "a", letters(batch=3))
    encode(tmp_path / "b", letters(batch=batch))
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_large_values_are_encoded_before_the_batch_is_full(tmp_path, monkeypatch):
    """What is decoded is held until its batch is encoded: the memory is bounded by its pixels, not by their number."""
    monkeypatch.setattr(encoding, "PIXELS", 100)
    sizes, held = [], letters(batch=64)

    def count(batch):
        sizes.append(len(batch))
        return held.encode(batch)

    reader = READERS["text"]._replace(weigh=lambda text: 60 if text < "text 4" else 20)
    encode(tmp_path, held._replace(encode=count), reader=reader)
    assert sizes == [2, 2, 5, 1]
    assert READERS["image"].weigh(PIL.Image.new("RGB", (20, 30))) == 600


def test_missing_broken_and_repeated_items_are_told_of_and_have_no_row(tmp_path):
    def read(text):
        if text == "bad":
            raise BrokenImage("cut off")
        return text

    reader = READERS["text"]._replace(decode=lambda data: read(data.decode()))
    made = encode(tmp_path, letters(), ids=["a", "b", "c", "a", "d"], texts=["1", "", "bad", "2", None], reader=reader)
    assert set(rows(tmp_path)) == {"a"}
    np.testing.assert_array_equal(rows(tmp_path)["a"], letters().encode(["1"]).row_BF[0])
    assert [(p.kind, p.occurrences, p.action) for p in made.problems] == [
        ("duplicate_item", 1, "dropped"), ("missing_text", 2, "kept"), ("broken_text", 1, "masked"),
    ]  # fmt: skip
    assert made.problems[2].where == ("item c: cut off",)
    told = manifest(tmp_path)
    assert (told["items"], told["vectors"], told["missing"], told["repeated_ids"]) == (4, 1, 2, 1)
    assert told["broken"] == {"c": "cut off"}


def test_strict_refuses_what_is_broken_and_keeps_what_was_done(tmp_path):
    broken = ["1", "2", "\0", *TEXTS[3:]]

    def refuse(data):
        if data == b"\0":
            raise BrokenImage("cut off")
        return data.decode()

    reader = READERS["text"]._replace(decode=refuse)
    with pytest.raises(ValueError, match="strict reading refuses 1 x broken_text .item i2: cut off"):
        encode(tmp_path, letters(), texts=broken, reader=reader, strict=True)
    seen = []
    encode(tmp_path, letters(seen), texts=["1", "2", "mended", *TEXTS[3:]], strict=True)
    assert seen == ["mended"]


def test_no_vector_is_ever_silently_zero_or_infinite(tmp_path):
    """What float16 cannot hold, or an encoder cannot make, is broken."""
    made = encode(tmp_path, letters(worth=1e4), texts=["1" * 5, *["12345678"] * 9], dtype="float16")
    assert set(rows(tmp_path)) == {"i0"}
    assert [(p.kind, p.occurrences) for p in made.problems] == [("broken_text", 9)]


def test_a_zero_vector_is_broken(tmp_path):
    """An encoder may make one, and float16 makes zero of what is small."""
    for name, worth, dtype in (("zero", 0.0, "float32"), ("small", 1e-12, "float16")):
        row_F = np.full(4, worth, np.float32)
        encoder = letters()._replace(
            encode=lambda batch, row_F=row_F: Encoded(
                np.array([row_F if text == "text 3" else row_F + 1 for text in batch]), np.zeros(len(batch), bool)
            )
        )
        made = encode(tmp_path / name, encoder, dtype=dtype)
        assert set(rows(tmp_path / name)) == {*IDS} - {"i3"}
        assert [(p.kind, p.occurrences, p.where) for p in made.problems] == [
            ("broken_text", 1, ("item i3: a zero vector",))
        ]


def test_a_text_that_was_cut_is_counted_also_when_it_is_used_again(tmp_path):
    for _ in range(2):
        made = encode(tmp_path, letters(), texts=["x" * 30, *TEXTS[1:]])
        assert [(p.kind, p.occurrences, p.where) for p in made.problems] == [("long_text", 1, ("item i0",))]
        assert manifest(tmp_path)["cut"] == 1


def test_nothing_to_encode_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected items that can be encoded, found none among 10"):
        encode(tmp_path, letters(), texts=[""] * 10)


def test_a_full_disk_is_told_and_the_next_run_goes_on(tmp_path, monkeypatch):
    append, calls = encoding._append, []

    def full(file, data, path):
        calls.append(len(data))
        if len(calls) == 3:
            file.write(data[:7])  # a part of it
            file.flush()
            raise files.explain(OSError(errno.ENOSPC, "full"), path)
        append(file, data, path)

    monkeypatch.setattr(encoding, "_append", full)
    with pytest.raises(OSError, match="no space left while writing"):
        encode(tmp_path, letters())
    monkeypatch.undo()
    seen = []
    encode(tmp_path, letters(seen))
    assert seen == TEXTS[6:]


def test_a_really_full_disk(small_disk):
    wide = Encoder(
        100_000, 2, {}, lambda texts: Encoded(np.ones((len(texts), 100_000), np.float32), np.zeros(len(texts), bool))
    )
    with pytest.raises(OSError, match="no space left while writing .*partial"):
        encode(small_disk, wide)
    assert not (small_disk / "text.npz").exists()


@pytest.mark.parametrize("facts", [{}, {"revision": "2"}])
def test_two_processes_do_not_write_the_same(tmp_path, facts):
    """Not with another encoder either: the last one would remove what the other is writing."""

    def encode_inside(batch):
        with pytest.raises(ValueError, match="found another process encoding the same"):
            encode(tmp_path, letters(facts=facts))
        return letters().encode(batch)

    encode(tmp_path, letters()._replace(encode=encode_inside))


def test_a_modality_is_held_until_all_is_written(tmp_path, monkeypatch):
    write, tried = files.write_json, []

    def write_inside(path, value):
        with pytest.raises(ValueError, match="found another process encoding the same"):
            encode(tmp_path, letters())
        tried.append(path.name)
        write(path, value)

    monkeypatch.setattr(files, "write_json", write_inside)
    encode(tmp_path, letters())
    assert tried == ["manifest.json"]


def test_two_modalities_at_once_are_both_in_the_manifest(tmp_path, monkeypatch):
    write, others = files.write_json, []

    def encode_image():
        encode_items("image", IDS, TEXTS, letters(), READERS["text"], folder=tmp_path, facts={})

    def write_beside(path, value):
        if not others:  # what the other one would write now must not be written over
            others.append(threading.Thread(target=encode_image))
            others[0].start()
            others[0].join(0.5)
        write(path, value)

    monkeypatch.setattr(files, "write_json", write_beside)
    encode(tmp_path, letters())
    others[0].join()
    assert {*json.loads((tmp_path / "manifest.json").read_text())} == {"text", "image"}


def test_what_a_kill_left_of_the_results_is_removed(tmp_path):
    for name in (".text.npz.x7.partial", ".image.npz.x7.partial"):
        (tmp_path / name).touch()
    encode(tmp_path, letters())
    assert sorted(listing(tmp_path)) == [".image.npz.x7.partial", "manifest.json", "text.npz"]
