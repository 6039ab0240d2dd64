"""Matrix products over long arrays, with gradients in the order that XLA computes fastest on a CPU.

The gradient of a matrix sums over all entries, the longest axis of either array. As JAX derives it, XLA reads the wider
array across its rows, or copies one of both first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def dense_dot_general(x: jax.Array, kernel_DA: jax.Array, dimension_numbers: Any, precision: Any = None) -> jax.Array:
    """What a `flax.linen.Dense` takes as its `dot_general`: [..., D] by [D, A] -> [..., A]."""
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or precision is not None:
        raise ValueError(
            "expected the product of a Dense, over the last axis and the first and of no given precision, found "
            f"{dimension_numbers}, precision {precision}"
        )
    return entries_by_matrix(x, kernel_DA)


@jax.custom_vjp
def entries_by_matrix(x: jax.Array, matrix_DA: jax.Array) -> jax.Array:
    """[..., D] by [D, A] -> [..., A]."""
    return x @ matrix_DA


def _entries_forward(x: jax.Array, matrix_DA: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return entries_by_matrix(x, matrix_DA), (x, matrix_DA)


def _entries_backward(kept: tuple[jax.Array, jax.Array], of_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix_DA = kept
    x_ND, of_y_NA = (value.reshape(-1, value.shape[-1]) for value in (x, of_y))
    # The narrower one first: it is the one that is read across its rows.
    first, second = (of_y_NA, x_ND) if of_y_NA.shape[1] < x_ND.shape[1] else (x_ND, of_y_NA)
    product = lax.dot_general(first, second, (((0,), (0,)), ((), ())))
    return of_y @ matrix_DA.T, product if first is x_ND else product.T


entries_by_matrix.defvjp(_entries_forward, _entries_backward)


@jax.custom_vjp
def rows_by_matrices(x_BLD: jax.Array, matrix_BDA: jax.Array) -> jax.Array:
    """[B, L, D] by a matrix a row, [B, D, A] -> [B, L, A]."""
    return jnp.einsum("bld,bda->bla", x_BLD, matrix_BDA)


def _rows_forward(x_BLD: jax.Array, matrix_BDA: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rows_by_matrices(x_BLD, matrix_BDA), (x_BLD, matrix_BDA)


def _rows_backward(kept: tuple[jax.Array, jax.Array], of_y_BLA: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BLD, matrix_BDA = kept
    x_BDL = jnp.swapaxes(x_BLD, 1, 2)
    # On a CPU XLA would fold the transpose into the product, and read x across its rows.
    if jax.default_backend() == "cpu":
        x_BDL = lax.optimization_barrier(x_BDL)
    of_x_BLD = jnp.einsum("bla,bda->bld", of_y_BLA, matrix_BDA)
    return of_x_BLD, jnp.einsum("bdl,bla->bda", x_BDL, of_y_BLA)


rows_by_matrices.defvjp(_rows_forward, _rows_backward)
