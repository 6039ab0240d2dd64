"""Which encoders there are."""

from __future__ import annotations

from marsjax.features.colour import make_colour
from marsjax.features.llama import make_llama
from marsjax.features.minilm import make_minilm
from marsjax.features.mobilenet import make_mobilenet
from marsjax.features.precomputed import make_precomputed
from marsjax.features.qwen_vision import make_qwen_vision
from marsjax.features.signature import Make
from marsjax.features.tfidf import make_tfidf

TEXT_ENCODERS: dict[str, Make] = {
    "llama": make_llama,
    "minilm": make_minilm,
    "tfidf": make_tfidf,
    "precomputed": make_precomputed,
}
IMAGE_ENCODERS: dict[str, Make] = {
    "qwen_vision": make_qwen_vision,
    "mobilenet": make_mobilenet,
    "colour": make_colour,
    "precomputed": make_precomputed,
}
