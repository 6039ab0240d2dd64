"""Your own events and items, from Parquet or CSV. Needs pyarrow: pip install marsjax[tabular]."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from marsjax.data.cleaning import RawItems, build_dataset
from marsjax.records import Dataset


def load_tabular(
    *,
    events_path: pathlib.Path,
    items_path: pathlib.Path | None = None,
    columns: Mapping[str, str],
    features: Mapping[str, pathlib.Path],
    image_folder: pathlib.Path | None = None,
    category_separator: str = "|",
    label_threshold: float | None = None,
    min_item_events: int = 1,
    min_user_events: int = 1,
    strict: bool = False,
) -> Dataset:
    """Reads one row an interaction, and optionally one row an item.

    Args:
        columns: our names (user, item, label, time; of the items file item, title, categories) -> the files' names.
        features: modality -> file of vectors, see `feature_files.read_features`.
        image_folder: images named by item id; missing and cut-off ones are reported.
        label_threshold: label = value >= threshold; None wants 0 and 1.

    Raises:
        ValueError: missing file or column, damaged file, or what `cleaning.build_dataset` refuses.
        ImportError: pyarrow is not installed.
    """
    from marsjax.data.feature_files import image_folder_problems, read_features

    events = read_table(events_path)
    for ours in ("user", "item", "label", "time"):
        _need(events, columns.get(ours, ours), ours, events_path)
    items = None
    if items_path is not None:
        table = read_table(items_path)
        raw_id = _ids(_need(table, columns.get("item", "item"), "item", items_path))
        blank = np.full(len(raw_id), "")
        title = _ids(_need(table, columns["title"], "title", items_path)) if "title" in columns else blank
        names = (
            _ids(_need(table, columns["categories"], "categories", items_path)) if "categories" in columns else blank
        )
        items = RawItems(raw_id, title, [str(name).split(category_separator) if name else [] for name in names])
    item_R = _ids(events[columns.get("item", "item")])
    known = items.raw_id if items is not None else np.unique(item_R)
    problems = image_folder_problems(image_folder, known) if image_folder is not None else []
    return build_dataset(
        name=pathlib.Path(events_path).stem,
        user_R=_ids(events[columns.get("user", "user")]),
        item_R=item_R,
        label_R=_numbers(events[columns.get("label", "label")], "label", events_path),
        time_R=_numbers(events[columns.get("time", "time")], "time", events_path),
        where=lambda row_R: [f"{pathlib.Path(events_path).name} row {row + 1}" for row in row_R],
        items=items,
        features={
            name: read_features(path, item_ids=None if items is None else items.raw_id)
            for name, path in features.items()
        },
        label_threshold=label_threshold,
        min_item_events=min_item_events,
        min_user_events=min_user_events,
        strict=strict,
        problems=problems,
    )


def read_table(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Columns of a Parquet or CSV file; missing strings are None, missing numbers NaN, times seconds."""
    try:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading Parquet and CSV needs pyarrow: pip install marsjax[tabular]") from error
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a Parquet or CSV file, found none")
    try:
        if path.suffix in (".parquet", ".pq"):
            table = pyarrow.parquet.read_table(path)
        elif path.suffix in (".csv", ".tsv"):
            delimiter = "\t" if path.suffix == ".tsv" else ","
            table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter))
        else:
            raise ValueError(f"{path}: expected .parquet, .csv or .tsv, found {path.suffix or 'no ending'}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the file is damaged, truncated or of another format ({error})") from error
    out = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pyarrow.types.is_timestamp(column.type) or pyarrow.types.is_date(column.type):
            missing = column.is_null().to_numpy(zero_copy_only=False)
            seconds = column.cast(pyarrow.timestamp("us")).cast(pyarrow.int64()).fill_null(0).to_numpy() / 1e6
            out[name] = np.where(missing, np.nan, seconds)
        elif pyarrow.types.is_boolean(column.type):
            out[name] = column.cast(pyarrow.int8()).to_numpy()
        else:
            out[name] = column.to_numpy()
    return out


def _need(table: Mapping[str, np.ndarray], column: str, ours: str, path: pathlib.Path) -> np.ndarray:
    if column not in table:
        raise ValueError(
            f"{path}: expected a column {column!r} for {ours}, found {', '.join(table)}; map it with "
            f"--config.data.columns.{ours}=NAME"
        )
    return table[column]


def _ids(column: np.ndarray) -> np.ndarray:
    """Ids as strings; missing ones are ""; whole floats (a pandas column with gaps) lose their .0."""
    if column.dtype.kind in "iu":
        return column.astype(str)
    if column.dtype.kind == "f":
        missing = ~np.isfinite(column)
        whole = np.where(missing, 0, column)
        text = whole.astype(np.int64).astype(str) if (whole == np.floor(whole)).all() else whole.astype(str)
        return np.where(missing, "", text)
    missing = np.array([value is None for value in column], bool)
    return np.where(missing, "", column).astype(str)


def _numbers(column: np.ndarray, ours: str, path: pathlib.Path) -> np.ndarray:
    if column.dtype.kind in "iufb":
        return column
    raise ValueError(f"{path}: expected numbers (or timestamps) for {ours}, found {column[:3].tolist()}")
