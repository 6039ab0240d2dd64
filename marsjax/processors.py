"""The processors of this machine that the process may use."""

from __future__ import annotations

import os


def processors() -> list[int]:
    """Their numbers, in order."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
