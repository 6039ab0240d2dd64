"""The scoring function as StableHLO: loads with jax alone, on another day's code of this package or without it."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from marsjax.records import CtrBatch, ItemTables

log = logging.getLogger(__name__)

PyTree = Any
PLATFORMS = ("cpu", "cuda")


def can_export() -> bool:
    """Whether flatbuffers, with which jax writes what is exported, is installed; warns where it is not."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        log.warning("no StableHLO is written: it needs flatbuffers, which `pip install marsjax[serve]` brings")
        return False
    return True


def export_scoring(
    model: nn.Module, params: PyTree, statistics: PyTree, tables: ItemTables, *, dense: int = 0
) -> bytes:
    """The function (leaves, tables, batch) -> probabilities [B] float32, for any B and L, serialised.

    The three are dictionaries: parameters and statistics by their paths, as `checkpoint.load_params` gives them without
    a template; `category` [N, G] and, with content, `feature` [N, F]; `user` [B], `target` [B], `history` [B, L],
    `borrowed` [B, L] and, where the model reads them, `feedback` [B, L] and `dense` [B, J].
    """
    paths, structure = jax.tree_util.tree_flatten_with_path({"params": params, "statistics": statistics})
    names = [jax.tree_util.keystr(path) for path, _ in paths]

    def score(leaves: dict[str, jax.Array], tables: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
        ones_B = jnp.ones(batch["user"].shape, jnp.float32)
        rows = CtrBatch(
            batch["user"], batch["target"], ones_B, ones_B, batch["history"], batch["borrowed"],
            batch.get("feedback"), batch.get("dense"),
        )  # fmt: skip
        variables = jax.tree.unflatten(structure, [leaves[name] for name in names])
        logit_B = model.apply(variables, rows, ItemTables(tables["category"], tables.get("feature")), train=False)
        return nn.sigmoid(logit_B)  # type: ignore[arg-type]

    b, length = export.symbolic_shape("b, l")
    batch = {
        "user": jax.ShapeDtypeStruct((b,), np.int32),
        "target": jax.ShapeDtypeStruct((b,), np.int32),
        "history": jax.ShapeDtypeStruct((b, length), np.int32),
        "borrowed": jax.ShapeDtypeStruct((b, length), np.bool_),
    }
    if model.levels:
        batch["feedback"] = jax.ShapeDtypeStruct((b, length), np.int8)
    if dense:
        batch["dense"] = jax.ShapeDtypeStruct((b, dense), np.float32)
    leaves = {name: _shape(leaf) for name, (_, leaf) in zip(names, paths, strict=True)}
    exported = export.export(jax.jit(score), platforms=PLATFORMS)(leaves, table_arrays(tables, _shape), batch)
    return bytes(exported.serialize())


def load_scoring(path: pathlib.Path) -> export.Exported:
    """What `export_scoring` wrote; `.call(leaves, tables, batch)` scores. Check the file's sum before."""
    return export.deserialize(bytearray(pathlib.Path(path).read_bytes()))


def table_arrays(tables: ItemTables, of: Any = np.asarray) -> dict[str, Any]:
    """The tables as the exported function reads them."""
    named = {"category": tables.category_NG, "feature": tables.feature_NF}
    return {name: of(value) for name, value in named.items() if value is not None}


def read_arrays(ctr: PyTree, tables: ItemTables) -> dict[str, np.ndarray]:
    """The first two arguments of the exported function in one file: parameters and statistics under "leaf:PATH", tables
    under "table:NAME"."""
    paths, _ = jax.tree_util.tree_flatten_with_path({name: ctr[name] for name in ("params", "statistics")})
    leaves = {f"leaf:{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in paths}
    return leaves | {f"table:{name}": np.asarray(value) for name, value in table_arrays(tables).items()}


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype)
