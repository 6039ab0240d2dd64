"""Work that waits for other work, done by several processes side by side."""

from __future__ import annotations

import concurrent.futures.process
import graphlib
import logging
import multiprocessing
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from marsjax.allocator import keep_freed_memory
from marsjax.processors import processors
from marsjax.progress import log_to, progress

log = logging.getLogger(__name__)

Name = tuple[Any, ...]


class Job(NamedTuple):
    """A call `function(shared, *arguments)` for when the jobs it waits for are done, in another process."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    after: tuple[Name, ...] = ()


def run(jobs: Mapping[Name, Job], shared: Any, *, processes: int, logs: pathlib.Path) -> dict[Name, BaseException]:
    """Does the jobs, of those that are ready the first one first.

    Each process gets one copy of `shared`, for all its jobs, and its share of the processors to itself: as many threads
    as processors in every process would wait for one another. What the processes log goes to files in `logs`.

    Returns what failed, and what waited for it, with the error.

    Raises:
        ValueError: a job waits for one that there is not, or jobs wait for each other.
        OSError: a process was killed.
    """
    if unknown := {needed for job in jobs.values() for needed in job.after} - jobs.keys():
        raise ValueError(f"jobs: expected jobs that wait for other jobs, found waiting for {sorted(map(str, unknown))}")
    try:
        graphlib.TopologicalSorter({name: job.after for name, job in jobs.items()}).prepare()
    except graphlib.CycleError as found:
        circle = " for ".join(" ".join(map(str, name)) for name in found.args[1])
        raise ValueError(f"jobs: expected jobs that can be put in an order, found {circle}, in a circle") from None
    logs.mkdir(parents=True, exist_ok=True)
    # Each would take three quarters of a GPU's memory for itself. Read where a process first asks for a device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # NumPy starts a thread a processor as it is loaded, before a process has its share: sixteen that spin on one
    # processor take nearly all of its time.
    threads = str(max(map(len, shares(processors(), processes))))
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, threads)
    waiting, done = dict(jobs), set[Name]()
    failed: dict[Name, BaseException] = {}
    context = multiprocessing.get_context("spawn")  # a forked process would share the threads of jax
    counter = context.Value("i", 0)
    with (
        concurrent.futures.ProcessPoolExecutor(
            processes, context, initializer=_begin, initargs=(shared, counter, processes, logs)
        ) as pool,
        progress("jobs", len(jobs)) as advance,
    ):
        running: dict[concurrent.futures.Future[None], Name] = {}
        try:
            while waiting or running:
                for name, job in list(waiting.items()):
                    if lost := next((needed for needed in job.after if needed in failed), None):
                        failed[name] = failed[lost]
                        del waiting[name]
                        advance(1)
                    elif len(running) < processes and done.issuperset(job.after):
                        running[pool.submit(_call, job.function, *job.arguments)] = name
                        del waiting[name]
                if not running:
                    continue
                finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    name = running.pop(future)
                    error = future.exception()
                    if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                        raise error
                    if error is not None:
                        log.warning("%s failed: %s", " ".join(map(str, name)), error)
                        failed[name] = error
                    else:
                        done.add(name)
                    advance(1, " ".join(map(str, name)))
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise OSError(
                    f"one of {processes} processes was killed, perhaps for want of memory; run the same command with "
                    f"fewer --processes, and it continues ({logs} holds their logs)"
                ) from error
            raise
    return failed


def shares(cores: Sequence[int], processes: int) -> list[list[int]]:
    """The processors of each process: all are used, and each process has at least one."""
    return [list(cores[i::processes]) or [cores[i % len(cores)]] for i in range(processes)]


_shared: Any = None  # of this process, which `_begin` gave it


def _call(function: Callable[..., None], *arguments: Any) -> None:
    function(_shared, *arguments)


def _begin(shared: Any, counter: Any, processes: int, logs: pathlib.Path) -> None:
    """The start of a process: its copy of what is shared, its processors and its log."""
    global _shared
    _shared = shared
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, shares(processors(), processes)[number % processes])
    sys.stderr = open(logs / f"{number}.log", "a", buffering=1)  # noqa: SIM115, it stays open
    log_to(sys.stderr, force=True)
    keep_freed_memory()  # a setting of the process, which is not handed down
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Whoever asked for the work may be killed, and nobody is left to tell its processes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
