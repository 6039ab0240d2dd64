"""Lifts the one-device step over the devices of all processes: `jax.pmap`, `jax.shard_map`, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

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
    make_step: Callable[[str | None], StepFn], *, mode: str, devices: Sequence[jax.Device] | None = None
) -> Lifted:
    """Lifts a step made by `make_step(axis_name)`.

    `mode` is "pmap", "shard_map" (jax.pmap is in maintenance mode and built on it) or "single" (plain jit on the
    first device). State, batch and tables are donated or kept such that the caller must use the returned state.

    Raises ValueError for another mode, and for "single" where there are several processes.
    """
    # In the order of the processes, so that the rows of each are together.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    modes = {"single": _single, "pmap": _pmap, "shard_map": _shard_map}
    if mode not in modes:
        raise ValueError(f"sharding: expected one of {sorted(modes)}, found {mode!r}")
    if mode == "single" and jax.process_count() > 1:
        raise ValueError(
            f"training.sharding: expected pmap or shard_map for {jax.process_count()} processes, found single, which "
            "trains on one device"
        )
    return modes[mode](make_step(axis_name(mode)), devices)


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


def _shard_map(step: StepFn, devices: list[jax.Device]) -> Lifted:
    n = len(_local(devices))
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = jax.P(), jax.P(AXIS)

    def put(tree: PyTree, spec: jax.P) -> PyTree:
        sharding = jax.NamedSharding(mesh, spec)
        if n == len(devices):
            return jax.device_put(tree, sharding)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)

    def replicate(tree: PyTree) -> PyTree:
        return put(_host_copy(tree), whole)

    def split(batch: PyTree) -> PyTree:
        return put(pad_rows(batch, n), rows)

    def collect(tree: PyTree) -> PyTree:
        return jax.tree.map(_first_copy, tree)

    # With check_vma=True the gradient of replicated parameters is summed over the devices once more by shard_map
    # itself, and a step that already sums it would get n times the gradient.
    lifted = jax.shard_map(step, mesh=mesh, in_specs=(whole, rows, whole), out_specs=(whole, whole), check_vma=False)
    return Lifted(jax.jit(lifted, donate_argnums=0), replicate, split, collect, len(devices), _own(devices))
