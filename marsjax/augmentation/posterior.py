"""What is to be expected of a user on the target, given the few opinions that the user has shown.

MARS as published (Eqs. 15-18) lends items of one donor; a vote (`votes.py`) asks all donors, each weighted by how
similar the users are, and with a handful of events that similarity is mostly noise. This asks the same donors in the
way that wastes least of a handful: donors tell which opinions go together (who likes A more than others do also likes
B more), and the best linear prediction from the user's own opinions follows from that by Gaussian process regression
(Rasmussen and Williams 2006, Eqs. 2.25-2.26, there with a learned instead of a chosen kernel). It is a vote too: the
prediction is a sum over the donors' opinions on the target, and the weights are those of least expected error.

Two items that few donors share say little about each other. Their covariance starts from what the aligned space says
of items that are as similar as they are, and moves to what donors say with the number of those who know both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from marsjax.augmentation.votes import centred, usual_rates
from marsjax.data.histories import gather_histories, own_tails
from marsjax.records import TRAIN, Array, Histories, Log, Rows

CHUNK = 2048  # rows at a time
LARGEST = 2**29  # pairs of items that some donor knows: some 60 bytes each while they are counted
CELLS = 2**26  # of a block of cosines or of donors, and of a full matrix
FASTER = 500  # times, a product of full matrices over one of sparse ones, for each number
FIXED = 100  # donors that take as long as to make and to search a full matrix
DENSE = 0.5  # share of pairs from which on a full matrix takes no more memory: a value has a place beside it
SHORTEST = 8  # history length that is compiled; then its doubles
LEAST_NOISE = 0.05  # of one opinion; at most .25, that of a coin


class Settings(NamedTuple):
    """How opinions are expected."""

    components: int = 32  # of the covariance between items; what is beyond them is noise
    folds: int = 5  # users are dealt into so many, and a row asks the donors of the other ones
    cap: int = 200  # the last items of a history that count


class Opinions(NamedTuple):
    """What the donors outside of each fold tell about the items."""

    usual_FN: np.ndarray  # [F, N] float32, rate of likes
    loading_FNK: np.ndarray  # [F, N, K] float32; the covariance of opinions on items i and j is loading_i . loading_j
    # [F] float32, variance of opinions over that of labels of the same rates; None: they are labels
    scale_F: np.ndarray | None = None


def learn_opinions(
    log: Log,
    rows: Rows,
    user_P: np.ndarray,
    item_ND: np.ndarray | None,
    *,
    n_items: int,
    settings: Settings,
    advance: Callable[[int], None] = lambda _: None,
) -> Opinions:
    """Means and covariances of opinions, from the training events of the donors `user_P`.

    An opinion is the label less the item's rate of likes; of a log in whose `label_E` grades stand it is the grade less
    the item's usual one. `item_ND`, [N, D], are the vectors whose cosine the
    covariance starts from; None: it starts from one value for all pairs of items. An item that a donor met more than
    once counts once, with the mean label. All training events of a donor count, whenever they were.

    Raises ValueError where the pairs of items that donors know would not fit into memory.
    """
    is_donor_U = np.zeros(len(rows.group_U), bool)
    is_donor_U[user_P] = True
    event_X = np.flatnonzero((rows.split_E == TRAIN) & is_donor_U[rows.user_E])
    known_X, at_X, count_X = np.unique(
        rows.user_E[event_X].astype(np.int64) * n_items + log.item_E[event_X], return_inverse=True, return_counts=True
    )
    user_X, item_X = known_X // n_items, known_X % n_items
    label_X = (np.bincount(at_X, log.label_E[event_X], minlength=len(known_X)) / count_X).astype(np.float32)
    pairs = min(int((np.bincount(user_X, minlength=1) ** 2).sum()), n_items**2)
    if pairs > LARGEST:
        raise ValueError(
            f"posterior: expected at most {LARGEST:,} pairs of items known to one donor, found up to {pairs:,}; lower "
            "split.high_fraction, raise data.min_item_events, or leave out the methods that ask for a posterior"
        )
    vector_ND = None if item_ND is None else centred(item_ND)
    usual, loadings, scales = [], [], []
    for fold in range(settings.folds):
        kept_X = user_X % settings.folds != fold
        user_K, item_K, label_K = user_X[kept_X], item_X[kept_X], label_X[kept_X]
        usual_N = usual_rates(item_K, label_K, n_items)
        shape = len(is_donor_U), n_items
        known = scipy.sparse.csr_array((np.ones(len(item_K), np.float32), (user_K, item_K)), shape)
        opinion = scipy.sparse.csr_array((label_K - usual_N[item_K], (user_K, item_K)), shape)
        usual.append(usual_N)
        loadings.append(_loadings(opinion, known, vector_ND, settings.components))
        as_labels_K = usual_N[item_K] * (1 - usual_N[item_K])
        scales.append(np.sum((label_K - usual_N[item_K]) ** 2) / max(float(np.sum(as_labels_K)), 1e-6))
        advance(1)
    labels = np.isin(log.label_E, (0, 1)).all()
    return Opinions(np.stack(usual), np.stack(loadings), None if labels else np.array(scales, np.float32))


def _loadings(
    opinion: scipy.sparse.csr_array,
    known: scipy.sparse.csr_array,
    vector_ND: np.ndarray | None,
    components: int,
) -> np.ndarray:
    """Principal components of the covariance between items, [N, K] float32, scaled to the root of their variance.

    With n donors who know both items, the covariance is (sum of products + tau * prior) / (n + tau). The prior is
    a + b * cosine, fitted to the pairs; tau = noise / spread, with the variance of the products of a pair as noise, and
    as spread how much more than noise / n the pairs miss the prior by (empirical Bayes). Nothing is chosen by hand.
    """
    n_items = opinion.shape[1]
    components = min(components, n_items - 2)
    if components < 1:
        return np.zeros((n_items, 1), np.float32)
    left_Z, right_Z, n_Z, sum_Z, square_Z = _over_pairs(opinion, known)
    cosine_Z = np.zeros(len(n_Z), np.float32) if vector_ND is None else _cosines(vector_ND, left_Z, right_Z)
    level, slope = _prior(sum_Z, n_Z, cosine_Z)
    prior_Z = np.float32(level) + np.float32(slope) * cosine_Z
    tau = _strength(sum_Z, square_Z, n_Z, prior_Z)
    step_Z = (sum_Z - n_Z * prior_Z) / (n_Z + np.float32(tau))
    if level + slope == 0 and not step_Z.any():  # no two items whose opinions are known to go together
        return np.zeros((n_items, components), np.float32)
    if len(step_Z) > DENSE * n_items**2:
        moved: Any = np.zeros((n_items, n_items), np.float32)
        moved[left_Z, right_Z] = step_Z
    else:
        moved = scipy.sparse.csr_array((step_Z, (left_Z, right_Z)), (n_items, n_items))
    real_N = (np.arange(n_items) > 0).astype(np.float32)

    def times(x_N: np.ndarray) -> np.ndarray:
        x_N = np.ravel(x_N).astype(np.float32)
        out_N = moved @ x_N + level * real_N * (real_N @ x_N)
        return out_N if vector_ND is None else out_N + slope * (vector_ND @ (vector_ND.T @ x_N))

    operator = scipy.sparse.linalg.LinearOperator((n_items, n_items), matvec=times, dtype=np.float32)
    # From a fixed start: the solver would draw one.
    start_N = np.random.default_rng(0).normal(size=n_items).astype(np.float32)
    strength_K, component_NK = scipy.sparse.linalg.eigsh(operator, k=components, which="LA", v0=start_N, tol=1e-3)
    return (component_NK * np.sqrt(np.maximum(strength_K, 0.0))).astype(np.float32)


def _over_pairs(opinion: scipy.sparse.csr_array, known: scipy.sparse.csr_array) -> tuple[np.ndarray, ...]:
    """Pairs of two items that some donor knows, sorted by the left one: [Z] left and right item, how many donors know
    both, and the sums over these of the products of their opinions and of the squares of the products."""
    n_items, donor_P = known.shape[1], np.flatnonzero(np.diff(known.indptr))
    known, opinion = known[donor_P], opinion[donor_P]
    values = known, opinion, opinion.multiply(opinion).tocsr()
    pairs = int((np.diff(known.indptr).astype(np.int64) ** 2).sum())
    if n_items**2 <= CELLS and pairs * FASTER > (len(donor_P) + FIXED) * n_items**2:
        products, block = [np.zeros((n_items, n_items), np.float32) for _ in values], CELLS // n_items
        for first in range(0, len(donor_P), block):
            for product, value in zip(products, values, strict=True):
                part = value[first : first + block].toarray()
                product += part.T @ part
        np.fill_diagonal(products[0], 0)
        left_Z, right_Z = np.nonzero(products[0])
        return left_Z, right_Z, *(product[left_Z, right_Z] for product in products)

    def over_donors(value: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
        product = (value.T @ value).T  # it comes by column, and is symmetric
        product.sort_indices()  # else each entry that is asked for is searched for in its whole row
        return product

    shared = over_donors(known).tocoo()
    pair_Z = shared.coords[0] != shared.coords[1]
    left_Z, right_Z = (place_Z[pair_Z] for place_Z in shared.coords)
    if not len(left_Z):  # no entries of a sparse array are a sparse array
        return left_Z, right_Z, *(np.zeros(0, np.float32) for _ in values)
    sums = (np.asarray(over_donors(value)[left_Z, right_Z]).ravel() for value in values[1:])
    return left_Z, right_Z, shared.data[pair_Z], *sums


def _cosines(vector_ND: np.ndarray, left_Z: np.ndarray, right_Z: np.ndarray) -> np.ndarray:
    """Cosines of pairs that are sorted by the left item."""
    out_Z = np.empty(len(left_Z), np.float32)
    n_items = len(vector_ND)
    rows = max(CELLS // n_items, 1)
    for first in range(0, n_items, rows):
        part = slice(*np.searchsorted(left_Z, (first, first + rows)))
        if part.start < part.stop:
            cosine_RN = vector_ND[first : first + rows] @ vector_ND.T
            out_Z[part] = cosine_RN[left_Z[part] - first, right_Z[part]]
    return out_Z


def _prior(sum_Z: np.ndarray, n_Z: np.ndarray, cosine_Z: np.ndarray) -> tuple[float, float]:
    """Level and slope of the covariance over the cosine, by least squares over pairs of donor opinions; both at least
    0, so that the prior is a covariance."""
    if not len(n_Z):
        return 0.0, 0.0
    total, level = float(n_Z.sum()), float(sum_Z.sum(dtype=np.float64) / n_Z.sum(dtype=np.float64))
    mean = float((n_Z * cosine_Z).sum(dtype=np.float64) / total)
    spread = float((n_Z * (cosine_Z - mean) ** 2).sum(dtype=np.float64))
    slope = float((sum_Z * (cosine_Z - mean)).sum(dtype=np.float64) / spread) if spread > 0 else 0.0
    if slope <= 0:
        return max(level, 0.0), 0.0
    return max(level - slope * mean, 0.0), slope


def _strength(sum_Z: np.ndarray, square_Z: np.ndarray, n_Z: np.ndarray, prior_Z: np.ndarray) -> float:
    """tau, the number of donors whose word counts as much as the prior.

    A pair's mean product misses the prior by noise, of variance noise / n, and by what is true of the pair alone. The
    noise is that of the products themselves, sum of squares / n - prior^2: opinions on items that few donors know
    are smaller than others, since their rate of likes is made of them.
    """
    if not len(n_Z):
        return 1.0

    def total(value_Z: np.ndarray) -> float:
        return float(value_Z.sum(dtype=np.float64))

    # Means of noise and of squared error - noise / n, weighted by n^2: squared errors scatter as (noise / n)^2.
    noise_Z = square_Z - n_Z * prior_Z**2  # n times
    weight, spread = total(n_Z**2), total((sum_Z - n_Z * prior_Z) ** 2 - noise_Z)
    return max(total(n_Z * noise_Z) / weight, 1e-6) / max(spread / weight, 1e-8)


def expect(
    log: Log,
    rows: Rows,
    opinions: Opinions,
    row_R: np.ndarray,
    *,
    settings: Settings,
    advance: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """The expected opinion on the target of each row, and how much the history tells of it, [R, 2] float32.

    The first is 4 times the mean of the posterior in units of the label, the second 4 times the root of the variance
    that the history explains; both are 0 without a history. Of the user, the visible history of the row enters, and
    nothing of the row itself or of what came later. Of the donors, all training events do, later ones too: where that
    matters, split by `global_time`. Donors are those outside of the user's fold, so a donor's own label is in no
    product that its rows read, and a training row is treated as a test row is. (It is in the training of the aligned
    space that covariances of rare pairs start from, as every user's labels are.)
    """
    histories = rows.histories
    folds, n_items = opinions.usual_FN.shape
    length_R = np.minimum(histories.end_E[row_R] - histories.start_E[row_R], settings.cap)
    bound_R = SHORTEST * 2 ** np.ceil(np.log2(np.maximum(length_R, SHORTEST) / SHORTEST)).astype(np.int64)
    # Items of fold f are numbered from f * N on, so that rows of all folds are computed together.
    first_R = (rows.user_E[row_R] % folds * n_items).astype(np.int32)
    arrays = jax.device_put((opinions.usual_FN.ravel(), opinions.loading_FNK.reshape(folds * n_items, -1)))
    scale_F = np.ones(folds, np.float32) if opinions.scale_F is None else opinions.scale_F
    out_R2 = np.zeros((len(row_R), 2), np.float32)
    for bound in np.unique(bound_R):
        here_R, width = np.flatnonzero(bound_R == bound), min(int(bound), settings.cap)
        for begin in range(0, len(here_R), CHUNK):
            part_C = here_R[begin : begin + CHUNK]
            item_CL, label_CL = np.zeros((CHUNK, bound), np.int32), np.zeros((CHUNK, bound), np.float32)
            target_C, scale_C = np.zeros(CHUNK, np.int32), np.ones(CHUNK, np.float32)
            target_C[: len(part_C)] = log.item_E[row_R[part_C]] + first_R[part_C]
            scale_C[: len(part_C)] = scale_F[rows.user_E[row_R[part_C]] % folds]
            item_CX, label_CX, _ = own_tails(histories, histories.label_H, row_R[part_C], length=width)
            item_CL[: len(part_C), :width] = np.where(item_CX > 0, item_CX + first_R[part_C, None], 0)
            label_CL[: len(part_C), :width] = label_CX
            out_R2[part_C] = _expect(item_CL, label_CL, target_C, *arrays, scale_C)[: len(part_C)]
            advance(len(part_C))
    return out_R2


@jax.jit
def _expect(
    item_CL: Array, label_CL: Array, target_C: Array, usual_N: Array, loading_NK: Array, scale_C: Array
) -> jax.Array:
    """With the results of `_summed` and A = 1 + X'X, the mean is t' A^-1 X'y for a target of loadings t, and what is
    explained of t't is t' A^-1 X'X t."""
    return _answered(*_summed(item_CL, label_CL, usual_N, loading_NK, scale_C), loading_NK[target_C])


@jax.jit
def expect_for_one(
    item_L: Array, label_L: Array, target_C: Array, usual_N: Array, loading_NK: Array, scale_1: Array
) -> jax.Array:
    """`expect` for many targets of one user, [C, 2]: history items, 0 is padding, their labels, and the opinions of the
    user's fold. The history is summed once."""
    known_1KK, opinion_1K = _summed(item_L[None], label_L[None], usual_N, loading_NK, scale_1)
    n, k = target_C.shape[0], loading_NK.shape[1]
    known_CKK, opinion_CK = jnp.broadcast_to(known_1KK, (n, k, k)), jnp.broadcast_to(opinion_1K, (n, k))
    return _answered(known_CKK, opinion_CK, loading_NK[target_C])


def _answered(known_CKK: jax.Array, opinion_CK: jax.Array, target_CK: jax.Array) -> jax.Array:
    factor_CKK = jnp.linalg.cholesky(known_CKK + jnp.eye(target_CK.shape[1])[None])
    solved_CK = jax.scipy.linalg.cho_solve((factor_CKK, True), target_CK[:, :, None])[:, :, 0]
    mean_C = jnp.sum(solved_CK * opinion_CK, axis=1)
    explained_C = jnp.einsum("ck,ckm,cm->c", solved_CK, known_CKK, target_CK)
    return 4.0 * jnp.stack([mean_C, jnp.sqrt(jnp.maximum(explained_C, 0.0))], axis=1)


def _summed(
    item_CL: Array, label_CL: Array, usual_N: Array, loading_NK: Array, scale_C: Array
) -> tuple[jax.Array, jax.Array]:
    """X'X [C, K, K] and X'y [C, K], with X the loadings of the history, each over the root of its noise: in the space
    of the components long histories cost no more than a sum over them."""
    inside_CL = item_CL > 0
    loading_CLK, usual_CL = loading_NK[item_CL], usual_N[item_CL]
    # All of an opinion's variance that is not explained is its noise.
    scale_C1 = scale_C[:, None]
    unexplained_CL = scale_C1 * usual_CL * (1.0 - usual_CL) - jnp.sum(loading_CLK**2, axis=2)
    noise_CL = jnp.maximum(unexplained_CL, scale_C1 * LEAST_NOISE)
    weight_CL = jnp.where(inside_CL, 1.0 / jnp.sqrt(noise_CL), 0.0)
    scaled_CLK = loading_CLK * weight_CL[:, :, None]
    known_CKK = jnp.einsum("clk,clm->ckm", scaled_CLK, scaled_CLK)
    return known_CKK, jnp.einsum("clk,cl->ck", scaled_CLK, weight_CL * (label_CL - usual_CL))


def expect_all(
    histories: Histories, opinions: Opinions, user_Q: np.ndarray, end_Q: np.ndarray, *, cap: int
) -> np.ndarray:
    """The expected opinions of a few users on all items, [Q, N] float32 in units of the label, to look at.

    A user is known by the last `cap` entries of the history before `end_Q`.
    """
    out_QN = np.zeros((len(user_Q), opinions.usual_FN.shape[1]), np.float32)
    item_QL = gather_histories(histories, user_Q, end_Q, cap=cap)
    label_QL = gather_histories(histories._replace(item_H=histories.label_H), user_Q, end_Q, cap=cap)
    fold_Q = user_Q % len(opinions.usual_FN)
    for fold in np.unique(fold_Q):
        of_fold, loading_NK = fold_Q == fold, opinions.loading_FNK[fold]
        scale_Q = np.full(of_fold.sum(), 1 if opinions.scale_F is None else opinions.scale_F[fold], np.float32)
        arrays = jax.device_put((item_QL[of_fold], label_QL[of_fold], opinions.usual_FN[fold], loading_NK, scale_Q))
        known_QKK, opinion_QK = map(np.asarray, _summed(*arrays))
        taste_QK1 = np.linalg.solve(known_QKK + np.eye(loading_NK.shape[1]), opinion_QK[:, :, None])
        out_QN[of_fold] = taste_QK1[:, :, 0] @ loading_NK.T
    return out_QN
