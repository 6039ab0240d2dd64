"""Image files of any kind as RGB pixels, or a reason why not. Needs Pillow: pip install marsjax[features]."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

PIXELS = (
    100_000_000  # 300 MB as RGB: what is larger is an error or an attack (a decompression bomb), not a product photo
)


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
        BrokenImage: not an image, cut off, or of more than `PIXELS` pixels (told before they are decoded).
    """
    import PIL.Image
    import PIL.ImageOps

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


def _rgb(image: Any) -> Any:
    import PIL.Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: convert() would clip all above 255 to white
        value_YX = np.asarray(image).astype(np.float64)
        if not np.isfinite(value_YX).all():
            raise BrokenImage("pixels that are no finite numbers")
        top = 65535.0 if image.mode.startswith("I") else max(float(value_YX.max()), 1.0)
        grey_YX = (value_YX.clip(0, top) / top * 255).round().astype(np.uint8)
        return PIL.Image.fromarray(grey_YX).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
