"""Where a result comes from: the commit of the code, the machine and the versions."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import subprocess

import jax
import numpy as np

from marsjax import __version__


@functools.cache
def current_commit(folder: pathlib.Path = pathlib.Path(__file__).parent) -> str:
    """The git commit of the code, with "+changes" where tracked files differ from it; the version where git has none.

    Installed into the tree of another project, the package is not among that project's files, and has no commit.
    """
    asked = (["ls-files", "--error-unmatch", "__init__.py"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
    try:
        _, commit, changes = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return f"version {__version__}"
    return commit + ("+changes" if changes else "")


def machine_description() -> str:
    """Processor, cores, memory and versions, without names."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, devices: {devices}; Python {platform.python_version()}, "
        f"jax {jax.__version__}, numpy {np.__version__}"
    )
