"""MicroLens: PREFIX_pairs.csv (user, item, timestamp) and PREFIX_titles.csv (item, title), with covers named by item
id.

Ni et al., A content-driven micro-video recommendation dataset at scale, 2023. The log holds what users commented on,
and nothing that they were shown and left. So for each event another video is drawn that the user never met.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Mapping

import numpy as np

from marsjax.data.checks import count_problems
from marsjax.data.cleaning import RawItems, as_texts, build_dataset
from marsjax.data.content import find_images, no_images
from marsjax.data.feature_files import read_features
from marsjax.records import Content, Dataset, Problem


def load_microlens(
    pairs: pathlib.Path,
    *,
    titles: pathlib.Path | None = None,
    features: Mapping[str, pathlib.Path],
    negatives: int = 1,
    expected: Mapping[str, int] | None = None,
    min_item_events: int = 1,
    min_user_events: int = 1,
    strict: bool = False,
    seed: int = 0,
    problems: tuple[Problem, ...] = (),
) -> Dataset:
    """Reads pairs as clicks, and draws `negatives` videos without a click at the time of each.

    They are drawn by how often a video occurs, so that popularity tells nothing, from a seed, so that they are the same
    in every run.

    Raises:
        ValueError: a file is missing, a line is something else, or a user met nearly everything.
    """
    rows = _read(pairs, ("user", "item", "timestamp"))
    user_R = np.array([row[0] for row in rows], str)
    item_R = np.array([row[1] for row in rows], str)
    try:
        time_R = np.array([row[2] for row in rows], np.int64)
    except ValueError as error:
        raise ValueError(f"{pairs}: expected whole numbers as timestamp ({error})") from error
    name_I, code_R = np.unique(item_R, return_inverse=True)
    counts = {"events": len(rows), "users": len(np.unique(user_R)), "items": len(name_I)}
    drawn_R = draw_negatives(np.unique(user_R, return_inverse=True)[1], code_R, negatives, seed=seed)
    shown_RC = np.concatenate([code_R[:, None], drawn_R.reshape(len(rows), negatives)], axis=1)
    # What was clicked and what was drawn for it have one time, so their order is drawn too.
    place_RC = np.random.default_rng([seed, 1]).permuted(
        np.broadcast_to(np.arange(1 + negatives), shown_RC.shape), axis=1
    )
    order_R = np.argsort(time_R, kind="stable")
    row_R, place_R = np.repeat(order_R, 1 + negatives), place_RC[order_R].ravel()
    items = None
    if titles is not None:
        title_of = {row[0]: row[1] for row in _read(titles, ("item", "title"))}
        items = RawItems(name_I, as_texts([title_of.get(str(name), "") for name in name_I]), [()] * len(name_I))
    return build_dataset(
        name=pathlib.Path(pairs).name.split("_")[0].lower(),
        user_R=user_R[row_R],
        item_R=name_I[shown_RC[row_R, place_R]],
        label_R=(place_R == 0).astype(np.float64),
        time_R=time_R[row_R],
        where=lambda at: [f"{pathlib.Path(pairs).name}:{row_R[row] + 2}" for row in at],
        items=items,
        features={name: read_features(path) for name, path in features.items()},
        min_item_events=min_item_events,
        min_user_events=min_user_events,
        strict=strict,
        problems=[*problems, *count_problems(counts, expected or {})],
    )


def draw_negatives(user_R: np.ndarray, item_R: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """For each of R events `count` items that its user never met, [R * count] int, by how often they occur.

    Raises ValueError where that cannot be done in 100 rounds of drawing.
    """
    rng, n_items = np.random.default_rng(seed), int(item_R.max(initial=0)) + 1
    met = np.unique(user_R.astype(np.int64) * n_items + item_R)
    of_R = np.repeat(user_R.astype(np.int64), count)
    drawn_R = np.full(len(of_R), -1)
    left = np.arange(len(of_R))
    for _ in range(100):
        if not len(left):
            return drawn_R
        drawn_R[left] = item_R[rng.integers(0, len(item_R), len(left))]
        left = left[np.isin(of_R[left] * n_items + drawn_R[left], met)]
    raise ValueError(
        f"negatives: expected users who left some items unseen, found {len(np.unique(of_R[left]))} who met nearly all; "
        "leave them out, or set data.negatives=0"
    )


def microlens_content(titles: pathlib.Path, *, image_folder: pathlib.Path | None = None) -> Content:
    """What videos are encoded from: title, and the cover ID.jpg of `image_folder`. Raises ValueError as above."""
    rows = _read(titles, ("item", "title"))
    raw_id = np.array([row[0] for row in rows], str)
    images = find_images(image_folder, raw_id) if image_folder is not None else no_images(len(rows))
    return Content(raw_id, {"title": as_texts([row[1] for row in rows])}, images)


def _read(path: pathlib.Path, names: tuple[str, ...]) -> list[list[str]]:
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected the official MicroLens file, found none")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    head = [name.strip().lower() for name in rows[0]] if rows else []
    if head != list(names):
        # The titles of some releases have no header.
        if len(names) == 2 and len(head) == 2 and head[0].isdigit():
            rows.insert(0, list(names))
        else:
            raise ValueError(f"{path}:1: expected the columns {','.join(names)}, found {','.join(head)}")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise ValueError(f"{path}:{number}: expected {','.join(names)}, found {','.join(row)[:80]!r}")
    return rows[1:]
