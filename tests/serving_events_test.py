"""Any bytes are an event or a ValueError; histories are the same whatever the order and the repeats of events."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marsjax.serving.events import (
    Entry,
    Event,
    decode_event,
    decode_history,
    encode_event,
    encode_history,
    merge,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)
GRADES = st.none() | st.floats(0, 1)
EVENTS = st.builds(Event, TEXT, TEXT, TEXT, st.sampled_from([0.0, 1.0]), st.integers(-(2**53), 2**53), GRADES)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def attempt(function, data):
    """What the function returns, or None and the text of its ValueError; any other error fails."""
    try:
        return function(data), ""
    except ValueError as error:
        return None, str(error)


@given(EVENTS)
def test_an_event_comes_back_as_it_was(event):
    assert decode_event(encode_event(event)) == event


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_value_error(data):
    found, said = attempt(decode_event, data)
    assert isinstance(found, Event) or "expected" in said


@settings(max_examples=300)
@given(EVENTS, st.sampled_from(["id", "user", "item", "label", "time", "grade", "more"]), JSON)
def test_an_event_with_one_wrong_field_is_an_event_or_a_value_error(event, field, value):
    found, said = attempt(decode_event, json.dumps(event._asdict() | {field: value}).encode())
    if found is None:
        assert "expected" in said
    else:
        assert decode_event(encode_event(found)) == found
        assert found.label in (0.0, 1.0)
        assert found.grade is None or 0 <= found.grade <= 1


@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"id": "\xff"}', b"1e999", b"NaN", b'{"id":"\\ud800","user":"u","item":"i","label":1,"time":1}'],
)
def test_known_traps_are_value_errors(data):
    with pytest.raises(ValueError, match="expected"):
        decode_event(data)


ENTRIES = st.lists(
    st.builds(Entry, st.integers(0, 20), TEXT, TEXT, st.sampled_from([0.0, 1.0]), GRADES),
    max_size=30,
    unique_by=lambda e: e.id,
)


@given(ENTRIES, st.integers(1, 10), st.randoms())
def test_order_and_repeats_of_events_change_nothing(entries, cap, rng: random.Random):
    """The latest `cap` by time and id, whatever the batches they came in; clocks may step back."""
    expected = tuple(sorted(entries, key=lambda e: (e.time, e.id))[-cap:])
    assert merge((), entries, cap=cap) == expected
    shuffled = [*entries, *(entry for entry in entries if rng.random() < 0.5)]
    rng.shuffle(shuffled)
    found = ()
    while shuffled:
        size = rng.randint(1, len(shuffled))
        batch, shuffled = shuffled[:size], shuffled[size:]
        found = merge(found, batch, cap=cap)
    assert found == expected


def test_entries_of_a_bundle_stay_beside_events():
    seed = [Entry(1, "", "a", 1.0), Entry(1, "", "b", 0.0)]
    found = merge(seed, [Entry(2, "e", "c", 1.0)], cap=10)
    assert [entry.item for entry in found] == ["a", "b", "c"]
    assert merge(found, [Entry(2, "e", "c", 1.0)], cap=10) == found
    assert decode_history(encode_history(found)) == found


@given(ENTRIES)
def test_a_history_comes_back_as_it_was(entries):
    assert decode_history(encode_history(entries)) == tuple(entries)


def test_a_grade_that_lacks_is_not_written():
    """So histories and events of before there were grades are read, and have the digests that they had."""
    assert encode_history([Entry(1, "e", "i", 1.0)]) == b'[[1,"e","i",1.0]]'
    assert encode_event(Event("e", "u", "i", 1.0, 1)) == b'{"id":"e","user":"u","item":"i","label":1.0,"time":1}'


@given(JSON)
def test_any_history_is_one_or_a_value_error(value):
    found, said = attempt(decode_history, json.dumps(value).encode())
    assert found is not None or "expected" in said
