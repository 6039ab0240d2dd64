"""Lifts the one-device step over the devices of all processes: `jax.pmap`, `jax.shard_map`, or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from marsjax.training.optimizer import Path, names_of
from marsjax.training.step import StepFn

AXIS = "device"
PyTree = Any


class Lifted(NamedTuple):
    """A step over devices, with the ways in and out. Values given to `step` come from the functions beside it.

    Over several processes each calls all of them, with the same values, save `split`, which it gives its own rows.
    """

    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, dict[str, jax.Array]]]
    replicate: Callable[[PyTree], PyTree]  # a host value -> one copy a device
    split: Callable[[PyTree], PyTree]  # this process's rows of a batch -> equal parts, padded with zero rows
    collect: Callable[[PyTree], PyTree]  # a replicated value -> the copy of the first device, on the host
    n_devices: int  # of all processes
    own: Callable[[int], slice]  # how many rows a batch has -> which of them, padded to equal parts, are this process's


def axis_name(mode: str) -> str | None:
    """The axis a step must reduce over under `mode`."""
    return None if mode == "single" else AXIS


def lift(
    make_step: Callable[[str | None], StepFn],
    *,
    mode: str,
    devices: Sequence[jax.Device] | None = None,
    rows: Mapping[Path, int] | None = None,
) -> Lifted:
    """Lifts a step made by `make_step(axis_name)`.

    `mode` is "pmap", "shard_map" (jax.pmap is in maintenance mode and built on it) or "single" (plain jit on the
    first device). State, batch and tables are donated or kept such that the caller must use the returned state.

    `rows` names leaves of the state and the tables, by the ends of their paths, whose rows the devices share out in
    place of copies; the numbers are those of the rows, which are padded to equal parts. Only shard_map can do that, in
    one process.

    Raises ValueError for another mode, for "single" where there are several processes, and for `rows` as above.
    """
    # In the order of the processes, so that the rows of each are together.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    modes: dict[str, Callable[[StepFn, list[jax.Device]], Lifted]] = {
        "single": _single,
        "pmap": _pmap,
        "shard_map": functools.partial(_shard_map, rows=rows or {}),
    }
    if mode not in modes:
        raise ValueError(f"sharding: expected one of {sorted(modes)}, found {mode!r}")
    if mode == "single" and jax.process_count() > 1:
        raise ValueError(
            f"training.sharding: expected pmap or shard_map for {jax.process_count()} processes, found single, which "
            "trains on one device"
        )
    if rows and (mode != "shard_map" or jax.process_count() > 1):
        raise ValueError(f"rows in parts: expected shard_map and one process, found {mode} and {jax.process_count()}")
    return modes[mode](make_step(axis_name(mode)), devices)


def rows_at(path: Any, rows: Mapping[Path, Any]) -> Any:
    """What `rows` has for a leaf at `path`, whatever stands before it there; None for a leaf that it does not name."""
    names = names_of(path)
    return rows.get(names[-2:], rows.get(names[-1:]))


def pad_rows(batch: PyTree, multiple: int) -> PyTree:
    """Pads the leading axis of every leaf with zeros to a multiple. Zero rows have weight 0: they count nowhere."""

    def pad(leaf: np.ndarray) -> np.ndarray:
        missing = -len(leaf) % multiple
        return np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) if missing else leaf

    return jax.tree.map(pad, batch)


def _local(devices: Sequence[jax.Device]) -> list[jax.Device]:
    return [device for device in devices if device.process_index == jax.process_index()]


def _own(devices: list[jax.Device]) -> Callable[[int], slice]:
    local = _local(devices)
    first = devices.index(local[0])

    def own(size: int) -> slice:
        part = -(-size // len(devices))
        return slice(first * part, (first + len(local)) * part)

    return own


def _first_copy(leaf: jax.Array) -> np.ndarray:
    # Indexing a sharded array gathers all of it first; the first shard is what is wanted.
    return np.asarray(leaf.addressable_shards[0].data)


def _host_copy(tree: PyTree) -> PyTree:
    # Putting an array where it already is gives the same buffer, and the step would donate the caller's own.
    return jax.tree.map(np.array, tree)


def _single(step: StepFn, devices: list[jax.Device]) -> Lifted:
    def put(tree: PyTree) -> PyTree:
        return jax.device_put(_host_copy(tree), devices[0])

    # A batch goes to the device with the call, which costs a quarter of putting its leaves there one by one.
    return Lifted(jax.jit(step, donate_argnums=0), put, lambda batch: batch, jax.device_get, 1, _own(devices[:1]))


def _pmap(step: StepFn, devices: list[jax.Device]) -> Lifted:
    local = _local(devices)  # what a process gives to jax.pmap, and gets from it, is on its own devices
    n = len(local)
    by_device = jax.NamedSharding(jax.sharding.Mesh(np.array(local), (AXIS,)), jax.P(AXIS))

    def replicate(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jax.device_put(np.broadcast_to(leaf, (n, *np.shape(leaf))), by_device), tree)

    def split(batch: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), pad_rows(batch, n))

    def collect(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _first_copy(leaf)[0], tree)

    lifted = jax.pmap(step, axis_name=AXIS, devices=devices, donate_argnums=0)
    return Lifted(lifted, replicate, split, collect, len(devices), _own(devices))


def _shard_map(step: StepFn, devices: list[jax.Device], *, rows: Mapping[Path, int]) -> Lifted:
    n = len(_local(devices))
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    whole, parts = jax.P(), jax.P(AXIS)

    def put(leaf: Any, spec: jax.P) -> jax.Array:
        sharding = jax.NamedSharding(mesh, spec)
        if n == len(devices):
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, leaf)

    def specs(tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: parts if rows_at(path, rows) else whole, tree)

    def replicate(tree: PyTree) -> PyTree:
        def one(path: Any, leaf: np.ndarray) -> jax.Array:
            return put(pad_rows(leaf, n), parts) if rows_at(path, rows) else put(leaf, whole)

        return jax.tree_util.tree_map_with_path(one, _host_copy(tree))

    def split(batch: PyTree) -> PyTree:
        padded = pad_rows(batch, n)
        if n == len(devices):  # one call for all leaves
            return jax.device_put(padded, jax.NamedSharding(mesh, parts))
        return jax.tree.map(lambda leaf: put(leaf, parts), padded)

    def collect(tree: PyTree) -> PyTree:
        def one(path: Any, leaf: jax.Array) -> np.ndarray:
            n_rows = rows_at(path, rows)
            return np.asarray(leaf)[:n_rows] if n_rows else _first_copy(leaf)

        return jax.tree_util.tree_map_with_path(one, tree)

    def lifted(state: PyTree, batch: PyTree, tables: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
        # With check_vma=True the gradient of replicated parameters is summed over the devices once more by shard_map
        # itself, and a step that already sums it would get n times the gradient.
        placed = specs(state)
        each = jax.shard_map(
            step, mesh=mesh, in_specs=(placed, parts, specs(tables)), out_specs=(placed, whole), check_vma=False
        )
        return each(state, batch, tables)

    return Lifted(jax.jit(lifted, donate_argnums=0), replicate, split, collect, len(devices), _own(devices))
