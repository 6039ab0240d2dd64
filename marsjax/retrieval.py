"""Nearest high-active users, Eq. 15: USearch behind one honest function, and the exact oracle. The only usearch import.

What USearch 2.26 does and callers here never see: a batch of one changes the return type; slots beyond the number of
vectors hold key 0, a valid key; a NaN vector damages every later search; a flipped byte in a file kills the process
at load; builds on several threads differ from run to run.
"""

from __future__ import annotations

import importlib.metadata
import logging
import pathlib
from typing import Any, NamedTuple

import numpy as np
import usearch.index

from marsjax import files
from marsjax.records import Neighbours

log = logging.getLogger(__name__)

METRIC = "ip"  # of unit vectors: the cosine, without USearch dividing by a norm that may be zero
FEW = 16  # queries that one thread searches for
SAME = 1e-4  # distance of a vector to itself in half precision, at the most
TWINS = 5  # neighbours among which a user must find itself, or so many of its vector
CHUNK = 65_536  # queries of an index at a time
ENTRIES = 1 << 25  # similarities at a time: those of 1,024 queries to a million users are 4 GB, several times over
GRAPH, VECTORS, DESCRIPTION = "graph.usearch", "vectors.npz", "index.json"
DESCRIBED = {
    "usearch": str, "metric": str, "dtype": str, "width": int, "count": int, "left_out": int, "connectivity": int,
    "expansion_add": int, "sha256": dict,
}  # fmt: skip


class UserIndex(NamedTuple):
    """An index over unit vectors, with the vectors themselves for exact similarities."""

    graph: usearch.index.Index
    unit_PD: np.ndarray  # [P, D] float32, unit length
    user_P: np.ndarray  # [P] int64, ascending, each once
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

    Ties go to the lower user.

    Raises:
        ValueError: queries that are not finite or have another width, a user with two vectors, `k` below 1, or
            `exclude_B` that is not one user a query.
    """
    unit_PD, user_P, _ = _sound(base_PD, user_P)
    unit_BD, exclude_B = _checked(query_BD, unit_PD.shape[1], k, exclude_B)
    # A matmul rounds by the place in the matrix, so equal vectors may get unequal products and the tie between them
    # is decided by chance. Equal vectors share one column here.
    distinct_XD, column_P = _distinct(unit_PD)
    slot_P = np.arange(len(user_P))
    chunk = max(1, min(chunk, ENTRIES // max(len(user_P), 1)))
    parts = []
    for i in range(0, len(unit_BD), chunk):
        part_BD = unit_BD[i : i + chunk]
        similarity_BP = (part_BD @ distinct_XD.T)[:, column_P]
        valid_BP = np.broadcast_to(part_BD.any(axis=1, keepdims=True), similarity_BP.shape)
        if exclude_B is not None:
            valid_BP = valid_BP & (user_P[None, :] != exclude_B[i : i + chunk, None])
        best = _ranked(np.broadcast_to(slot_P, similarity_BP.shape), similarity_BP, valid_BP, k)
        parts.append(_answer(best.user_BK, best.valid_BK, unit_PD, user_P, part_BD, k))
    if not parts:
        return _nothing(0, k)
    return Neighbours(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def build_index(
    base_PD: np.ndarray,
    user_P: np.ndarray,
    *,
    connectivity: int = 16,
    expansion_add: int = 128,
    dtype: str = "f16",
    threads: int = 1,
) -> UserIndex:
    """An HNSW index over the users' vectors. On one thread equal input gives an equal graph; on more, or with 0 one for
    each processor, it takes less time, and each build gives another graph, which finds as many: users whom it does not
    find are added again.

    Half precision in the graph costs little recall, since similarities are computed from the vectors, and takes less
    time to build and half the memory (`benchmarks/retrieval.py`).

    A vector with NaN or infinity, or without length, never enters the graph: it is left out and counted. A user with
    two vectors raises ValueError, as does a negative number of threads.
    """
    if threads < 0:
        raise ValueError(f"threads: expected 0 (one for each processor) or more, found {threads}")
    unit_PD, user_P, left_out = _sound(base_PD, user_P)
    if left_out:
        log.warning(
            "retrieval: %d of %d user vectors are not finite or empty and were left out", left_out, len(base_PD)
        )
    graph = _graph(unit_PD.shape[1], connectivity, expansion_add, dtype)
    slot_P = np.arange(len(user_P), dtype=np.uint64)
    if len(user_P):
        graph.add(slot_P, unit_PD, threads=threads)
        # Users who are added side by side do not see each other, and a few end with no way to them.
        lost = slot_P[:0] if threads == 1 else _lost(graph, unit_PD, slot_P)
        if len(lost):
            graph.remove(lost)
            graph.add(lost, unit_PD[lost], threads=1)
    return UserIndex(graph, unit_PD, user_P, left_out)


def _lost(graph: usearch.index.Index, unit_PD: np.ndarray, slot_P: np.ndarray) -> np.ndarray:
    """Slots [X] uint64 of vectors that a search for themselves does not find."""
    parts = []
    count = min(TWINS, len(slot_P))
    for i in range(0, len(slot_P), CHUNK):
        found = graph.search(unit_PD[i : i + CHUNK], count, threads=0)
        key_BK = np.asarray(found.keys).reshape(-1, count)
        distance_BK = np.asarray(found.distances).reshape(-1, count)
        own_B1 = slot_P[i : i + CHUNK, None]
        parts.append(own_B1[~(key_BK == own_B1).any(axis=1) & (distance_BK[:, -1] > SAME), 0])
    return np.concatenate(parts)


def search(
    index: UserIndex, query_BD: np.ndarray, *, k: int, expansion_search: int = 64, exclude_B: np.ndarray | None = None
) -> Neighbours:
    """Approximately the `k` users of highest cosine; the contract of `exact_search`, and the same similarities.

    The similarities are computed from the vectors, whatever the precision of the graph. Of users with equal vectors,
    those that the graph finds come in order; which of them it finds is up to it.
    """
    unit_BD, exclude_B = _checked(query_BD, index.unit_PD.shape[1], k, exclude_B)
    count = len(index.user_P)
    if not len(unit_BD) or not count:
        return _nothing(len(unit_BD), k)
    # Of two that are nearly equal a graph of less precision may put the nearer one last, so it is asked for more.
    spare = 0 if _kind(index.graph.dtype) == "f32" else k
    wanted = min(k + spare + (exclude_B is not None), count)
    index.graph.expansion_search = max(expansion_search, wanted)  # type: ignore[misc]  # it has a setter
    # All cores where there is much to do (only building depends on their number); starting threads takes longer than a
    # few queries.
    found = index.graph.search(unit_BD, wanted, threads=0 if len(unit_BD) > FEW else 1)
    # A batch of one comes back without its axis; unfilled slots hold key 0, and only the counts tell.
    slot_BK = np.asarray(found.keys).reshape(len(unit_BD), wanted).astype(np.int64)
    filled_B = np.asarray(getattr(found, "counts", [len(found)])).reshape(-1)
    filled_BK = np.arange(wanted)[None, :] < filled_B[:, None]
    slot_BK = np.where(filled_BK, slot_BK, 0)
    valid_BK = filled_BK & unit_BD.any(axis=1, keepdims=True)
    if exclude_B is not None:
        valid_BK &= index.user_P[slot_BK] != exclude_B[:, None]
    return _answer(slot_BK, valid_BK, index.unit_PD, index.user_P, unit_BD, k)


def nearest(
    query_BD: np.ndarray, base_PD: np.ndarray, user_P: np.ndarray, *, k: int, backend: str, sample: int = 1000
) -> tuple[Neighbours, float]:
    """Eq. 15 by a backend, "usearch" or "exact", and its recall against the exact search of `sample` queries.

    Raises ValueError for another backend.
    """
    if backend == "exact":
        return exact_search(query_BD, base_PD, user_P, k=k), 1.0
    if backend != "usearch":
        raise ValueError(f"retrieval.backend: expected usearch or exact, found {backend!r}")
    index = build_index(base_PD, user_P)
    # Some at a time: what is between is several times as large as the queries.
    parts = [search(index, query_BD[i : i + CHUNK], k=k) for i in range(0, max(len(query_BD), 1), CHUNK)]
    found = Neighbours(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    asked = np.random.default_rng(0).permutation(len(query_BD))[:sample]
    exact = exact_search(query_BD[asked], base_PD, user_P, k=k)
    return found, recall(Neighbours(*(value[asked] for value in found)), exact)


def recall(found: Neighbours, exact: Neighbours) -> float:
    """Share of the exact neighbours that were found; one as similar as the worst exact one counts as found.

    Raises ValueError where the two answer another number of queries.
    """
    if len(found.valid_BK) != len(exact.valid_BK):
        raise ValueError(
            f"expected answers to the same queries, found {found.valid_BK.shape} and {exact.valid_BK.shape}; search "
            "both with the same queries"
        )
    if not exact.valid_BK.any():
        return 1.0
    worst_B1 = np.where(exact.valid_BK, exact.similarity_BK, np.inf).min(axis=1, keepdims=True)
    hits = (found.valid_BK & (found.similarity_BK >= worst_B1 - 1e-6)).sum(axis=1)
    return float(np.minimum(hits, exact.valid_BK.sum(axis=1)).sum() / exact.valid_BK.sum())


def save_index(index: UserIndex, folder: pathlib.Path) -> None:
    """Writes graph, vectors and their sums into `folder`, which appears whole or not at all.

    Raises:
        OSError: the disk is full; what was in `folder` before is still there.
    """
    with files.write_folder(folder) as partial:
        # Through memory: on a full disk USearch's own writing raises an error that does not say so.
        files.write_bytes(partial / GRAPH, bytes(index.graph.save() or b""))
        files.write_arrays(partial / VECTORS, unit_PD=index.unit_PD, user_P=index.user_P)
        described = {
            "usearch": importlib.metadata.version("usearch"),
            "metric": METRIC,
            "dtype": _kind(index.graph.dtype),
            "width": index.unit_PD.shape[1],
            "count": len(index.user_P),
            "left_out": index.left_out,
            "connectivity": index.graph.connectivity,
            "expansion_add": index.graph.expansion_add,
            "sha256": {name: files.sha256_file(partial / name) for name in (GRAPH, VECTORS)},
        }
        files.write_json(partial / DESCRIPTION, described)


def load_index(folder: pathlib.Path) -> UserIndex:
    """Reads what `save_index` wrote. Everything is checked before USearch loads the graph.

    Raises:
        ValueError: a file is missing, or differs from its sum, or holds another metric, precision, number or width of
            vectors than described.
    """
    folder = pathlib.Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder}: expected an index written by marsjax, found no index.json; build the index again")
    described = _description(folder / DESCRIPTION)
    for name in (GRAPH, VECTORS):
        expected = described["sha256"].get(name, "no sum")
        found = files.sha256_file(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            raise ValueError(
                f"{folder / name}: expected sha256 {expected}, found {found}; the file is damaged, "
                "build the index again"
            )
    count, width = described["count"], described["width"]
    with np.load(folder / VECTORS) as arrays:
        unit_PD, user_P = arrays["unit_PD"], arrays["user_P"]
    # Reads the head of the file only.
    head = usearch.index.Index.metadata(str(folder / GRAPH)) or {}
    facts = {
        "metric": (METRIC, described["metric"]),
        "metric of the graph": (METRIC, _kind(head.get("kind_metric"))),
        "dtype of the graph": (described["dtype"], _kind(head.get("kind_scalar"))),
        "vectors in the graph": (count, head.get("count_present")),
        "width of the graph": (width, head.get("dimensions")),
        "vectors": ((count, width), unit_PD.shape),
        "users": ((count,), user_P.shape),
    }
    wrong = [f"{name}: expected {expected}, found {found}" for name, (expected, found) in facts.items()
             if expected != found]  # fmt: skip
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong)}; index.json describes another index, build the index again")
    graph = _graph(width, described["connectivity"], described["expansion_add"], described["dtype"])
    graph.load(str(folder / GRAPH))
    return UserIndex(graph, unit_PD, user_P, described["left_out"])


def _description(path: pathlib.Path) -> dict[str, Any]:
    described = files.read_json(path)
    if not isinstance(described, dict):
        raise ValueError(f"{path}: expected an object, found {type(described).__name__}; build the index again")
    wrong = [name for name, kind in DESCRIBED.items() if not isinstance(described.get(name), kind)]
    if wrong:
        raise ValueError(
            f"{path}: expected {', '.join(f'{name} ({DESCRIBED[name].__name__})' for name in wrong)}, found "
            f"{', '.join(repr(described.get(name)) for name in wrong)}; the file is damaged, build the index again"
        )
    return described


def _kind(kind: Any) -> str:
    """ScalarKind.F32 -> f32"""
    return str(kind).rsplit(".", 1)[-1].lower()


def _graph(width: int, connectivity: int, expansion_add: int, dtype: str) -> usearch.index.Index:
    return usearch.index.Index(
        ndim=width, metric=METRIC, dtype=dtype, connectivity=connectivity, expansion_add=expansion_add
    )


def _unit(x_BD: np.ndarray) -> np.ndarray:
    # Scaled by a power of two first, which is exact: the squares of large entries overflow, of small ones vanish.
    _, exponent_B1 = np.frexp(np.abs(x_BD).max(axis=1, keepdims=True, initial=0.0))
    scaled_BD = np.ldexp(x_BD, -exponent_B1)
    norm_B1 = np.linalg.norm(scaled_BD, axis=1, keepdims=True)
    # Adding 0 turns -0 into 0, so that equal vectors have equal bytes.
    return np.ascontiguousarray(scaled_BD / np.where(norm_B1 > 0, norm_B1, 1.0) + 0.0, dtype=np.float32)


def _float32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is treated as such
        return np.asarray(x, np.float32)


def _sound(base_PD: np.ndarray, user_P: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    base_PD, user_P = _float32(base_PD), np.asarray(user_P, np.int64)
    if base_PD.ndim != 2 or user_P.shape != base_PD.shape[:1]:
        raise ValueError(
            f"expected one vector a user, found {base_PD.shape} vectors, {user_P.shape} users; give both in one order"
        )
    ascending_P = np.sort(user_P)
    twice = ascending_P[1:][ascending_P[1:] == ascending_P[:-1]]
    if len(twice):
        raise ValueError(f"expected each user once, found user {twice[0]} more than once; drop all but one vector")
    keep_P = np.isfinite(base_PD).all(axis=1) & base_PD.any(axis=1)
    order = np.argsort(user_P[keep_P], kind="stable")
    return _unit(base_PD[keep_P][order]), user_P[keep_P][order], int((~keep_P).sum())


def _checked(
    query_BD: np.ndarray, width: int, k: int, exclude_B: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Unit queries, and the users to exclude."""
    query_BD = _float32(query_BD)
    if k < 1:
        raise ValueError(f"expected k of 1 or more, found {k}; ask for at least one neighbour")
    if query_BD.ndim != 2 or query_BD.shape[1] != width:
        raise ValueError(
            f"expected queries [B, {width}], as wide as the indexed vectors, found {query_BD.shape}; embed queries and "
            "users with the same model"
        )
    bad_B = ~np.isfinite(query_BD).all(axis=1)
    if bad_B.any():
        raise ValueError(
            f"expected finite queries, found {int(bad_B.sum())} of {len(bad_B)} with NaN or infinity, the first in row "
            f"{int(np.argmax(bad_B))} of {query_BD.shape}; drop them, or look for the cause in the features"
        )
    if exclude_B is not None:
        exclude_B = np.asarray(exclude_B)
        if exclude_B.shape != (len(query_BD),):
            raise ValueError(
                f"expected one user to exclude a query, ({len(query_BD)},), found {exclude_B.shape}; -1 excludes nobody"
            )
    return _unit(query_BD), exclude_B


def _distinct(unit_PD: np.ndarray) -> tuple[np.ndarray, np.ndarray | slice]:
    """The distinct vectors [X, D], and which of them each vector is, [P]."""
    if not unit_PD.size:
        return unit_PD, slice(None)
    bytes_P = unit_PD.view(np.dtype((np.void, unit_PD.itemsize * unit_PD.shape[1])))[:, 0]
    _, first_X, column_P = np.unique(bytes_P, return_index=True, return_inverse=True)
    if len(first_X) == len(unit_PD):
        return unit_PD, slice(None)
    return unit_PD[first_X], column_P


def _answer(
    slot_BX: np.ndarray, valid_BX: np.ndarray, unit_PD: np.ndarray, user_P: np.ndarray, unit_BD: np.ndarray, k: int
) -> Neighbours:
    """The best `k` of the vectors `slot_BX`, whose similarities are the same whatever else is in the batch."""
    if not len(user_P):
        return _nothing(len(slot_BX), k)
    similarity_BX = np.empty(slot_BX.shape, np.float32)
    rows = max(1, 512 // max(1, slot_BX.shape[1]))  # the vectors of some rows at a time, as many as a cache holds
    for i in range(0, len(slot_BX), rows):
        near_BXD = unit_PD[np.where(valid_BX[i : i + rows], slot_BX[i : i + rows], 0)].astype(np.float64)
        part_BD = unit_BD[i : i + rows].astype(np.float64)
        similarity_BX[i : i + rows] = np.einsum("bxd,bd->bx", near_BXD, part_BD)
    best = _ranked(slot_BX, similarity_BX, valid_BX, k)
    return best._replace(user_BK=np.where(best.valid_BK, user_P[np.where(best.valid_BK, best.user_BK, 0)], -1))


def _ranked(user_BX: np.ndarray, similarity_BX: np.ndarray, valid_BX: np.ndarray, k: int) -> Neighbours:
    """The best `k` valid entries, by similarity and then by user (or slot, in the same order), padded to `k`."""
    similarity_BX = np.where(valid_BX, similarity_BX, -np.inf).astype(np.float32)
    rows_B1 = np.arange(len(user_BX))[:, None]
    if similarity_BX.shape[1] > 4 * k:
        # Only entries at least as similar as the k-th can be in the answer; sorting few beats sorting all.
        kth_B1 = -np.partition(-similarity_BX, k - 1, axis=1)[:, k - 1 : k]
        width = max(int((similarity_BX >= kth_B1).sum(axis=1).max()), k)
        if width < similarity_BX.shape[1]:
            top_BX = np.argpartition(-similarity_BX, width - 1, axis=1)[:, :width]
            user_BX, similarity_BX, valid_BX = (value[rows_B1, top_BX] for value in (user_BX, similarity_BX, valid_BX))
    order_BX = np.lexsort((user_BX, -similarity_BX), axis=1)[:, :k]
    user_BK, similarity_BK, valid_BK = (value[rows_B1, order_BX] for value in (user_BX, similarity_BX, valid_BX))
    out = _nothing(len(user_BK), k)
    width = user_BK.shape[1]
    out.user_BK[:, :width] = np.where(valid_BK, user_BK, -1)
    out.similarity_BK[:, :width] = np.where(valid_BK, similarity_BK, -np.inf)
    out.valid_BK[:, :width] = valid_BK
    return out


def _nothing(b: int, k: int) -> Neighbours:
    return Neighbours(np.full((b, k), -1, np.int64), np.full((b, k), -np.inf, np.float32), np.zeros((b, k), bool))
