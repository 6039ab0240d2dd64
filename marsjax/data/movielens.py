"""The official MovieLens-1M folder: ratings.dat, movies.dat ('::' between columns, latin-1)."""

from __future__ import annotations

import hashlib
import pathlib

import numpy as np

from marsjax.data.checks import sum_problems
from marsjax.data.cleaning import Ids, RawItems, as_texts, build_dataset
from marsjax.data.content import find_images, image_problems, joined, no_images, read_texts
from marsjax.data.feature_files import read_features
from marsjax.records import Content, Dataset, Problem

# Counts of the official files (README of the download), and of items with at least 5 ratings.
KNOWN_COUNTS = {"ratings": 1_000_209, "users": 6_040, "movies": 3_883, "rated movies": 3_706}
KNOWN_ITEMS_OF_5 = 3_416
ARCHIVE_MD5 = "c4d9eecfca2ab87c1945afe126590906"  # of ml-1m.zip, beside the download


def load_movielens(
    folder: pathlib.Path,
    *,
    text_features: pathlib.Path | None = None,
    image_features: pathlib.Path | None = None,
    image_folder: pathlib.Path | None = None,
    label_threshold: float | None = 4.0,
    min_item_events: int = 5,
    min_user_events: int = 1,
    strict: bool = False,
    checksums: pathlib.Path | None = None,
) -> Dataset:
    """Reads MovieLens-1M; a rating of 4 or 5 is a click. Genres become categories.

    Where the folder holds the downloaded ml-1m.zip too, or lies beside it, this is held against its published sum.
    Differences from the known counts are a problem of kind "count_differs", and are refused by `strict`, as are other
    sums.

    Raises:
        ValueError: a file is missing or malformed; the message names the file, and the line where there is one.
    """
    folder = pathlib.Path(folder)
    lines = _read(folder, "ratings.dat").replace(b"\r", b"").rstrip(b"\n").split(b"\n")
    columns_of = np.char.count(np.array(lines), b"::")
    if (columns_of != 3).any():
        bad = int(np.argmax(columns_of != 3))
        raise ValueError(
            f"{folder / 'ratings.dat'}:{bad + 1}: expected user::movie::rating::time, found "
            f"{lines[bad].decode('latin-1')!r} ({int((columns_of != 3).sum())} such lines)"
        )
    try:
        value_R4 = np.array(b"::".join(lines).split(b"::"), dtype=np.int64).reshape(-1, 4)
    except ValueError as error:
        raise ValueError(f"{folder / 'ratings.dat'}: expected whole numbers in all columns ({error})") from error

    items = _read_movies(folder)
    raw_id = items.raw_id

    counts = {
        "ratings": len(value_R4),
        "users": len(np.unique(value_R4[:, 0])),
        "movies": len(raw_id),
        "rated movies": len(np.unique(value_R4[:, 1])),
    }
    if min_item_events == 5:
        counts["movies of at least 5 ratings"] = int((np.bincount(value_R4[:, 1]) >= 5).sum())
    known = KNOWN_COUNTS | {"movies of at least 5 ratings": KNOWN_ITEMS_OF_5}
    different = [f"{counts[what]} {what}, officially {known[what]}" for what in counts if counts[what] != known[what]]
    problems = [Problem("count_differs", len(different), "noted", tuple(different))] if different else []
    problems += sum_problems(checksums) if checksums is not None else []
    for archive in (folder / "ml-1m.zip", folder.parent / "ml-1m.zip"):
        if archive.is_file():
            with archive.open("rb") as data:
                if hashlib.file_digest(data, "md5").hexdigest() != ARCHIVE_MD5:
                    problems.append(Problem("checksum_differs", 1, "noted", (archive.name,)))
            break
    if image_folder is not None:
        problems += image_problems(raw_id, find_images(image_folder, raw_id))
    named = {"text": text_features, "image": image_features}
    return build_dataset(
        name="ml1m",
        user_R=_ids(value_R4[:, 0]),
        item_R=_ids(value_R4[:, 1]),
        label_R=value_R4[:, 2].astype(np.float64),
        time_R=value_R4[:, 3],
        where=lambda row_R: [f"ratings.dat:{row + 1}" for row in row_R],
        items=items,
        features={name: read_features(path) for name, path in named.items() if path is not None},
        label_threshold=label_threshold,
        min_item_events=min_item_events,
        min_user_events=min_user_events,
        strict=strict,
        problems=problems,
    )


def movielens_content(
    folder: pathlib.Path, *, texts: pathlib.Path | None = None, image_folder: pathlib.Path | None = None
) -> Content:
    """What the movies are encoded from: title, categories ("Action, Comedy") and, with `texts`, text.

    Args:
        texts: JSON lines with movie_id and text.
        image_folder: posters named by movie id.

    Raises:
        ValueError: a file is missing or malformed.
    """
    items = _read_movies(pathlib.Path(folder))
    fields = {"title": items.title, "categories": joined(items.categories)}
    if texts is not None:
        text_of = read_texts(texts)
        fields["text"] = as_texts([text_of.get(str(name), "") for name in items.raw_id])
    images = find_images(image_folder, items.raw_id) if image_folder is not None else no_images(len(items.raw_id))
    return Content(items.raw_id, fields, images)


def _read_movies(folder: pathlib.Path) -> RawItems:
    movies = [line.split("::") for line in _read(folder, "movies.dat").decode("latin-1").splitlines() if line]
    for number, fields in enumerate(movies, start=1):
        if len(fields) != 3:
            raise ValueError(f"{folder / 'movies.dat'}:{number}: expected movie::title::genres, found {fields}")
    return RawItems(
        np.array([fields[0] for fields in movies]),
        as_texts([fields[1] for fields in movies]),
        [fields[2].split("|") for fields in movies],
    )


def _ids(number_R: np.ndarray) -> Ids:
    number_X, code_R = np.unique(number_R, return_inverse=True)
    return Ids(code_R, number_X.astype(str))


def _read(folder: pathlib.Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"{path}: expected the official MovieLens-1M file, found none; download ml-1m.zip from "
            "https://grouplens.org/datasets/movielens/1m and give its folder as --config.data.folder"
        )
    return path.read_bytes()
