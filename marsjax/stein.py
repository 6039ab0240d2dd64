"""RBF kernel, median bandwidth, score estimators and the entropy surrogate: pure functions, Eqs. 5-8.

Every function takes padded samples with a mask; padded rows change nothing. All arithmetic is float32 at the highest
matmul precision, because (K + eta I) has a condition number of about 3e3 at eta = 0.1 and bfloat16 would drown it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST
_TOP = 2**31 - 1  # more than the bits of any number
_SAMPLE, _PARTS = 256, 16  # of `median`


class ScoreEstimator(Protocol):
    """The signature that `stein_score` and `ssge_score` share."""

    def __call__(self, x_ND: jax.Array, mask_N: jax.Array) -> jax.Array: ...


def squared_distances(x_ND: jax.Array, y_MD: jax.Array) -> jax.Array:
    """Squared Euclidean distances [N, M], by the Gram matrix, so that no [N, M, D] tensor exists.

    Both sets are moved by the mean of `y_MD` first: the Gram form loses digits when points lie far from the origin.
    """
    origin_1D = lax.stop_gradient(jnp.mean(y_MD, axis=0, keepdims=True))
    x_ND, y_MD = x_ND - origin_1D, y_MD - origin_1D
    gram_NM = jnp.matmul(x_ND, y_MD.T, precision=HIGHEST)
    square_N1 = jnp.sum(x_ND * x_ND, axis=1, keepdims=True)
    square_1M = jnp.sum(y_MD * y_MD, axis=1)[None, :]
    return jnp.maximum(square_N1 + square_1M - 2.0 * gram_NM, 0.0)


def median(value_NM: jax.Array, valid_NM: jax.Array) -> jax.Array:
    """The lower median of the valid, non-negative values, exactly; 0 where none is valid. No gradient flows.

    Selected by counting (non-negative floats sort as their bits do): a sample brackets the median, then guesses between
    the ends of the bracket, by how many values lie below each, close it in about ten passes over the values. A sort, or
    a bisection of the 31 bits, costs more than the Cholesky solve. Every fourth guess halves the bracket, so whatever
    the values are it ends.
    """
    bits_NM = jnp.maximum(lax.bitcast_convert_type(lax.stop_gradient(value_NM).astype(jnp.float32), jnp.int32), 0)
    bits_Q = jnp.where(valid_NM, bits_NM, _TOP).ravel()
    sample_S = jnp.sort(bits_Q[:: max(1, bits_Q.size // _SAMPLE) | 1])  # odd: an even step may stay in a few columns
    n_sample = jnp.sum(sample_S < _TOP)
    bits_PQ = jnp.pad(bits_Q, (0, -bits_Q.size % _PARTS), constant_values=_TOP).reshape(_PARTS, -1)
    n_valid = jnp.sum(valid_NM, dtype=jnp.int32)
    rank = (n_valid + 1) // 2  # how many values lie at or below the lower median

    def fold(combine: Callable[[jax.Array, jax.Array], jax.Array], part: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # A CPU adds up parts of an array several numbers at a time, and all numbers of one array one after the other.
        return functools.reduce(combine, [part(bits_PQ[i]) for i in range(_PARTS)])

    def open_(bracket: _Bracket) -> jax.Array:
        return (bracket.high - bracket.low > 1) & (bracket.below_high - bracket.below_low > 2)

    def close(bracket: _Bracket) -> _Bracket:
        low, high, below_low, below_high, done = bracket
        inside, width = (below_high - below_low).astype(jnp.float32), high - low
        # A little beyond the rank, on the side from which the end that is farther away is moved to it.
        margin = jnp.minimum(0.5 * jnp.sqrt(inside), 0.25 * inside)
        margin = jnp.where(rank - below_low <= below_high - rank, margin, -margin)
        share = jnp.clip(((rank - below_low).astype(jnp.float32) - 0.5 + margin) / inside, 0.0, 1.0)
        guess = jnp.where(done % 4 == 3, low + width // 2, low + (share * width.astype(jnp.float32)).astype(jnp.int32))
        # The first two guesses: three deviations of a sample's rank to either side.
        away = jnp.where(done == 0, -1.5, 1.5) * jnp.sqrt(n_sample.astype(jnp.float32))
        at = jnp.clip(n_sample // 2 + away.astype(jnp.int32), 0, len(sample_S) - 1)
        guess = jnp.clip(jnp.where(done < 2, sample_S[at], guess), low + 1, high - 1)
        below = jnp.sum(fold(jnp.add, lambda bits_Q: (bits_Q < guess).astype(jnp.int32)))
        less = below < rank
        return _Bracket(
            jnp.where(less, guess, low),
            jnp.where(less, high, guess),
            jnp.where(less, below, below_low),
            jnp.where(less, below_high, below),
            done + 1,
        )

    zero = jnp.int32(0)
    found = lax.while_loop(open_, close, _Bracket(zero, jnp.int32(_TOP), zero, n_valid, zero))
    # One or two values are left, or several that are equal: the least or the greatest of them.
    least = jnp.min(fold(jnp.minimum, lambda bits_Q: jnp.where(bits_Q >= found.low, bits_Q, _TOP)))
    greatest = jnp.max(fold(jnp.maximum, lambda bits_Q: jnp.where(bits_Q < found.high, bits_Q, 0)))
    answer = jnp.where(rank - found.below_low == 1, least, greatest)
    return jnp.where(n_valid > 0, lax.bitcast_convert_type(answer, jnp.float32), 0.0)


class _Bracket(NamedTuple):
    """Bits of two floats, with the median at or above the first and below the second, and how far the search is."""

    low: jax.Array
    high: jax.Array
    below_low: jax.Array  # how many values are less than `low`
    below_high: jax.Array
    done: jax.Array  # guesses


def squared_bandwidth(square_NM: jax.Array, valid_NM: jax.Array) -> jax.Array:
    """gamma^2 for Eq. 5: the squared median distance over the valid pairs. No gradient flows.

    Never zero: where all points coincide any bandwidth is as good, and 1 keeps the kernel finite.
    """
    gamma2 = median(square_NM, valid_NM)
    return jnp.where(gamma2 > 1e-12, gamma2, 1.0)


def rbf_kernel(square_NM: jax.Array, gamma2: jax.Array) -> jax.Array:
    """k = exp(-d^2 / (2 gamma^2)), Eq. 5, from squared distances [N, M]."""
    return jnp.exp(-square_NM / (2.0 * gamma2))


def _pairs_once(value_NN: jax.Array) -> jax.Array:
    """Each pair of a symmetric matrix once, not twice: half of its values, with the same lower median.

    They are the upper right block, the lower triangle of the upper left one and the upper triangle of the lower right
    one, which share a square. The diagonals share one too, so the caller must leave them out.
    """
    odd = len(value_NN) % 2
    value_NN = jnp.pad(value_NN, ((0, odd), (0, odd)))  # False where it is a mask
    h = len(value_NN) // 2
    triangles = jnp.where(jnp.tri(h, k=-1, dtype=bool), value_NN[:h, :h], value_NN[h:, h:])
    return jnp.concatenate([value_NN[:h, h:], triangles])


def _centred(x_ND: jax.Array, mask_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Centred samples, the kernel of the valid pairs without its diagonal, gamma^2 and the mask as float."""
    keep_N = mask_N.astype(jnp.float32)
    x_ND = lax.stop_gradient(x_ND).astype(jnp.float32)
    mean_1D = jnp.sum(x_ND * keep_N[:, None], axis=0, keepdims=True) / jnp.maximum(jnp.sum(keep_N), 1.0)
    x_ND = (x_ND - mean_1D) * keep_N[:, None]
    pair_NN = (keep_N[:, None] * keep_N[None, :]).astype(bool) & ~jnp.eye(x_ND.shape[0], dtype=bool)
    square_NN = squared_distances(x_ND, x_ND)
    gamma2 = squared_bandwidth(_pairs_once(square_NN), _pairs_once(pair_NN))
    kernel_NN = jnp.where(pair_NN, rbf_kernel(square_NN, gamma2), 0.0)
    return x_ND, kernel_NN, gamma2, keep_N


def stein_score(x_ND: jax.Array, mask_N: jax.Array, *, eta: float = 0.1) -> jax.Array:
    """Estimate of grad log q at the samples, [N, D] float32, zero at padded rows. No gradient flows.

    S = -(K + eta I)^-1 gamma^-2 (diag(K 1) - K) X (Li and Turner, arXiv 1705.07107), gamma the median pairwise
    distance. With N = 512 Gaussian samples eta = 0.1 has the best worst case over D = 2..256; the relative error is
    about 0.3 to 0.5 (`tests/stein_test.py`).
    """
    x_ND, kernel_NN, gamma2, keep_N = _centred(x_ND, mask_N)
    # A padded row gets 1 on the diagonal and nothing else, so it decouples from the solve.
    system_NN = kernel_NN + (1.0 + eta) * jnp.eye(x_ND.shape[0], dtype=jnp.float32)
    # Whatever stands on the diagonal cancels in the drift, so K is not made beside the system.
    drift_ND = jnp.sum(system_NN, axis=1, keepdims=True) * x_ND - jnp.matmul(system_NN, x_ND, precision=HIGHEST)
    # LAPACK wants columns. Of a symmetric matrix the transpose is as good and is that already; otherwise XLA lays out
    # the kernel by columns too, and reads all that it is made of across the lines of the cache.
    factor_NN = lax.linalg.cholesky(system_NN.T, symmetrize_input=False)  # reads the lower triangle
    return -jax.scipy.linalg.cho_solve((factor_NN, True), drift_ND / gamma2) * keep_N[:, None]


def ssge_score(x_ND: jax.Array, mask_N: jax.Array, *, explained: float = 0.95) -> jax.Array:
    """The spectral estimator of the score (Shi et al., arXiv 1806.02925), behind the signature of `stein_score`.

    Keeps the eigenvectors of K that hold `explained` of its trace. Slower (it needs all eigenvectors) and brittle
    where the scales of the directions differ; here for comparison.
    """
    x_ND, kernel_NN, gamma2, keep_N = _centred(x_ND, mask_N)
    count = jnp.maximum(jnp.sum(keep_N), 1.0)
    kernel_NN = kernel_NN + jnp.diag(keep_N)
    value_J, vector_NJ = jnp.linalg.eigh(kernel_NN)
    value_J = jnp.maximum(value_J[::-1], 0.0)
    vector_NJ = vector_NJ[:, ::-1]
    before_J = jnp.cumsum(value_J) - value_J
    use_J = (before_J < explained * jnp.sum(value_J)) & (value_J > 1e-6 * value_J[0])
    function_NJ = jnp.sqrt(count) * vector_NJ * use_J[None, :] * keep_N[:, None]
    # The derivative of the Nystroem extension of eigenfunction j at every sample, averaged: beta_j = -mean grad psi_j.
    weight_NJ = function_NJ * jnp.where(use_J, 1.0 / jnp.maximum(value_J, 1e-12), 0.0)[None, :]
    pulled_JD = jnp.matmul(weight_NJ.T, jnp.matmul(kernel_NN, x_ND, precision=HIGHEST), precision=HIGHEST)
    spread_JD = jnp.matmul((weight_NJ * jnp.sum(kernel_NN, axis=0)[:, None]).T, x_ND, precision=HIGHEST)
    beta_JD = -(spread_JD - pulled_JD) / gamma2 / count
    return jnp.matmul(function_NJ, beta_JD, precision=HIGHEST) * keep_N[:, None]


def alignment(x_ND: jax.Array, y_ND: jax.Array, mask_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """L_align of Eq. 6, the mean kernel of the matched pairs, in [0, 1], and the bandwidth gamma.

    gamma is the median over all cross-modal pairs of the batch. Over the matched pairs alone the median kernel would
    be exp(-1/2) however well they match, and nothing would be learnt.
    """
    pair_NN = mask_N[:, None] & mask_N[None, :]
    gamma2 = squared_bandwidth(squared_distances(x_ND, y_ND), pair_NN)
    matched_N = jnp.sum((x_ND - y_ND) ** 2, axis=1)
    keep_N = mask_N.astype(jnp.float32)
    mean = jnp.sum(rbf_kernel(matched_N, gamma2) * keep_N) / jnp.maximum(jnp.sum(keep_N), 1.0)
    return mean, jnp.sqrt(gamma2)


def entropy_surrogate(
    x_ND: jax.Array, mask_N: jax.Array, *, score: Callable[[jax.Array, jax.Array], jax.Array] = stein_score
) -> jax.Array:
    """mean over samples of stop_gradient(score) . x: its gradient is minus the gradient of the entropy of q.

    Only this surrogate means anything: by Stein's identity the value of Eq. 7 is the constant D whatever q is. So
    *adding* it to a loss that is minimised raises the entropy; Eqs. 7-8 as printed subtract it, which lowers the
    entropy and contracts the space.
    """
    keep_N = mask_N.astype(jnp.float32)
    score_ND = lax.stop_gradient(score(x_ND, mask_N))
    return jnp.sum(jnp.sum(score_ND * x_ND, axis=1) * keep_N) / jnp.maximum(jnp.sum(keep_N), 1.0)
