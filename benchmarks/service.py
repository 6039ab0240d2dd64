"""Service and runner as processes of their own, and clients that ask as fast as they are answered. Loopback only."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from marsjax import files
from marsjax.provenance import current_commit, machine_description

HOST = "127.0.0.1"
MARSJAX = ("marsjax.main",)


class Answer(NamedTuple):
    """One request as a client saw it."""

    status: int
    body: Any
    seconds: float


def free_port() -> int:
    """A port that nobody listens at."""
    with contextlib.closing(socket.create_server((HOST, 0))) as line:
        return int(line.getsockname()[1])


@contextlib.contextmanager
def process(
    command: str, root: pathlib.Path, program: Sequence[str] = MARSJAX, /, **settings: object
) -> Iterator[subprocess.Popen[bytes]]:
    """`marsjax serve` or `marsjax runner`, stopped at the end. See `start`."""
    started = start(command, root, program, **settings)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def start(
    command: str, root: pathlib.Path, program: Sequence[str] = MARSJAX, /, **settings: object
) -> subprocess.Popen[bytes]:
    """`marsjax serve` or `marsjax runner`; `program` is a module that takes their flags too, and flags of its own."""
    flags = [f"--config.serving.{name}={value}" for name, value in settings.items()]
    log = open(root / f"{command}.log", "ab")  # noqa: SIM115 - the process keeps it
    module, *own = program
    return subprocess.Popen([sys.executable, "-m", module, command, *own, f"--root={root}", *flags], stderr=log)


class Connection:
    """A connection that stays open."""

    def __init__(self, port: int):
        self._http = http.client.HTTPConnection(HOST, port, timeout=120)

    def call(self, method: str, path: str, body: Any = None) -> Answer:
        """One request; a connection that was closed is opened again, once."""
        data = None if body is None else json.dumps(body).encode()
        began = time.perf_counter()
        for attempt in (0, 1):
            try:
                self._http.request(method, path, data, {"content-type": "application/json"})
                answer = self._http.getresponse()
                content = answer.read()
                break
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                self._http.close()
                if attempt:
                    raise
        seconds = time.perf_counter() - began
        kind = answer.headers.get("content-type", "")
        return Answer(answer.status, json.loads(content) if "json" in kind else content.decode(), seconds)


def wait_ready(port: int, started: subprocess.Popen[bytes], *, seconds: float = 300.0) -> dict[str, Any]:
    """What /readyz says once it is ready. Raises RuntimeError where the process ends first."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if started.poll() is not None:
            raise RuntimeError(f"the service ended with {started.returncode} before it was ready; its log says why")
        with contextlib.suppress(OSError):
            answer = Connection(port).call("GET", "/readyz")
            if answer.status == 200:
                return dict(answer.body)
        time.sleep(0.1)
    raise TimeoutError("the service did not become ready")


def metrics(port: int) -> dict[str, float]:
    """What /metrics says."""
    lines = Connection(port).call("GET", "/metrics").body.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def ask(port: int, bodies: Sequence[Any], *, clients: int, path: str = "/v1/score") -> list[Answer]:
    """Sends all bodies over `clients` connections at once; the answers in the order of the bodies."""
    out: list[Answer | None] = [None] * len(bodies)

    def work(first: int) -> None:
        connection = Connection(port)
        for i in range(first, len(bodies), clients):
            out[i] = connection.call("POST", path, bodies[i])

    _together([lambda first=first: work(first) for first in range(clients)])  # type: ignore[misc]
    return [answer for answer in out if answer is not None]


def _together(functions: Sequence[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def row(question: str, case: str, ours: float, other: float | None, name: str, target: float | None) -> dict[str, Any]:
    """A row of results; `met` says whether ours is at most the target."""
    ratio = ours / other if other else None
    met = None if target is None else bool(ours <= target)
    return {
        "question": question, "case": case, "ours": ours, "other": other, "other_name": name, "ratio": ratio,
        "target": target, "met": met,
    }  # fmt: skip


def write_results(
    output: pathlib.Path | None, rows: Sequence[dict[str, Any]], began: float, *, module: str, printed: int = 0
) -> None:
    """Prints the rows but the first `printed`, and writes all with the command, the commit, the machine and how busy it
    was."""
    for found in rows[printed:]:
        sys.stdout.write(json.dumps(found) + "\n")
    if output is not None:
        # Where the bundle lies on this machine says nothing.
        words = [re.sub(r"^--bundle=.*/", "--bundle=", word) for word in sys.argv[1:]]
        content = {
            "command": shlex.join(["python", "-m", module, *words]),
            "commit": current_commit(),
            "machine": f"{machine_description()}; load average {', '.join(f'{x:.1f}' for x in os.getloadavg())}",
            "wall_seconds": time.monotonic() - began,
            "rows": list(rows),
        }
        files.write_json(output, content)
