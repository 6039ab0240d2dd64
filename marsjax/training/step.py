"""The training step, written once for one device's part of the batch.

A loss function returns this device's *share* of the global loss: the shares of all devices add up to the loss. Then
the gradient of the global loss is the sum of the gradients of the shares, whatever collectives the loss uses inside,
and one device is the case in which the share is the whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

PyTree = Any


class TrainState(NamedTuple):
    """All that a step reads and writes."""

    params: PyTree
    statistics: PyTree  # running statistics (Dice); {} where a model has none
    opt_state: PyTree
    key: jax.Array  # PRNG key data, [2] uint32; the key of a step is folded with its number
    step: jax.Array  # int32, steps done
    rate_scale: jax.Array  # float32, lowered by the host when validation stands still


class Share(NamedTuple):
    """One device's share of the loss, and of each metric (shares add up to the metric)."""

    loss: jax.Array
    statistics: PyTree
    metrics: dict[str, jax.Array]


LossFn = Callable[[PyTree, PyTree, PyTree, PyTree, jax.Array], Share]  # params, statistics, batch, tables, key
StepFn = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]]


def total(value: PyTree, axis_name: str | None) -> PyTree:
    """Sum over the devices; the value itself where there is no axis. The leaves have one type, and go in one message:
    between processes each costs about a millisecond, however small."""
    if axis_name is None:
        return value
    leaves, structure = jax.tree.flatten(value)
    flat = lax.psum(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]), axis_name)
    ends = itertools.accumulate(leaf.size for leaf in leaves)
    parts = [flat[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    return jax.tree.unflatten(structure, parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_variables(module: nn.Module, options: tuple[tuple[str, Any], ...], key: jax.Array, *inputs: PyTree) -> PyTree:
    """The variables of a module as they are drawn; `options` are those of its call.

    One program, which takes seconds to compile and is kept for equal modules: op by op, a GPU compiles for a minute.
    """
    return module.init(key, *inputs, **dict(options))


def init_state(params: PyTree, statistics: PyTree, optimizer: optax.GradientTransformation, *, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(
        params=params,
        statistics=statistics,
        opt_state=jax.jit(optimizer.init)(params),  # one program, where each shape would be one
        key=jax.random.key_data(jax.random.key(seed)),
        step=jnp.zeros((), jnp.int32),
        rate_scale=jnp.ones((), jnp.float32),
    )


def make_step(loss: LossFn, optimizer: optax.GradientTransformation, *, axis_name: str | None) -> StepFn:
    """A pure function `(state, batch, tables) -> (state, metrics)`, to be lifted by `sharding.lift`."""

    def step(state: TrainState, batch: PyTree, tables: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def share_of(params: PyTree) -> tuple[jax.Array, Share]:
            share = loss(params, state.statistics, batch, tables, key)
            return share.loss, share

        gradient, share = jax.grad(share_of, has_aux=True)(state.params)
        gradient, metrics = total((gradient, {"loss": share.loss, **share.metrics}), axis_name)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: update * state.rate_scale, updates)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        return (
            state._replace(
                params=optax.apply_updates(state.params, updates),
                statistics=share.statistics,
                opt_state=opt_state,
                step=state.step + 1,
            ),
            metrics,
        )

    return step
