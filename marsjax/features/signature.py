"""What every encoder is: a function from a batch of texts or images to vectors, and what there is to say of it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """A batch of vectors."""

    row_BF: np.ndarray  # [B, F] float32
    cut_B: np.ndarray  # [B] bool, inputs that were longer than the model takes; their beginning was encoded
    reason_B: Sequence[str] = ()  # why a row is not finite, "" where it is, of an encoder that can tell


class Encoder(NamedTuple):
    """A model that is ready to encode.

    A row depends on its own input and on `facts` alone, not on the other inputs of its batch: so a vector that was made
    under the same facts is used again.
    """

    width: int  # F
    batch: int  # inputs that are encoded at a time
    facts: Mapping[str, Any]  # name, revision, weights_sha256, pooling, normalisation, ...; goes into the manifest
    encode: Callable[[Sequence[Any]], Encoded]  # texts (str), or images (PIL, RGB), or ids where it only looks them up


class Options(NamedTuple):
    """What an encoder may be told; each reads what concerns it."""

    model: str = ""  # a folder or a hub name, of encoders that load a model of the user's
    revision: str = ""  # of a hub name
    width: int = 256  # of encoders that are free to choose it
    max_tokens: int = 0  # texts are cut there; 0: as the model was trained
    batch: int = 0  # inputs at a time; 0: as the encoder likes it
    expected_width: int = 0  # the width that the model must have; 0: any
    file: pathlib.Path | None = None  # of vectors that are looked up


# (options, all texts or all image files that will be encoded) -> encoder. Only an encoder that learns from the corpus
# looks at them.
Make = Callable[[Options, Sequence[Any]], Encoder]
