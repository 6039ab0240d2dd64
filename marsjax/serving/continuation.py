"""Training that goes on with new events, and a new bundle where it is not worse (section 3.5.1)."""

from __future__ import annotations

import hashlib
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from marsjax import files
from marsjax.ctr import objective
from marsjax.data.histories import length_bounds
from marsjax.serving import people, scoring, versions
from marsjax.serving.bundle import Bundle, continue_bundle, item_numbers, user_numbers
from marsjax.serving.events import Entry, Event, decode_event, encode_event, read_history
from marsjax.serving.lending import lend
from marsjax.serving.storage import TRAINER, Storage
from marsjax.training import checkpoint
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.step import init_state

log = logging.getLogger(__name__)

FOLDER, HELD_OUT = "training", "held_out.jsonl"


class Settings(NamedTuple):
    """How the training goes on."""

    least_events: int = 500  # fewer wait for the next time
    most_events: int = 50_000  # at a time
    rate: float = 0.1  # of the learning rate that the model was trained with
    held_out: int = 10  # one event of so many, told by its id, is never trained on, and judges
    judges: int = 5000  # the latest of these that are kept
    least_judges: int = 30  # fewer cannot judge, and nothing is published
    margin: float = 0.002  # of log loss by which a candidate may be worse than what is served
    tries: int = 5  # after so many that failed, events are given up


class Verdict(NamedTuple):
    """A candidate beside what is served, on events that neither was trained on."""

    served: float  # log loss
    candidate: float
    events: int

    def passes(self, settings: Settings) -> bool:
        """Whether the candidate may be published."""
        enough = self.events >= settings.least_judges
        return enough and math.isfinite(self.candidate) and self.candidate <= self.served + settings.margin


def is_held_out(event_id: str, one_of: int) -> bool:
    """Whether an event judges and is never trained on: the same answer each time it comes."""
    return int.from_bytes(hashlib.blake2b(event_id.encode(), digest_size=8).digest(), "big") % one_of == 0


def make_rows(
    bundle: Bundle,
    storage: Storage,
    events: Sequence[Event],
    *,
    embed: Callable[[Sequence[Sequence[Entry]]], np.ndarray],
) -> list[scoring.Row]:
    """Rows of events on items that the bundle knows, each with what its user had done before and borrowed then.

    Donors are looked up with the history before the event: one found with later events has seen the label.
    """
    known_X = item_numbers(bundle, [event.item for event in events]) > 0
    events = [event for event, known in zip(events, known_X, strict=True) if known]
    users = list(dict.fromkeys(event.user for event in events))
    stored = dict(zip(users, storage.histories(users), strict=True))
    whole = {user: read_history(data, user) or () for user, data in stored.items()}
    before = [
        [entry for entry in whole[event.user] if (entry.time, entry.id) < (event.time, event.id)] for event in events
    ]
    numbers = user_numbers(bundle, [event.user for event in events])
    profiles = [
        scoring.Profile(int(number), *people.of_entries(bundle, entries))
        for number, entries in zip(numbers, before, strict=True)
    ]
    if bundle.manifest["lends"]["live"]:
        asks = [
            x for x, profile in enumerate(profiles)
            if len(profile.item_L) and people.borrows(bundle, profile.user, len(profile.item_L))
        ]  # fmt: skip
        if asks:
            vector_QD = embed([before[x] for x in asks])
            config = bundle.manifest["config"]
            for x, found in zip(asks, lend(bundle.lenders, config, vector_QD), strict=True):
                profiles[x] = profiles[x]._replace(lent=found)
    else:
        profiles = [profile._replace(lent=scoring.table_lent(bundle, profile.user)) for profile in profiles]
    targets = item_numbers(bundle, [event.item for event in events])
    return [
        scoring.Row(profile, np.array([target], np.int32), event.time, np.array([event.label], np.float32))
        for profile, target, event in zip(profiles, targets, events, strict=True)
    ]


def continue_training(
    root: pathlib.Path,
    storage: Storage,
    version: str,
    bundle: Bundle,
    settings: Settings,
    *,
    embed: Callable[[Sequence[Sequence[Entry]]], np.ndarray],
    keep: int,
) -> str | None:
    """Trains on the events since the last time, and publishes the result; returns the new version, or None.

    An event is trained on once: the manifest says up to which message, and what is acknowledged is not read again. The
    events of a candidate that was not published are not tried again.
    """
    if storage.backlog(TRAINER) < settings.least_events:
        return None
    messages = storage.read(TRAINER, count=settings.most_events, wait=0.0)
    # A runner that died after it had published, and before it had acknowledged, gets the same messages again.
    before = _place(bundle.manifest.get("trained", {}).get("to", "0"))
    new = [message for message in messages if message.deliveries == 1 or _place(message.id) > before]
    given_up = [message for message in new if message.deliveries > settings.tries]
    if given_up:
        log.warning("%d events are given up: training on them failed %d times", len(given_up), settings.tries)
    events = _once(event for message in new if message.deliveries <= settings.tries and (event := _event(message.data)))
    folder = pathlib.Path(root) / FOLDER
    judging = _judges(folder, [event for event in events if is_held_out(event.id, settings.held_out)], settings)
    training = [event for event in events if not is_held_out(event.id, settings.held_out)]
    published = None
    if training and messages:
        ctr, state, steps = _train(folder, version, bundle, make_rows(bundle, storage, training, embed=embed), settings)
        candidate = bundle._replace(
            params=ctr["params"], statistics=ctr["statistics"],
            tables=objective.with_vectors(bundle.model, ctr["params"], bundle.tables),
        )  # fmt: skip
        verdict = judge(bundle, candidate, make_rows(bundle, storage, judging, embed=embed))
        said = f"log loss {verdict.candidate:.5f}, served {verdict.served:.5f}, on {verdict.events} events"
        if verdict.passes(settings):
            trained = {
                "from": version, "to": messages[-1].id, "events": len(training), "log_loss": verdict.candidate,
                "log_loss_before": verdict.served, "judges": verdict.events,
            }  # fmt: skip
            made = folder / "candidate"
            files.remove_folder(made)
            continue_bundle(made, bundle, ctr=ctr, trained=trained)
            try:
                published = versions.publish(root, made, keep=keep, only_after=version)
                _remember(folder, published, state, steps)
                log.info("version %s is published after %d events: %s", published, len(training), said)
            except versions.Overtaken as error:
                log.warning("a candidate trained on %d events is dropped: %s", len(training), error)
            finally:
                files.remove_folder(made)
        else:
            log.warning("a candidate trained on %d events is not published: %s", len(training), said)
    storage.apply(TRAINER, {}, [message.id for message in messages], cap=1, seed=lambda _: ())
    return published


def judge(served: Bundle, candidate: Bundle, rows: Sequence[scoring.Row]) -> Verdict:
    """Log losses of both on the same rows; infinite without rows."""
    if not rows:
        return Verdict(math.inf, math.inf, 0)
    label_B = np.concatenate([row.label_C for row in rows if row.label_C is not None]).astype(np.float64)
    losses = []
    for bundle in (served, candidate):
        score_B = np.clip(np.concatenate(scoring.score_rows(bundle, rows)).astype(np.float64), 1e-7, 1 - 1e-7)
        losses.append(float(-(label_B * np.log(score_B) + (1 - label_B) * np.log1p(-score_B)).mean()))
    return Verdict(losses[0], losses[1], len(rows))


def _train(
    folder: pathlib.Path, version: str, bundle: Bundle, rows: Sequence[scoring.Row], settings: Settings
) -> tuple[dict[str, Any], Any, int]:
    """One pass over the rows, from the parameters that are served and the moments that led to them."""
    cfg = bundle.manifest["config"]["ctr"]
    optimizer = AdamW(cfg["learning_rate"] * settings.rate, cfg["weight_decay"], cfg["clip"])
    served = jax.device_get((bundle.params, bundle.statistics))
    state = init_state(served[0], served[1], adamw(optimizer), seed=0)
    manager = checkpoint.open_manager(folder / "state", keep=1)
    try:
        restored = checkpoint.restore_latest(manager, jax.device_get(state))
    except ValueError as error:  # of a bundle of another shape
        log.warning("the training goes on with fresh moments: %s", error)
        restored = None
    if restored is not None and restored.meta["version"] == version:
        state = restored.state
    lifted = objective.lifted_step(bundle.model, optimizer, "single")
    tables = lifted.replicate(jax.device_get(bundle.tables._replace(vector_ND=None)))
    device = lifted.replicate(state)
    bounds = length_bounds(cfg["buckets"], int(cfg["cap"]))
    length_X = np.array([len(scoring.history(bundle, row)[0]) for row in rows])
    order_X = np.random.default_rng(int(state.step)).permutation(len(rows))
    order_X = order_X[np.argsort(np.searchsorted(bounds, length_X[order_X]), kind="stable")]
    size = int(cfg["batch_size"])
    for begin in range(0, len(rows), size):
        part = [rows[x] for x in order_X[begin : begin + size]]
        longest = max(len(scoring.history(bundle, row)[0]) for row in part)
        length = bounds[int(np.searchsorted(bounds, longest))]
        (batch,) = scoring.make_batches(bundle, part, length, sizes=(size,))
        device, _ = lifted.step(device, lifted.split(batch), tables)
    state = lifted.collect(device)
    return {"params": state.params, "statistics": state.statistics}, state, int(state.step)


def _remember(folder: pathlib.Path, version: str, state: Any, step: int) -> None:
    """The state of the training, for the next time. Without it the next one starts with fresh moments."""
    manager = checkpoint.open_manager(folder / "state", keep=1)
    last = manager.orbax.latest_step()
    checkpoint.save(manager, max(step, 1 + (last or 0)), state, {"version": version})


def _judges(folder: pathlib.Path, more: Sequence[Event], settings: Settings) -> list[Event]:
    """The latest events that judge, those of earlier times too."""
    path = folder / HELD_OUT
    lines = path.read_bytes().splitlines() if path.is_file() else []
    known = {event.id: event for line in lines if (event := _event(line))}
    known |= {event.id: event for event in more}
    kept = sorted(known.values(), key=lambda event: (event.time, event.id))[-settings.judges :]
    files.write_bytes(path, b"".join(encode_event(event) + b"\n" for event in kept))
    return kept


def _once(events: Iterable[Event]) -> list[Event]:
    """Of events with the same id the first: the sender of one that got no answer sends it again."""
    known: dict[str, Event] = {}
    for event in events:
        known.setdefault(event.id, event)
    return [*known.values()]


def _event(data: bytes) -> Event | None:
    """None where it is none: the runner makes it a dead letter."""
    try:
        return decode_event(data)
    except ValueError:
        return None


def _place(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("-"))
