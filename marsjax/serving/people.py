"""What is known of a user at the moment of a request: from the store where it has something, else from the bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from marsjax.records import LOW
from marsjax.serving import scoring
from marsjax.serving.bundle import Bundle, item_numbers, user_numbers
from marsjax.serving.engine import Snapshot
from marsjax.serving.events import Entry, decode_history
from marsjax.serving.vectors import Vector, decode_vector, digest

T = TypeVar("T")


class Known(NamedTuple):
    """A user, and how to find what this user borrows."""

    profile: scoring.Profile
    vector_D: (
        np.ndarray | None
    )  # look up with this vector what to borrow; None: the profile has it, or there is nothing
    fallback: str | None  # why nothing is borrowed though MARS would lend: "store", "unknown_user", "no_vector", ...
    cold: bool  # no history at all
    vector: Vector | None  # the store's
    stale: bool  # the vector was made from another history than the one that is read now


def find_user(
    snapshot: Snapshot,
    user: str,
    *,
    stored: tuple[bytes | None, bytes | None] | None,
    history: Sequence[str] | None = None,
    always_live: bool = False,
) -> Known:
    """Puts together what store and bundle have of a user.

    Args:
        stored: history and vector in the store; None where the store gave no answer, so that nothing is borrowed.
        history: items that replace the user's own history in this request.
        always_live: look up what users borrow whom the bundle has an answer for, too.

    Damaged values of the store count as if they were not there.
    """
    bundle = snapshot.bundle
    (number,) = (int(n) for n in user_numbers(bundle, [user]))
    data, vector_data = stored if stored is not None else (None, None)
    entries = _or_none(decode_history, data)
    if history is not None:
        item_L = item_numbers(bundle, history)
        item_L = item_L[item_L > 0]
        mark_L, grade_L = np.zeros(len(item_L), np.int8), scoring.not_graded(item_L)
    elif entries is not None:
        item_L, mark_L, grade_L = of_entries(bundle, entries)
    else:
        item_L, mark_L, grade_L = scoring.own_history(bundle, number)
    vector = _or_none(lambda value: decode_vector(value, width=len(snapshot.lenders.centre_D)), vector_data)
    if vector is not None and vector.version != snapshot.version:
        vector = None
    stale = vector is not None and data is not None and vector.history != digest(data)
    found = Known(scoring.Profile(number, item_L, mark_L, grade_L), None, None, not len(item_L), vector, stale)
    if not borrows(bundle, number, len(item_L)):
        return found
    if stored is None:
        return found._replace(fallback="store")
    if not len(snapshot.lenders.user_index.user_P):
        return found._replace(fallback="empty_index")
    if bundle.manifest["lends"]["live"]:
        # A vector of a stored history without an item that the bundle knows says nothing.
        if vector is not None and (history is not None or not found.cold):
            return found._replace(vector_D=vector.vector_D)
        changed = entries is not None or always_live or snapshot.lenders_version != "bundle"
        if number >= 0 and changed:
            return found._replace(vector_D=bundle.users.user_UD[number])
    if number >= 0:
        return found._replace(profile=found.profile._replace(lent=scoring.table_lent(bundle, number)))
    if not bundle.manifest["lends"]["live"]:
        return found
    return found._replace(fallback="unknown_user" if found.cold else "no_vector")


def borrows(bundle: Bundle, number: int, length: int) -> bool:
    """Whether a user is lent to: a low-active one of the bundle, or one it does not know who has done as little."""
    if number >= 0:
        return int(bundle.users.group_U[number]) == LOW
    return length <= int(bundle.manifest["lends"]["longest"])


def of_entries(bundle: Bundle, entries: Sequence[Entry]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items that the bundle knows, [L] int32, what the user thought of them, [L] int8, and how much, [L] float32, as
    histories of the bundle hold them: all entries, or the liked ones."""
    if bundle.manifest["config"]["split"]["history"] == "positives":
        entries = [entry for entry in entries if entry.label > 0]
    item_L = item_numbers(bundle, [entry.item for entry in entries])
    mark_L = scoring.marks(np.array([entry.label for entry in entries], np.float32))
    grade_L = np.array([entry.grade for entry in entries], np.float32)  # None is NaN
    return item_L[item_L > 0], mark_L[item_L > 0], grade_L[item_L > 0]


def seed_entries(bundle: Bundle, user: str) -> list[Entry]:
    """The history of the bundle as entries: what a user's history in the store begins with."""
    (number,) = user_numbers(bundle, [user])
    if number < 0:
        return []
    users = bundle.users
    own = slice(users.start_U1[number], users.start_U1[number + 1])
    names = bundle.items.raw_id_N[users.item_H[own]]
    grades = users.grade_H[own].tolist() if len(users.grade_H) else [None] * len(names)
    return [
        Entry(int(time), "", str(item), float(label), grade)
        for time, item, label, grade in zip(users.time_H[own], names, users.label_H[own], grades, strict=True)
    ]


def _or_none(decode: Callable[[bytes], T], data: bytes | None) -> T | None:
    try:
        return None if data is None else decode(data)
    except ValueError:
        return None
