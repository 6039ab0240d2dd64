"""Image files of any kind as RGB pixels, or a reason why not. Needs Pillow: pip install marsjax[features]."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

# 400 MB as Pillow holds RGB: what is larger is an error or an attack (a decompression bomb), not a product photo.
# Images that are encoded together have at most twice as many.
PIXELS = 100_000_000


class BrokenImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def need_pillow() -> None:
    """Raises ImportError naming the extra where Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install marsjax[features]") from error


def read_image(data: bytes) -> Any:
    """The image as a PIL.Image in RGB, upright.

    Of an animation the first frame counts. CMYK is converted, of 16 bits a channel the upper 8 stay, and what is
    transparent is laid on white.

    Raises:
        BrokenImage: empty, not an image, cut off, or of more than `PIXELS` pixels (told before they are decoded).
    """
    import PIL.Image
    import PIL.ImageOps

    if not data:
        raise BrokenImage("an empty file")
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that are far below the limit here, and of oddities of files that it can read.
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data)) as file:
                if file.width * file.height > PIXELS:
                    raise BrokenImage(f"{file.width} x {file.height} pixels, more than {PIXELS:,} in all")
                file.load()
                return _rgb(PIL.ImageOps.exif_transpose(file))
    except BrokenImage:
        raise
    except PIL.UnidentifiedImageError as error:
        raise BrokenImage("not an image of a known kind") from error
    except PIL.Image.DecompressionBombError as error:
        raise BrokenImage(str(error)) from error
    except (OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, EOFError, OverflowError) as error:
        # Pillow's readers raise nearly anything on damaged files.
        raise BrokenImage(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error


def thumbnail(data: bytes, *, side: int) -> bytes:
    """The image as `read_image` has it, shrunken to at most `side` x `side` pixels: a JPEG, or a PNG where that is
    smaller.

    Raises:
        BrokenImage: as `read_image`.
    """
    image = read_image(data)
    image.thumbnail((side, side))
    image.info = {}  # no comment, position or colour profile of the file goes with it
    made = []
    for kind, options in (("JPEG", {"quality": 85}), ("PNG", {"optimize": True})):
        with io.BytesIO() as file:
            image.save(file, kind, **options)
            made.append(file.getvalue())
    return min(made, key=len)


def _rgb(image: Any) -> Any:
    import PIL.Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: convert() would clip all above 255 to white
        value_YX = np.array(image, np.float32)  # one copy, which is worked in: an image may have PIXELS
        least, most = float(value_YX.min()), float(value_YX.max())
        if not np.isfinite([least, most]).all():  # NaN is the least and the most of what has one
            raise BrokenImage("pixels that are no finite numbers")
        top = 65535.0 if image.mode.startswith("I") else max(most, 1.0)
        value_YX.clip(0, top, out=value_YX)
        value_YX *= 255 / top
        return PIL.Image.fromarray(np.rint(value_YX, out=value_YX).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
