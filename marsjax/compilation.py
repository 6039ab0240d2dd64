"""Programs that XLA compiled are kept with the results, for the processes and the runs that come after."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform


def keep_compiled(workdir: pathlib.Path) -> None:
    """What is compiled goes to `workdir`/compiled, and is read from there; to be called before jax is imported.

    Methods and seeds share most of their programs, and a program takes up to a minute to compile: of a small study,
    that is most of the time. Programs are made for one kind of processor, so each kind has a folder of its own. Where
    the environment names a folder already (JAX_COMPILATION_CACHE_DIR), that is the one.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.resolve() / "compiled" / _processor()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _processor() -> str:
    """A name for what this processor can do: another one may lack instructions that a program uses."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()  # Linux
    except OSError:
        lines = []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(able.encode()).hexdigest()[:12]}"
