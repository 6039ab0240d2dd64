"""Progress of long work: a bar with rate and time left on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import rich.console
import rich.progress

log = logging.getLogger(__name__)

Advance = Callable[..., None]


def log_to(stream: TextIO, *, force: bool = False) -> None:
    """Sends what is logged to `stream`, save what two libraries tell at length; with `force` nowhere else."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=stream, force=force
    )
    # Orbax tells every step of a save, and every part of a failure, which is raised and told in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.WARNING)  # jax tells which backends it looked for


class _Rate(rich.progress.ProgressColumn):
    def render(self, task: rich.progress.Task) -> str:
        return f"{task.speed:,.0f}/s" if task.speed else ""


@contextlib.contextmanager
def progress(title: str, total: int, *, done: int = 0, every_seconds: float = 10.0) -> Iterator[Advance]:
    """Yields `advance(n, note="")`, to be called when `n` more of `total` units are done."""
    console = rich.console.Console(stderr=True)
    if console.is_terminal:
        columns = (
            "{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            _Rate(),
            rich.progress.TimeRemainingColumn(),
            "{task.fields[note]}",
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=done, note="")

            def advance_bar(n: int = 1, note: str | None = None) -> None:
                fields: dict[str, Any] = {} if note is None else {"note": note}
                bar.update(task, advance=n, **fields)

            yield advance_bar
        return

    began = last = time.monotonic()
    finished, text = done, ""

    def advance_line(n: int = 1, note: str | None = None) -> None:
        nonlocal finished, last, text
        finished += n
        text = text if note is None else note
        now = time.monotonic()
        if now - last >= every_seconds:
            last = now
            rate = (finished - done) / (now - began)
            left = (total - finished) / rate if rate else float("inf")
            log.info("%s %d/%d %.1f/s %.0f s left %s", title, finished, total, rate, left, text)

    yield advance_line
    log.info("%s done in %.1f s %s", title, time.monotonic() - began, text)
