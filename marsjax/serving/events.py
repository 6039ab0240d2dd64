"""Interaction events and the histories that they make. Both are JSON, so nothing that is read can run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

LONGEST_ID = 128  # characters of an id
LARGEST = 2**53  # of a time: beyond, JSON numbers are not exact everywhere
FIELDS = ("id", "user", "item", "label", "time")  # and "grade", which may lack


class Event(NamedTuple):
    """One user met one item."""

    id: str  # given by the sender; an event with the same id is the same event
    user: str
    item: str
    label: float  # 0 or 1
    time: int  # in the units of the log that the model was trained on
    grade: float | None = None  # 0 to 1, how much (`data.grades`), for models that read it


class Entry(NamedTuple):
    """An event in the history of its user."""

    time: int
    id: str  # "" where the entry comes from a bundle
    item: str
    label: float
    grade: float | None = None


def encode_event(event: Event) -> bytes:
    """The event as JSON; a grade that lacks is left out."""
    value = event._asdict() if event.grade is not None else {name: getattr(event, name) for name in FIELDS}
    return json.dumps(value, separators=(",", ":")).encode()


def decode_event(data: bytes) -> Event:
    """The event that a message holds.

    Raises ValueError, whatever the bytes: not JSON, not an object, a field missing, unknown, or not what it must be.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected an event as JSON, found {data[:60]!r} ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with {', '.join(FIELDS)}, found {type(value).__name__}")
    if set(value) - {"grade"} != set(FIELDS):
        different = sorted(map(str, set(FIELDS) ^ (set(value) - {"grade"})))
        raise ValueError(f"expected exactly {', '.join(FIELDS)}, found a difference in {', '.join(different[:3])}")
    for name in ("id", "user", "item"):
        check_id(name, value[name])
    label, time = value["label"], value["time"]
    if isinstance(label, bool) or not isinstance(label, int | float) or label not in (0, 1):
        raise ValueError(f"label: expected 0 or 1, found {str(label)[:60]!r}")
    if isinstance(time, bool) or not isinstance(time, int) or not -LARGEST <= time <= LARGEST:
        raise ValueError(f"time: expected a whole number of at most 2^53, found {str(time)[:60]!r}")
    return Event(value["id"], value["user"], value["item"], float(label), time, _grade(value.get("grade")))


def _grade(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"grade: expected a number from 0 to 1, found {str(value)[:60]!r}")
    return float(value)


def check_id(name: str, value: Any) -> None:
    """Raises ValueError unless the value is text of 1 to `LONGEST_ID` characters that UTF-8 can hold."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_ID:
        raise ValueError(f"{name}: expected text of 1 to {LONGEST_ID} characters, found {str(value)[:60]!r}")
    if "\x00" in value:  # arrays of text do without those at the end: another user's id
        raise ValueError(f"{name}: expected text without NUL, found {value[:60]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text that UTF-8 can hold, found a lone surrogate") from error


def merge(entries: Iterable[Entry], more: Iterable[Entry], *, cap: int) -> tuple[Entry, ...]:
    """The latest `cap` of all entries, by time and then by id; an event that is there already changes nothing.

    Whatever the order in which events arrive, and however often, the result is the same: an event that was cut off
    before is cut off again. So a message that is delivered twice needs no list of what was seen.
    """
    known = {entry.id: entry for entry in entries if entry.id}
    from_bundle = [entry for entry in entries if not entry.id]
    for entry in more:
        known.setdefault(entry.id, entry)
    merged = sorted([*from_bundle, *known.values()], key=lambda entry: (entry.time, entry.id))
    return tuple(merged[-cap:])


def encode_history(entries: Sequence[Entry]) -> bytes:
    """A history as JSON, one list an entry; a grade that lacks is left out."""
    return json.dumps([entry[: 4 + (entry.grade is not None)] for entry in entries], separators=(",", ":")).encode()


def decode_history(data: bytes) -> tuple[Entry, ...]:
    """What `encode_history` wrote. Raises ValueError where it is damaged."""
    try:
        entries = tuple(_entry(*values) for values in json.loads(data))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a history, found {data[:60]!r} ({type(error).__name__})") from error
    if not all(math.isfinite(entry.label) for entry in entries):
        raise ValueError("expected labels of a history that are finite, found others")
    return entries


def _entry(time: Any, name: Any, item: Any, label: Any, grade: Any = None) -> Entry:
    return Entry(int(time), str(name), str(item), float(label), _grade(grade))


def read_history(data: bytes | None, user: str) -> tuple[Entry, ...] | None:
    """A history as a store has it; None where there is none. A damaged one counts as none, and the log tells of it: one
    user with a history that cannot be read must not keep all others from theirs."""
    try:
        return None if data is None else decode_history(data)
    except ValueError as error:
        log.warning("user %s: the history in the store counts as none: %s", user, error)
        return None
