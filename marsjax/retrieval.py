"""Nearest high-active users, Eq. 15: USearch behind one honest function, and the exact oracle. The only usearch import.

What USearch 2.26 does and callers here never see: a batch of one changes the return type; slots beyond the number of
vectors hold key 0, a valid key; a NaN vector damages every later search; a flipped byte in a file kills the process
at load; builds on several threads differ from run to run.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import numpy as np
import usearch.index

from marsjax import files
from marsjax.records import Neighbours

log = logging.getLogger(__name__)


class UserIndex(NamedTuple):
    """An index over unit vectors, with the vectors themselves for exact similarities."""

    graph: usearch.index.Index
    unit_PD: np.ndarray  # [P, D] float32, unit length
    user_P: np.ndarray  # [P] int64, ascending
    left_out: int  # vectors that were not finite or had no length


def exact_search(
    query_BD: np.ndarray, base_PD: np.ndarray, user_P: np.ndarray, *, k: int, exclude_B: np.ndarray | None = None,
    chunk: int = 1024,
) -> Neighbours:  # fmt: skip
    """The `k` users of highest cosine, by chunked matmul; the oracle, and a good default up to some 10^5 users.

    Args:
        query_BD: queries; a zero vector has no neighbours.
        base_PD: vectors of the users `user_P`; those that are not finite or have no length are left out.
        exclude_B: a user that a query must not get (itself), or -1.

    Ties go to the lower user. Raises ValueError for queries that are not finite or have another width.
    """
    unit_PD, user_P, _ = _sound(base_PD, user_P)
    unit_BD = _unit(_checked(query_BD, unit_PD.shape[1]))
    parts = [
        _best(unit_BD[i : i + chunk] @ unit_PD.T, user_P, unit_BD[i : i + chunk],
              None if exclude_B is None else exclude_B[i : i + chunk], k)
        for i in range(0, len(unit_BD), chunk)
    ]  # fmt: skip
    if not parts:
        return _nothing(0, k)
    return Neighbours(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def build_index(
    base_PD: np.ndarray, user_P: np.ndarray, *, connectivity: int = 16, expansion_add: int = 128, dtype: str = "f32"
) -> UserIndex:
    """An HNSW index over the users' vectors, built on one thread, so that equal input gives an equal graph.

    A vector with NaN or infinity, or without length, never enters the graph: it is left out and counted.
    """
    unit_PD, user_P, left_out = _sound(base_PD, user_P)
    if left_out:
        log.warning(
            "retrieval: %d of %d user vectors are not finite or empty and were left out", left_out, len(base_PD)
        )
    graph = _graph(unit_PD.shape[1], connectivity, expansion_add, dtype)
    if len(user_P):
        graph.add(np.arange(len(user_P), dtype=np.uint64), unit_PD, threads=1)
    return UserIndex(graph, unit_PD, user_P, left_out)


def search(
    index: UserIndex, query_BD: np.ndarray, *, k: int, expansion_search: int = 64, exclude_B: np.ndarray | None = None
) -> Neighbours:
    """Approximately the `k` users of highest cosine; the contract of `exact_search`, and the same similarities."""
    query_BD = _checked(query_BD, index.unit_PD.shape[1])
    count = len(index.user_P)
    if not len(query_BD) or not count:
        return _nothing(len(query_BD), k)
    unit_BD = _unit(query_BD)
    wanted = min(k + (exclude_B is not None), count)
    index.graph.expansion_search = max(expansion_search, wanted)  # type: ignore[misc]  # it has a setter
    found = index.graph.search(unit_BD, wanted, threads=1)
    # A batch of one comes back without its axis; unfilled slots hold key 0, and only the counts tell.
    slot_BK = np.asarray(found.keys).reshape(len(unit_BD), wanted).astype(np.int64)
    filled_B = np.asarray(getattr(found, "counts", [len(found)])).reshape(-1)
    filled_BK = np.arange(wanted)[None, :] < filled_B[:, None]
    slot_BK = np.where(filled_BK, slot_BK, 0)
    similarity_BK = np.einsum("bkd,bd->bk", index.unit_PD[slot_BK], unit_BD)
    valid_BK = filled_BK & (np.abs(unit_BD).sum(axis=1) > 0)[:, None]
    if exclude_B is not None:
        valid_BK &= index.user_P[slot_BK] != np.asarray(exclude_B)[:, None]
    return _ranked(index.user_P[slot_BK], similarity_BK, valid_BK, k)


def recall(found: Neighbours, exact: Neighbours) -> float:
    """Share of the exact neighbours that were found; one as similar as the worst exact one counts as found."""
    if not exact.valid_BK.any():
        return 1.0
    worst_B1 = np.where(exact.valid_BK, exact.similarity_BK, np.inf).min(axis=1, keepdims=True)
    hits = (found.valid_BK & (found.similarity_BK >= worst_B1 - 1e-6)).sum(axis=1)
    return float(np.minimum(hits, exact.valid_BK.sum(axis=1)).sum() / exact.valid_BK.sum())


def save_index(index: UserIndex, folder: pathlib.Path) -> None:
    """Writes graph, vectors and their sums into `folder`, which appears whole or not at all."""
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        index.graph.save(str(partial / "graph.usearch"))
        files.write_arrays(partial / "vectors.npz", unit_PD=index.unit_PD, user_P=index.user_P)
        names = ("graph.usearch", "vectors.npz")
        described = {
            "usearch": importlib.metadata.version("usearch"),
            "metric": "ip",
            "width": index.unit_PD.shape[1],
            "count": len(index.user_P),
            "left_out": index.left_out,
            "connectivity": index.graph.connectivity,
            "expansion_add": index.graph.expansion_add,
            "dtype": str(index.graph.dtype).rsplit(".", 1)[-1].lower(),
            "sha256": {name: files.sha256_file(partial / name) for name in names},
        }
        files.write_json(partial / "index.json", described)
        if folder.exists():
            shutil.rmtree(folder)
        os.chmod(partial, 0o755)
        os.replace(partial, folder)
    except OSError as error:
        raise files.explain(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_index(folder: pathlib.Path) -> UserIndex:
    """Reads what `save_index` wrote. Sums are checked before USearch opens the file.

    Raises:
        ValueError: a file is missing, or differs from its sum, or holds another number or width of vectors.
    """
    folder = pathlib.Path(folder)
    if not (folder / "index.json").is_file():
        raise ValueError(f"{folder}: expected an index written by marsjax, found no index.json; build the index again")
    described = files.read_json(folder / "index.json")
    for name, expected in described["sha256"].items():
        found = files.sha256_file(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            raise ValueError(
                f"{folder / name}: expected sha256 {expected}, found {found}; the file is damaged, "
                "build the index again"
            )
    with np.load(folder / "vectors.npz") as arrays:
        unit_PD, user_P = arrays["unit_PD"], arrays["user_P"]
    graph = _graph(described["width"], described["connectivity"], described["expansion_add"], described["dtype"])
    graph.load(str(folder / "graph.usearch"))
    if len(graph) != described["count"] or unit_PD.shape != (described["count"], described["width"]):
        raise ValueError(
            f"{folder}: expected {described['count']} vectors of width {described['width']}, found {len(graph)} in the "
            f"graph and {unit_PD.shape} beside it; build the index again"
        )
    return UserIndex(graph, unit_PD, user_P, described["left_out"])


def _graph(width: int, connectivity: int, expansion_add: int, dtype: str) -> usearch.index.Index:
    # Unit vectors under the inner product: the cosine, without USearch dividing by a norm that may be zero.
    return usearch.index.Index(
        ndim=width, metric="ip", dtype=dtype, connectivity=connectivity, expansion_add=expansion_add
    )


def _unit(x_BD: np.ndarray) -> np.ndarray:
    norm_B1 = np.linalg.norm(x_BD, axis=1, keepdims=True)
    return np.ascontiguousarray(x_BD / np.where(norm_B1 > 0, norm_B1, 1.0), dtype=np.float32)


def _sound(base_PD: np.ndarray, user_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    base_PD, user_P = np.asarray(base_PD, np.float32), np.asarray(user_P, np.int64)
    if base_PD.ndim != 2 or len(base_PD) != len(user_P):
        raise ValueError(f"expected one vector a user, found {base_PD.shape} vectors and {user_P.shape} users")
    keep_P = np.isfinite(base_PD).all(axis=1) & (np.abs(base_PD).sum(axis=1) > 0)
    order = np.argsort(user_P[keep_P], kind="stable")
    return _unit(base_PD[keep_P][order]), user_P[keep_P][order], int((~keep_P).sum())


def _checked(query_BD: np.ndarray, width: int) -> np.ndarray:
    query_BD = np.asarray(query_BD, np.float32)
    if query_BD.ndim != 2 or query_BD.shape[1] != width:
        raise ValueError(f"expected queries [B, {width}], as wide as the indexed vectors, found {query_BD.shape}")
    bad_B = ~np.isfinite(query_BD).all(axis=1)
    if bad_B.any():
        raise ValueError(
            f"expected finite queries, found {int(bad_B.sum())} of {len(bad_B)} with NaN or infinity, the first in row "
            f"{int(np.argmax(bad_B))}; drop them, or look for the cause in the features"
        )
    return query_BD


def _best(
    similarity_BP: np.ndarray, user_P: np.ndarray, unit_BD: np.ndarray, exclude_B: np.ndarray | None, k: int
) -> tuple[np.ndarray, ...]:
    valid_BP = np.broadcast_to((np.abs(unit_BD).sum(axis=1) > 0)[:, None], similarity_BP.shape)
    if exclude_B is not None:
        valid_BP = valid_BP & (user_P[None, :] != np.asarray(exclude_B)[:, None])
    return tuple(_ranked(np.broadcast_to(user_P, similarity_BP.shape), similarity_BP, valid_BP, k))


def _ranked(user_BX: np.ndarray, similarity_BX: np.ndarray, valid_BX: np.ndarray, k: int) -> Neighbours:
    """The best `k` valid entries, by similarity and then by user, padded to `k`."""
    similarity_BX = np.where(valid_BX, similarity_BX, -np.inf).astype(np.float32)
    if similarity_BX.shape[1] > 4 * k:
        # Only entries at least as similar as the k-th can be in the answer; sorting few beats sorting all.
        kth_B1 = -np.partition(-similarity_BX, k - 1, axis=1)[:, k - 1 : k]
        width = max(int((similarity_BX >= kth_B1).sum(axis=1).max()), k)
        if width < similarity_BX.shape[1]:
            top_BX = np.argpartition(-similarity_BX, width - 1, axis=1)[:, :width]
            user_BX, similarity_BX, valid_BX = (
                np.take_along_axis(value, top_BX, axis=1) for value in (user_BX, similarity_BX, valid_BX)
            )
    order_BX = np.lexsort((user_BX, -similarity_BX), axis=1)[:, :k]
    user_BK, similarity_BK, valid_BK = (
        np.take_along_axis(value, order_BX, axis=1) for value in (user_BX, similarity_BX, valid_BX)
    )
    out = _nothing(len(user_BK), k)
    width = user_BK.shape[1]
    out.user_BK[:, :width] = np.where(valid_BK, user_BK, -1)
    out.similarity_BK[:, :width] = np.where(valid_BK, similarity_BK, -np.inf)
    out.valid_BK[:, :width] = valid_BK
    return out


def _nothing(b: int, k: int) -> Neighbours:
    return Neighbours(np.full((b, k), -1, np.int64), np.full((b, k), -np.inf, np.float32), np.zeros((b, k), bool))
