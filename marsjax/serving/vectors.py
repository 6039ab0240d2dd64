"""A user's vector as the store holds it: with the model version that made it, and what it was made from."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import NamedTuple

import numpy as np


class Vector(NamedTuple):
    """A user in the aligned space of one model version."""

    version: str
    vector_D: np.ndarray  # [D] float32
    history: str  # digest of the history that it was made from
    made: float  # seconds since the epoch


def digest(history: bytes) -> str:
    """What tells one history from another."""
    return hashlib.blake2b(history, digest_size=8).hexdigest()


def encode_vector(vector: Vector) -> bytes:
    """The vector as JSON."""
    text = base64.b64encode(np.asarray(vector.vector_D, "<f4").tobytes()).decode()
    return json.dumps(vector._asdict() | {"vector_D": text}, separators=(",", ":")).encode()


def decode_vector(data: bytes, *, width: int) -> Vector:
    """What `encode_vector` wrote. Raises ValueError where it is damaged, or not `width` finite numbers."""
    try:
        value = json.loads(data)
        vector_D = np.frombuffer(base64.b64decode(value["vector_D"], validate=True), "<f4").astype(np.float32)
        found = Vector(str(value["version"]), vector_D, str(value["history"]), float(value["made"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"expected a vector of a user, found {data[:60]!r} ({type(error).__name__})") from error
    if vector_D.shape != (width,) or not np.isfinite(vector_D).all():
        raise ValueError(f"expected {width} finite numbers, found {vector_D.shape[0]} numbers or some not finite")
    return found
