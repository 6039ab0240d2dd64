"""Several processes, most often one a host, that train one model: who this one is, and what the first one tells all."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

PyTree = Any

AUTO = "auto"  # the coordinator that the cluster knows


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process with the others; to be called before anything runs on a device. All of them must call it.

    Args:
        coordinator: HOST:PORT of the first process, or "auto" where the cluster tells all three (Cloud TPU, SLURM,
            Open MPI, Kubernetes).

    Raises ValueError where an argument lacks, and where the others cannot be reached.
    """
    given = {"--num_processes": num_processes, "--process_id": process_id}
    lacking = [name for name, value in given.items() if value is None]
    if coordinator != AUTO and lacking:
        raise ValueError(
            f"--coordinator={coordinator}: expected {' and '.join(given)}, found no {' and no '.join(lacking)}"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id: expected a number from 0 to {num_processes - 1}, found {process_id}")
    # Its handler would swallow SIGTERM. What a stopped process had is in the checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(None if coordinator == AUTO else coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"--coordinator={coordinator}: expected {num_processes or 'all'} processes that find one another, found "
            f"({str(error).splitlines()[0]}); start all of them with the same --coordinator and --num_processes, each "
            "with its own --process_id, and see docs/hosts.md"
        ) from error
    from_first()  # gloo waits 30 s for others where it first meets them: here, not after data were read at two speeds


def leave(code: int) -> NoReturn:
    """Ends this process at once, after an error: an orderly end would wait for the others, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def count() -> int:
    """How many processes there are; 1 without `join`."""
    return jax.process_count()


def index() -> int:
    """Which of them this one is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes and decides."""
    return jax.process_index() == 0


def from_first(value: Any = None) -> Any:
    """The first process's value (of JSON), on all of them; all must call it. It waits for the slowest."""
    if count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_first() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = multihost_utils.broadcast_one_to_all(text if is_first() else np.zeros(length, np.uint8))
    return json.loads(np.asarray(text).tobytes())


def arrays_from_first(tree: PyTree) -> PyTree:
    """The first process's arrays, on all of them, on the host; the others give any of the same shapes and dtypes."""
    if count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
