"""Lets the C library keep the memory that a training step frees."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> bool:
    """Stops glibc from returning large blocks to the kernel; true where that was possible.

    On CPU every training step allocates and frees the same few blocks of some megabytes. By default glibc maps and
    unmaps each of them, and the kernel clears their pages again and again: a DIN step on 2 cores spent as much time in
    the kernel as in arithmetic (`benchmarks/allocator.py`). To be called before other threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # 32 MiB is the largest threshold that glibc takes; blocks above it are still mapped.
    settings = {_ARENA_MAX: 1, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 1 << 30}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
