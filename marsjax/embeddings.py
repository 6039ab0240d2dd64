"""Item and user tables in the aligned space, Eq. 13, computed in batches of fixed shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marsjax.alignment import FeatureTables, MultimodalEncoder, apply
from marsjax.data.histories import gather_histories
from marsjax.progress import progress
from marsjax.records import Array, Histories

PyTree = Any


def in_chunks(
    function: Callable[[PyTree], jax.Array],
    value_X: PyTree,
    *,
    size: int,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Applies a jitted function to fixed-size chunks of the leading axis of some arrays and joins the results on the
    host.

    The last chunk is padded with zeros, so that one shape is compiled whatever the count. `advance` hears how many
    rows each chunk finished.
    """
    count = len(jax.tree.leaves(value_X)[0])
    out = np.zeros(0, np.float32)
    for begin in range(0, max(count, 1), size):
        chunk = jax.tree.map(lambda column_X, begin=begin: column_X[begin : begin + size], value_X)
        padded = jax.tree.map(lambda part: np.pad(part, [(0, size - len(part)), *[(0, 0)] * (part.ndim - 1)]), chunk)
        found = np.asarray(function(padded))
        if not begin:
            out = np.empty((count, *found.shape[1:]), found.dtype)
        out[begin : begin + size] = found[: count - begin]
        advance(min(size, count - begin))
    return out


@functools.partial(jax.jit, static_argnums=0)
def encode(
    encoder: MultimodalEncoder, params: PyTree, tables: FeatureTables, history_BL: Array
) -> tuple[jax.Array, jax.Array]:
    """Item vectors [B, L, D] of histories, zero at padding, and user vectors [B, D], Eqs. 11 and 13. Compiled for each
    shape."""
    return apply(encoder, params, history_BL, tables, method="encode")


def with_vectors(
    encoder: MultimodalEncoder, params: PyTree, tables: FeatureTables, *, size: int = 1024
) -> FeatureTables:
    """Tables with the vectors of Eq. 3 of all items in place of their features, on the device. Histories name an item
    many times, and features are wide: what encodes then gathers its vector, and does not project its features each
    time.

    Features may lie in a file: so many items at a time are read.
    """
    vectors = {}
    for name in encoder.modalities:
        # NumPy's, since a slice of an array on the device would be a program for each place.
        columns = np.asarray(tables.feature_NF[name]), np.asarray(tables.present_N[name])
        project = functools.partial(_modality, encoder, name, params)
        vectors[name] = jax.device_put(in_chunks(project, columns, size=size))
    return FeatureTables({}, jax.device_put(tables.present_N), vectors)


def item_vectors(
    encoder: MultimodalEncoder, params: PyTree, tables: FeatureTables, *, n_items: int, size: int = 1024
) -> np.ndarray:
    """Static item vectors [N, D] float32: each item in a history of its own. Row 0 is zero."""

    return in_chunks(
        lambda item_B: _static(encoder, params, tables, item_B), np.arange(n_items, dtype=np.int32), size=size
    )


def user_vectors(
    encoder: MultimodalEncoder,
    params: PyTree,
    tables: FeatureTables,
    histories: Histories,
    user_Q: np.ndarray,
    end_Q: np.ndarray,
    *,
    cap: int,
    size: int = 128,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """User vectors [Q, D] float32, Eq. 13, of users at given ends of their history; zero where it is empty.

    Histories are sorted by length and padded to the shortest of a few lengths, since attention costs the square.
    """

    length_Q = np.minimum(end_Q - histories.start_U1[user_Q], cap)
    bounds = [bound for bound in (16, 64) if bound < cap] + [cap]
    bucket_Q = np.searchsorted(np.asarray(bounds), length_Q)
    out_QD = np.zeros((len(user_Q), encoder.width), np.float32)
    for bucket, bound in enumerate(bounds):
        member_Q = np.flatnonzero(bucket_Q == bucket)
        # Some chunks at a time: histories of all users, and all vectors once more, would take several times the answer.
        for begin in range(0, len(member_Q), 256 * size):
            part_Q = member_Q[begin : begin + 256 * size]
            history_QL = gather_histories(histories, user_Q[part_Q], end_Q[part_Q], cap=bound)
            out_QD[part_Q] = in_chunks(
                lambda history_BL: encode(encoder, params, tables, history_BL)[1],
                history_QL,
                size=size,
                advance=advance,
            )
    return out_QD


def contextual_vectors(
    encoder: MultimodalEncoder,
    params: PyTree,
    tables: FeatureTables,
    history_BL: np.ndarray,
    *,
    size: int = 64,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Item vectors [B, L, D] float32 of each history in its own context (the literal Eq. 16); zero at padding."""

    return in_chunks(
        lambda chunk_BL: encode(encoder, params, tables, chunk_BL)[0], history_BL, size=size, advance=advance
    )


def units(vector_XD: np.ndarray, centre_D: np.ndarray) -> np.ndarray:
    """Vectors [..., D] less the centre, of length 1, float32; what has no length stays 0. For cosines, Eq. 16."""
    moved_XD = vector_XD - centre_D.astype(vector_XD.dtype)
    length_X = np.sqrt(np.einsum("...d,...d->...", moved_XD, moved_XD))
    moved_XD /= np.maximum(length_X, 1e-12)[..., None]
    return moved_XD


def donor_units(
    kind: str,
    encoder: MultimodalEncoder,
    params: PyTree,
    tables: FeatureTables,
    item_PL: np.ndarray,
    item_ND: np.ndarray,
    centre_D: np.ndarray,
    *,
    most_bytes: int = 1 << 30,
) -> Callable[[np.ndarray], np.ndarray]:
    """Item vectors of donors for Eq. 16, as `units` makes them, as a function of positions [X] among them -> [X, L, D].

    Contextual ones are all made before where they take little memory (`most_bytes`), and else when they are asked for:
    those of a million donors take more than most machines have.

    Args:
        kind: "contextual", each item in the context of its donor's history, or "static", from the table `item_ND`.
        item_PL: the donors' histories.
    """
    if kind == "static":
        unit_ND = units(item_ND, centre_D)
        return lambda position_X: unit_ND[item_PL[position_X]]
    if kind != "contextual":
        raise ValueError(f"augmentation.vectors: expected contextual or static, found {kind!r}")
    if item_PL.size * encoder.width * 4 > most_bytes:
        # Small parts: one that is asked for a few donors is padded with few.
        return lambda position_X: units(
            contextual_vectors(encoder, params, tables, item_PL[position_X], size=16), centre_D
        )
    with progress("donor item vectors", len(item_PL)) as advance:
        unit_PLD = units(contextual_vectors(encoder, params, tables, item_PL, advance=advance), centre_D)
    return lambda position_X: unit_PLD[position_X]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _modality(encoder: MultimodalEncoder, name: str, params: PyTree, columns: tuple[Array, Array]) -> jax.Array:
    feature_BF, present_B = columns
    tables = FeatureTables({name: feature_BF}, {name: present_B})
    return apply(encoder, params, name, jnp.arange(len(present_B)), tables, method="modality")[0]


@functools.partial(jax.jit, static_argnums=0)
def _static(encoder: MultimodalEncoder, params: PyTree, tables: FeatureTables, item_B: np.ndarray) -> jax.Array:
    return apply(encoder, params, item_B, tables, method="static")
