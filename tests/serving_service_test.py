"""The service over real HTTP: parity with offline scores, fallbacks, limits, swaps, and nothing drawn breaks it."""

import contextlib
import http.client
import json
import pathlib
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marsjax import files
from marsjax.records import LOW
from marsjax.serving import bundle as serving
from marsjax.serving import engine, lending, limits, runner, scoring, service, snapshots, versions
from marsjax.serving.events import Event, encode_event
from marsjax.serving.storage import RUNNER, Dead, StorageError, open_storage


class Client:
    """One service in a thread of this process, and requests to it."""

    def __init__(self, root, storage, **changes):
        self.root, self.storage = pathlib.Path(root), storage
        # Deadlines that a loaded test machine keeps.
        made = service.Settings(
            self.root, **({"deadline": 30.0, "store_deadline": 5.0, "poll": 0.05, "rate": 1e6} | changes)
        )
        self.server = service.make_server(made, storage)
        self.app = self.server.config.app
        self.state = self.app.state.marsjax
        line = socket.create_server(("127.0.0.1", 0))
        self.port = line.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [line]}, daemon=True)
        self.thread.start()

    def call(self, method, path, body=None, headers=None, raw=False):
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, data, {"content-type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            content = answer.read()
        return answer.status, content.decode() if raw else json.loads(content)

    def post(self, path, body, **headers):
        return self.call("POST", path, body, headers)

    def score(self, user, candidates, **more):
        status, answer = self.post("/v1/score", {"user": user, "candidates": list(candidates), **more})
        assert status == 200, answer
        return answer

    def metric(self, name):
        for line in self.call("GET", "/metrics", raw=True)[1].splitlines():
            if line.startswith(name + " ") or line.startswith(name + "{"):
                head, value = line.rsplit(" ", 1)
                if head == name:
                    return float(value)
        return 0.0

    def wait_ready(self, version=None):
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                status, answer = self.call("GET", "/readyz")
                if status == 200 and version in (None, answer["version"]):
                    return answer
            time.sleep(0.02)
        raise TimeoutError(f"not ready: {version}")

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)


@contextlib.contextmanager
def serving_from(root, storage, **changes):
    client = Client(root, storage, **changes)
    try:
        yield client
    finally:
        client.stop()


@pytest.fixture(scope="module")
def root(bundle_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    versions.publish(folder, bundle_folder, keep=3)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    opened = open_storage(f"sqlite:{tmp_path_factory.mktemp('store')}/s.sqlite", timeout=5.0, ttl=1000.0)
    opened.join(RUNNER)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(root, storage):
    with serving_from(root, storage) as made:
        made.wait_ready()
        yield made


@pytest.fixture(scope="module")
def bundle(bundle_folder):
    return serving.load_bundle(bundle_folder)


def low_user(bundle, nth=0):
    low_U = np.flatnonzero((bundle.users.group_U == LOW) & (np.diff(bundle.users.borrowed_U1) > 0))
    return str(bundle.users.raw_user_U[low_U[nth]])


def items(bundle, n):
    return [str(name) for name in bundle.items.raw_id_N[1 : n + 1]]


def event(name, user, item, label=1, when=10**6):
    return {"id": name, "user": user, "item": item, "label": label, "time": when}


def consume_all(storage, bundle, version):
    model = runner.Model(version, bundle, serving.load_encoder(bundle))
    while runner.consume(storage, bundle, count=100, wait=0.0, most_deliveries=10):
        pass
    while runner.embed_changed(storage, model, count=100):
        pass


def test_online_scores_are_the_offline_ones_and_nothing_compiles(client, bundle):
    """Random users, known and not, with and without histories; many at once, so that they share batches."""
    rng = np.random.default_rng(0)
    names, users = bundle.items.raw_id_N[1:], [*bundle.users.raw_user_U, "stranger"]
    requests = []
    for _ in range(150):
        history = tuple(map(str, rng.choice(names, rng.integers(0, 30)))) if rng.random() < 0.3 else None
        candidates = tuple(map(str, rng.choice(names, rng.integers(1, 60))))
        requests.append(scoring.Request(str(rng.choice(users)), candidates, history))
    offline = scoring.score(bundle, requests)

    def ask(request):
        more = {} if request.history is None else {"history": request.history}
        return client.score(request.user, request.items, **more)

    compiled = client.state.compilations.serving
    with ThreadPoolExecutor(8) as pool:
        online = list(pool.map(ask, requests))
    assert client.state.compilations.serving == compiled
    assert client.metric("marsjax_compilations_while_serving") == 0 or compiled > client.state.compiled_before
    worst = max(np.abs(a["scores"] - b).max() for a, b in zip(online, offline, strict=True))
    assert worst < 1e-5
    assert sum(answer["borrowed"] > 0 for answer in online) > 10
    assert {answer["version"] for answer in online} == {versions.read_current(client.root).version}


def test_what_is_borrowed_is_told(client, bundle):
    user = low_user(bundle)
    status, answer = client.post("/v1/augment", {"user": user})
    assert status == 200
    number = int(np.flatnonzero(bundle.users.raw_user_U == user)[0])
    lent = scoring.table_lent(bundle, number)
    assert [row["item"] for row in answer["borrowed"]] == [str(bundle.items.raw_id_N[i]) for i in lent.item_S]
    assert {row["donor"] for row in answer["borrowed"]} == {str(bundle.users.raw_user_U[d]) for d in lent.donor_S}
    scored = client.score(user, items(bundle, 3))
    assert scored["donor"] == answer["borrowed"][-1]["donor"]
    assert scored["borrowed"] == len(lent.item_S)
    assert scored["fallback"] is None


def test_events_reach_histories_vectors_and_scores(client, storage, bundle):
    version = client.wait_ready()["version"]
    known, names = low_user(bundle, 1), items(bundle, 12)
    before = client.score(known, names)
    sent = [
        event("a1", known, names[0]),
        event("a2", "newcomer", names[1]),
        event("a3", "newcomer", names[2], when=10**6 + 1),
    ]
    assert client.post("/v1/events", {"events": sent}) == (202, {"accepted": 3})
    cold = client.score("newcomer", names)
    assert (cold["fallback"], cold["borrowed"], cold["donor"]) == ("unknown_user", 0, None)
    while runner.consume(storage, bundle, count=100, wait=0.0, most_deliveries=10):
        pass
    without = client.score("newcomer", names)  # the history is there, the vector is not
    assert (without["fallback"], without["borrowed"]) == ("no_vector", 0)
    assert without["scores"] != cold["scores"]
    consume_all(storage, bundle, version)
    warm = client.score("newcomer", names)
    assert warm["fallback"] is None
    assert warm["borrowed"] > 0
    assert warm["donor"] in set(map(str, bundle.users.raw_user_U))
    bare = client.score("newcomer", names, history=[])  # what replaces the history leaves the vector
    assert (bare["donor"], bare["borrowed"]) == (warm["donor"], warm["borrowed"])
    after = client.score(known, names)
    assert after["scores"] != before["scores"]
    assert client.post("/v1/augment", {"user": known})[1]["history"][-1] == names[0]
    again = [event("a1", known, names[0])]  # the same event once more
    client.post("/v1/events", {"events": again})
    consume_all(storage, bundle, version)
    assert client.score(known, names) == after


def test_unseen_items_get_a_score_and_are_counted(client, bundle):
    before = client.metric('marsjax_fallbacks_total{reason="unseen_item"}')
    answer = client.score(low_user(bundle), ["never seen", *items(bundle, 2)])
    assert answer["unseen"] == [0]
    assert np.isfinite(answer["scores"]).all()
    assert len(answer["scores"]) == 3
    assert client.metric('marsjax_fallbacks_total{reason="unseen_item"}') == before + 1


def test_sound_requests_and_others_are_told_apart_as_the_framework_does(client, bundle):
    """What goes past the framework and what does not: the same answers and failures."""
    user, names = low_user(bundle), items(bundle, 3)
    body = json.dumps({"user": user, "candidates": names}).encode()
    expected = client.score(user, names)
    for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.any+json"):
        assert client.call("POST", "/v1/score", body, {"content-type": kind}) == (200, expected)
    assert client.call("POST", "/v1/score", body, {"content-type": "text/plain"})[0] == 422
    for wrong, code, what in (
        (b"{", 400, "JSON"),
        (b"", 422, "body"),
        (b"[]", 422, "body"),
        (json.dumps({"user": 1, "candidates": names}).encode(), 422, "body.user"),
        (json.dumps({"user": user, "candidates": []}).encode(), 422, "body.candidates"),
        (json.dumps({"user": user, "candidates": names, "more": 1}).encode(), 422, "body.more"),
    ):
        status, answer = client.call("POST", "/v1/score", wrong)
        assert (status, what in answer["error"], "openapi.json" in answer["error"]) == (code, True, True), answer
    assert client.call("GET", "/v1/score")[0] == 405
    assert client.metric('marsjax_requests_total{route="/v1/score",status="422"}') >= 6


class Broken:
    """A store that is slow, or gone."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, 0

    def lookup(self, user, version):
        self.calls += 1
        time.sleep(self.seconds)
        raise StorageError("gone")

    def append(self, data):
        raise StorageError("gone, at redis://secret:6379")

    def backlog(self, group):
        raise StorageError("gone")

    dead_count = backlog


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_a_slow_or_absent_store_costs_the_loan_and_not_the_answer(root, bundle, seconds):
    user, names = low_user(bundle), items(bundle, 5)
    number = int(np.flatnonzero(bundle.users.raw_user_U == user)[0])
    profile = scoring.Profile(number, *scoring.own_history(bundle, number))
    (expected,) = scoring.score_rows(bundle, [scoring.Row(profile, serving.item_numbers(bundle, names))])
    store = Broken(seconds)
    with serving_from(root, store, store_deadline=0.05, store_pause=60.0) as client:
        client.wait_ready()
        began = time.monotonic()
        for _ in range(3):
            answer = client.score(user, names)
            assert (answer["fallback"], answer["borrowed"]) == ("store", 0)
            np.testing.assert_allclose(answer["scores"], expected, atol=1e-6)
        assert time.monotonic() - began < 2.5
        assert store.calls == (service.MISSES if seconds else 1)  # then it is left alone
        assert client.metric('marsjax_fallbacks_total{reason="store"}') == 3
        status, answer = client.post("/v1/events", {"events": [event("x", "u", "i")]})
        assert status == 503
        assert "secret" not in answer["error"]


class Pausing(Broken):
    """A store that is late now and then."""

    def lookup(self, user, version):
        self.calls += 1
        if self.calls % service.MISSES:
            time.sleep(2.0)
        return None, None


def test_a_store_that_is_late_now_and_then_is_asked_on(root, bundle):
    store = Pausing(0.0)
    with serving_from(root, store, store_deadline=0.7, store_pause=60.0) as client:
        client.wait_ready()
        found = [client.score(low_user(bundle), items(bundle, 2))["fallback"] for _ in range(2 * service.MISSES)]
    assert found == 2 * [*(service.MISSES - 1) * ["store"], None]


class Slow(Broken):
    """A store that takes events once it is told to."""

    def __init__(self):
        super().__init__(0.0)
        self.go, self.waiting = threading.Event(), 0

    def append(self, data):
        self.waiting += 1
        self.go.wait(30)


def test_events_that_wait_for_the_store_are_bounded(root):
    store = Slow()
    with serving_from(root, store, most_appends=6) as client, ThreadPoolExecutor(6) as pool:
        client.wait_ready()
        waiting = [pool.submit(client.post, "/v1/events", {"events": [event(f"w{i}", "u", "i")]}) for i in range(6)]
        until = time.monotonic() + 30
        while time.monotonic() < until and client.state.writers._work_queue.qsize() < 2:  # four threads have one each
            time.sleep(0.01)
        status, answer = client.post("/v1/events", {"events": [event("x", "u", "i")]})
        assert (status, "too much is waiting" in answer["error"]) == (503, True)
        assert client.metric("marsjax_refused_total") == 1
        store.go.set()
        assert [status for status, _ in (call.result() for call in waiting)] == [202] * 6
        assert client.post("/v1/events", {"events": [event("x", "u", "i")]})[0] == 202


def test_what_has_nothing_to_score_counts_among_what_waits(root, bundle, monkeypatch):
    """Else any number of requests for what is borrowed would wait, and be answered in one batch."""
    snapshot = snapshots.load(root, snapshots.wanted(root), None)
    made = engine.Engine(most_rows=4)
    begun, go, sizes = threading.Event(), threading.Event(), []
    answer = made.answer

    def slowly(tasks):
        sizes.append(len(tasks))
        begun.set()
        go.wait(30)
        return answer(tasks)

    monkeypatch.setattr(made, "answer", slowly)
    monkeypatch.setattr(scoring, "SIZES", (2,))
    monkeypatch.setattr(engine.lending, "SIZES", (2,))
    profile = scoring.Profile(0, *scoring.own_history(bundle, 0))
    task = engine.Task(snapshot, scoring.Row(profile, np.zeros(0, np.int32)), None, time.monotonic() + 60, 0.0)
    first = made.submit(task)
    begun.wait(30)
    futures = [first, *(made.submit(task) for _ in range(5))]
    go.set()
    assert [future is None for future in futures] == [False] * 4 + [True] * 2
    assert all(len(future.result(60).score_C) == 0 for future in futures[:4])
    made.close()
    assert sizes == [1, 2, 1]
    assert made._rows == 0


def test_what_is_remembered_goes_with_the_vector_the_donors_and_the_model(root, bundle, monkeypatch):
    """What a user borrows is looked up once, and again as soon as anything that it is made of is another."""
    snapshot, made = snapshots.load(root, snapshots.wanted(root), None), engine.Engine(most_rows=1000)
    lend, looked_up = engine.lend, []

    def counting(lenders, config, user_QD):
        looked_up.append(len(user_QD))
        return lend(lenders, config, user_QD)

    monkeypatch.setattr(engine, "lend", counting)

    def ask(snapshot, *vectors):
        profile, later = scoring.Profile(0, *scoring.own_history(bundle, 0)), time.monotonic() + 60
        tasks = [engine.Task(snapshot, scoring.Row(profile, np.ones(3, np.int32)), v, later, 0.0) for v in vectors]
        looked_up.clear()
        return [answer.lent for answer in made.answer(tasks)], sum(looked_up)

    low_U = np.flatnonzero((bundle.users.group_U == LOW) & (np.diff(bundle.users.borrowed_U1) > 0))
    one, other = bundle.users.user_UD[low_U[:2]]
    (first,), count = ask(snapshot, one)
    assert count == 1
    assert len(first.item_S) > 0
    both, count = ask(snapshot, one, other)  # one of them is new
    assert count == 1
    for lent, vector_D in zip(both, (one, other), strict=True):
        (expected,) = lend(snapshot.lenders, bundle.manifest["config"], vector_D[None])
        np.testing.assert_array_equal(lent.item_S, expected.item_S)
        np.testing.assert_array_equal(lent.donor_S, expected.donor_S)
    changed = one + np.float32(1e-3)  # the user did something more
    assert ask(snapshot, changed)[1] == 1
    assert ask(snapshot, one, other, changed)[1] == 0
    index, gone = snapshot.lenders.user_index, first.donor_S[-1]
    left_P = index.user_P != gone
    fewer = snapshot.lenders._replace(
        user_index=lending.retrieval.build_index(index.unit_PD[left_P], index.user_P[left_P])
    )
    (lent,), count = ask(snapshot._replace(lenders=fewer, lenders_version="000001"), one)
    assert (count, gone in lent.donor_S) == (1, False)
    assert ask(snapshot._replace(version="000009-another"), one)[1] == 1
    made.close()


def test_what_comes_too_late_is_scored_without_a_loan(root, storage, bundle):
    with serving_from(root, storage, deadline=1e-9, live=True) as client:
        client.wait_ready()
        answer = client.score(low_user(bundle), items(bundle, 3))
        assert (answer["fallback"], answer["borrowed"]) == ("late", 0)
        assert client.metric('marsjax_fallbacks_total{reason="late"}') == 1


def test_before_a_bundle_is_there_nothing_is_ready(tmp_path, storage):
    with serving_from(tmp_path, storage) as client:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                assert client.call("GET", "/healthz", raw=True) == (200, "ok")
                break
        assert client.call("GET", "/readyz")[0] == 503
        assert client.post("/v1/score", {"user": "u", "candidates": ["i"]})[0] == 503


def variant(bundle_folder, folder, factor):
    """The same bundle with other parameters: every score differs."""
    bundle = serving.load_bundle(bundle_folder)
    scaled = {"params": _times(bundle.params, factor), "statistics": bundle.statistics}
    serving.continue_bundle(folder, bundle, ctr=scaled, trained={"factor": factor})
    return folder


def _times(tree, factor):
    return {name: _times(value, factor) if hasattr(value, "items") else np.asarray(value) * np.float32(factor)
            for name, value in tree.items()}  # fmt: skip


def test_swaps_under_load_fail_no_request_and_mix_no_versions(bundle_folder, storage, bundle, tmp_path):
    """Each answer is exactly what one version says: the one it names. A damaged version is never served."""
    root, user, names = tmp_path / "root", low_user(bundle, 2), items(bundle, 8)
    folders = [variant(bundle_folder, tmp_path / f"b{i}", factor) for i, factor in enumerate((1.0, 0.5, 2.0))]
    said = {}

    def publish(number):
        version = versions.publish(root, folders[number], keep=9)
        said[version] = scoring.score(serving.load_bundle(folders[number]), [scoring.Request(user, tuple(names))])[0]
        return version

    publish(0)
    answers, stop = [], threading.Event()
    with serving_from(root, storage) as client:
        client.wait_ready()

        def ask():
            while not stop.is_set():
                answers.append(client.score(user, names))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in (1, 2, 0):
            client.wait_ready(publish(number))
        before = versions.read_current(root).version
        damaged = versions.publish(root, folders[1], keep=9)
        path = versions.folder_of(root, damaged) / "users.npz"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        time.sleep(0.5)
        versions.rollback(root)
        client.wait_ready(before)
        stop.set()
        for thread in threads:
            thread.join()
        assert client.state.compilations.serving == client.state.compiled_before
    assert len({answer["version"] for answer in answers} & set(said)) >= 3
    for answer in answers:
        if answer["version"] == damaged:  # it was served before it was damaged
            continue
        np.testing.assert_allclose(answer["scores"], said[answer["version"]], atol=1e-6)
    assert max(np.abs(a - b).max() for a in said.values() for b in said.values()) > 1e-3


def test_lenders_are_swapped_beside_the_bundle(bundle_folder, storage, bundle, tmp_path):
    root = tmp_path / "root"
    version = versions.publish(root, bundle_folder, keep=2)
    kept = bundle.lenders.donors.user_P[1:]
    fewer = bundle.lenders._replace(
        user_index=runner.retrieval.build_index(bundle.users.user_UD[kept] - bundle.lenders.centre_D, kept)
    )
    with serving_from(root, storage) as client:
        client.wait_ready()
        name = snapshots.publish_lenders(root, version, fewer)
        until = time.monotonic() + 60
        while client.wait_ready()["lenders"] != name and time.monotonic() < until:
            time.sleep(0.02)
        gone = str(bundle.users.raw_user_U[bundle.lenders.donors.user_P[0]])
        donors = {client.score(low_user(bundle, nth), items(bundle, 2))["donor"] for nth in range(5)}
        assert gone not in donors
        path = root / snapshots.FOLDER / snapshots.publish_lenders(root, version, bundle.lenders) / "donors.npz"
        path.write_bytes(path.read_bytes()[:-1])  # truncated at once: refused, or swapped in just before
        assert client.score(low_user(bundle), items(bundle, 2))["borrowed"] >= 0


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_damaged_at_the_start_is_replaced_by_the_next_best(
    bundle_folder, storage, bundle, tmp_path, monkeypatch
):
    """Anything is better than no answer; what was refused is tried again, since a disk may be out for a moment."""
    monkeypatch.setattr(service, "RETRY", 0.3)
    root, user, names = tmp_path / "root", low_user(bundle), items(bundle, 3)
    first, second = (versions.publish(root, bundle_folder, keep=3) for _ in range(2))
    lenders = snapshots.publish_lenders(root, second, bundle.lenders)
    donors, users = root / "lenders" / lenders / "donors.npz", versions.folder_of(root, second) / "users.npz"
    flip(donors)
    with serving_from(root, storage) as client:  # the donors: those in the bundle
        assert client.wait_ready() == {"version": second, "lenders": "bundle"}
        assert client.score(user, names)["borrowed"] > 0
        assert client.metric('marsjax_swaps_total{result="refused"}') >= 1
        flip(donors)
        until = time.monotonic() + 60
        while client.wait_ready()["lenders"] != lenders and time.monotonic() < until:
            time.sleep(0.02)
        assert client.wait_ready() == {"version": second, "lenders": lenders}
    flip(users)
    with serving_from(root, storage) as client:  # the bundle: the one before
        assert client.wait_ready() == {"version": first, "lenders": "bundle"}
        assert client.score(user, names)["version"] == first
        flip(users)
        assert client.wait_ready(second)["lenders"] == lenders
    (root / snapshots.POINTER).write_text("{")
    with serving_from(root, storage) as client:  # the pointer to the donors
        assert client.wait_ready() == {"version": second, "lenders": "bundle"}


def test_bad_requests_are_told_what_is_wrong_and_nothing_of_the_machine(client):
    cases = [
        (b"{", 400, "json"),
        (b"[" * 100_000, 400, ""),
        ({"user": "u"}, 422, "body.candidates"),
        ({"user": "u", "candidates": []}, 422, "body.candidates"),
        ({"user": "u", "candidates": [1]}, 422, "body.candidates"),
        ({"user": "u", "candidates": ["i"] * 1001}, 422, "body.candidates"),
        ({"user": "", "candidates": ["i"]}, 422, "body.user"),
        ({"user": "u", "candidates": ["i"], "more": 1}, 422, "body.more"),
        ({"user": "\ud800", "candidates": ["i"]}, 422, "body.user"),
        ({"user": "u\0", "candidates": ["i"]}, 422, "body.user"),
        ({"user": "u", "candidates": ["i\0"]}, 422, "body.candidates"),
        ({"user": "u", "candidates": ["i"], "context": {"time": 1e300}}, 422, "body.context.time"),
    ]
    for body, code, said in cases:
        status, answer = client.post("/v1/score", body)
        assert (status, set(answer)) == (code, {"error"}), (str(body)[:80], answer)
        assert said in answer["error"].lower()
        assert "/" not in answer["error"].replace("/openapi.json", "")
    status, answer = client.post("/v1/score", {"user": "u", "candidates": ["i"]}, **{"content-type": "text/plain"})
    assert (status, answer["error"]) == (422, "expected content-type application/json, found text/plain")
    assert client.call("GET", "/nowhere")[0] == 404
    assert client.call("GET", "/v1/score")[0] == 405
    status, answer = client.post("/v1/score", {"user": "u" * 2_000_000, "candidates": ["i"]})
    assert (status, "at most 1048576 bytes" in answer["error"]) == (413, True)


def test_what_goes_wrong_inside_is_told_in_the_log_alone(client, bundle, monkeypatch, caplog):
    """Whatever fails: the store, a file of the page, the engine."""
    user = low_user(bundle)

    def fail(*_, **__):
        raise OSError(2, "No such file or directory", "/secret/place/users.npz")

    monkeypatch.setattr(service.people, "find_user", fail)
    for method, path, body in (
        ("POST", "/v1/score", {"user": user, "candidates": items(bundle, 2)}),
        ("POST", "/v1/augment", {"user": user}),
        ("GET", f"/explain?user={user}", None),
    ):
        caplog.clear()
        assert client.call(method, path, body) == (500, {"error": "the service failed; its log says why"})
        assert "/secret/place" in caplog.text
    monkeypatch.undo()
    assert client.score(user, items(bundle, 2))["version"]


def test_bodies_without_a_length_are_limited_too(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.putrequest("POST", "/v1/score")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    for _ in range(40):  # 2.5 MiB: refused, and read to its end so that the sender hears of it
        connection.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
    connection.send(b"0\r\n\r\n")
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_without_an_end_is_not_read_for_ever(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    connection.putrequest("POST", "/v1/score")
    connection.putheader("content-length", str(2**40))
    connection.endheaders()
    with pytest.raises(OSError):  # the connection is closed on it
        connection.send(b" " * 2**27)
    connection.close()
    assert client.call("GET", "/healthz", raw=True) == (200, "ok")


def test_clients_have_a_rate(root, storage):
    with serving_from(root, storage, rate=5.0) as client:
        client.wait_ready()
        found = [
            client.post("/v1/score", {"user": "u", "candidates": ["i"]}, **{"x-forwarded-for": f"10.0.0.{i}"})[0]
            for i in range(20)
        ]
        assert {200, 429} == set(found)
        assert client.call("GET", "/healthz", raw=True)[0] == 200  # never limited


@pytest.mark.parametrize("times", [0.9, 1.1, 2.0])
def test_who_sends_more_than_the_rate_gets_the_rate(monkeypatch, times):
    """Ten seconds of steady requests: as many are let through as a bucket of one second's worth does, and no fewer."""
    clock = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: clock[0])
    layer = limits.Limits(None, most_bytes=1, rate=20.0, heard=lambda path, status: None)
    scope, sent = {"path": "/v1/score", "client": ("10.0.0.1", 1)}, int(10 * 20 * times)
    admitted = 0
    for _ in range(sent):
        clock[0] += 10.0 / sent
        admitted += layer._admits(scope)
    assert abs(admitted - min(sent, 20 + 10 * 20)) <= 2


@pytest.mark.parametrize(("name", "value"), [("port", 99_999), ("port", 0), ("rate", -1.0), ("deadline", 0.0)])
def test_numbers_that_cannot_be_are_refused(root, storage, name, value):
    with pytest.raises(ValueError, match=rf"serving\.{name}(_ms)?: expected .*, found {value}"):
        service.make_server(service.Settings(root, **{name: value}), storage)


def test_what_waits_and_what_is_dead_can_be_seen(root, tmp_path):
    store = open_storage(f"sqlite:{tmp_path}/s.sqlite", timeout=5.0, ttl=1000.0)
    store.join(RUNNER)
    with serving_from(root, store) as client:
        client.wait_ready()
        store.append([b"garbage", b"{}", b"[]"])
        assert (client.metric("marsjax_backlog"), client.metric("marsjax_dead_letters")) == (3, 0)
        messages = store.read(RUNNER, count=2, wait=0.0)
        dead = [Dead(message.id, message.data, "nothing") for message in messages]
        store.apply(RUNNER, {}, [], cap=1, seed=lambda user: [], dead=dead)
        assert (client.metric("marsjax_backlog"), client.metric("marsjax_dead_letters")) == (1, 2)
    store.close()
    with serving_from(root, Broken(0.0)) as client:  # one that cannot say
        client.wait_ready()
        assert np.isnan(client.metric("marsjax_backlog"))


def test_who_did_only_what_the_bundle_does_not_know_is_unknown(root, bundle, tmp_path):
    """There is a vector in the store, of no items: it says nothing."""
    store = open_storage(f"sqlite:{tmp_path}/s.sqlite", timeout=5.0, ttl=1000.0)
    store.join(RUNNER)
    model = runner.load_model(root, versions.read_current(root).version)
    store.append([encode_event(Event("n1", "newcomer", "an item of tomorrow", 1.0, 5))])
    runner.consume(store, model.bundle, count=10, wait=0.0, most_deliveries=3)
    assert runner.embed_changed(store, model, count=10) == 1
    with serving_from(root, store) as client:
        client.wait_ready()
        answer = client.score("newcomer", items(bundle, 2))
    store.close()
    assert (answer["fallback"], answer["borrowed"]) == ("unknown_user", 0)


def test_tokens_guard_events_and_what_shows_users(client, monkeypatch, bundle):
    body = {"events": [event("t", "u", "i")]}
    monkeypatch.setenv(service.EVENTS_TOKEN, "eve")
    monkeypatch.setenv(service.ADMIN_TOKEN, "adam")
    for path, method, content, right in (
        ("/v1/events", "POST", body, "eve"),
        ("/metrics", "GET", None, "adam"),
        ("/explain?user=u", "GET", None, "adam"),
        ("/v1/augment", "POST", {"user": "u"}, "adam"),
    ):  # fmt: skip
        assert client.call(method, path, content, raw=True)[0] == 401
        assert client.call(method, path, content, {"authorization": "Bearer wrong"}, raw=True)[0] == 401
        assert client.call(method, path, content, {"authorization": f"Bearer {right}"}, raw=True)[0] in (200, 202)
    assert client.score(low_user(bundle), items(bundle, 1))["version"]


def test_other_addresses_than_loopback_need_tokens(monkeypatch):
    monkeypatch.delenv(service.EVENTS_TOKEN, raising=False)
    monkeypatch.delenv(service.ADMIN_TOKEN, raising=False)
    with pytest.raises(ValueError, match="MARSJAX_EVENTS_TOKEN and MARSJAX_ADMIN_TOKEN"):
        service.check_binding("0.0.0.0")
    monkeypatch.setenv(service.EVENTS_TOKEN, "a")
    monkeypatch.setenv(service.ADMIN_TOKEN, "b")
    service.check_binding("0.0.0.0")


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.text(min_size=1, max_size=8)
EVENT = {"id": NAMES, "user": NAMES, "item": NAMES, "label": st.integers(-1, 2), "time": st.integers()}
PARTS = {
    "/v1/score": {
        "user": NAMES,
        "candidates": st.lists(NAMES, min_size=1, max_size=5),
        "history": st.lists(NAMES, max_size=3),
        "context": st.fixed_dictionaries({}, optional={"time": st.integers()}),
    },
    "/v1/augment": {"user": NAMES, "history": st.lists(NAMES, max_size=5)},
    "/v1/events": {"events": st.lists(st.fixed_dictionaries(EVENT), max_size=3)},
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_nothing_drawn_gets_an_error_of_the_server(client, data):
    """Requests that are nearly right, and every answer as the OpenAPI document says."""
    path = data.draw(st.sampled_from([*PARTS]))
    optional = {name: part | VALUE for name, part in PARTS[path].items()} | {"more": VALUE}
    body = data.draw(st.fixed_dictionaries(PARTS[path]) | st.fixed_dictionaries({}, optional=optional) | VALUE)
    status, answer = client.post(path, body)
    declared = client.app.openapi()["paths"][path]["post"]["responses"]
    assert status < 500
    assert str(status) in declared
    kind = declared[str(status)]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    schema = client.app.openapi()["components"]["schemas"][kind]
    assert set(answer) == set(schema["properties"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.sampled_from(["/v1/score", "/v1/augment", "/v1/events", "/explain", "/x"]))
def test_no_bytes_get_an_error_of_the_server(client, data, path):
    for method in ("POST", "GET"):
        assert client.call(method, path + "?user=" + urllib.parse.quote(data), data, raw=True)[0] < 500


def test_the_page_shows_who_lends_and_what_was_left_out(client, bundle, tmp_path):
    user = low_user(bundle)
    status, html = client.call("GET", f"/explain?user={user}", raw=True)
    assert status == 200
    donor = client.post("/v1/augment", {"user": user})[1]["borrowed"][-1]["donor"]
    borrowed = client.post("/v1/augment", {"user": user})[1]["borrowed"]
    assert f"borrowed, most similar first: {min(len(borrowed), 12)} of {len(borrowed)}" in html
    assert f"{borrowed[-1]['item']}, similarity" in html
    for text in (f"User {user}", donor, "rejected, least similar first", "with augmentation", "similarity"):
        assert text in html
    assert client.call("GET", "/explain?user=%3Cscript%3E", raw=True)[1].count("<script>") == 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH; `.ci/run` installs it")
def test_the_page_in_a_browser(client, bundle, tmp_path):
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
        "--virtual-time-budget=3000", "--window-size=1000,1400", "--dump-dom",
        f"http://127.0.0.1:{client.port}/explain?user={low_user(bundle)}",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "borrowed, most similar first" in shown
    assert shown.count('class="poster"') > 3


def test_the_document_says_what_is_needed(root, storage, tmp_path):
    document = json.loads(service.openapi(service.Settings(root), storage))
    assert set(document["paths"]) == {
        "/v1/score", "/v1/augment", "/v1/events", "/healthz", "/readyz", "/metrics", "/explain",
    }  # fmt: skip
    files.write_json(tmp_path / "openapi.json", document)
