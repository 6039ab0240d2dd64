"""Checkpoints of the full state, and parameters on disk. The only orbax import.

Orbax commits a step by renaming its folder, so a killed process leaves the last committed step readable. But it keeps
no sum of the data (flipped bytes restore in silence), casts dtypes in silence, passes in silence over a step that is
not later than the last one, and stores neither arrays without elements nor typed keys. All of that is closed here.
"""

from __future__ import annotations

import errno
import json
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from marsjax import files, hosts

log = logging.getLogger(__name__)

PyTree = Any
NUMBER = 4  # digits before the path of a leaf: paths alone are not distinct once they are text, and have no order
OWN = ("leaves", "digest", "sum")  # what `save` adds to the JSON of a step


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
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, create=False, multiprocessing_options=_alone()
    )
    return Manager(ocp.CheckpointManager(folder, options=options), folder)


def save(manager: Manager, step: int, state: PyTree, meta: dict[str, Any]) -> None:
    """Saves `state` (any pytree of arrays) and `meta` (JSON) as `step`.

    Raises:
        OSError: the disk is full; the partial step is removed and the earlier ones stay.
        ValueError: `step` is not later than the last one, or `meta` uses a name that is taken, or `state` is empty.
    """
    last = manager.orbax.latest_step()
    if last is not None and step <= last:
        raise ValueError(
            f"expected a step after {last}, the last one in {manager.folder}, found {step}; restore before training, "
            "or use another --workdir"
        )
    if taken := set(OWN) & set(meta):
        raise ValueError(f"expected meta without the names {', '.join(OWN)}, found {', '.join(taken)}; rename them")
    leaves = flatten(state)
    # As JSON gives it back (tuples are lists, keys are text), or the sum of what is read would be another one.
    described = json.loads(json.dumps(meta)) | {"digest": files.digest_arrays(leaves), "leaves": describe(leaves)}
    described["sum"] = files.digest_json(described)
    items = ocp.args.Composite(state=ocp.args.StandardSave(_stored(leaves)), meta=ocp.args.JsonSave(described))
    try:
        saved = manager.orbax.save(step, args=items)
        manager.orbax.wait_until_finished()
    except Exception as error:
        for remains in (*manager.folder.glob("*.orbax-checkpoint-tmp*"), manager.folder / str(step)):
            files.remove_folder(remains)
        if not _is_full(error):
            raise
        manager.orbax.reload()
        last = manager.orbax.latest_step()  # Orbax removes old steps only once the new one is whole
        kept = "no earlier checkpoint exists" if last is None else f"the checkpoint of step {last} is intact"
        raise OSError(
            errno.ENOSPC,
            f"no space left while saving step {step} in {manager.folder}; {kept}. Free some space and run the same "
            "command again to continue",
        ) from error  # fmt: skip
    if not saved:
        raise RuntimeError(f"orbax did not save step {step} in {manager.folder}, without saying why")


def restore_latest(manager: Manager, template: PyTree) -> Restored | None:
    """The latest readable checkpoint, in the structure and the dtypes of `template`; None where there is none.

    A step that is damaged (unreadable, or its content differs from its digest) is moved aside to `<step>.damaged` with
    a warning, and the one before it is taken. It is not removed: the cause may be one that passes, such as too many
    open files.

    Raises:
        ValueError: a checkpoint is sound but holds other arrays than `template`: another configuration wrote it.
    """
    expected = describe(flatten(template))
    for step in sorted(manager.orbax.all_steps(), reverse=True):
        try:
            meta = manager.orbax.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            found, digest, expected_sum = (meta[name] for name in OWN)
            found_sum = files.digest_json({name: value for name, value in meta.items() if name != "sum"})
        except Exception as error:  # orbax raises many kinds, and any of them means that the step is unreadable
            _put_aside(manager, step, f"its description is unreadable ({type(error).__name__}: {error})")
            continue
        # Before the comparison with the template: a flipped byte is no other configuration.
        if found_sum != expected_sum:
            _put_aside(manager, step, f"its description has sha256 {found_sum}, expected {expected_sum}")
            continue
        if found != expected:
            raise ValueError(_mismatch(manager.folder / str(step), expected, found))
        try:
            empty = _empty(expected)
            args = ocp.args.Composite(state=ocp.args.StandardRestore(_stored(empty)))
            restored = manager.orbax.restore(step, args=args)["state"]
            leaves = {name: np.asarray(restored.get(name, leaf)) for name, leaf in empty.items()}
        except Exception as error:
            _put_aside(manager, step, f"its arrays are unreadable ({type(error).__name__}: {str(error)[:200]})")
            continue
        if files.digest_arrays(leaves) != digest:
            _put_aside(manager, step, "its content differs from its digest")
            continue
        meta = {name: value for name, value in meta.items() if name not in OWN}
        return Restored(step, unflatten(leaves, template), meta)
    return None


def save_params(folder: pathlib.Path, params: PyTree) -> None:
    """Writes parameters with orbax; a sum of the content lies beside them. What is in `folder` is replaced as a whole.

    Of several processes the first one alone writes. Orbax keeps what its threads tell one another in a store that all
    processes share, under numbers that each counts for itself: of two that save at a time, one may wait for ever.

    Raises:
        OSError: the disk is full; what was in `folder` before is still there.
    """
    if not hosts.is_first():
        return
    folder = pathlib.Path(folder).absolute()
    leaves = flatten(params)
    try:
        with files.write_folder(folder) as partial:
            with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as writer:
                writer.save(partial / "arrays", _stored(leaves))
                writer.wait_until_finished()
            content = {"digest": files.digest_arrays(leaves), "leaves": describe(leaves)}
            files.write_json(partial / "content.json", content)
    except Exception as error:
        if isinstance(error, OSError) or not _is_full(error):
            raise
        raise files.explain(OSError(errno.ENOSPC, str(error)), folder) from error


def load_params(folder: pathlib.Path, template: PyTree | None = None) -> PyTree:
    """Reads what `save_params` wrote, in the structure of `template` (arrays or anything with shape and dtype).

    Without a template, the arrays by their paths in the tree, such as "['dense']['kernel']".

    Raises:
        ValueError: missing or damaged files, or other arrays than the template's.
    """
    folder = pathlib.Path(folder).absolute()
    if not (folder / "content.json").is_file():
        raise ValueError(
            f"{folder}: expected parameters written by marsjax (content.json, arrays), found none; write them again"
        )
    content = files.read_json(folder / "content.json")
    if not isinstance(content, dict) or not isinstance(content.get("leaves"), dict) or "digest" not in content:
        raise ValueError(f"{folder / 'content.json'}: expected leaves and a digest, found neither; write them again")
    if template is not None and content["leaves"] != (expected := describe(flatten(template))):
        raise ValueError(_mismatch(folder, expected, content["leaves"]))
    try:
        empty = _empty(content["leaves"])
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
            restored = reader.restore(folder / "arrays", _stored(empty))
        leaves = {name: np.asarray(restored.get(name, leaf)) for name, leaf in empty.items()}
    except Exception as error:
        raise ValueError(f"{folder}: the arrays are unreadable ({error}); write them again") from error
    found = files.digest_arrays(leaves)
    if found != content["digest"]:
        raise ValueError(
            f"{folder}: expected content of sha256 {content['digest']}, found {found}; the files are damaged, write "
            "them again"
        )
    if template is None:
        return {name[NUMBER:]: leaf for name, leaf in leaves.items()}
    return unflatten(leaves, template)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax waits for no other process: what is stored is on the host, and whole in each of them."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path. Orbax stores a flat dictionary, so that NamedTuples of any library survive."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        f"{i:0{NUMBER}d}{jax.tree_util.keystr(path)}": _on_host(leaf) for i, (path, leaf) in enumerate(leaves)
    }  # fmt: skip


def _on_host(leaf: Any) -> Any:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    # A template may hold shapes instead of arrays.
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def unflatten(leaves: dict[str, Any], template: PyTree) -> PyTree:
    """The inverse of `flatten`. Where the template holds a typed key, the result does."""
    likes, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(
        structure,
        [
            jax.random.wrap_key_data(leaves[name], impl=jax.random.key_impl(like)) if _is_key(like) else leaves[name]
            for name, like in zip(flatten(template), likes, strict=True)
        ],
    )


def describe(leaves: dict[str, Any]) -> dict[str, str]:
    """dtype and shape of each leaf, as JSON."""
    return {name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _empty(described: dict[str, str]) -> dict[str, np.ndarray]:
    """Zeros of the dtypes and shapes that `describe` wrote."""
    out = {}
    for name, text in described.items():
        dtype, shape = text.rstrip("]").split("[")
        out[name] = np.zeros(tuple(int(size) for size in shape.split(",") if size.strip()), np.dtype(dtype))
    return out


def _stored(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Orbax refuses arrays without elements. Their description says all there is to them.
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
    if not stored:
        raise ValueError(
            "expected a tree with at least one array that has elements, found none; there is nothing to save"
        )
    return stored


def _mismatch(where: pathlib.Path, expected: dict[str, str], found: dict[str, str]) -> str:
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    first = ", ".join(
        f"{n[NUMBER:]}: expected {expected.get(n, 'none')}, found {found.get(n, 'none')}" for n in names[:3]
    )
    return f"{where} was written by another configuration ({first}); use another --workdir, or remove it"


def _put_aside(manager: Manager, step: int, reason: str) -> None:
    aside = manager.folder / f"{step}.damaged"
    log.warning(
        "checkpoint of step %d in %s is damaged: %s; falling back to the one before, and keeping the damaged one as %s",
        step, manager.folder, reason, aside.name,
    )  # fmt: skip
    shutil.rmtree(aside, ignore_errors=True)
    (manager.folder / str(step)).rename(aside)
    manager.orbax.reload()


def _is_full(error: BaseException | None) -> bool:
    # Tensorstore's errors carry the text only, and its code RESOURCE_EXHAUSTED stands for a lack of memory too.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))  # an error can be its own cause
        if (isinstance(error, OSError) and files.is_full(error)) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
