"""Which encoders there are."""

from __future__ import annotations

from marsjax.features.colour import make_colour
from marsjax.features.precomputed import make_precomputed
from marsjax.features.signature import Make
from marsjax.features.tfidf import make_tfidf

TEXT_ENCODERS: dict[str, Make] = {
    "tfidf": make_tfidf,
    "precomputed": make_precomputed,
}
IMAGE_ENCODERS: dict[str, Make] = {
    "colour": make_colour,
    "precomputed": make_precomputed,
}
