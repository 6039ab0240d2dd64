"""Which items are alike by who met both: ItemCF-IUF, the similarity that CoSeRec and BASRec start with.

C_ij = sum of 1 / ln(1 + |S_u|) over the users u who met both i and j, with S_u the distinct items of u, and
w_ij = C_ij / sqrt(N_i N_j) with N_i the users who met i. Without `iuf` (ItemCF) each user counts 1.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

CELLS = 2**21  # of the similarity matrix at a time, were it dense


def most_similar(
    user_X: np.ndarray, item_X: np.ndarray, n_items: int, *, k: int, iuf: bool = True, cells: int = CELLS
) -> np.ndarray:
    """The `k` items most similar to each, the most similar first, [N, K] int32; 0 where there are fewer.

    Never the item itself; among equals the lower item number first.

    Args:
        user_X, item_X: training interactions, in any order; repeats count once.
        n_items: with the padding item 0.

    Raises:
        ValueError: an item that is not in 1..n_items-1; lengths that differ; k < 1.
    """
    if k < 1:
        raise ValueError(f"item similarity: expected k of at least 1, found {k}")
    if len(user_X) != len(item_X):
        raise ValueError(f"item similarity: expected one user for each item, found {len(user_X)} and {len(item_X)}")
    similar_NK = np.zeros((n_items, k), np.int32)
    if not len(item_X):
        return similar_NK
    if item_X.min() < 1 or item_X.max() >= n_items:
        raise ValueError(f"item similarity: expected items in 1..{n_items - 1}, found {item_X.min()}..{item_X.max()}")
    _, number_X = np.unique(user_X, return_inverse=True)
    user_X, item_X = np.unique(np.stack([number_X, item_X]), axis=1)
    distinct_U, met_N = np.bincount(user_X), np.maximum(np.bincount(item_X, minlength=n_items), 1)
    weight_U = 1 / np.log1p(distinct_U) if iuf else np.ones(len(distinct_U))
    shape = len(distinct_U), n_items
    met_UN = scipy.sparse.csr_array((1 / np.sqrt(met_N[item_X]), (user_X, item_X)), shape)
    weighted_NU = scipy.sparse.csr_array(met_UN.T * weight_U[None, :])
    step = max(cells // n_items, 1)
    for first in range(0, n_items, step):
        block = (weighted_NU[first : first + step] @ met_UN).tocoo()
        row_Z, column_Z = block.coords
        other_Z = row_Z + first != column_Z
        row_Z, column_Z, weight_Z = row_Z[other_Z], column_Z[other_Z], block.data[other_Z]
        # Sums of the same terms in another order differ in the last digits: such similarities are equal.
        order_Z = np.lexsort((column_Z, -np.round(weight_Z, 12), row_Z))
        row_Z, column_Z = row_Z[order_Z], column_Z[order_Z]
        rank_Z = np.arange(len(row_Z)) - np.searchsorted(row_Z, row_Z)
        near_Z = rank_Z < k
        similar_NK[row_Z[near_Z] + first, rank_Z[near_Z]] = column_Z[near_Z]
    return similar_NK
