"""Jobs side by side: in order, each once, failures told and not spread further than they must."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from marsjax import jobs
from marsjax.jobs import Job


def note(folder, name, seconds=0.0):
    (folder / f"{name}.begun").touch()
    time.sleep(seconds)
    (folder / f"{name}.done").touch(exist_ok=False)


def note_after(folder, name, *others):
    assert all((folder / f"{other}.done").exists() for other in others)
    note(folder, name)


def note_beside(folder, name, other):
    """Ends once the other one has begun."""
    (folder / f"{name}.begun").touch()
    for _ in range(600):
        if (folder / f"{other}.begun").exists():
            note(folder, name)
            return
        time.sleep(0.1)
    raise TimeoutError(f"{other} did not begin")


def fail(folder, text):
    raise ValueError(text)


def die(folder):
    os._exit(9)


def interrupt(folder):
    raise KeyboardInterrupt


def multiply(shared):
    """`shared` holds an array, so that numpy is loaded where it is read: before the process has its processors."""
    folder, array = shared
    array @ array
    (folder / f"{os.getpid()}.threads").write_text(str(len(os.listdir("/proc/self/task"))))


def write_process(folder):
    (folder / "process").write_text(str(os.getpid()))
    (folder / "process").rename(folder / "process.written")
    time.sleep(60)


def names(folder):
    return sorted(path.stem for path in folder.glob("*.done"))


def test_each_job_is_done_once_after_what_it_waits_for_and_beside_the_others(tmp_path):
    work = {
        ("last",): Job(note_after, ("last", "a", "b"), (("a",), ("b",))),
        ("a",): Job(note_beside, ("a", "b")),
        ("b",): Job(note_beside, ("b", "a")),
        ("c", 1): Job(note, ("c",)),
    }
    assert jobs.run(work, tmp_path, processes=2, logs=tmp_path / "logs") == {}
    assert names(tmp_path) == ["a", "b", "c", "last"]
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_jobs_that_wait_for_each_other_are_refused(tmp_path):
    work = {("a", 1): Job(note, ("a",), (("b",),)), ("b",): Job(note, ("b",), (("a", 1),))}
    with pytest.raises(
        ValueError, match=r"can be put in an order, found (a 1 for b for a 1|b for a 1 for b), in a circle"
    ):
        jobs.run(work, tmp_path, processes=1, logs=tmp_path / "logs")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processors are shared out on Linux alone")
def test_a_process_has_as_many_threads_as_processors(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # to be put back as it was
        monkeypatch.delenv(name)
    shared, many = (tmp_path, np.ones((500, 500))), len(os.sched_getaffinity(0))
    assert jobs.run({("a",): Job(multiply, ())}, shared, processes=many, logs=tmp_path / "logs") == {}
    assert [path.read_text() for path in tmp_path.glob("*.threads")] == ["2"]  # one waits for its parent's end


def test_what_fails_is_told_and_what_waits_for_it_is_left(tmp_path, caplog):
    work = {
        ("bad",): Job(fail, ("no such thing",)),
        ("after",): Job(note, ("after",), (("bad",),)),
        ("after that",): Job(note, ("after that",), (("after",),)),
        ("other",): Job(note, ("other",)),
    }
    failed = jobs.run(work, tmp_path, processes=1, logs=tmp_path / "logs")
    assert set(failed) == {("bad",), ("after",), ("after that",)}
    assert {str(error) for error in failed.values()} == {"no such thing"}
    assert names(tmp_path) == ["other"]
    assert "bad failed: no such thing" in caplog.text


def test_a_process_that_is_killed_is_an_error_that_says_so(tmp_path):
    with pytest.raises(OSError, match="one of 2 processes was killed.*fewer --processes"):
        jobs.run({("a",): Job(die, ())}, tmp_path, processes=2, logs=tmp_path / "logs")


def test_jobs_that_wait_for_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found waiting for .*nobody"):
        jobs.run({("a",): Job(note, ("a",), (("nobody",),))}, tmp_path, processes=2, logs=tmp_path / "logs")


@pytest.mark.parametrize(("cores", "processes"), [(2, 2), (2, 5), (16, 3), (3, 1)])
def test_all_processors_are_shared_out(cores, processes):
    shares = jobs.shares(list(range(10, 10 + cores)), processes)
    assert len(shares) == processes
    assert all(shares)
    assert {core for share in shares for core in share} == set(range(10, 10 + cores))
    if processes <= cores:
        assert sum(map(len, shares)) == cores


def test_a_process_has_its_share_and_its_log(tmp_path):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system pins no process")
    assert jobs.run({("a",): Job(write_affinity, ())}, tmp_path, processes=1, logs=tmp_path / "logs") == {}
    assert (tmp_path / "affinity").read_text() == str(sorted(os.sched_getaffinity(0)))


def write_affinity(folder: pathlib.Path) -> None:
    (folder / "affinity").write_text(str(sorted(os.sched_getaffinity(0))))


STARTED = """
import pathlib, sys
from marsjax import jobs
from tests.jobs_test import write_process
if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    jobs.run({("a",): jobs.Job(write_process, ())}, folder, processes=1, logs=folder / "logs")
"""


def test_processes_end_with_the_one_that_is_killed(tmp_path):
    (tmp_path / "started.py").write_text(STARTED)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, tmp_path / "started.py", tmp_path], env=environment)
    written = tmp_path / "process.written"
    assert eventually(written.exists)
    child = int(written.read_text())
    parent.kill()
    parent.wait()
    assert eventually(lambda: not running(child))


def eventually(holds):
    """Whether it holds within 20 seconds."""
    for _ in range(200):
        if holds():
            return True
        time.sleep(0.1)
    return False


def running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # One that ended stays listed until somebody asks for its status.
    state = pathlib.Path(f"/proc/{process}/stat")
    return not (state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")
