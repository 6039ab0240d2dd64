"""The stage: items in, one array a modality and a manifest out. It can be stopped, and does nothing twice.

While a modality is encoded, its rows go to a journal beside the results, one record a row with the sum of its bytes.
What an earlier run left there, or in the results themselves, is used again where the content of the item (its rendered
text, or the bytes of its image) and the facts of the encoder are the same. So a run that was killed goes on, and after
a change of some items only these are encoded. The results hold a sum of these facts, so that they are one file which is
replaced at once: the manifest tells of them and decides nothing.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from marsjax import files
from marsjax.features.images import PIXELS, BrokenImage, read_image
from marsjax.features.signature import Encoder
from marsjax.progress import progress
from marsjax.records import Problem

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHOWN = 5  # places that a problem names
CHUNK = 1024  # rows that are copied at a time
KEYS = {"embedding", "content_sha256", "cut", "facts_sha256"}  # of results that may be used again
DTYPES = ("float32", "float16")


class Reader(NamedTuple):
    """How the value of an item (its text, its image file, its id) becomes what an encoder reads."""

    content: Callable[[Any], bytes]  # may raise OSError
    decode: Callable[[bytes], Any]  # may raise BrokenImage
    weigh: Callable[[Any], int] = lambda value: 0  # pixels of what was decoded
    name: Callable[[Any], str] = lambda value: ""  # of the file, where the value is one


READERS = {
    "text": Reader(lambda text: text.encode("utf-8", "surrogatepass"), lambda data: data.decode("utf-8", "replace")),
    "image": Reader(
        lambda path: path.read_bytes(), read_image, lambda image: image.width * image.height, lambda path: path.name
    ),
}


class Refused(ValueError):
    """Items that strict reading does not take."""


class Made(NamedTuple):
    """The features of one modality."""

    path: pathlib.Path  # .npz with item_id, embedding, content_sha256, cut (in the order of the items) and facts_sha256
    problems: tuple[Problem, ...]


def encode_items(
    modality: str,
    raw_id_I: np.ndarray,
    value_I: Sequence[Any],
    encoder: Encoder,
    reader: Reader,
    *,
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    strict: bool = False,
) -> Made:
    """Encodes the items of one modality into `folder`/MODALITY.npz and tells of it in `folder`/manifest.json.

    An item without a usable vector has no row, and so counts as absent wherever the file is read.

    Args:
        raw_id_I: [I] str. The first of equal ids counts.
        value_I: I values for `reader.content`; None or "" is missing.
        facts: what the manifest says beside the facts of the encoder (the template, ...).
        notes: what the manifest says too, and no vector depends on (where a model lies).
        dtype: of the vectors in the file, float32 or float16. A number that float16 cannot hold is broken.
        strict: refuse broken items and repeated ids once all is read; what was encoded stays in the journal.

    Raises:
        Refused: `strict` and something is broken.
        ValueError: no item has a vector, or another process is at work in `folder`.
        OSError: the disk is full; what is in the journal stays, and the next run goes on from there.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**facts, **encoder.facts, "width": encoder.width, "dtype": dtype}
    record = np.dtype(
        [("content", "u1", 32), ("cut", "?"), ("row", np.dtype(dtype).newbyteorder("<"), encoder.width), ("sum", "<u4")]
    )
    facts_sha256 = files.digest_json(whole)
    journal = folder / f".{modality}-{facts_sha256[:12]}.partial"
    _, first = np.unique(raw_id_I, return_index=True)
    use = np.sort(first)
    repeated = np.setdiff1d(np.arange(len(raw_id_I)), use)
    content: dict[int, bytes] = {}  # item -> sha256 of its content, of items that have a vector
    broken: dict[str, str] = {}  # id -> reason
    missing = []
    alone = f"{folder}: expected to be alone, found another process encoding the same; wait for it"
    with files.locked(folder / f".{modality}.lock", held=alone), journal.open("a+b") as file:
        known = _Known(folder / f"{modality}.npz", facts_sha256)
        place = _mend(file, record)  # content -> record
        before = len(place)  # by a call that was stopped
        batch: dict[bytes, tuple[list[int], Any]] = {}
        weight = 0  # of the batch

        def flush() -> None:
            nonlocal weight
            if not batch:
                return
            encoded = encoder.encode([value for _, value in batch.values()])
            with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and broken below
                row_BF = encoded.row_BF.astype(record["row"].base)
            finite_B = np.isfinite(row_BF).all(axis=1)
            good_B = finite_B & row_BF.any(axis=1)  # zeros have no direction, and would pass for a vector
            record_B = np.zeros(int(good_B.sum()), record)
            at = 0
            for row, (digest, (items, _)) in enumerate(batch.items()):
                if not good_B[row]:
                    reason = "a zero vector" if finite_B[row] else "no finite vector"
                    reason = (encoded.reason_B[row] if encoded.reason_B else "") or reason
                    broken.update({str(raw_id_I[item]): reason for item in items})
                    continue
                record_B[at]["content"] = np.frombuffer(digest, np.uint8)
                record_B[at]["cut"], record_B[at]["row"] = encoded.cut_B[row], row_BF[row]
                record_B[at]["sum"] = _sum(record_B[at])
                place[digest] = len(place)
                content.update(dict.fromkeys(items, digest))
                at += 1
            batch.clear()
            weight = 0
            _append(file, record_B.tobytes(), journal)

        with progress(f"{modality} features", len(use)) as advance:
            for item in map(int, use):
                value = value_I[item]
                advance()
                if value is None or value == "":
                    missing.append(item)
                    continue
                try:
                    data = reader.content(value)
                    digest = hashlib.sha256(data).digest()
                    if digest in known.place or digest in place:
                        content[item] = digest
                        continue
                    if digest in batch:
                        batch[digest][0].append(item)
                        continue
                    batch[digest] = [item], reader.decode(data)
                    weight += reader.weigh(batch[digest][1])
                except BrokenImage as error:
                    name = reader.name(value)
                    broken[str(raw_id_I[item])] = f"{error} ({name})" if name else str(error)
                except OSError as error:  # it names the file itself
                    broken[str(raw_id_I[item])] = str(error)
                # Large images wait for no others, so that memory is bounded.
                if len(batch) >= encoder.batch or weight >= PIXELS:
                    flush()
            flush()
        problems = _problems(modality, raw_id_I, repeated, missing, broken)
        refused = [problem for problem in problems if strict and problem.action != "kept"]
        if refused:
            raise Refused(
                f"{modality} features: strict reading refuses "
                + "; ".join(f"{p.occurrences} x {p.kind} ({', '.join(p.where)})" for p in refused)
                + ". Mend the items, or go without strict to have them left out"
            )
        if not content:
            raise ValueError(
                f"{modality} features: expected items that can be encoded, found none among {len(use)} "
                f"({len(missing)} without {modality}, {len(broken)} broken); look at features.template, "
                "data.image_folder and the messages before"
            )
        file.flush()
        item_I = sorted(content)
        digest_I = [content[item] for item in item_I]
        record_J: Any = np.memmap(journal, record, "r", shape=(len(place),)) if place else np.zeros(0, record)
        path = folder / f"{modality}.npz"
        cut_I = _write(path, facts_sha256, raw_id_I[item_I], digest_I, record_J, place, known, record["row"])
        entry = {
            **whole,
            **(notes or {}),
            "facts_sha256": facts_sha256,  # as in the file: rows with another one are made anew
            "sha256": files.sha256_file(path),
            "items": len(use),
            "vectors": len(item_I),
            "missing": len(missing),
            "broken": broken,
            "repeated_ids": len(repeated),
            "cut": int(cut_I.sum()),
        }
        if cut_I.any():
            where = tuple(f"item {raw_id_I[item]}" for item in np.array(item_I)[cut_I][:SHOWN])
            problems += (Problem(f"long_{modality}", int(cut_I.sum()), "kept", where),)
        with files.locked(folder / ".manifest.lock", held=None):  # other modalities may be at work
            manifest = files.read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
            files.write_json(folder / MANIFEST, {**manifest, modality: entry})
        # Also what a kill left of results that were being written.
        for left in (*folder.glob(f".{modality}-*.partial"), *folder.glob(f".{modality}.npz.*.partial")):
            left.unlink()
    stopped = f", {before} by a call that was stopped" if before else ""
    made = len(place) - before
    log.info("%s: %d vectors of %d items, %d made anew%s", path, len(item_I), len(use), made, stopped)
    return Made(path, problems)


class _Known:
    """The rows of finished results that may be used again; they stay on disk.

    Attributes:
        place: sha256 of a content -> its row.
    """

    def __init__(self, path: pathlib.Path, facts_sha256: str):
        self.place: dict[bytes, int] = {}
        if not path.exists():
            return
        if not _is_whole(path):
            log.warning("%s is damaged and is made anew", path)
            return
        with np.load(path) as arrays:
            if not set(arrays) >= KEYS or str(arrays["facts_sha256"]) != facts_sha256:
                log.info("%s was made in another way and is made anew", path)
                return
        known = files.map_arrays(path)
        self.row_IF, self.cut_I = known["embedding"], known["cut"]
        self.place = {digest.tobytes(): row for row, digest in enumerate(known["content_sha256"])}


def _is_whole(path: pathlib.Path) -> bool:
    """Whether all members of an archive have the sums that it lists."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
    ):  # as what is damaged may raise
        return False


def _write(
    path: pathlib.Path,
    facts_sha256: str,
    id_I: np.ndarray,
    digest_I: Sequence[bytes],
    record_J: np.ndarray,
    place: Mapping[bytes, int],
    known: _Known,
    row: np.dtype,
) -> np.ndarray:
    """Writes the result, some rows at a time; returns which items were cut, [I] bool."""
    row_of = [(place.get(digest, -1), known.place.get(digest, -1)) for digest in digest_I]
    cut_I = np.array([record_J["cut"][new] if new >= 0 else known.cut_I[old] for new, old in row_of], bool)

    def rows() -> Iterator[bytes]:
        for start in range(0, len(row_of), CHUNK):
            chunk = row_of[start : start + CHUNK]
            yield np.stack([record_J["row"][new] if new >= 0 else known.row_IF[old] for new, old in chunk]).tobytes()

    small = {
        "item_id": id_I,
        "content_sha256": np.frombuffer(b"".join(digest_I), np.uint8).reshape(-1, 32),
        "cut": cut_I,
        "facts_sha256": np.array(facts_sha256),
    }
    # ZipFile.open gives every member a date, and the archive would differ from one run to the next: it is fixed here.
    with files.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in small.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open(zipfile.ZipInfo("embedding.npy"), "w", force_zip64=True) as member:
            header = {
                "descr": np.lib.format.dtype_to_descr(row.base),
                "fortran_order": False,
                "shape": (len(row_of), *row.shape),
            }
            np.lib.format.write_array_header_1_0(member, header)
            for data in rows():
                member.write(data)
    return cut_I


def _problems(
    modality: str, raw_id_I: np.ndarray, repeated: np.ndarray, missing: Sequence[int], broken: Mapping[str, str]
) -> tuple[Problem, ...]:
    problems = []
    if len(repeated):
        where = tuple(f"row {item + 1}: item {raw_id_I[item]}" for item in repeated[:SHOWN])
        problems.append(Problem("duplicate_item", len(repeated), "dropped", where))
    if missing:
        where = tuple(f"item {raw_id_I[item]}" for item in missing[:SHOWN])
        problems.append(Problem(f"missing_{modality}", len(missing), "kept", where))
    if broken:
        where = tuple(f"item {name}: {reason}" for name, reason in list(broken.items())[:SHOWN])
        problems.append(Problem(f"broken_{modality}", len(broken), "masked", where))
    return tuple(problems)


def _sum(record: np.void) -> int:
    """Of all bytes of a record but the sum itself."""
    return zlib.crc32(record.tobytes()[:-4])


def _mend(file: BinaryIO, record: np.dtype) -> dict[bytes, int]:
    """Content -> record of what an earlier run left; cuts the journal before the first record that is not whole."""
    place: dict[bytes, int] = {}
    file.seek(0)
    while len(data := file.read(record.itemsize)) == record.itemsize:
        (one,) = np.frombuffer(data, record)
        if one["sum"] != _sum(one):
            break
        place[one["content"].tobytes()] = len(place)
    file.truncate(len(place) * record.itemsize)
    return place


def _append(file: BinaryIO, data: bytes, path: pathlib.Path) -> None:
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        if files.is_full(error):
            raise files.explain(error, path) from error
        raise
