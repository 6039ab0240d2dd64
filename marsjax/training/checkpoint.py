"""Checkpoints of the full state, and parameters on disk. The only orbax import.

Orbax commits a step by renaming its folder, so a killed process leaves the last committed step readable. It keeps no
sum of the data, though (flipped bytes restore in silence), and casts dtypes in silence; both are closed here.
"""

from __future__ import annotations

import errno
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from marsjax import files

log = logging.getLogger(__name__)

PyTree = Any


class Manager(NamedTuple):
    """An open folder of checkpoints."""

    orbax: ocp.CheckpointManager
    folder: pathlib.Path


class Restored(NamedTuple):
    step: int
    state: PyTree
    meta: dict[str, Any]


def open_manager(folder: pathlib.Path, *, keep: int = 2) -> Manager:
    """Opens (or makes) a folder of checkpoints; remains of saves that were killed are removed."""
    folder = pathlib.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for remains in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(remains, ignore_errors=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
    return Manager(ocp.CheckpointManager(folder, options=options), folder)


def save(manager: Manager, step: int, state: PyTree, meta: dict[str, Any]) -> None:
    """Saves `state` (any pytree of arrays) and `meta` (JSON) as `step`.

    Raises:
        OSError: the disk is full; the partial step is removed and the earlier ones stay.
    """
    leaves = flatten(state)
    described = meta | {"digest": files.digest_arrays(leaves), "leaves": describe(leaves)}
    try:
        manager.orbax.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(described))
        )
        manager.orbax.wait_until_finished()
    except Exception as error:
        for remains in (*manager.folder.glob("*.orbax-checkpoint-tmp*"), manager.folder / str(step)):
            shutil.rmtree(remains, ignore_errors=True)
        if not _is_full(error):
            raise
        manager.orbax.reload()
        last = manager.orbax.latest_step()
        kept = "no earlier checkpoint exists" if last is None else f"the checkpoint of step {last} is intact"
        raise OSError(
            errno.ENOSPC,
            f"no space left while saving step {step} in {manager.folder}; {kept}. Free some space and run the same "
            "command again to continue",
        ) from error  # fmt: skip


def restore_latest(manager: Manager, template: PyTree) -> Restored | None:
    """The latest readable checkpoint, in the structure and the dtypes of `template`; None where there is none.

    A step that is damaged (unreadable, or its content differs from its digest) is removed with a warning and the one
    before it is taken.

    Raises:
        ValueError: a checkpoint is sound but holds other arrays than `template`: another configuration wrote it.
    """
    expected = describe(flatten(template))
    for step in sorted(manager.orbax.all_steps(), reverse=True):
        try:
            meta = manager.orbax.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            found, digest = meta.pop("leaves"), meta.pop("digest")
        except Exception as error:  # orbax raises many kinds, and any of them means that the step is unreadable
            _drop(manager, step, f"its description is unreadable ({type(error).__name__}: {error})")
            continue
        if found != expected:
            raise ValueError(_mismatch(manager.folder / str(step), expected, found))
        try:
            abstract = {name: np.zeros(shape, dtype) for name, (dtype, shape) in _parsed(expected).items()}
            leaves = manager.orbax.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]  # fmt: skip
            leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        except Exception as error:
            _drop(manager, step, f"its arrays are unreadable ({type(error).__name__}: {str(error)[:200]})")
            continue
        if files.digest_arrays(leaves) != digest:
            _drop(manager, step, "its content differs from its digest")
            continue
        return Restored(step, unflatten(leaves, template), meta)
    return None


def save_params(folder: pathlib.Path, params: PyTree) -> None:
    """Writes parameters with orbax, replacing what is there; a sum of the content lies beside them."""
    folder = pathlib.Path(folder).absolute()
    leaves = flatten(params)
    try:
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder / "arrays", leaves, force=True)
            writer.wait_until_finished()
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if _is_full(error):
            raise OSError(
                errno.ENOSPC, f"no space left while writing {folder}; nothing was left half-written"
            ) from error
        raise
    files.write_json(folder / "content.json", {"digest": files.digest_arrays(leaves), "leaves": describe(leaves)})


def load_params(folder: pathlib.Path, template: PyTree) -> PyTree:
    """Reads what `save_params` wrote, in the structure of `template` (arrays or anything with shape and dtype).

    Raises:
        ValueError: missing or damaged files, or other arrays than the template's.
    """
    folder = pathlib.Path(folder).absolute()
    if not (folder / "content.json").is_file():
        raise ValueError(f"{folder}: expected parameters written by marsjax (content.json, arrays), found none")
    content = files.read_json(folder / "content.json")
    expected = describe(flatten(template))
    if content["leaves"] != expected:
        raise ValueError(_mismatch(folder, expected, content["leaves"]))
    try:
        abstract = {name: np.zeros(shape, dtype) for name, (dtype, shape) in _parsed(expected).items()}
        with ocp.StandardCheckpointer() as reader:
            leaves = {name: np.asarray(leaf) for name, leaf in reader.restore(folder / "arrays", abstract).items()}
    except Exception as error:
        raise ValueError(f"{folder}: the arrays are unreadable ({error}); write them again") from error
    if files.digest_arrays(leaves) != content["digest"]:
        raise ValueError(f"{folder}: the content differs from its sum; the files are damaged, write them again")
    return unflatten(leaves, template)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path. Orbax stores a flat dictionary, so that NamedTuples of any library survive."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"{i:04d}{jax.tree_util.keystr(path)}": _on_host(leaf) for i, (path, leaf) in enumerate(leaves)}


def _on_host(leaf: Any) -> Any:
    # A template may hold shapes instead of arrays.
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)


def unflatten(leaves: dict[str, Any], template: PyTree) -> PyTree:
    """The inverse of `flatten`."""
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in flatten(template)])


def describe(leaves: dict[str, Any]) -> dict[str, str]:
    """dtype and shape of each leaf, as JSON."""
    return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _parsed(described: dict[str, str]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    out = {}
    for name, text in described.items():
        dtype, shape = text.rstrip("]").split("[")
        out[name] = np.dtype(dtype), tuple(int(size) for size in shape.split(",") if size.strip())
    return out


def _mismatch(where: pathlib.Path, expected: dict[str, str], found: dict[str, str]) -> str:
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    first = ", ".join(f"{n[4:]}: expected {expected.get(n, 'none')}, found {found.get(n, 'none')}" for n in names[:3])
    return f"{where} was written by another configuration ({first}); use another --workdir, or remove it"


def _drop(manager: Manager, step: int, reason: str) -> None:
    log.warning(
        "checkpoint of step %d in %s is damaged: %s; falling back to the one before", step, manager.folder, reason
    )
    shutil.rmtree(manager.folder / str(step), ignore_errors=True)
    manager.orbax.reload()


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        if "RESOURCE_EXHAUSTED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
