"""What a user borrows, looked up anew: a bundle's donors with their index, and Eqs. 15-18 for vectors of users.

Retrieval and filtering are `retrieval.search` and `mars.borrow`, which made the training data.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from marsjax import files, retrieval
from marsjax.augmentation import mars
from marsjax.embeddings import units
from marsjax.records import Donors

DONORS, UNITS, INDEX = "donors.npz", "donor_units.npy", "index"
SIZES = (1, 2, 4, 8)  # users whose items are filtered at a time: the smallest shape that holds them is used


class Lenders(NamedTuple):
    """The possible donors."""

    donors: Donors
    mark_PL: np.ndarray  # [P, L] int8, what the donor thought of the item, as in `CtrBatch.feedback_BL`
    centre_D: np.ndarray  # [D] float32, subtracted before a cosine
    unit_PLD: np.ndarray | None  # [P, L, D] float32, `units` of items in the donors' histories, or else
    unit_ND: np.ndarray | None  # [N, D] float32, `units` of the static vectors
    user_index: retrieval.UserIndex  # over the donors' vectors, less the centre


class Lent(NamedTuple):
    """What a user borrows, in the order in which Eq. 18 prepends it, the nearest donor's last."""

    item_S: np.ndarray  # [S] int32
    time_S: np.ndarray  # [S] int64
    donor_S: np.ndarray  # [S] int32, numbers of users
    similarity_S: np.ndarray  # [S] float32, Eq. 16
    mark_S: np.ndarray  # [S] int8


NOTHING = Lent(
    np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int8)
)


def find_candidates(lenders: Lenders, config: Mapping[str, Any], user_QD: np.ndarray) -> mars.Candidates:
    """Eqs. 15-17 for vectors of users, [Q, D]; a vector without length finds nobody. `config` is that of the bundle."""
    retrieving, lending = config["retrieval"], config["augmentation"]
    moved_QD = np.where(user_QD.any(axis=1, keepdims=True), user_QD - lenders.centre_D, 0.0)
    k = max(min(int(retrieving["donors"]), len(lenders.donors.user_P)), 1)
    index = lenders.user_index
    if retrieving["backend"] == "exact":
        neighbours = retrieval.exact_search(moved_QD, index.unit_PD, index.user_P, k=k)
    else:
        neighbours = retrieval.search(index, moved_QD, k=k)
    return mars.borrow(
        lenders.donors,
        neighbours,
        user_QD.astype(np.float32),
        item_units(lenders),
        strategy=lending["strategy"],
        theta=lending["theta"],
        theta_quantile=lending["theta_quantile"],
        centre_D=lenders.centre_D,
        size=SIZES[min(int(np.searchsorted(SIZES, len(user_QD))), len(SIZES) - 1)],
    )


def item_units(lenders: Lenders) -> Callable[[np.ndarray], np.ndarray]:
    """Item vectors of donors at positions [X] -> [X, L, D], moved and of length 1."""
    unit_PLD, unit_ND, item_PL = lenders.unit_PLD, lenders.unit_ND, lenders.donors.item_PL
    if unit_PLD is not None:
        return lambda position_X: np.asarray(unit_PLD[position_X])
    assert unit_ND is not None
    return lambda position_X: unit_ND[item_PL[position_X]]


def lend(lenders: Lenders, config: Mapping[str, Any], user_QD: np.ndarray) -> list[Lent]:
    """What each of the users borrows, Eqs. 15-18."""
    if not len(user_QD):
        return []
    if not len(lenders.user_index.user_P):
        return [NOTHING] * len(user_QD)
    borrowed = mars.kept_items(find_candidates(lenders, config, user_QD))
    position_S = np.searchsorted(lenders.donors.user_P, borrowed.donor_S)
    at_S = np.argmax(lenders.donors.item_PL[position_S] == borrowed.item_S[:, None], axis=1)
    whole = Lent(
        borrowed.item_S, borrowed.time_S, borrowed.donor_S, borrowed.similarity_S, lenders.mark_PL[position_S, at_S]
    )
    parts = [slice(*bounds) for bounds in zip(borrowed.start_Q1[:-1], borrowed.start_Q1[1:], strict=True)]
    return [Lent(*(value[part] for value in whole)) for part in parts]


def write_lenders(folder: pathlib.Path, lenders: Lenders) -> None:
    """Writes donors, their vectors and their index into an existing folder.

    Raises OSError where the disk is full.
    """
    files.write_arrays(folder / DONORS, **lenders.donors._asdict(), mark_PL=lenders.mark_PL, centre_D=lenders.centre_D)
    if lenders.unit_PLD is not None:
        files.write_array(folder / UNITS, lenders.unit_PLD)
    retrieval.save_index(lenders.user_index, folder / INDEX)


def read_lenders(folder: pathlib.Path, item_ND: np.ndarray) -> Lenders:
    """Reads what `write_lenders` wrote; vectors stay on the disk until they are needed. Check the sums before.

    Raises ValueError where the index is damaged.
    """
    arrays = files.map_arrays(folder / DONORS)
    donors = Donors(**{name: arrays[name] for name in Donors._fields})
    mark_PL, centre_D = arrays["mark_PL"], arrays["centre_D"]
    path = folder / UNITS
    unit_PLD = np.load(path, mmap_mode="r") if path.is_file() else None
    unit_ND = units(item_ND, centre_D) if unit_PLD is None else None
    return Lenders(donors, mark_PL, centre_D, unit_PLD, unit_ND, retrieval.load_index(folder / INDEX))
