"""Requests and scores as JSON lines."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from marsjax import files
from marsjax.serving.scoring import Request

KEYS = ("user", "items", "history", "time")


def read_requests(path: pathlib.Path) -> list[Request]:
    """Reads one request a line: {"user": ID, "items": [ID, ...], "history": [ID, ...], "time": SECONDS}.

    `history` and `time` may be left out. Raises ValueError naming the line of the first bad request.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of requests, found none")
    requests = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if unknown := value.keys() - KEYS:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(KEYS)}")
            history = value.get("history")
            requests.append(
                Request(
                    str(value["user"]),
                    tuple(str(item) for item in _list(value["items"])),
                    None if history is None else tuple(str(item) for item in _list(history)),
                    None if value.get("time") is None else int(value["time"]),
                )
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"user": ID, "items": [ID, ...]}}, found {line[:80]!r} '
                f"({type(error).__name__}: {error})"
            ) from error
    return requests


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return value


def write_scores(path: pathlib.Path, requests: Sequence[Request], scores: Sequence[np.ndarray]) -> None:
    """Writes one line a request: user, items and their click probabilities."""
    lines = [
        json.dumps({"user": request.user, "items": request.items, "scores": [float(p) for p in score_C]}) + "\n"
        for request, score_C in zip(requests, scores, strict=True)
    ]
    files.write_bytes(path, "".join(lines).encode())
