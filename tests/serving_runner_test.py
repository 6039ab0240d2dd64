"""The runner's vectors are the pipeline's, a kill loses and doubles nothing, and a worse model is not published."""

import contextlib
import json
import os
import pathlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from marsjax.records import LOW
from marsjax.serving import bundle as serving
from marsjax.serving import continuation, lending, people, runner, scoring, snapshots, versions
from marsjax.serving.events import Event, decode_history, encode_event
from marsjax.serving.storage import RUNNER, TRAINER, StorageError, open_storage
from marsjax.serving.vectors import decode_vector, digest


@pytest.fixture(scope="module")
def model(bundle_folder):
    bundle = serving.load_bundle(bundle_folder)
    return runner.Model("v1", bundle, serving.load_encoder(bundle))


@pytest.fixture
def storage(tmp_path):
    opened = open_storage(f"sqlite:{tmp_path}/s.sqlite", timeout=5.0, ttl=1000.0)
    opened.join(RUNNER)
    opened.join(TRAINER)
    yield opened
    opened.close()


def consume(storage, model):
    while runner.consume(storage, model.bundle, count=50, wait=0.0, most_deliveries=10):
        pass


def name(model, number):
    return str(model.bundle.items.raw_id_N[number])


def send(storage, events):
    storage.append([encode_event(event) for event in events])


def make_events(bundle, n, *, seed=0, head="e", time_from=10**6):
    rng = np.random.default_rng(seed)
    users, names = bundle.users.raw_user_U, bundle.items.raw_id_N[1:]
    return [
        Event(f"{head}{i}", str(rng.choice(users)), str(rng.choice(names)), float(rng.random() < 0.5), time_from + i)
        for i in range(n)
    ]


def test_histories_begin_with_those_of_the_bundle(storage, model):
    bundle = model.bundle
    user = str(bundle.users.raw_user_U[3])
    send(
        storage,
        [
            Event("n1", user, "an item of the future", 1.0, 10**6),
            Event("n2", user, name(model, 1), 1.0, 10**6 + 1, 0.75),
        ],
    )
    consume(storage, model)
    (data,) = storage.histories([user])
    entries = decode_history(data)
    item_L, *_ = scoring.own_history(bundle, 3)
    found, mark_L, grade_L = people.of_entries(bundle, entries)
    assert np.isnan(grade_L[:-1]).all()  # the model reads none, so its bundle has none
    assert grade_L[-1] == 0.75
    np.testing.assert_array_equal(found[:-1], item_L)
    assert bundle.items.raw_id_N[found[-1]] == name(model, 1)
    assert mark_L[-1] == 2
    assert entries[-2].item == "an item of the future"  # kept for a model that knows it


def test_vectors_are_of_the_model_and_of_the_history_as_it_is(storage, model):
    user = str(model.bundle.users.raw_user_U[5])
    send(storage, [Event("n1", user, name(model, 2), 1.0, 10**6), Event("n2", "new", name(model, 3), 1.0, 10**6)])
    consume(storage, model)
    assert runner.embed_changed(storage, model, count=10) == 2
    assert storage.changed(10) == []
    history, data = storage.lookup(user, "v1")
    vector = decode_vector(data, width=len(model.bundle.lenders.centre_D))
    assert vector.version == "v1"
    assert vector.history == digest(history)
    alone = runner.embed_histories(model.bundle, model.encoder, [decode_history(history)])
    np.testing.assert_allclose(vector.vector_D, alone[0], atol=1e-6)
    assert storage.lookup(user, "v2")[1] is None
    assert runner.embed_changed(storage, model, count=10) == 0


def test_garbage_and_what_is_never_acknowledged_become_dead_letters(storage, model):
    storage.append([b"\x00garbage", encode_event(Event("e", "u", "i", 1.0, 1)), b"{}"])
    consume(storage, model)
    assert {letter.data for letter in storage.dead_letters(10)} == {b"\x00garbage", b"{}"}
    assert storage.dead_count() == 2
    assert storage.backlog(RUNNER) == 0
    storage.append([encode_event(Event("poison", "u", "i", 1.0, 1))])
    for _ in range(11):  # eleven processes died of it
        storage.read(RUNNER, count=50, wait=0.0)
    consume(storage, model)
    assert "handed out 12 times" in storage.dead_letters(1)[0].reason
    assert storage.backlog(RUNNER) == 0


def test_a_store_that_refuses_makes_no_dead_letters(storage, model, monkeypatch, caplog):
    """However often: what a healthy event has met is a full disk."""
    (event,) = make_events(model.bundle, 1)
    send(storage, [event])
    storage.append([b"garbage"])
    say = {"count": 50, "wait": 0.0, "most_deliveries": 3, "refused": set()}
    with monkeypatch.context() as patch:
        patch.setattr(storage, "apply", lambda *_, **__: (_ for _ in ()).throw(StorageError("full")))
        for _ in range(9):
            with pytest.raises(StorageError):
                runner.consume(storage, model.bundle, **say)
    while runner.consume(storage, model.bundle, **say):
        pass
    assert [letter.data for letter in storage.dead_letters(10)] == [b"garbage"]
    assert event.id in {entry.id for entry in decode_history(storage.histories([event.user])[0])}
    assert say["refused"] == set()


def test_a_new_version_gets_vectors_of_its_own(storage, model, bundle_folder, tmp_path):
    root = tmp_path / "root"
    first = versions.publish(root, bundle_folder, keep=3)
    followed = runner.follow(root, storage, None)
    assert followed.version == first
    assert runner.follow(root, storage, followed) is followed
    send(storage, make_events(model.bundle, 5))
    consume(storage, followed)
    runner.embed_changed(storage, followed, count=100)
    second = versions.publish(root, bundle_folder, keep=3)
    followed = runner.follow(root, storage, followed)
    assert followed.version == second
    users = [change.user for change in storage.changed(100)]
    assert users
    runner.embed_changed(storage, followed, count=100)
    assert all(storage.lookup(user, second)[1] for user in users)
    assert all(storage.lookup(user, first)[1] for user in users)  # the service may still answer with it
    assert runner.follow(root, storage, None).version == second
    assert storage.changed(100) == []  # only started again
    # Going back is no different: who changed since has no vector of that version.
    send(storage, [Event("since", users[0], name(model, 1), 1.0, 10**7)])
    consume(storage, followed)
    runner.embed_changed(storage, followed, count=100)
    assert versions.rollback(root) == first
    followed = runner.follow(root, storage, followed)
    assert {change.user for change in storage.changed(100)} == set(users)
    runner.embed_changed(storage, followed, count=100)
    history, vector = storage.lookup(users[0], first)
    width = len(model.bundle.lenders.centre_D)
    assert decode_vector(vector, width=width).history == digest(history)
    assert storage.lookup(users[0], second)[1] is not None  # the service may still answer with it


def test_donors_who_went_on_lend_what_they_did_since(storage, model):
    bundle = model.bundle
    assert runner.renew_lenders(storage, model, bundle.lenders) is None
    donors = bundle.lenders.donors
    donor, names = str(bundle.users.raw_user_U[donors.user_P[0]]), bundle.items.raw_id_N[1:15]
    send(storage, [Event(f"d{i}", donor, str(name), 1.0, 10**6 + i) for i, name in enumerate(names)])
    consume(storage, model)
    renewed = runner.renew_lenders(storage, model, bundle.lenders, threads=2)
    assert runner.renew_lenders(storage, model, renewed) is None  # nothing is newer
    np.testing.assert_array_equal(renewed.donors.item_PL[1:], donors.item_PL[1:])
    last = renewed.donors.item_PL[0]
    np.testing.assert_array_equal(last[last > 0][-14:], np.arange(1, 15))
    assert renewed.donors.time_PL[0].max() == 10**6 + 13
    assert (renewed.mark_PL[0][last > 0][-14:] == 2).all()
    unit_PD, before_PD = renewed.user_index.unit_PD, bundle.lenders.user_index.unit_PD
    np.testing.assert_allclose(unit_PD[1:], before_PD[1:], atol=1e-6)
    assert np.abs(unit_PD[0] - before_PD[0]).max() > 1e-3
    # Looked up from its own vector, the donor is the nearest to itself, with its new items.
    history = decode_history(storage.histories([donor])[0])
    (vector_D,) = runner.embed_histories(bundle, model.encoder, [history])
    (lent,) = lending.lend(renewed, bundle.manifest["config"], vector_D[None])
    assert set(lent.donor_S) == {donors.user_P[0]}


def embed(model):
    return lambda histories: runner.embed_histories(model.bundle, model.encoder, histories)


def test_rows_to_train_on_see_only_what_came_before(storage, model):
    user = next(
        str(name)
        for name, group in zip(model.bundle.users.raw_user_U, model.bundle.users.group_U, strict=True)
        if group == LOW
    )
    events = [Event(f"r{i}", user, name(model, i + 1), 1.0, 10**6 + i) for i in range(4)]
    send(storage, events)
    consume(storage, model)
    rows = continuation.make_rows(
        model.bundle, storage, [*events, Event("x", user, "unknown", 1.0, 1)], embed=embed(model)
    )
    assert len(rows) == 4
    number = int(np.flatnonzero(model.bundle.users.raw_user_U == user)[0])
    own = len(scoring.own_history(model.bundle, number)[0])
    for i, row in enumerate(rows):
        assert len(row.profile.item_L) == own + i
        assert row.target_C[0] not in row.profile.item_L[own:]
        assert row.label_C[0] == 1.0
        before = decode_history(storage.histories([user])[0])[: own + i]
        (vector_D,) = runner.embed_histories(model.bundle, model.encoder, [before])
        (lent,) = lending.lend(model.bundle.lenders, model.bundle.manifest["config"], vector_D[None])
        np.testing.assert_array_equal(row.profile.lent.item_S, lent.item_S)


def test_training_goes_on_and_a_better_model_is_published(storage, model, bundle_folder, tmp_path):
    """Nearly all is liked now, which the model can learn. The second time begins where the first ended."""
    root, bundle = tmp_path / "root", model.bundle
    version = versions.publish(root, bundle_folder, keep=5)
    settings = continuation.Settings(least_events=100, rate=10.0, least_judges=10)
    say = {"embed": embed(model), "keep": 5}
    assert continuation.continue_training(root, storage, version, bundle, settings, **say) is None  # nothing is new

    def learnable(head, seed):
        events = make_events(bundle, 400, seed=seed, head=head)
        return [event._replace(label=float(i % 20 > 0)) for i, event in enumerate(events)]

    losses = []
    for head, seed in (("a", 1), ("b", 2)):
        send(storage, learnable(head, seed))
        consume(storage, model)
        published = continuation.continue_training(root, storage, version, bundle, settings, **say)
        assert published == versions.read_current(root).version != version
        version, bundle = published, serving.load_bundle(versions.folder_of(root, published))
        trained = bundle.manifest["trained"]
        assert trained["log_loss"] < trained["log_loss_before"]
        assert storage.backlog(TRAINER) == 0
        losses.append(trained["log_loss"])
    assert losses[1] < losses[0]
    assert continuation.continue_training(root, storage, version, bundle, settings, **say) is None
    held = [json.loads(line)["id"] for line in (root / "training" / "held_out.jsonl").read_text().splitlines()]
    assert held
    assert all(continuation.is_held_out(name, settings.held_out) for name in held)


@pytest.mark.parametrize("why", ["worse", "not finite", "too few judges"])
def test_a_worse_model_is_not_published(storage, model, bundle_folder, tmp_path, caplog, why, monkeypatch):
    root = tmp_path / "root"
    version = versions.publish(root, bundle_folder, keep=5)
    settings = continuation.Settings(least_events=10, least_judges=10**6 if why == "too few judges" else 5)
    spoiled = {
        "worse": lambda leaf: leaf * 30.0,
        "not finite": lambda leaf: leaf * np.nan,
        "too few judges": lambda leaf: leaf,
    }
    train = continuation._train

    def spoil(*arguments):
        ctr, state, steps = train(*arguments)
        return (
            {"params": continuation.jax.tree.map(spoiled[why], ctr["params"]), "statistics": ctr["statistics"]},
            state,
            steps,
        )

    monkeypatch.setattr(continuation, "_train", spoil)
    send(storage, make_events(model.bundle, 200))
    consume(storage, model)
    found = continuation.continue_training(root, storage, version, model.bundle, settings, embed=embed(model), keep=5)
    assert found is None
    assert "is not published: log loss" in caplog.text
    assert versions.read_current(root).version == version
    assert storage.backlog(TRAINER) == 0


def test_who_goes_back_while_the_training_goes_on_is_not_overruled(
    storage, model, bundle_folder, tmp_path, caplog, monkeypatch
):
    root = tmp_path / "root"
    first, version = (versions.publish(root, bundle_folder, keep=5) for _ in range(2))
    train = continuation._train
    monkeypatch.setattr(continuation, "_train", lambda *arguments: (versions.rollback(root), train(*arguments))[1])
    settings = continuation.Settings(least_events=10, least_judges=5, margin=10.0)
    send(storage, make_events(model.bundle, 200))
    consume(storage, model)
    found = continuation.continue_training(root, storage, version, model.bundle, settings, embed=embed(model), keep=5)
    assert found is None
    assert versions.read_current(root).version == first
    assert f"is dropped: {root}: expected {version} to be served, found {first}" in caplog.text
    assert not (root / "training" / "candidate").exists()
    assert storage.backlog(TRAINER) == 0


def spoil(tmp_path, user):
    with contextlib.closing(sqlite3.connect(tmp_path / "s.sqlite")) as connection, connection:
        connection.execute("INSERT OR REPLACE INTO histories VALUES(?, ?)", (user, b"spoiled"))


def test_a_history_that_cannot_be_read_costs_no_other_user_anything(storage, model, tmp_path, caplog):
    donors = [str(model.bundle.users.raw_user_U[user]) for user in model.bundle.lenders.donors.user_P[:2]]
    events = [Event(f"s{user}", user, name(model, 1), 1.0, 10**6) for user in donors]
    send(storage, events)
    consume(storage, model)
    spoil(tmp_path, donors[0])
    renewed = runner.renew_lenders(storage, model, model.bundle.lenders)
    np.testing.assert_array_equal((renewed.donors.time_PL == 10**6).any(axis=1)[:2], [False, True])
    rows = continuation.make_rows(model.bundle, storage, events, embed=embed(model))
    assert [len(row.profile.item_L) > 0 for row in rows] == [False, True]
    assert runner.embed_changed(storage, model, count=10) == 2
    assert [storage.lookup(user, "v1")[1] is not None for user in donors] == [False, True]
    assert f"user {donors[0]}: the history in the store counts as none" in caplog.text


def test_an_event_that_was_sent_again_is_trained_on_once(storage, model, bundle_folder, tmp_path, monkeypatch):
    root, trained = tmp_path / "root", []
    version = versions.publish(root, bundle_folder, keep=5)
    make_rows = continuation.make_rows

    def seen(bundle, storage, events, **named):
        trained.append(events)
        return make_rows(bundle, storage, events, **named)

    monkeypatch.setattr(continuation, "make_rows", seen)
    events = make_events(model.bundle, 30)
    send(storage, [*events, *events[5:25]])
    consume(storage, model)
    settings = continuation.Settings(least_events=10)
    continuation.continue_training(root, storage, version, model.bundle, settings, embed=embed(model), keep=5)
    assert trained[0] == [event for event in events if not continuation.is_held_out(event.id, settings.held_out)]


def test_events_that_no_training_survives_are_given_up(storage, model, bundle_folder, tmp_path, caplog, monkeypatch):
    root = tmp_path / "root"
    version = versions.publish(root, bundle_folder, keep=5)
    settings = continuation.Settings(least_events=10, tries=2)
    tried = []

    def fail(*arguments):
        tried.append(arguments)
        raise OSError("a full disk")

    monkeypatch.setattr(continuation, "_train", fail)
    send(storage, make_events(model.bundle, 30))
    consume(storage, model)
    go_on = [root, storage, version, model.bundle, settings]
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            continuation.continue_training(*go_on, embed=embed(model), keep=5)
    assert continuation.continue_training(*go_on, embed=embed(model), keep=5) is None
    assert "30 events are given up: training on them failed 2 times" in caplog.text
    assert (len(tried), storage.backlog(TRAINER)) == (2, 0)


def test_a_step_that_fails_keeps_no_other_from_its_turn(bundle_folder, storage, model, tmp_path, monkeypatch):
    root, stop, tried = tmp_path / "root", threading.Event(), []

    def failing(step):
        def fail(*_, **__):
            tried.append(step)
            raise ValueError(f"{step} never works")

        return fail

    monkeypatch.setattr(runner, "renew_lenders", failing("donors"))
    monkeypatch.setattr(continuation, "continue_training", failing("training"))
    monkeypatch.setattr(storage, "trim", lambda trim=storage.trim: (tried.append("trim"), trim()))
    monkeypatch.setattr(runner, "PAUSE", 0.05)
    version = versions.publish(root, bundle_folder, keep=2)
    settings = runner.Settings(
        root, wait=0.01, lenders_seconds=0.5, train_seconds=0.5, trim_seconds=0.2, rebuild_hour=-1
    )
    thread = threading.Thread(target=runner.run, args=(settings, storage, stop))
    thread.start()
    (event,) = make_events(model.bundle, 1)
    send(storage, [event])
    until = time.monotonic() + 60
    while time.monotonic() < until and not (tried.count("trim") > 6 and storage.lookup(event.user, version)[1]):
        time.sleep(0.02)
    stop.set()
    thread.join(60)
    assert tried.count("trim") > 6
    assert storage.lookup(event.user, version)[1] is not None
    assert all(0 < tried.count(step) < tried.count("trim") for step in ("donors", "training"))  # once a turn


def test_histories_and_vectors_do_not_wait_for_a_training(bundle_folder, storage, model, tmp_path, monkeypatch):
    root, stop, trains, go_on, trained = tmp_path / "root", threading.Event(), threading.Event(), threading.Event(), []

    def train(*_, **__):
        trains.set()
        go_on.wait(120)
        trained.append(1)

    monkeypatch.setattr(continuation, "continue_training", train)
    version = versions.publish(root, bundle_folder, keep=2)
    settings = runner.Settings(root, wait=0.01, lenders_seconds=0.0, train_seconds=0.1, rebuild_hour=-1)
    thread = threading.Thread(target=runner.run, args=(settings, storage, stop))
    thread.start()
    assert trains.wait(60)
    (event,) = make_events(model.bundle, 1)
    send(storage, [event])
    until = time.monotonic() + 60
    while time.monotonic() < until and not storage.lookup(event.user, version)[1]:
        time.sleep(0.02)
    made = storage.lookup(event.user, version)[1]
    stop.set()
    time.sleep(0.2)
    waits = thread.is_alive()  # for the training: its events are in hand
    go_on.set()
    thread.join(60)
    assert made is not None
    assert waits
    assert trained == [1]  # one at a time


def test_a_clock_that_steps_back_keeps_no_step_from_its_turn(bundle_folder, storage, model, tmp_path, monkeypatch):
    """Events of an hour ago, by either clock, become histories, vectors and donors; versions and donors go on."""
    root, stop, clock = tmp_path / "root", threading.Event(), [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + clock[0])
    donor = str(model.bundle.users.raw_user_U[model.bundle.lenders.donors.user_P[0]])
    settings = runner.Settings(root, wait=0.01, lenders_seconds=0.1, train_seconds=0, trim_seconds=0.1, rebuild_hour=-1)
    versions.publish(root, bundle_folder, keep=9)
    thread = threading.Thread(target=runner.run, args=(settings, storage, stop))
    thread.start()
    try:
        for step in range(3):
            send(storage, [Event(f"c{step}", donor, name(model, 1 + step), 1.0, 10**6 - 3600 * step)])
            if step == 2:
                versions.publish(root, bundle_folder, keep=9)
            until = time.monotonic() + 60
            while time.monotonic() < until:
                wanted = snapshots.wanted(root)
                lent = snapshots.load(root, wanted, None).lenders.donors.item_PL[0]
                if not storage.changed(1) and 1 + step in lent and storage.lookup(donor, wanted.version)[1]:
                    break
                time.sleep(0.05)
            else:
                pytest.fail(f"nothing went on after the clock had stepped back {step} times")
            clock[0] -= 3600.0
    finally:
        stop.set()
        thread.join(60)
    history, vector = storage.lookup(donor, wanted.version)
    assert decode_vector(vector, width=len(model.bundle.lenders.centre_D)).history == digest(history)
    assert [entry.id for entry in decode_history(history) if entry.id] == ["c2", "c1", "c0"]


def test_what_no_step_may_raise_ends_the_runner(bundle_folder, storage, tmp_path, monkeypatch):
    """The one who started it starts it again; a thread that is dead in a process that lives would never train."""
    monkeypatch.setattr(continuation, "continue_training", lambda *_, **__: 1 / 0)
    versions.publish(tmp_path / "root", bundle_folder, keep=2)
    settings = runner.Settings(tmp_path / "root", wait=0.01, lenders_seconds=0.0, train_seconds=0.1, rebuild_hour=-1)
    stop = threading.Event()
    guard = threading.Timer(60, stop.set)
    guard.start()
    with pytest.raises(ZeroDivisionError):
        runner.run(settings, storage, stop)
    guard.cancel()


def test_two_runners_of_one_folder_are_one_too_many(storage, tmp_path):
    stop = threading.Event()
    stop.set()
    with runner.only_one(tmp_path / "root"):
        with pytest.raises(ValueError, match=f"expected no other runner, found process {os.getpid()} on .*; stop it"):
            runner.run(runner.Settings(tmp_path / "root"), storage, stop)
        runner.run(runner.Settings(tmp_path / "other"), storage, stop)
    runner.run(runner.Settings(tmp_path / "root"), storage, stop)


def test_the_runner_runs_follows_and_stops(bundle_folder, storage, model, tmp_path):
    root, stop = tmp_path / "root", threading.Event()
    settings = runner.Settings(
        root, wait=0.02, lenders_seconds=0.1, train_seconds=0.0, trim_seconds=0.1, rebuild_hour=-1
    )
    thread = threading.Thread(target=runner.run, args=(settings, storage, stop))
    thread.start()
    version = versions.publish(root, bundle_folder, keep=2)
    donor = str(model.bundle.users.raw_user_U[model.bundle.lenders.donors.user_P[0]])
    send(storage, [*make_events(model.bundle, 20), Event("d", donor, name(model, 1), 1.0, 10**6)])
    until = time.monotonic() + 120
    while time.monotonic() < until:
        snapshot = snapshots.load(root, snapshots.wanted(root), None)
        if not storage.changed(1) and 1 in snapshot.lenders.donors.item_PL[0]:
            break
        time.sleep(0.05)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert storage.lookup(donor, version)[1] is not None
    assert storage.backlog(RUNNER) == 0
    assert snapshot.lenders_version != "bundle"
    assert 1 in snapshot.lenders.donors.item_PL[0]


WORKER = """
import pathlib, sys
from marsjax.serving import events, storage as storing
storage = storing.open_storage(sys.argv[1], timeout=5.0, ttl=1000.0)
storage.join(storing.RUNNER)
print("up", flush=True)
while True:
    messages = storage.read(storing.RUNNER, count=7, wait=0.05)
    entries = {}
    for message in messages:
        event = events.decode_event(message.data)
        entries.setdefault(event.user, []).append(events.Entry(event.time, event.id, event.item, event.label))
    if messages:
        storage.apply(storing.RUNNER, entries, [m.id for m in messages], cap=10_000, seed=lambda user: [])
"""


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_kills_lose_no_acknowledged_event_and_double_none(kind, request, tmp_path):
    """What the runner does to the store, killed at random moments while events come; `benchmarks/serving_faults.py`
    kills the whole runner, and more often."""
    url = f"sqlite:{tmp_path}/s.sqlite"
    if kind == "redis":
        import redis

        url = request.getfixturevalue("redis_server").url
        with redis.Redis.from_url(url) as client:
            client.flushall()
    storage = open_storage(url, timeout=5.0, ttl=1000.0)
    storage.join(RUNNER)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    rng, sent, stop = random.Random(0), [], threading.Event()

    def produce():
        while not stop.is_set():
            batch = [Event(f"e{len(sent) + i}", f"u{rng.randrange(5)}", "i", 1.0, rng.randrange(100)) for i in range(5)]
            send(storage, batch)
            sent.extend(batch)
            time.sleep(0.002)

    producer = threading.Thread(target=produce)
    for number in range(4):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, env=environment)
        assert worker.stdout.readline() == b"up\n"
        if not number:
            producer.start()
        time.sleep(rng.random() * 0.3)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
    stop.set()
    producer.join()
    worker = subprocess.Popen([sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, env=environment)
    until = time.monotonic() + 240
    while (left := storage.backlog(RUNNER)) and time.monotonic() < until:
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    worker.stdout.close()
    assert not left, f"{left} of {len(sent)} events are not read yet: a busy machine, or a runner that stands still"
    found = []
    for data in storage.histories([f"u{i}" for i in range(5)]):
        found += [entry.id for entry in decode_history(data or b"[]")]
    assert len(sent) > 50
    assert sorted(found) == sorted(event.id for event in sent)
    with contextlib.suppress(Exception):
        storage.close()
