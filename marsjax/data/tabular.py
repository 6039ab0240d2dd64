"""Your own events and items, from Parquet or CSV. Needs pyarrow: pip install marsjax[tabular]."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from marsjax.data.checks import count_problems
from marsjax.data.cleaning import Ids, RawItems, as_texts, build_dataset, float_ids
from marsjax.data.content import find_images, image_problems, no_images
from marsjax.records import Content, Dataset, Problem

Table = Any  # pyarrow.Table; the package may be missing, so its types have no name here
Column = Any  # pyarrow.ChunkedArray


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
    expected: Mapping[str, int] | None = None,
    strict: bool = False,
    problems: tuple[Problem, ...] = (),
) -> Dataset:
    """Reads one row an interaction, and optionally one row an item.

    Ids, titles and categories of a CSV are text: "007" is not 7, and what is empty is missing. Integer times stay as
    they are. Floats (of seconds) and timestamps become whole seconds or, where any of them has a fraction,
    microseconds, all of them; a timestamp's parts of a microsecond are cut.

    Args:
        columns: our names (user, item, label, time; of the items file item, title, categories, image) -> the files'
            names.
        features: modality -> file of vectors, see `feature_files.read_features`.
        image_folder: images named by item id, or as the column of images says; missing and cut-off ones are reported.
        label_threshold: label = value >= threshold; None wants 0 and 1.
        expected: published counts of events, and of users and items that have some; 0 is not checked.
        problems: what was found before.

    Raises:
        ValueError: missing file or column, damaged file, or what `cleaning.build_dataset` refuses.
        ImportError: pyarrow is not installed.
    """
    from marsjax.data.feature_files import read_features

    named = {ours: columns.get(ours, ours) for ours in ("user", "item", "label", "time")}
    events = read_table(events_path, text=(named["user"], named["item"]))
    user, item, label, time = (_need(events, theirs, ours, events_path) for ours, theirs in named.items())
    item_ids = read_ids(item, "item", events_path)
    items, pictures = None, None
    if items_path is not None:
        optional = ("title", "categories", *(["image"] if image_folder is not None else []))
        named = {"item": named["item"]} | {ours: columns[ours] for ours in optional if ours in columns}
        table = read_table(items_path, text=named.values())
        strings = {
            ours: read_texts(_joined(_need(table, theirs, ours, items_path), category_separator), ours, items_path)
            for ours, theirs in named.items()
        }
        blank = np.full(table.num_rows, "")
        categories = [
            str(names).split(category_separator) if names else [] for names in strings.get("categories", blank)
        ]
        items = RawItems(strings["item"].astype(str), strings.get("title", blank), categories)
        pictures = strings.get("image")
    known = items.raw_id if items is not None else np.unique(item_ids.name_X[item_ids.name_X != ""])
    user_ids = read_ids(user, "user", events_path)
    counts = {"events": events.num_rows, "users": _occurring(user_ids), "items": _occurring(item_ids)}
    found = [*problems, *count_problems(counts, expected or {})]
    if image_folder is not None:
        found += image_problems(known, find_images(image_folder, known if pictures is None else pictures))
    return build_dataset(
        name=pathlib.Path(events_path).stem,
        user_R=user_ids,
        item_R=item_ids,
        label_R=_numbers(_mend(label, events_path), "label", events_path),
        time_R=_times(_mend(time, events_path), events_path),
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
        problems=found,
    )


def image_names(*, items_path: pathlib.Path, item: str, image: str) -> dict[str, str]:
    """Id -> the name of its image, of the columns `item` and `image`. Raises as `tabular_content`."""
    table = read_table(items_path, text={item, image})
    item_I, image_I = (
        read_texts(_need(table, name, ours, items_path), ours, items_path)
        for name, ours in ((item, "item"), (image, "image"))
    )
    return dict(zip(item_I[::-1], image_I[::-1], strict=True))  # the first of equal ids counts


def _occurring(ids: Ids) -> int:
    """How many different ids there are."""
    name_X = np.unique(ids.name_X[np.unique(ids.code_R)])
    return int((name_X != "").sum())


def tabular_content(
    *,
    items_path: pathlib.Path,
    item: str,
    fields: Collection[str],
    image: str = "",
    image_folder: pathlib.Path | None = None,
    later: Mapping[str, str] | None = None,
) -> Content:
    """What the items of a table are encoded from.

    Args:
        item: the column of ids.
        fields: columns that a template names; a list is joined by ", ".
        image: the column of file names in `image_folder`, with or without ending; "" looks for ID.jpg and the like.
        later: our names -> columns that are read when the log is, and missed now rather than after the encoding.

    Raises:
        ValueError: a file, a folder or a column is missing.
        ImportError: pyarrow is not installed.
    """
    table = read_table(items_path, text={item, *fields, *([image] if image else [])})
    for ours, theirs in (later or {}).items():
        _need(table, theirs, ours, items_path)

    def strings(name: str, ours: str) -> np.ndarray:
        return read_texts(_joined(_need(table, name, ours, items_path), ", "), ours, items_path)

    raw_id = strings(item, "item").astype(str)
    images = no_images(len(raw_id))
    if image_folder is not None:
        images = find_images(image_folder, strings(image, "image") if image else raw_id)
    columns = {}
    for name in fields:
        if name not in table.column_names:
            raise ValueError(
                f"{items_path}: expected the column {name!r} that features.template names, found "
                f"{', '.join(table.column_names)}"
            )
        columns[name] = strings(name, "text")
    return Content(raw_id, columns, images)


def read_table(path: pathlib.Path, *, text: Collection[str] = ()) -> Table:
    """A Parquet or CSV file as a pyarrow.Table. Types of CSV columns are guessed, save those in `text`, which are text.

    Programs that hold ids with gaps as floats leave "1.0", "" or "nan", and "2.0" in a CSV. So in a column in `text`
    that holds only numbers and gaps, a gap is "", and if every number ends in ".0" it loses that.

    Raises:
        ValueError: the file is missing, damaged, or of another kind.
        ImportError: pyarrow is not installed.
    """
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
            return pyarrow.parquet.read_table(path)
        if path.suffix in (".csv", ".tsv"):
            # Descriptions have line breaks, in quotes: without the option one that lies across two blocks is refused.
            layout = pyarrow.csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
            table = pyarrow.csv.read_csv(
                path,
                parse_options=layout,
                convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(text, pyarrow.string())),
            )
            for position, name in enumerate(table.column_names):
                if name in text:
                    table = table.set_column(position, name, _tidy(table.column(position)))
            return table
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the file is damaged, truncated or of another format ({error})") from error
    raise ValueError(f"{path}: expected .parquet, .csv or .tsv, found {path.suffix or 'no ending'}")


def _tidy(column: Column) -> Column:
    import pyarrow
    import pyarrow.compute as pc
    import pyarrow.csv

    gap = pc.is_in(column, value_set=pyarrow.array(pyarrow.csv.ConvertOptions().null_values))
    number = pc.match_substring_regex(column, r"^-?[0-9]+(\.[0-9]+)?$")
    if not (pc.all(pc.or_(gap, number)).as_py() and pc.any(number).as_py()):
        return column
    column = pc.if_else(gap, "", column)
    if pc.all(pc.or_(gap, pc.ends_with(column, ".0"))).as_py():
        return pc.replace_substring_regex(column, r"\.0$", "")
    return column


def _joined(column: Column, separator: str) -> Column:
    """A list of categories as text; other columns as they are."""
    import pyarrow
    import pyarrow.compute as pc

    kind = column.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return pc.binary_join(column, separator) if is_list and pyarrow.types.is_string(kind.value_type) else column


def _need(table: Table, column: str, ours: str, path: pathlib.Path) -> Column:
    if table.column_names.count(column) != 1:
        raise ValueError(
            f"{path}: expected one column {column!r} for {ours}, found {', '.join(table.column_names)}; map it with "
            f"--config.data.columns.{ours}=NAME"
        )
    return table[column]


def read_ids(column: Column, ours: str, path: pathlib.Path) -> Ids:
    """Ids as text; missing ones are "".

    The names are made text by Arrow, for NumPy would take whole numbers with gaps through floats, which merge those
    from 2^53 on. Floats are made text by `float_ids`.

    Raises:
        ValueError: the column holds lists or the like.
    """
    code_R, name_X = _encoded(column, ours, path)
    return Ids(code_R, np.append(np.array(name_X, str), ""))


def read_texts(column: Column, ours: str, path: pathlib.Path) -> np.ndarray:
    """Titles, descriptions or categories, [R] objects that are str; missing ones are "". Otherwise as `read_ids`."""
    code_R, name_X = _encoded(column, ours, path)
    return as_texts([*name_X, ""])[code_R]


def _encoded(column: Column, ours: str, path: pathlib.Path) -> tuple[np.ndarray, list[str]]:
    """Numbers [R] of distinct names, and these [X]; X is the number of what is missing."""
    import pyarrow

    try:
        encoded = column.dictionary_encode().combine_chunks()
        names = encoded.dictionary
        if pyarrow.types.is_floating(names.type):
            name_X = float_ids(names.to_numpy(zero_copy_only=False)).tolist()
        else:
            name_X = names.cast(pyarrow.string()).fill_null("").to_pylist()
        code_R = encoded.indices.cast(pyarrow.int64()).fill_null(len(name_X)).to_numpy(zero_copy_only=False)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path}: expected text or numbers for {ours}, found {column.type} ({error}); write it as text"
        ) from error
    return code_R, name_X


def _times(column: Column, path: pathlib.Path) -> np.ndarray:
    """Times without a way through floats where Arrow has them exactly; missing are NaT, NaN or the least int64."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind):
        micro = pyarrow.compute.CastOptions(target_type=pyarrow.timestamp("us"), allow_time_truncate=True)
        return pyarrow.compute.cast(column, options=micro).to_numpy()
    if pyarrow.types.is_integer(kind) and not pyarrow.types.is_uint64(kind):
        return column.cast(pyarrow.int64()).fill_null(np.iinfo(np.int64).min).to_numpy()
    return _numbers(column, "time", path)


def _numbers(column: Column, ours: str, path: pathlib.Path) -> np.ndarray:
    """Numbers, with NaN where they are missing."""
    import pyarrow

    values = (column.cast(pyarrow.int8()) if pyarrow.types.is_boolean(column.type) else column).to_numpy()
    if values.dtype.kind in "iuf":
        return values
    kind = "numbers or timestamps" if ours == "time" else "numbers or booleans"
    raise ValueError(
        f"{path}: expected {kind} for {ours}, found {values[:3].tolist()}; write it as numbers (times also as "
        f"2024-01-31T12:00:00, with or without Z or +02:00), or map another column "
        f"with --config.data.columns.{ours}=NAME"
    )


def _mend(column: Column, path: pathlib.Path) -> Column:
    """Text as what most of its cells are; the others become gaps, which are dropped and counted.

    One bad cell makes text of a whole CSV column. Raises ValueError for a column without rows.
    """
    import pyarrow
    import pyarrow.compute as pc

    if not len(column):
        raise ValueError(f"{path}: expected events, found a header and no rows")
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        return column
    column = pc.utf8_trim_whitespace(column)
    kinds = (
        (r"^[-+]?([0-9]{1,18}|[1-8][0-9]{18})$", pyarrow.int64()),
        (r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$", pyarrow.float64()),
        (r"^(?i:true|false)$", pyarrow.bool_()),
        (r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?)?$", pyarrow.timestamp("us")),
        (
            r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[-+][0-9]{2}:?[0-9]{2})$",
            pyarrow.timestamp("us", "UTC"),
        ),
    )
    fits = [pc.fill_null(pc.match_substring_regex(column, pattern), False) for pattern, _ in kinds]
    shares = [pc.mean(pc.cast(fit, pyarrow.float64())).as_py() for fit in fits]
    best = int(np.argmax(shares))  # the first of equals: whole numbers are numbers too, and stay exact
    if shares[best] <= 0.5:
        return column
    return pc.cast(pc.if_else(fits[best], column, None), kinds[best][1])
