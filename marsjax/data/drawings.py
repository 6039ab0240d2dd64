"""Short texts and small images that show the latent vectors of planted items, so that the encoders have work to do."""

from __future__ import annotations

import pathlib

import numpy as np

from marsjax import files

WORDS = 400
SHARPNESS = 8.0  # how much a text sticks to the words of its item
BLOCKS, PIXELS = 6, 8  # an image has 6 x 6 blocks of 8 x 8 pixels


def write_drawings(
    folder: pathlib.Path, *, raw_id_I: np.ndarray, item_ID: np.ndarray, missing: float, seed: int
) -> None:
    """Writes items.csv (id, text) and images/ID.png.

    Words have directions in the latent space, and a text is drawn from those that point to its item. The colours of the
    blocks of an image are a fixed random map of the latent vector, with noise on every pixel.

    Args:
        item_ID: [I, D] latent vectors.
        missing: share of items without a text (an empty cell), and of items without an image.

    Raises ImportError where Pillow is missing.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError("drawing images needs Pillow: pip install marsjax[features]") from error
    rng = np.random.default_rng(seed)
    syllables = np.array([consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"])
    number_W = rng.permutation(len(syllables) ** 2)[:WORDS]
    words = np.char.add(syllables[number_W // len(syllables)], syllables[number_W % len(syllables)])
    width = item_ID.shape[1]
    unit_ID = item_ID / np.linalg.norm(item_ID, axis=1, keepdims=True)
    direction_WD = rng.normal(size=(WORDS, width))
    direction_WD /= np.linalg.norm(direction_WD, axis=1, keepdims=True)
    score_IW = SHARPNESS * np.sqrt(width) / 2 * (unit_ID @ direction_WD.T)
    map_DC = rng.normal(size=(width, BLOCKS * BLOCKS * 3))
    colour_IC = 1 / (1 + np.exp(-(unit_ID @ map_DC)))
    has_text_I, has_image_I = rng.random((2, len(item_ID))) >= missing
    lines = ["id,text"]
    with files.write_folder(folder) as new:
        (new / "images").mkdir()
        for item, name in enumerate(raw_id_I):
            chance_W = np.exp(score_IW[item] - score_IW[item].max())
            drawn = rng.choice(WORDS, size=24, p=chance_W / chance_W.sum())
            lines.append(f"{name},{' '.join(words[drawn]) if has_text_I[item] else ''}")
            block = np.kron(colour_IC[item].reshape(BLOCKS, BLOCKS, 3), np.ones((PIXELS, PIXELS, 1)))
            pixel = block + 0.03 * rng.normal(size=block.shape)
            if has_image_I[item]:
                image = PIL.Image.fromarray((pixel.clip(0, 1) * 255).astype(np.uint8))
                image.save(new / "images" / f"{name}.png")
        (new / "items.csv").write_text("\n".join(lines) + "\n")
