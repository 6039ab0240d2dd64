"""Stream and store keep their promises, in SQLite and in a real Redis: what is acknowledged has its effect, once."""

import concurrent.futures
import sqlite3
import threading
import time

import pytest

from marsjax.serving.events import Entry, decode_history
from marsjax.serving.storage import RUNNER, TRAINER, Changed, Dead, StorageError, open_storage


@pytest.fixture(params=["sqlite", "redis"])
def opened(request, tmp_path):
    """A function that opens the same empty storage, as often as it is called."""
    url = f"sqlite:{tmp_path}/storage.sqlite"
    if request.param == "redis":
        import redis

        url = request.getfixturevalue("redis_server").url
        with redis.Redis.from_url(url) as client:
            client.flushall()
    made = []

    def make(**changes):
        made.append(open_storage(url, **({"timeout": 5.0, "ttl": 1000.0} | changes)))
        return made[-1]

    yield make
    for storage in made:
        storage.close()


def entry(number, time=None):
    return Entry(number if time is None else time, f"e{number}", f"item{number}", 1.0)


def apply(storage, messages, entries, group=RUNNER, **changes):
    done = [message.id for message in messages]
    storage.apply(group, entries, done, **({"cap": 100, "seed": lambda user: []} | changes))


def history(storage, user):
    (data,) = storage.histories([user])
    return None if data is None else [found.id for found in decode_history(data)]


def test_messages_come_in_order_until_they_are_acknowledged(opened):
    storage = opened()
    storage.join(RUNNER)
    assert storage.read(RUNNER, count=10, wait=0.0) == []
    storage.append([b"a", b"b"])
    storage.append([b"c"])
    assert storage.backlog(RUNNER) == 3
    first = storage.read(RUNNER, count=2, wait=1.0)
    assert [message.data for message in first] == [b"a", b"b"]
    again = storage.read(RUNNER, count=10, wait=0.0)  # not acknowledged: they come again, and count it
    assert [message.data for message in again][:2] == [b"a", b"b"]
    assert all(message.deliveries == 2 for message in again[:2])
    apply(storage, first, {})
    rest = []
    while len(rest) < 1:
        rest = storage.read(RUNNER, count=10, wait=1.0)
    assert [message.data for message in rest] == [b"c"]
    apply(storage, rest, {})
    assert storage.backlog(RUNNER) == 0
    assert storage.read(RUNNER, count=10, wait=0.0) == []


def test_a_consumer_that_was_killed_gets_its_messages_again(opened):
    storage = opened()
    storage.join(RUNNER)
    storage.append([b"a", b"b"])
    assert len(storage.read(RUNNER, count=10, wait=1.0)) == 2
    assert [message.data for message in opened().read(RUNNER, count=10, wait=1.0)] == [b"a", b"b"]


def test_what_a_consumer_that_is_gone_had_is_taken_over_though_more_always_comes(redis_server, monkeypatch):
    import redis

    from marsjax.serving import redis_storage

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    gone, other = (open_storage(redis_server.url, timeout=5.0, ttl=9.0, consumer=name) for name in ("gone", "other"))
    gone.join(RUNNER)
    gone.append([b"a", b"b"])
    assert len(gone.read(RUNNER, count=10, wait=1.0)) == 2
    monkeypatch.setattr(redis_storage, "CLAIM", 0.2)
    seen, until = [], time.monotonic() + 5
    while time.monotonic() < until and b"b" not in {message.data for message in seen}:
        other.append([b"new"])
        read = other.read(RUNNER, count=10, wait=0.0)
        apply(other, read, {})
        seen += read
    assert {message.data: message.deliveries for message in seen} == {b"new": 1, b"a": 2, b"b": 2}
    gone.join(TRAINER)
    assert len(gone.read(TRAINER, count=10**6, wait=1.0)) >= len(seen)
    time.sleep(0.3)
    other.append([b"new"])
    assert len(other.read(TRAINER, count=10**6, wait=0.0)) == 1  # a training may take longer
    for storage in (gone, other):
        storage.close()


def test_groups_see_all_messages_each_and_trimming_waits_for_both(opened):
    storage = opened()
    storage.join(RUNNER)
    storage.join(TRAINER)
    storage.append([b"a", b"b"])
    apply(storage, storage.read(RUNNER, count=10, wait=1.0), {})
    storage.trim()
    messages = storage.read(TRAINER, count=10, wait=1.0)
    assert [message.data for message in messages] == [b"a", b"b"]
    apply(storage, messages[:1], {}, group=TRAINER)
    storage.trim()
    assert storage.backlog(TRAINER) == 1
    assert [message.data for message in storage.read(TRAINER, count=10, wait=1.0)] == [b"b"]
    apply(storage, messages[1:], {}, group=TRAINER)
    storage.trim()
    storage.append([b"c"])
    assert [message.data for message in storage.read(RUNNER, count=10, wait=1.0)] == [b"c"]


def test_a_message_that_kills_is_handed_out_alone_at_last(opened):
    """Each read stands for a process that died of what it read."""
    storage = opened()
    storage.join(RUNNER)
    storage.append([b"poison", b"good"])
    seen = [storage.read(RUNNER, count=10, wait=1.0) for _ in range(12)]
    assert len(seen[0]) == 2
    assert [message.data for message in seen[-1]] == [b"poison"]
    assert seen[-1][0].deliveries > 10


def test_the_trainer_gets_all_again_and_nothing_waits_for_one_that_has_left(opened):
    storage = opened()
    storage.leave(TRAINER)  # not there: nothing happens
    storage.join(RUNNER)
    storage.join(TRAINER)
    storage.append([b"a", b"b"])
    for deliveries in range(1, 9):
        messages = storage.read(TRAINER, count=10, wait=1.0)
        assert [(message.data, message.deliveries) for message in messages] == [(b"a", deliveries), (b"b", deliveries)]
    apply(storage, storage.read(RUNNER, count=10, wait=1.0), {})
    storage.leave(TRAINER)
    storage.trim()
    storage.join(TRAINER)
    assert storage.read(TRAINER, count=10, wait=0.0) == []


def test_events_have_their_effect_once(opened):
    storage = opened()
    storage.join(RUNNER)
    storage.append([b"x"])
    messages = storage.read(RUNNER, count=10, wait=1.0)
    apply(storage, messages, {"u": [entry(2), entry(1)]}, seed=lambda user: [Entry(0, "", f"old {user}", 1.0)])
    assert history(storage, "u") == ["", "e1", "e2"]
    (changed,) = storage.changed(10)
    apply(storage, messages, {"u": [entry(1), entry(3)]}, seed=lambda user: pytest.fail("seeded twice"))
    assert history(storage, "u") == ["", "e1", "e2", "e3"]
    (later,) = storage.changed(10)
    assert later.stamp != changed.stamp
    assert later.since == pytest.approx(changed.since, abs=1e-3)
    apply(storage, [], {"u": [entry(3)]})  # nothing new: nothing changed
    assert storage.changed(10) == [later]
    apply(storage, [], {"u": [entry(9, time=-5)]}, cap=3)  # late, and cut off at once
    assert history(storage, "u") == ["e1", "e2", "e3"]


def test_a_history_that_cannot_be_read_begins_anew(opened):
    storage = opened()
    apply(storage, [], {"u": [entry(1)]})
    spoil(storage, "u")
    apply(storage, [], {"u": [entry(2)]}, seed=lambda user: [entry(0)])
    assert history(storage, "u") == ["e0", "e2"]


def spoil(storage, user):
    """Writes nonsense where the history of a user is."""
    if hasattr(storage, "_redis"):
        storage._redis.set(f"marsjax:history:{user}", b"nonsense")
        return
    with storage._writing() as connection:
        connection.execute("UPDATE histories SET data = ? WHERE user = ?", (b"nonsense", user))


def test_dead_letters_are_kept_and_acknowledged(opened):
    storage = opened()
    storage.join(RUNNER)
    storage.append([b"garbage", b"good"])
    bad, good = storage.read(RUNNER, count=10, wait=1.0)
    storage.apply(RUNNER, {}, [good.id], cap=1, seed=lambda _: [], dead=[Dead(bad.id, bad.data, "no event")])
    assert storage.backlog(RUNNER) == 0
    assert storage.dead_letters(5) == [Dead(bad.id, b"garbage", "no event")]


def test_a_reader_never_gets_a_vector_of_another_version(opened):
    storage = opened()
    storage.write_vectors("v1", {"u": b"one"}, [])
    assert storage.lookup("u", "v1") == (None, b"one")
    assert storage.lookup("u", "v2") == (None, None)
    storage.write_vectors("v2", {"u": b"two"}, [])
    assert storage.lookup("u", "v1")[1] == b"one"
    assert storage.lookup("u", "v2")[1] == b"two"


def test_vectors_of_versions_that_are_gone_are_removed(opened):
    storage = opened()
    users = [f"u{number}" for number in range(1500)]  # more than are removed at a time
    for version in ("000001-a", "000002-b", "000003-c"):
        storage.write_vectors(version, dict.fromkeys(users, version.encode()), [])
    apply(storage, [], {"u0": [entry(1)]})
    storage.forget_versions(["000002-b", "000003-c"])
    found = {version: [storage.lookup(user, version)[1] for user in (users[0], users[-1])]
             for version in ("000001-a", "000002-b", "000003-c")}  # fmt: skip
    assert found == {"000001-a": [None] * 2, "000002-b": [b"000002-b"] * 2, "000003-c": [b"000003-c"] * 2}
    assert history(storage, "u0") == ["e1"]


def test_a_user_who_changes_while_a_vector_is_made_stays_marked(opened):
    storage = opened()
    apply(storage, [], {"u": [entry(1)], "w": [entry(1)]})
    seen = storage.changed(10)
    assert {item.user for item in seen} == {"u", "w"}
    apply(storage, [], {"u": [entry(2)]})
    storage.write_vectors("v1", {"u": b"old", "w": b"new"}, seen)
    (left,) = storage.changed(10)
    assert left.user == "u"
    storage.write_vectors("v1", {"u": b"new"}, [left])
    assert storage.changed(10) == []
    storage.touch_all()
    assert {item.user for item in storage.changed(10)} == {"u", "w"}
    assert all(isinstance(item, Changed) and item.stamp for item in storage.changed(10))


def test_a_clock_that_steps_back_loses_no_change(opened, monkeypatch):
    """Stamps and not times tell changes apart, and the order in which they wait is all that a clock can spoil."""
    storage, clock = opened(), [2e9]
    storage.join(RUNNER)
    monkeypatch.setattr(time, "time", lambda: clock[0])
    apply(storage, [], {"u": [entry(1)]})
    before = storage.changed(10)
    clock[0] -= 3600.0
    apply(storage, [], {"u": [entry(2)], "v": [entry(3)]})
    assert {change.user for change in storage.changed(10)} == {"u", "v"}
    storage.write_vectors("v1", {"u": b"old"}, before)
    assert {change.user for change in storage.changed(10)} == {"u", "v"}  # u has changed since
    storage.write_vectors("v1", {"u": b"new", "v": b"new"}, storage.changed(10))
    assert storage.changed(10) == []
    assert history(storage, "u") == ["e1", "e2"]


def test_users_are_listed_and_touched(opened):
    storage = opened()
    storage.join(RUNNER)
    names = sorted(["ü", "a b", *(f"u{number}" for number in range(2500))])
    apply(storage, [], {name: [entry(1)] for name in names})
    assert sorted(set(storage.users())) == names
    storage.write_vectors("v1", {}, storage.changed(10**6))
    assert storage.changed(1) == []
    storage.touch([])
    storage.touch(["u7", "ü"])
    (first, second) = storage.changed(10)
    assert {first.user, second.user} == {"u7", "ü"}
    assert first.stamp != second.stamp
    storage.touch_all()
    assert len(storage.changed(10**6)) == len(names)


def test_a_new_file_is_opened_by_many_at_once(tmp_path):
    """SQLite answers "busy" at once, without waiting, where another one is turning the file to WAL."""
    for number in range(20):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            ready = threading.Barrier(8)

            def opens(path=f"sqlite:{tmp_path}/{number}.sqlite", ready=ready):
                ready.wait()
                open_storage(path, timeout=10.0, ttl=1000.0).close()

            for opening in [pool.submit(opens) for _ in range(8)]:
                opening.result()


def test_two_writers_of_one_history_lose_nothing(opened):
    """Reading, merging and writing of one cannot interleave with another's."""

    def write(start):
        storage = opened()
        for number in range(start, 60, 2):
            apply(storage, [], {"u": [entry(number)]})

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert history(opened(), "u") == [f"e{number}" for number in range(60)]


def test_redis_stopped_and_started_again_has_lost_nothing(redis_server):
    storage = open_storage(redis_server.url, timeout=0.5, ttl=1000.0)
    storage.join(RUNNER)
    storage.append([b"before"])
    redis_server.stop()
    began = time.monotonic()
    with pytest.raises(StorageError, match="the store failed"):
        storage.append([b"lost, and said so"])
    assert time.monotonic() - began < 5
    with pytest.raises(StorageError):
        storage.lookup("u", "v")
    redis_server.start()
    data = [message.data for message in storage.read(RUNNER, count=1000, wait=1.0)]
    assert data[-1] == b"before"
    storage.close()


def test_an_append_may_take_longer_than_a_look_up(redis_server):
    import redis

    storage = open_storage(redis_server.url, timeout=0.05, ttl=1.0, append_timeout=10.0)
    storage.join(RUNNER)
    before = storage.backlog(RUNNER)
    with redis.Redis.from_url(redis_server.url) as client:
        client.client_pause(1500)  # as a disk that is busy
        with pytest.raises(StorageError, match="Timeout"):
            storage.lookup("u", "v")
        storage.append([b"slow"])
    assert storage.backlog(RUNNER) == before + 1
    storage.close()


def test_values_of_redis_expire(redis_server):
    storage = open_storage(redis_server.url, timeout=5.0, ttl=1.0)
    storage.write_vectors("v9", {"u": b"x"}, [])
    assert storage.lookup("u", "v9")[1] == b"x"
    time.sleep(1.3)
    assert storage.lookup("u", "v9")[1] is None
    storage.close()


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    storage = open_storage(f"sqlite:{tmp_path}/s.sqlite", timeout=0.1, ttl=1.0)
    other = sqlite3.connect(tmp_path / "s.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="locked"):
        storage.append([b"x"])
    assert storage.lookup("u", "v") == (None, None)  # readers do not wait for writers
    other.execute("ROLLBACK")
    other.close()
    storage.append([b"x"])
    storage.close()


def test_a_full_disk_loses_no_acknowledged_event(small_disk):
    storage = open_storage(f"sqlite:{small_disk}/s.sqlite", timeout=1.0, ttl=1.0)
    storage.join(RUNNER)
    accepted = []

    def fill():
        while True:
            storage.append([bytes(20_000)])
            accepted.append(1)

    with pytest.raises(StorageError, match="full"):
        fill()
    assert storage.backlog(RUNNER) == len(accepted) > 0
    storage.close()


@pytest.mark.parametrize("url", ["", "sqlite:", "mysql://x", "file"])
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match="expected sqlite:PATH or redis://HOST:PORT/DB"):
        open_storage(url, timeout=1.0, ttl=1.0)
