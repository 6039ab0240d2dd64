"""Writing that leaves nothing half-written, and sums that tell whether what is read is what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes beside `path` and renames, so that a reader sees the old file or the new one and never a part.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = None
    try:
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        raise explain(error, path) from error


def explain(error: OSError, path: pathlib.Path) -> OSError:
    """The same error with a message that says what to do; only a full disk is rephrased."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return OSError(
        error.errno, f"no space left while writing {path}; nothing was left half-written. Free some space and run again"
    )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes indented JSON; NaN and infinity, which JSON lacks, raise ValueError."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: pathlib.Path) -> Any:
    """Reads JSON. Raises ValueError naming the file where it is damaged."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, found {error}; the file is damaged, write it again") from error


def write_arrays(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Writes an uncompressed .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


def sha256_file(path: pathlib.Path) -> str:
    """sha256 of the content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_arrays(arrays: Mapping[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        if array.dtype.hasobject:
            raise ValueError(f"{name}: expected plain numbers or fixed-width strings, found Python objects")
        digest.update(array.tobytes())
    return digest.hexdigest()
