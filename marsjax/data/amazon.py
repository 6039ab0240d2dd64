"""Amazon reviews of 2014 and 2023: the official dumps of reviews and metadata, JSON lines, gzipped or not.

2014 (McAuley et al., 2015): reviews have reviewerID, asin, overall, unixReviewTime (seconds); metadata are Python
literals rather than JSON, with asin, title, categories, description, brand, imUrl. 2023 (Hou et al., 2024): reviews
have user_id, parent_asin, rating, timestamp (milliseconds); metadata have parent_asin, title, categories, description,
features, store, images. Which one it is, each line tells.
"""

from __future__ import annotations

import ast
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from marsjax.data.checks import count_problems, k_core
from marsjax.data.cleaning import RawItems, as_texts, build_dataset
from marsjax.data.content import find_images, joined, no_images
from marsjax.data.feature_files import read_features
from marsjax.records import Content, Dataset, Problem

# user, item, rating, time -> the names in the reviews
NAMES_2014 = ("reviewerID", "asin", "overall", "unixReviewTime")
NAMES_2023 = ("user_id", "parent_asin", "rating", "timestamp")


def load_amazon(
    reviews: pathlib.Path,
    *,
    metadata: pathlib.Path | None = None,
    features: Mapping[str, pathlib.Path],
    core: int = 0,
    expected: Mapping[str, int] | None = None,
    label_threshold: float | None = 4.0,
    min_item_events: int = 1,
    min_user_events: int = 1,
    strict: bool = False,
    problems: tuple[Problem, ...] = (),
) -> Dataset:
    """Reads reviews of one category; a rating of 4 or 5 is a click.

    Args:
        metadata: gives titles and categories; without, items are known by their reviews alone.
        features: modality -> file of vectors.
        core: users and items with fewer reviews are left out until all have as many; 0 keeps all. Of 2023, where a
            product may be reviewed again, a user's earliest review of it is the one that counts and stays.
        expected: published counts of reviews, users and items after that; 0 is not checked.

    Raises:
        ValueError: a file is missing or damaged, or a line is something else; the message names file and line.
    """
    user_R, item_R, label_R, time_R, recent_R = _read_reviews(reviews)
    first_R, keep_R = _in_core(user_R, item_R, time_R, recent_R, core)
    row_R = np.flatnonzero(keep_R)
    row_R = row_R[np.argsort(time_R[row_R], kind="stable")]  # the dumps are in no order of time, which is no defect
    user_R, item_R = user_R[row_R], item_R[row_R]
    counts = {"events": len(row_R), "users": len(np.unique(user_R)), "items": len(np.unique(item_R))}
    found = [*problems, *count_problems(counts, expected or {})]
    if later := int((~first_R).sum()):
        note = "of one user and item only the earliest review counts for the core, as in the published splits"
        found.append(Problem("later_review", later, "filtered", (note,)))
    if outside := int(first_R.sum()) - len(row_R):
        note = f"{core}-core: {len(row_R)} reviews of {counts['users']} users and {counts['items']} items are left"
        found.append(Problem("outside_core", outside, "filtered", (note,)))
    items = None
    if metadata is not None:
        # Items without metadata stay, without a title.
        known = {str(name): (title, kinds) for name, title, kinds, _ in _read_metadata(metadata, set(item_R))}
        name_I = np.unique(item_R)
        without = [str(name) for name in name_I if str(name) not in known]
        if without:
            found.append(Problem("item_without_metadata", len(without), "kept", tuple(without[:5])))
        items = RawItems(
            name_I,
            as_texts([known.get(str(name), ("", []))[0] for name in name_I]),
            [known.get(str(name), ("", []))[1] for name in name_I],
        )
    return build_dataset(
        name=pathlib.Path(reviews).name.split(".")[0],
        user_R=user_R,
        item_R=item_R,
        label_R=label_R[row_R],
        time_R=time_R[row_R],
        where=lambda at: [f"{pathlib.Path(reviews).name}:{row_R[row] + 1}" for row in at],
        items=items,
        features={name: read_features(path) for name, path in features.items()},
        label_threshold=label_threshold,
        min_item_events=min_item_events,
        min_user_events=min_user_events,
        strict=strict,
        problems=found,
    )


def amazon_content(
    metadata: pathlib.Path,
    *,
    reviews: pathlib.Path | None = None,
    core: int = 0,
    image_folder: pathlib.Path | None = None,
) -> Content:
    """What products are encoded from: title, categories, brand, description, features and image_url.

    Images are those of `image_folder`, named by asin; image_url is where a user may get them from, one an item.

    Args:
        reviews, core: encode only products that are left in the core.

    Raises ValueError as `load_amazon` does.
    """
    wanted = None
    if reviews is not None:
        user_R, item_R, _, time_R, recent_R = _read_reviews(reviews)
        wanted = set(item_R[_in_core(user_R, item_R, time_R, recent_R, core)[1]])
    rows = list(_read_metadata(metadata, wanted))
    raw_id = np.array([name for name, *_ in rows], str)
    fields = {name: as_texts([row[3][name] for row in rows]) for name in ("brand", "description", "features")}
    fields |= {"title": as_texts([row[1] for row in rows]), "categories": joined([row[2] for row in rows])}
    fields["image_url"] = as_texts([row[3]["image_url"] for row in rows])
    images = find_images(image_folder, raw_id) if image_folder is not None else no_images(len(raw_id))
    return Content(raw_id, fields, images)


def _read_reviews(reviews: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users, items, ratings, times and whether they are of 2023, [R] each."""
    rows: tuple[list[Any], ...] = ([], [], [], [])
    recent = []
    for number, line in _lines(reviews, literal=False):
        names = NAMES_2014 if NAMES_2014[0] in line else NAMES_2023
        if missing := [name for name in names if name not in line]:
            raise ValueError(
                f"{reviews}:{number}: expected a review of 2014 ({', '.join(NAMES_2014)}) or 2023 "
                f"({', '.join(NAMES_2023)}), found no {', '.join(missing)}"
            )
        for column, name in zip(rows, names, strict=True):
            column.append(line[name])
        recent.append(names == NAMES_2023)
    user_R, item_R = (np.array(["" if name is None else name for name in column], str) for column in rows[:2])
    try:
        label_R = np.array([np.nan if value is None else value for value in rows[2]], np.float64)
        time_R = np.array([np.nan if value is None else value for value in rows[3]], np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{reviews}: expected numbers as rating and time ({error})") from error
    return user_R, item_R, label_R, time_R, np.array(recent, bool)


def _in_core(
    user_R: np.ndarray, item_R: np.ndarray, time_R: np.ndarray, recent_R: np.ndarray, core: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which reviews count for the core, and which of these are in it, [R] bool each.

    The scripts of the 2023 data keep the earliest review of each user and item before they look for the core.
    """
    first_R = np.ones(len(user_R), bool)
    if core <= 1:
        return first_R, first_R
    pair_R = np.unique(user_R, return_inverse=True)[1] * (len(item_R) + 1) + np.unique(item_R, return_inverse=True)[1]
    order_R = np.argsort(time_R, kind="stable")  # the file decides ties
    first_R[recent_R] = False
    first_R[order_R[np.unique(pair_R[order_R], return_index=True)[1]]] = True
    keep_R = np.zeros_like(first_R)
    keep_R[first_R] = k_core(user_R[first_R], item_R[first_R], core)
    return first_R, keep_R


def _read_metadata(path: pathlib.Path, wanted: set[str] | None) -> Iterator[tuple[str, str, list[str], dict[str, str]]]:
    """Id, title, categories and other texts of each product that is wanted; None wants all."""
    for number, line in _lines(path, literal=True):
        name = line.get("parent_asin") or line.get("asin")
        if not name:
            raise ValueError(f"{path}:{number}: expected metadata with asin or parent_asin, found {', '.join(line)}")
        if wanted is not None and name not in wanted:
            continue
        kinds = line.get("categories") or []
        flat = [kind for path_of in kinds for kind in (path_of if isinstance(path_of, list) else [path_of])]
        images = line.get("images") or []
        url = line.get("imUrl") or next((image.get("large", "") for image in images if isinstance(image, dict)), "")
        texts = {
            "brand": _text(line.get("brand") or line.get("store")),
            "description": _text(line.get("description")),
            "features": _text(line.get("features")),
            "image_url": _text(url),
        }
        yield str(name), _text(line.get("title")), list(dict.fromkeys(map(str, flat))), texts


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _lines(path: pathlib.Path, *, literal: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered objects of JSON lines; with `literal` also Python literals, which are read and never run."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected JSON lines (.json.gz, .jsonl.gz or unpacked), found no such file")
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):  # noqa: B007
                if not text.strip():
                    continue
                try:
                    value = json.loads(text)
                except json.JSONDecodeError:
                    if not literal:
                        raise
                    value = ast.literal_eval(text.strip())
                if not isinstance(value, dict):
                    raise ValueError(f"found {type(value).__name__}")
                yield number, value
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the file is damaged or truncated after line {number} ({error})") from error
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}:{number}: expected one JSON object a line ({error})") from error
