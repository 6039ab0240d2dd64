"""MIND, news of Microsoft: behaviors.tsv (impressions with clicks) and news.tsv, of one folder or of several.

Wu et al., MIND: a large-scale dataset for news recommendation, 2020. News have texts and no images.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from marsjax.data.checks import count_problems
from marsjax.data.cleaning import RawItems, as_texts, build_dataset
from marsjax.data.content import no_images
from marsjax.data.feature_files import read_features
from marsjax.records import Content, Dataset, Problem

NEWS = ("news", "category", "subcategory", "title", "abstract")


def load_mind(
    folders: Sequence[pathlib.Path],
    *,
    features: Mapping[str, pathlib.Path],
    expected: Mapping[str, int] | None = None,
    min_item_events: int = 1,
    min_user_events: int = 1,
    strict: bool = False,
    problems: tuple[Problem, ...] = (),
) -> Dataset:
    """Each news of an impression is an event, clicked or not, at the time of the impression (UTC, in seconds).

    The clicks before the log, which have no times and are the column History, are left out.

    Args:
        folders: such as MINDsmall_train and MINDsmall_dev; later ones add users and news.
        expected: published counts of impressions, users and news; 0 is not checked.

    Raises:
        ValueError: a file is missing or a line is something else; the message names file and line.
    """
    user, item, label, time = [], [], [], []
    part, line = [], []  # where a row comes from
    impressions = 0
    for at_folder, folder in enumerate(folders):
        for number, fields in _table(pathlib.Path(folder) / "behaviors.tsv", 5):
            try:
                at = datetime.datetime.strptime(fields[2], "%m/%d/%Y %I:%M:%S %p").replace(tzinfo=datetime.UTC)
                shown = [entry.rpartition("-") for entry in fields[4].split()]
                if any(click not in ("0", "1") or not news for news, _, click in shown):
                    raise ValueError(f"impressions {fields[4][:60]!r}")
            except ValueError as error:
                raise ValueError(
                    f"{folder}/behaviors.tsv:{number}: expected impression, user, time as 11/15/2019 8:55:22 AM, "
                    f"history and news with -0 or -1, found {error}"
                ) from error
            impressions += 1
            for news, _, click in shown:
                user.append(fields[1])
                item.append(news)
                label.append(float(click))
                time.append(int(at.timestamp()))
                part.append(at_folder)
                line.append(number)
    rows = _read_news(folders)
    raw_id = np.array([*rows], str)
    order_R = np.argsort(np.array(time, np.int64), kind="stable")  # the log is in no order of time
    counts = {"events": impressions, "users": len(set(user)), "items": len(raw_id)}
    return build_dataset(
        name="mind",
        user_R=np.array(user, str)[order_R],
        item_R=np.array(item, str)[order_R],
        label_R=np.array(label, np.float64)[order_R],
        time_R=np.array(time, np.int64)[order_R],
        where=lambda at: [f"{folders[part[row]]}/behaviors.tsv:{line[row]}" for row in order_R[at]],
        items=RawItems(raw_id, as_texts([row[3] for row in rows.values()]), [row[1:3] for row in rows.values()]),
        features={name: read_features(path) for name, path in features.items()},
        min_item_events=min_item_events,
        min_user_events=min_user_events,
        strict=strict,
        problems=[*problems, *count_problems(counts, expected or {})],
    )


def mind_content(folders: Sequence[pathlib.Path]) -> Content:
    """What news are encoded from: category, subcategory, title and abstract. Raises ValueError as `load_mind` does."""
    rows = _read_news(folders)
    columns = {name: as_texts([row[at] for row in rows.values()]) for at, name in enumerate(NEWS) if at}
    return Content(np.array([*rows], str), columns, no_images(len(rows)))


def _read_news(folders: Sequence[pathlib.Path]) -> dict[str, list[str]]:
    """Id -> the columns of `NEWS`; the first folder that has an id counts."""
    rows: dict[str, list[str]] = {}
    for folder in folders:
        for _, fields in _table(pathlib.Path(folder) / "news.tsv", 8):
            rows.setdefault(fields[0], fields[: len(NEWS)])
    return rows


def _table(path: pathlib.Path, width: int) -> list[tuple[int, list[str]]]:
    if not path.is_file():
        raise ValueError(
            f"{path}: expected the official MIND file, found none; give its folder as --config.data.folder"
        )
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")]
    if bad := [number for number, fields in enumerate(lines, start=1) if len(fields) != width and fields != [""]]:
        raise ValueError(f"{path}:{bad[0]}: expected {width} columns, found {len(lines[bad[0] - 1])}")
    return [(number, fields) for number, fields in enumerate(lines, start=1) if fields != [""]]
