"""Writing that leaves nothing half-written, and sums that tell whether what is read is what was written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

log = logging.getLogger(__name__)

ALIGNED = 64  # bytes, a line of the cache, and what XLA asks of an array that it is to read where it lies
ZIP_HEADER, ZIP64, ZIP_FIELD = 30, 20, 4  # bytes of a member's head, and of what may follow the name
PADDING = 0xD935  # the field that Android's zipalign pads with; readers skip it
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextlib.contextmanager
def locked(path: pathlib.Path, *, held: str | None) -> Iterator[None]:
    """Holds a file, which stays; the lock goes with the process, however that ends. A disk without locks is told of.

    Args:
        held: the message of the ValueError that is raised where another process holds it; None waits for that one.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if held is not None:
                raise ValueError(held) from error
            log.info("waiting for another process, which holds %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network disks have no locks
            log.warning("%s cannot be locked (%s): let no other process write there", path, error)
        yield


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes beside `path` and renames, so that a reader sees the old file or the new one and never a part.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Gives a file beside `path` to write into, which takes its place where the block ends well.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    path = pathlib.Path(path)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        partial = None
    except OSError as error:
        if is_full(error):
            raise explain(error, path) from error
        raise
    finally:  # an interrupt leaves nothing either
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


def copy_file(source: pathlib.Path, path: pathlib.Path) -> None:
    """Copies a file; one that was copied is a file of its own.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)


def sync_folder(folder: pathlib.Path, *, deep: bool = True) -> None:
    """Waits until a folder, and all in it unless it is not to be `deep`, is on the disk: what points to it next must
    not outlive it where power is lost."""
    for path in [*(folder.rglob("*") if deep else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def write_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder beside `folder` to write into, which takes its place where the block ends well.

    What was at `folder` stays until then, and stays for good where the block raises.

    Raises:
        OSError: the disk is full, or the parent cannot be written; nothing new is left behind.
    """
    folder = pathlib.Path(folder).absolute()
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
        new, old = partial / "new", partial / "old"
        new.mkdir()
        yield new
        # A folder cannot be renamed over one that has content. A kill between the two renames leaves both folders
        # whole inside the partial one, and nothing at `folder`.
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:  # an interrupt too
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
    except OSError as error:
        if is_full(error):
            raise explain(error, folder) from error
        raise
    finally:
        if partial is not None:
            remove_folder(partial)


def remove_folder(folder: pathlib.Path, *, seconds: float = 5.0) -> None:
    """Removes a folder and all in it; no error where it is not there.

    Orbax writes many files at once. Where one of them fails, the others are still being written for some moments, and
    a folder that gains a file while it is being removed stays: so this tries again, for some seconds, and warns where
    it is still there then.
    """
    until = time.monotonic() + seconds
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.05)
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("%s could not be removed; remove it by hand", folder)


def is_full(error: OSError) -> bool:
    """Whether the disk (or the quota on it) is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def explain(error: OSError, path: pathlib.Path) -> OSError:
    """The error of a full disk (`is_full`) with a message that says what to do."""
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
    """Writes an uncompressed .npz, for `map_arrays` or `np.load`. Arrays of Python objects, which could not be read
    back, raise ValueError."""
    for name, array in arrays.items():
        _refuse_objects(name, np.asarray(array))
    # Not through memory, which would hold large arrays twice more. As `np.savez` does, but that numbers begin at whole
    # multiples of ALIGNED: without, what is mapped would be copied wherever it is used.
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            head = file.tell() + ZIP_HEADER + len(member.filename.encode()) + ZIP64 + ZIP_FIELD
            spare = -head % ALIGNED
            member.extra = PADDING.to_bytes(2, "little") + spare.to_bytes(2, "little") + bytes(spare)
            with archive.open(member, "w", force_zip64=True) as written:
                np.lib.format.write_array(written, np.asanyarray(array), allow_pickle=False)


def map_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed .npz, read-only and left on disk: a page is read when it is touched, and processes
    that map one file share its memory. The file may be replaced or removed, but not be changed.

    Raises:
        OSError: the file cannot be read.
        ValueError, zipfile.BadZipFile: it is damaged, or no such file.
    """
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: expected arrays without compression, found {member.filename} with")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in HEADERS:
                    raise ValueError(f"{path}: expected arrays of format 1 or 2, found {member.filename} of {version}")
                shape, by_columns, dtype = HEADERS[version](file)
                if dtype.hasobject:  # their bytes are a pickle, which is not read
                    raise ValueError(f"{path}: expected plain numbers or text, found Python objects in dtype {dtype}")
                skip = file.tell()
            # Of the member itself: names and extra fields of these lengths follow.
            head = raw[member.header_offset + 26 : member.header_offset + ZIP_HEADER].view("<u2")
            begin = member.header_offset + ZIP_HEADER + int(head.sum()) + skip
            flat = raw[begin : begin + dtype.itemsize * math.prod(shape)].view(dtype)
            arrays[member.filename.removesuffix(".npy")] = flat.reshape(shape, order="F" if by_columns else "C")
    return arrays


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an .npy, which can be read without being loaded. Arrays of Python objects raise ValueError."""
    _refuse_objects(path.name, array)
    with replacing(path) as file:
        np.save(file, array, allow_pickle=False)


def sha256_file(path: pathlib.Path) -> str:
    """sha256 of the content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_arrays(arrays: Mapping[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names.

    Objects that are all str have the sum of a fixed-width array of them; other Python objects raise ValueError.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])  # not ascontiguousarray, which turns a scalar into an array of one
        if array.dtype.hasobject and all(isinstance(text, str) for text in array.flat):
            texts = [text.rstrip("\0") for text in array.flat]  # as NumPy does
            width = max(map(len, texts), default=0) or 1
            digest.update(f"{name}|<U{width}|{array.shape}|".encode())
            for text in texts:  # the array as a whole may not fit
                digest.update(text.encode("utf-32-le", "surrogatepass").ljust(4 * width, b"\0"))
            continue
        _refuse_objects(name, array)
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """sha256 over the content of a JSON value, whatever its layout."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _refuse_objects(name: str, array: np.ndarray) -> None:
    if array.dtype.hasobject:
        raise ValueError(
            f"{name}: expected plain numbers or fixed-width strings, found Python objects ({array.dtype}); convert them"
        )
