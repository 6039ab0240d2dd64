"""Images as people have them: every kind is read as what it shows, and what is broken is a reason, not a crash."""

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest

from marsjax.data.content import find_images, read_texts
from marsjax.features.colour import make_colour
from marsjax.features.encoding import READERS, encode_items
from marsjax.features.images import BrokenImage, read_image
from marsjax.features.signature import Options

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(colour=RED, size=(40, 30)):
    return PIL.Image.new("RGB", size, colour)


def png_of(width, height):
    """A PNG that says it is this large, with next to no data."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def noisy_jpeg():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    return saved(PIL.Image.fromarray(pixels), "JPEG", quality=95)


def sixteen_bits():
    return saved(PIL.Image.fromarray(np.full((30, 40), 0x80FF, np.uint16)), "PNG")


def animated(kind):
    return saved(plain(RED), kind, save_all=True, append_images=[plain(BLUE)], duration=50)


def transparent():
    image = PIL.Image.new("RGBA", (40, 30), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 30))
    return saved(image, "PNG")


def palette():
    return saved(plain().convert("P"), "PNG", transparency=255)


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (saved(plain(), "PNG"), RED, 0),
        (saved(plain(), "JPEG", quality=95), RED, 3),
        (saved(plain(), "WEBP", lossless=True), RED, 0),
        (saved(plain().convert("CMYK"), "JPEG", quality=95), RED, 8),
        (saved(plain().convert("CMYK"), "TIFF"), RED, 0),
        (saved(plain().convert("L"), "PNG"), (76, 76, 76), 1),
        (saved(plain().convert("1"), "PNG"), None, 0),
        (sixteen_bits(), (128, 128, 128), 1),
        (animated("GIF"), RED, 0),
        (animated("PNG"), RED, 0),
        (palette(), RED, 0),
    ],
    ids=["png", "jpeg", "webp", "cmyk-jpeg", "cmyk-tiff", "grey", "bits", "16-bit", "gif", "apng", "palette"],
)
def test_an_image_is_what_it_shows(data, expected, tolerance):
    image = read_image(data)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    if expected is not None:
        np.testing.assert_allclose(np.asarray(image).mean(axis=(0, 1)), expected, atol=tolerance)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_greys_of_many_bits_are_read_in_little_memory(kind):
    """The largest images are of 100 million pixels, so each byte a pixel costs 100 MB."""
    image = PIL.Image.fromarray((np.arange(1_000_000) % 65536).reshape(1000, 1000).astype(kind))
    data = saved(image, "TIFF")
    tracemalloc.start()
    pixel_YXC = np.asarray(read_image(data))
    peak = tracemalloc.get_traced_memory()[1] - pixel_YXC.nbytes
    tracemalloc.stop()
    assert peak < 13 * image.width * image.height
    expected = (np.asarray(image).astype(np.float64) / 65535 * 255).round()
    np.testing.assert_array_equal(pixel_YXC[..., 0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_broken(value):
    pixel_YX = np.ones((8, 8), np.float32)
    pixel_YX[3, 4] = value
    with pytest.raises(BrokenImage, match="no finite numbers"):
        read_image(saved(PIL.Image.fromarray(pixel_YX), "TIFF"))


def test_what_is_transparent_is_white():
    pixel_YXC = np.asarray(read_image(transparent()))
    np.testing.assert_array_equal(pixel_YXC[0, 5], RED)
    np.testing.assert_array_equal(pixel_YXC[0, 35], (255, 255, 255))


def test_an_image_that_was_taken_upright_is_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by a right angle
    assert read_image(saved(plain(size=(40, 30)), "JPEG", exif=exif)).size == (30, 40)


BROKEN = {
    "truncated": (noisy_jpeg()[:4000], "truncated"),
    "empty": (b"", "an empty file"),
    "text": (b"<html>not found</html>", "not an image of a known kind"),
    "head": (noisy_jpeg()[:10], "not an image|truncated|Truncated|EOF"),
    "bomb": (png_of(30_000, 30_000), "900000000 pixels"),
    "large": (png_of(30_000, 4_000), "30000 x 4000 pixels, more than 100,000,000 in all"),
    "flipped": (noisy_jpeg()[:300] + bytes(200) + b"\xff\xd9", "Error|rror|broken|truncated"),
}


@pytest.mark.parametrize(("data", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_image_is_a_reason(data, reason):
    with pytest.raises(BrokenImage, match=reason):
        read_image(data)


def test_damage_of_any_kind_is_a_broken_image_or_none():
    whole = bytearray(noisy_jpeg())
    rng = np.random.default_rng(0)
    for _ in range(50):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 20):
            data[place] = rng.integers(256)
        with contextlib.suppress(BrokenImage):
            assert read_image(bytes(data)).mode == "RGB"


def test_a_long_thin_image_is_no_bomb():
    data = saved(PIL.Image.new("L", (30_000, 10)), "PNG")
    assert read_image(data).size == (30_000, 10)


def test_bad_images_of_a_folder_are_told_of_and_masked_unless_strict(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (data, _) in BROKEN.items():
        (folder / f"{name}.jpg").write_bytes(data)
    (folder / "good.png").write_bytes(saved(plain(), "PNG"))
    (folder / "folder.png").mkdir()
    ids = np.array([*BROKEN, "good", "folder", "absent"])
    images = find_images(folder, ids)

    def encode(**options):
        return encode_items(
            "image",
            ids,
            images,
            make_colour(Options(), []),
            READERS["image"],
            folder=tmp_path / "out",
            facts={},
            **options,
        )

    made = encode()
    assert {problem.kind: (problem.occurrences, problem.action) for problem in made.problems} == {
        "missing_image": (1, "kept"), "broken_image": (len(BROKEN) + 1, "masked"),
    }  # fmt: skip
    with np.load(made.path) as arrays:
        assert list(arrays["item_id"]) == ["good"]
    with pytest.raises(ValueError, match=f"strict reading refuses {len(BROKEN) + 1} x broken_image"):
        encode(strict=True)


def test_images_are_found_by_name_or_stem_in_any_ending(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.d.webp", "e.txt"):
        (tmp_path / name).touch()
    found = find_images(tmp_path, np.array(["a", "b", "c.d", "e", "b.PNG", "", "z"]))
    assert [path and path.name for path in found] == ["a.jpg", "b.PNG", "c.d.webp", None, "b.PNG", None, None]
    with pytest.raises(ValueError, match="expected a folder of images"):
        find_images(tmp_path / "none", ["a"])


def test_texts_are_read_by_id_and_bad_lines_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"movie_id": 1, "text": "one"}\n\n{"item_id": "b", "text": null}\n{"id": 1, "text": "again"}\n')
    assert read_texts(path) == {"1": "one", "b": ""}
    for line in ('{"text": "x"}', "{", '["x"]', '{"id": 1}', '"id"'):
        path.write_text(f'{{"id": 1, "text": "x"}}\n{line}\n')
        with pytest.raises(ValueError, match="texts.jsonl:2: expected text and one of item_id"):
            read_texts(path)
