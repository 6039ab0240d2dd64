"""Metrics of a stage: JSON lines always, TensorBoard events where tensorboardX is installed."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from marsjax.files import write_bytes

log = logging.getLogger(__name__)

Write = Callable[[int, Mapping[str, float]], None]


@contextlib.contextmanager
def metrics_log(folder: pathlib.Path, *, from_step: int) -> Iterator[Write]:
    """Yields `write(step, {name: value})`.

    Appends to `folder/metrics.jsonl`. Lines after `from_step` are cut first: a run that was killed wrote them for
    steps that are now done again.
    """
    path = folder / "metrics.jsonl"
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= from_step]
        write_bytes(path, "".join(line + "\n" for line in kept).encode())
    events = _event_writer(folder, from_step)
    with path.open("a") as lines:

        def write(step: int, values: Mapping[str, float]) -> None:
            # JSON has no NaN or infinity.
            clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
            lines.write(json.dumps({"step": step, **clean}) + "\n")
            lines.flush()
            if events is not None:
                for name, value in values.items():
                    events.add_scalar(name, value, step)

        try:
            yield write
        finally:
            if events is not None:
                events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line cut off by a kill


def _event_writer(folder: pathlib.Path, from_step: int) -> Any:
    try:
        import tensorboardX
    except ImportError:
        log.info("no TensorBoard events: pip install marsjax[tensorboard] to have them beside metrics.jsonl")
        return None
    return tensorboardX.SummaryWriter(str(folder), purge_step=from_step + 1)
