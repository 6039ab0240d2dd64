"""The click loss of a backbone (Eq. 2) as a share, the compiled step for it, and scoring."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from marsjax.ctr.view_losses import view_loss
from marsjax.records import Array, CtrBatch, ItemTables, Objective
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.sharding import Lifted, lift
from marsjax.training.step import LossFn, Share, StepFn, init_variables, make_step, total

PyTree = Any

AHEAD = 2  # batches that are scored while the next one is made
CANDIDATES = 1024  # of one user, at most
# Of them at a time: what a DIN computes between its layers for 16 candidates and 200 entries stays in the cache of one
# core. An accelerator would wait for one part after the other.
CANDIDATES_AT_A_TIME = {"cpu": 16}


def init_model(model: nn.Module, tables: ItemTables, *, seed: int, dense: int = 0) -> dict[str, PyTree]:
    """Parameters and running statistics of a backbone, under "params" and "statistics".

    `dense` is J, how many numbers the rows of its batches have beside ids; 0: none.
    """
    number_B, weight_B, history_BL = np.zeros(2, np.int32), np.zeros(2, np.float32), np.zeros((2, 1), np.int32)
    dense_BJ = np.zeros((2, dense), np.float32) if dense else None
    batch = CtrBatch(
        number_B, number_B, weight_B, weight_B, history_BL, history_BL > 0, history_BL.astype(np.int8), dense_BJ
    )
    variables = init_variables(model, (("train", False),), jax.random.key(seed), batch, tables)
    return {"params": variables["params"], "statistics": variables.get("statistics", {})}


def make_loss(model: nn.Module, *, axis_name: str | None, objective: Objective | None = None) -> LossFn:
    """Binary cross-entropy, averaged over the rows of weight 1 of the global batch, and a loss on views beside it."""

    def loss(params: PyTree, statistics: PyTree, batch: CtrBatch, tables: ItemTables, key: jax.Array) -> Share:
        logit_B, new = model.apply(
            {"params": params, "statistics": statistics}, batch, tables, train=True, mutable=["statistics"]
        )
        row_B = optax.sigmoid_binary_cross_entropy(logit_B, batch.label_B) * batch.weight_B
        n_rows = jnp.maximum(total(jnp.sum(batch.weight_B), axis_name), 1.0)
        click = jnp.sum(row_B) / n_rows
        if objective is None or not (objective.weight or objective.cross_weight):
            return Share(click, new.get("statistics", {}), {})
        variables = {"params": params, "statistics": statistics}
        beside = view_loss(model, objective, variables, batch, tables, key, axis_name=axis_name)
        return Share(click + beside, new.get("statistics", {}), {"click_loss": click, "view_loss": beside})

    return loss


@functools.partial(jax.jit, static_argnums=0)
def probabilities(
    model: nn.Module, params: PyTree, statistics: PyTree, batch: CtrBatch, tables: ItemTables
) -> jax.Array:
    """Click probabilities [B] of a batch. Compiled once for a model and a history length."""
    logit_B = model.apply({"params": params, "statistics": statistics}, batch, tables, train=False)
    return nn.sigmoid(logit_B)  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=0, static_argnames="drop_target")
def probabilities_of_one(
    model: nn.Module,
    params: PyTree,
    statistics: PyTree,
    one: CtrBatch,
    count: Array,
    tables: ItemTables,
    *,
    drop_target: bool = False,
) -> jax.Array:
    """Click probabilities [C] of candidates of one user; what stands behind the first `count` (a scalar) means nothing.

    `target_B` and `dense_BJ` of `one` have C rows, C a multiple of 128, and all else one row: the history is gathered
    once, and its product with the weights of all candidates is one of two matrices. `drop_target` blanks the borrowed
    entries that are the candidate. Compiled once for a model and a history length, whatever the count.
    """

    def score(target: jax.Array, dense_J: jax.Array | None) -> jax.Array:
        history_BL, borrowed_BL, feedback_BL = one.history_BL, one.borrowed_BL, one.feedback_BL
        if drop_target:
            kept_BL = ~(borrowed_BL & (history_BL == target))
            history_BL, borrowed_BL = history_BL * kept_BL, borrowed_BL & kept_BL
            feedback_BL = None if feedback_BL is None else feedback_BL * kept_BL
        batch = one._replace(
            target_B=target[None], history_BL=history_BL, borrowed_BL=borrowed_BL, feedback_BL=feedback_BL,
            dense_BJ=None if dense_J is None else dense_J[None],
        )  # fmt: skip
        return model.apply({"params": params, "statistics": statistics}, batch, tables, train=False)[0]

    rows = CANDIDATES_AT_A_TIME.get(jax.default_backend(), 128)
    columns = one.target_B, one.dense_BJ

    def advance(i: jax.Array, logit_C: jax.Array) -> jax.Array:
        part = jax.tree.map(lambda value: jax.lax.dynamic_slice_in_dim(value, i * rows, rows), columns)
        return jax.lax.dynamic_update_slice_in_dim(logit_C, jax.vmap(score)(*part), i * rows, 0)

    logit_C = jax.lax.fori_loop(0, (count + rows - 1) // rows, advance, jnp.zeros(one.target_B.shape[0], jnp.float32))
    return nn.sigmoid(logit_C)


def score(
    model: nn.Module, params: PyTree, statistics: PyTree, tables: ItemTables, batches: Iterable[CtrBatch]
) -> np.ndarray:
    """Probabilities [rows] float32 of the rows of weight 1 of all batches, in order. What is not on the device is sent
    there for every batch."""
    parts: list[np.ndarray] = []
    on_the_way: collections.deque[tuple[jax.Array, CtrBatch]] = collections.deque()

    def wait() -> None:
        score_B, batch = on_the_way.popleft()
        parts.append(np.asarray(score_B)[batch.weight_B > 0])

    for batch in batches:
        on_the_way.append((probabilities(model, params, statistics, batch, tables), batch))
        if len(on_the_way) > AHEAD:
            wait()
    while on_the_way:
        wait()
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def with_vectors(model: nn.Module, params: PyTree, tables: ItemTables) -> ItemTables:
    """Tables with all items embedded by these parameters, so that a batch that is scored does not embed them again."""
    return tables._replace(vector_ND=_vectors(model, params, tables._replace(vector_ND=None)))


@functools.partial(jax.jit, static_argnums=0)
def _vectors(model: nn.Module, params: PyTree, tables: ItemTables) -> jax.Array:
    return model.bind({"params": params}).items(tables)


@functools.lru_cache(maxsize=8)
def lifted_step(model: nn.Module, settings: AdamW, mode: str, objective: Objective | None = None) -> Lifted:
    """The training step over all devices. Cached: methods of one model and objective, and all seeds, train with one
    compiled step a length."""

    def make(axis: str | None) -> StepFn:
        loss = make_loss(model.clone(axis_name=axis), axis_name=axis, objective=objective)
        return make_step(loss, adamw(settings), axis_name=axis)

    return lift(make, mode=mode)
