"""What users like me thought of the target: high-active users vote on it, weighted by similarity in the aligned space.

MARS as published (Eqs. 15-18) lends items of one donor and leaves it to the CTR model to find out what they mean for
the target. One donor rarely knows the target, and one opinion says little. Here all donors who know the target are
asked, and their answer is lent: two numbers beside the history. Users are compared in the aligned space, each by what
is special in its likes, not by the mean of all it met (Eq. 13).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from marsjax.data.histories import ragged_histories
from marsjax.records import TRAIN, Array, Log, Rows

CHUNK = 2048  # rows at a time
LARGEST = 2**30  # items x donors: 13 bytes each
PRIOR = 5.0  # events that the overall rate counts for in the rate of likes of an item or a donor


class Settings(NamedTuple):
    """How donors vote."""

    sharpness: float = 8.0  # a donor counts exp(sharpness * cosine), scaled to a mean of 1 over all donors
    evidence: float = 20.0  # events with which half the sharpness is reached: few events say little of a taste
    shrink: float = 30.0  # votes of weight 1 that say "as usual": what few donors know counts little
    cap: int = 200  # the last items of a history that users are compared by
    time_safe: bool = False  # ask only donors who met the target before the row's own time


class Voters(NamedTuple):
    """The donors as voters."""

    profile_PD: np.ndarray  # [P, D] float32, unit length; zero where nothing is known
    opinion_NP: np.ndarray  # [N, P] float32, label less what is usual for item and donor; 0 where not known
    known_NP: np.ndarray  # [N, P] bool
    time_NP: np.ndarray  # [N, P] int64, when the donor met the item
    usual_N: np.ndarray  # [N] float32, the donors' rate of likes of each item


def make_voters(log: Log, rows: Rows, user_P: np.ndarray, item_ND: np.ndarray) -> Voters:
    """Voters from the training events of the donors.

    A donor's profile is the sum of the item vectors of its training events, each weighted by label less the item's
    usual rate: a like of what everybody likes says little about taste, and meeting without a like says the opposite.

    Raises ValueError where the table of opinions would not fit into memory.
    """
    n_items, n_donors = len(item_ND), len(user_P)
    if n_items * n_donors > LARGEST:
        raise ValueError(
            f"votes: expected at most {LARGEST:,} pairs of items and donors, found {n_items:,} x {n_donors:,}; "
            "lower split.high_fraction, raise data.min_item_events, or leave out the methods that vote"
        )
    position_U = np.full(len(rows.group_U), -1)
    position_U[user_P] = np.arange(n_donors)
    event_X = np.flatnonzero((rows.split_E == TRAIN) & (position_U[rows.user_E] >= 0))
    item_X, donor_X, label_X = log.item_E[event_X], position_U[rows.user_E[event_X]], log.label_E[event_X]
    usual_N, usual_P = usual_rates(item_X, label_X, n_items), usual_rates(donor_X, label_X, n_donors)
    opinion_NP = np.zeros((n_items, n_donors), np.float32)
    known_NP = np.zeros((n_items, n_donors), bool)
    time_NP = np.zeros((n_items, n_donors), np.int64)
    opinion_NP[item_X, donor_X] = label_X - 0.5 * (usual_N[item_X] + usual_P[donor_X])
    known_NP[item_X, donor_X] = True
    time_NP[item_X, donor_X] = log.time_E[event_X]
    special = scipy.sparse.csr_matrix((label_X - usual_N[item_X], (donor_X, item_X)), shape=(n_donors, n_items))
    return Voters(unit(special @ centred(item_ND)), opinion_NP, known_NP, time_NP, usual_N)


def usual_rates(group_X: np.ndarray, label_X: np.ndarray, size: int) -> np.ndarray:
    """Rates of likes of groups (items or donors), [size] float32, shrunk to the rate over all events."""
    overall = label_X.mean() if len(label_X) else 0.5
    likes = np.bincount(group_X, label_X, minlength=size) + PRIOR * overall
    return (likes / (np.bincount(group_X, minlength=size) + PRIOR)).astype(np.float32)


def collaborative_factors(
    log: Log, rows: Rows, user_P: np.ndarray, item_ND: np.ndarray, *, width: int = 64
) -> np.ndarray:
    """Item vectors [N, width] from the donors' opinions alone: their principal components, scaled by their strength.

    `item_ND` gives the size of the catalogue.
    """
    opinion_NP = make_voters(log, rows, user_P, item_ND).opinion_NP
    left_NX, strength_X, _ = np.linalg.svd(opinion_NP, full_matrices=False)
    return left_NX[:, :width] * strength_X[:width]


def vote(
    log: Log,
    rows: Rows,
    voters: Voters,
    item_ND: np.ndarray,
    row_R: np.ndarray,
    settings: Settings,
) -> np.ndarray:
    """The donors' vote on the target of each row and the weight behind it, [R, 2] float32.

    The vote is the weighted mean opinion of the donors who know the target; its weight is log(1 + sum of weights).
    A user is compared by the visible history of the row, so nothing of the row or of what came later enters, and a
    training row is treated as a test row is.

    Args:
        row_R: event numbers of users who are no donors: a donor's row would find its own label among the voters', or,
            left out there, could be told from what is missing.
    """
    histories = rows.histories
    vector_ND, usual_N = centred(item_ND), voters.usual_N
    out_R2 = np.zeros((len(row_R), 2), np.float32)
    arrays = jax.device_put((voters.profile_PD, voters.opinion_NP, voters.known_NP))
    for begin in range(0, len(row_R), CHUNK):
        row_C = row_R[begin : begin + CHUNK]
        start_C1, at_X = ragged_histories(histories.start_E[row_C], histories.end_E[row_C], cap=settings.cap)
        item_X = histories.item_H[at_X]
        special_X = histories.label_H[at_X] - usual_N[item_X]
        history = scipy.sparse.csr_matrix((special_X, item_X, start_C1), shape=(len(row_C), len(usual_N)))
        target_C, length_C = log.item_E[row_C], np.diff(start_C1)
        sharpness_C = settings.sharpness * length_C / np.maximum(length_C + settings.evidence, 1e-9)
        allowed_CP = voters.time_NP[target_C] < log.time_E[row_C][:, None] if settings.time_safe else None
        padded = jax.tree.map(
            lambda x: np.pad(x, [(0, CHUNK - len(x))] + [(0, 0)] * (x.ndim - 1)),
            (unit(history @ vector_ND), sharpness_C.astype(np.float32), target_C, allowed_CP),
        )
        out_R2[begin : begin + len(row_C)] = _vote(*padded, *arrays, settings.shrink)[: len(row_C)]
    return out_R2


@jax.jit
def _vote(
    profile_CD: Array,
    sharpness_C: Array,
    target_C: Array,
    allowed_CP: Array | None,
    profile_PD: Array,
    opinion_NP: Array,
    known_NP: Array,
    shrink: float,
) -> jax.Array:
    strength_CP = jnp.exp(sharpness_C[:, None] * (profile_CD @ profile_PD.T))
    strength_CP = strength_CP / jnp.mean(strength_CP, axis=1, keepdims=True)
    known_CP = known_NP[target_C] if allowed_CP is None else known_NP[target_C] & allowed_CP
    strength_CP = strength_CP * known_CP
    total_C = jnp.sum(strength_CP, axis=1)
    vote_C = jnp.sum(strength_CP * opinion_NP[target_C], axis=1) / (total_C + shrink)
    return jnp.stack([vote_C, jnp.log1p(total_C)], axis=1)


def centred(item_ND: np.ndarray) -> np.ndarray:
    """Item vectors less the mean of the catalogue, at unit length; row 0 stays zero."""
    moved_ND = item_ND - item_ND[1:].mean(axis=0)
    return unit(moved_ND) * (np.arange(len(item_ND)) > 0)[:, None]


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows at unit length, float32; zero rows stay zero."""
    return (x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)).astype(np.float32)
