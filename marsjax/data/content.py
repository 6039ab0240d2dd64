"""What items are encoded from: texts in JSON lines, and images in a folder."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from marsjax.data.cleaning import as_texts
from marsjax.data.feature_files import ID_KEYS

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_texts(path: pathlib.Path) -> dict[str, str]:
    """Id -> text of JSON lines with `text` and one of item_id, movie_id or id; the first line of an id counts.

    Raises:
        ValueError: the file is missing, or a line is something else; the message names the line.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected JSON lines with an id and a text, found no such file")
    texts: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = next(key for key in ID_KEYS if key in row)
                texts.setdefault(str(row[key]), "" if row["text"] is None else str(row["text"]))
            except (ValueError, TypeError, KeyError, StopIteration) as error:
                raise ValueError(
                    f"{path}:{number}: expected text and one of {', '.join(ID_KEYS)}, found {line[:80]!r}"
                ) from error
    return texts


def find_images(folder: pathlib.Path, names: Sequence[str] | np.ndarray) -> list[pathlib.Path | None]:
    """The image of each name: a file of that name, or NAME with one of the endings of `IMAGES`; None where none is.

    Raises:
        ValueError: no such folder.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of images named by item id, found none")
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGES}
    by_stem: dict[str, pathlib.Path] = {}
    for path in paths.values():
        by_stem.setdefault(path.stem, path)
    return [paths.get(str(name)) or by_stem.get(str(name)) if name else None for name in names]


def no_images(count: int) -> list[pathlib.Path | None]:
    """Where there is no folder."""
    return [None] * count


def joined(categories: Sequence[Sequence[str]]) -> np.ndarray:
    """Categories as text for a template, [I] objects: "Action, Comedy"."""
    return as_texts([", ".join(names) for names in categories])
