"""What items are encoded from: texts in JSON lines, and images in a folder with a cheap check of these."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from marsjax.data.cleaning import SHOWN, as_texts
from marsjax.data.feature_files import ID_KEYS
from marsjax.records import Problem

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TAIL = 1024  # bytes: the end of an image, and what some programs pad it with
# How files of the other kinds begin, whose ends tell nothing.
OTHER_KINDS = (b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")


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


def image_problems(item_ids: np.ndarray, images: Sequence[pathlib.Path | None]) -> list[Problem]:
    """Which items have no image, and which images are cut off.

    Only the first and last bytes are read: a whole JPEG ends with its end marker and a whole PNG with IEND; of other
    kinds only the beginning tells. The images are looked at and not used (vectors are made elsewhere), so a cut one is
    noted, and no feature goes with it.

    Args:
        images: one for each id, as `find_images` finds them.
    """
    missing = [str(item) for item, path in zip(item_ids, images, strict=True) if path is None]
    broken = [path.name for path in images if path is not None and not _is_whole(path)]
    problems = []
    if missing:
        problems.append(Problem("missing_image", len(missing), "kept", tuple(f"item {i}" for i in missing[:SHOWN])))
    if broken:
        problems.append(Problem("truncated_image", len(broken), "noted", tuple(broken[:SHOWN])))
    return problems


def unused_files(images: Sequence[pathlib.Path | None]) -> list[Problem]:
    """Files beside these images that are no item's image: of another name or ending, or a second one of an item."""
    used = {path for path in images if path is not None}
    folders = sorted({path.parent for path in used})
    left = [path.name for folder in folders for path in sorted(folder.iterdir()) if path not in used]
    left = [name for name in left if not name.startswith(".")]
    return [Problem("unused_file", len(left), "ignored", tuple(left[:SHOWN]))] if left else []


def _is_whole(path: pathlib.Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb", buffering=0) as file:
        head = file.read(8)
        file.seek(max(path.stat().st_size - TAIL, 0))
        tail = file.read(TAIL)
    if head == b"\x89PNG\r\n\x1a\n":
        return b"IEND" in tail[-64:]
    if head.startswith(OTHER_KINDS):
        return True
    return head.startswith(b"\xff\xd8") and tail.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")


def no_images(count: int) -> list[pathlib.Path | None]:
    """Where there is no folder."""
    return [None] * count


def joined(categories: Sequence[Sequence[str]]) -> np.ndarray:
    """Categories as text for a template, [I] objects: "Action, Comedy"."""
    return as_texts([", ".join(names) for names in categories])
