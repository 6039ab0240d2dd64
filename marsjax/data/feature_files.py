"""Precomputed item features from .npz, .npy or Parquet."""

from __future__ import annotations

import pathlib
import zipfile
from typing import Any

import numpy as np

from marsjax.data.cleaning import RawFeatures, float_ids

ID_KEYS = ("item_id", "movie_id", "id")


def read_features(path: pathlib.Path, *, item_ids: np.ndarray | None = None) -> RawFeatures:
    """Reads ids and vectors.

    .npz holds the ids under item_id, movie_id or id and the vectors under embedding; Parquet has an id column and a
    list column named embedding; .npy holds vectors alone, one for each row of the items table `item_ids`.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a feature file, found none; set the path to '' to do without it")
    if path.suffix == ".npz":
        try:
            # Opened here: numpy leaves a damaged file open.
            with path.open("rb") as file, np.load(file) as read:
                arrays = {name: read[name] for name in read}
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the file is damaged, truncated or no .npz ({error}); write it again") from error
        ids = next((key for key in ID_KEYS if key in arrays), None)
        if ids is None or "embedding" not in arrays:
            raise ValueError(
                f"{path}: expected arrays embedding and one of {', '.join(ID_KEYS)}, found {sorted(arrays)}"
            )
        id_I = float_ids(arrays[ids]) if arrays[ids].dtype.kind == "f" else arrays[ids].astype(str)
        return RawFeatures(id_I, _numeric(arrays["embedding"], path), path.name)
    if path.suffix == ".npy":
        if item_ids is None:
            raise ValueError(f"{path}: a .npy file has no ids, expected an items table that gives their order")
        try:
            feature = np.load(path)
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path}: the file is damaged, truncated or no .npy ({error}); write it again") from error
        return RawFeatures(item_ids, _numeric(feature, path), path.name)
    if path.suffix in (".parquet", ".pq"):
        from marsjax.data.tabular import read_ids, read_table

        table = read_table(path)
        names = table.column_names
        ids = next((key for key in ID_KEYS if key in names), None)
        if ids is None or "embedding" not in names:
            raise ValueError(
                f"{path}: expected columns embedding and one of {', '.join(ID_KEYS)}, found {', '.join(names)}"
            )
        return RawFeatures(
            read_ids(table[ids], ids, path).strings(), _numeric(_vectors(table["embedding"], path), path), path.name
        )
    raise ValueError(f"{path}: expected .npz, .npy or .parquet, found {path.suffix or 'no ending'}")


def _vectors(column: Any, path: pathlib.Path) -> np.ndarray:
    """A list column as [I, F]; a missing list or number is NaN, which is masked and counted later."""
    import pyarrow

    kind = column.type
    lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not lists or not (pyarrow.types.is_floating(kind.value_type) or pyarrow.types.is_integer(kind.value_type)):
        raise ValueError(f"{path}: expected a column embedding of lists of numbers, found {kind}")
    vectors = column.to_pylist() if column.null_count else column.to_numpy()
    widths = {len(vector) for vector in vectors if vector is not None}
    if len(widths) != 1:
        raise ValueError(f"{path}: expected vectors of one width, found widths {sorted(widths)[:5]}")
    missing = [np.nan] * widths.pop()
    return np.array([missing if vector is None else vector for vector in vectors], np.float64)


def _numeric(feature: np.ndarray, path: pathlib.Path) -> np.ndarray:
    if feature.dtype.kind not in "fiu":
        raise ValueError(f"{path}: expected vectors of numbers, found {feature.dtype}; write them as float32")
    return feature
