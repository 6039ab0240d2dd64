"""Training steps that read and write only the rows of the tables of ids that their batch names.

An ordinary step embeds the catalogue, makes a gradient as large as the tables, and its optimizer goes through every row
and both moments of it: with a million users or items that is nearly all of its time. Here a batch brings the numbers of
the rows that it needs, and counts its users and items within these. The step takes these rows of the parameters, of
their moments and of the items' constants, does an ordinary step on them, and puts them back.

So the optimizer is lazy, as PyTorch's SparseAdam and TensorFlow's LazyAdam are: a row that a batch does not name stands
still, and so do its moments, where AdamW's momentum would move it on.

Tables of which no device holds all (`apart`) come with it: what a step needs of them are some rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from marsjax.ctr.items import ID_TABLES
from marsjax.ctr.objective import make_loss, probabilities
from marsjax.records import Array, CtrBatch, ItemTables, Objective
from marsjax.training.optimizer import AdamW, Path, adamw
from marsjax.training.sharding import Lifted, lift, rows_at
from marsjax.training.step import StepFn, TrainState, make_step

PyTree = Any
T = TypeVar("T")
Tree = TypeVar("Tree")

ITEMS, USERS = ID_TABLES
TABLES = ("dense", "lazy", "sharded")


class Touched(NamedTuple):
    """A batch, and the rows of the tables that it names. Row 0, which is padding, is the first of both."""

    batch: CtrBatch  # its numbers of items and users are positions in the rows below
    item_X: Array  # [X] int32, ascending; numbers beyond the table are padding
    user_Y: Array  # [Y] int32, as above


class Decays(Protocol):
    """Of an optimizer's settings, or of a configuration."""

    @property
    def weight_decay(self) -> float: ...

    @property
    def id_decay(self) -> float: ...


def check_tables(tables: str, settings: Decays, *, sharding: str) -> None:
    """Refuses settings that steps on few rows cannot follow.

    Raises ValueError for decay of weights, which falls on every row at every step, and for "sharded" without shard_map.
    """
    if tables == "dense":
        return
    if settings.weight_decay or settings.id_decay:
        raise ValueError(
            f"ctr.tables={tables}: expected ctr.weight_decay=0 and ctr.id_decay=0, for decay falls on every row at "
            f"every step, found {settings.weight_decay:g} and {settings.id_decay:g}; leave them out, or set "
            "ctr.tables=dense"
        )
    if tables == "sharded" and sharding != "shard_map":
        raise ValueError(f"ctr.tables=sharded: expected training.sharding=shard_map, found {sharding}")


def touch(batch: CtrBatch, *, n_items: int, n_users: int) -> Touched:
    """Renumbers a batch within the rows that it names.

    All rows of a batch are renumbered together, also where several processes train on parts of it. X and Y depend on
    the shape of the batch alone, so no batch compiles a step anew.

    Args:
        n_items: rows of the table of items, padding and mask included.
        n_users: rows of the table of users, padding included.
    """
    views = batch.views
    item_X, place_N = _name([batch.target_B, batch.history_BL] + ([] if views is None else [views.item_BVW]), n_items)
    user_Y, place_U = _name([batch.user_B], n_users)

    def renumbered(rows: CtrBatch) -> CtrBatch:
        user_B, target_B, history_BL = place_U[rows.user_B], place_N[rows.target_B], place_N[rows.history_BL]
        return rows._replace(user_B=user_B, target_B=target_B, history_BL=history_BL)

    if views is not None:  # its rows are some of the batch's, so they name nothing else
        rows = None if views.rows is None else renumbered(views.rows)
        views = views._replace(item_BVW=place_N[views.item_BVW], rows=rows)
    return Touched(renumbered(batch)._replace(views=views), item_X, user_Y)


@functools.lru_cache(maxsize=8)
def touched_step(
    model: nn.Module, settings: AdamW, mode: str, objective: Objective | None = None, *, apart: bool = False
) -> Lifted:
    """`objective.lifted_step` for the batches of `touch`. State and tables are as there, of all rows.

    With `apart` each device holds a part of the rows of every table, for tables that do not fit one of them. It looks
    up what it has of a batch's rows, the sum over the devices is all of them, and it writes back what it has.

    Raises ValueError for what `check_tables` refuses.
    """
    check_tables("sharded" if apart else "lazy", settings, sharding=mode)

    def make(axis: str | None) -> StepFn:
        axis_of_rows = axis if apart else None

        def step(state: TrainState, touched: Touched, tables: ItemTables) -> tuple[TrainState, dict[str, jax.Array]]:
            # Devices share one list of rows, of which each brings a part.
            item_X, user_Y = (
                value if axis is None else lax.all_gather(value, axis, tiled=True)
                for value in (touched.item_X, touched.user_Y)
            )
            rows = _rows(item_X, user_Y)
            take, put = (functools.partial(change, axis=axis_of_rows) for change in (_take, _put))
            loss = make_loss(_few(model, item_X, user_Y, axis=axis), axis_name=axis, objective=objective)
            ordinary = make_step(loss, adamw(settings), axis_name=axis)
            few, metrics = ordinary(_map_rows(take, rows, state), touched.batch, _map_rows(take, rows, tables))
            return _map_rows(put, rows, few, state), metrics

        return step

    n_items, n_users = model.n_items, rows_of_users(model)
    return lift(make, mode=mode, rows=_rows(n_items, n_users) if apart else None)


def touched_score(
    model: nn.Module, params: PyTree, statistics: PyTree, tables: ItemTables, batches: Iterable[CtrBatch]
) -> np.ndarray:
    """`objective.score`, where all rows stay on the host and those that a batch names go to the device with it."""

    def one(batch: CtrBatch) -> np.ndarray:
        touched = touch(batch, n_items=model.n_items, n_users=rows_of_users(model))
        rows = _rows(touched.item_X, touched.user_Y)
        few = _few(model, touched.item_X, touched.user_Y, axis=None)
        params_, tables_ = _map_rows(_look_up, rows, params), _map_rows(_look_up, rows, tables)
        return np.asarray(probabilities(few, params_, statistics, touched.batch, tables_))[batch.weight_B > 0]

    parts = [one(batch) for batch in batches]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def rows_of_users(model: nn.Module) -> int:
    """Rows of a backbone's table of users, padding included; 0 where it has none."""
    n_users = model.n_users
    return n_users + 1 if n_users else 0


def _name(values: Sequence[Array], n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are named, padded by `n_rows`, and the place of each among them."""
    size = min(n_rows, 1 + sum(value.size for value in values))
    size += -size % 8  # equal parts for up to 8 devices
    seen_N = np.zeros(n_rows, bool)  # a mark a row and a look at each cost less than sorting the values
    seen_N[0] = True
    for value in values:
        seen_N[value.ravel()] = True
    row_X = np.flatnonzero(seen_N)
    place_N = np.empty(n_rows, np.int32)  # not filled: only pages that are written to exist
    place_N[row_X] = np.arange(len(row_X), dtype=np.int32)
    padded_X = np.full(size, n_rows, np.int32)
    padded_X[: len(row_X)] = row_X
    return padded_X, place_N


def _few(model: nn.Module, item_X: Array, user_Y: Array, *, axis: str | None) -> nn.Module:
    """The model for tables of these rows alone."""
    n_users = len(user_Y) - 1 if rows_of_users(model) else 0
    return model.clone(axis_name=axis, n_items=len(item_X), n_users=n_users)


def _rows(of_items: T, of_users: T) -> dict[Path, T]:
    """By the ends of the paths of all that has a row for an item or a user."""
    return {ITEMS: of_items, USERS: of_users, **{(name,): of_items for name in ItemTables._fields}}


def _map_rows(change: Callable[..., Any], rows: Mapping[Path, Any], tree: Tree, *others: Tree) -> Tree:
    """`change(rows, leaf, ...)` of the tables' leaves, also among moments, which mirror the parameters."""

    def one(path: tuple, leaf: Any, *more: Any) -> Any:
        row_X = rows_at(path, rows)
        return leaf if row_X is None else change(row_X, leaf, *more)

    return jax.tree_util.tree_map_with_path(one, tree, *others)


def _look_up(row_X: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    return np.take(leaf, row_X, axis=0, mode="clip")


def _take(row_X: jax.Array, leaf: jax.Array, *, axis: str | None) -> jax.Array:
    """The rows of a leaf; nothing counts within the padding. With `axis` each device has a part of the leaf."""
    if axis is None:
        return jnp.asarray(leaf).at[row_X].get(mode="clip")
    here_X, at_X = _place(row_X, leaf, axis)
    found_X = leaf.at[at_X].get(mode="clip")
    return lax.psum(jnp.where(here_X.reshape(-1, *[1] * (leaf.ndim - 1)), found_X, 0), axis)


def _put(row_X: jax.Array, new: jax.Array, leaf: jax.Array, *, axis: str | None) -> jax.Array:
    """The leaf with new values of its rows."""
    at_X = row_X if axis is None else _place(row_X, leaf, axis)[1]
    return leaf.at[at_X].set(new, mode="drop")


def _place(row_X: jax.Array, leaf: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Whether a row is in this device's part of the leaf, and where there; beyond its end if it is not."""
    at_X = row_X - lax.axis_index(axis) * len(leaf)
    here_X = (at_X >= 0) & (at_X < len(leaf))
    return here_X, jnp.where(here_X, at_X, len(leaf))
