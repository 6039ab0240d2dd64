"""Stages that are not done twice: a folder each, named by what went in, sealed by the sums of what came out."""

from __future__ import annotations

import logging
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

from marsjax import files

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A finished stage."""

    folder: pathlib.Path
    seconds_before: float  # what an earlier run spent on it; 0 where this one built it


def stage(workdir: pathlib.Path, name: str, fingerprint: str, build: Callable[[pathlib.Path], None]) -> Finished:
    """A finished stage, built if it is not there.

    `fingerprint` covers the configuration and the data that the stage reads: another one is another folder, so nothing
    is overwritten. A stage that was interrupted is built again into the same folder, where `build` may find
    checkpoints to continue from. A finished stage whose files no longer match their sums is built again.
    """
    folder = workdir / "stages" / f"{name}-{fingerprint[:12]}"
    seal = folder / "done.json"
    if seal.exists():
        damaged = _damaged(folder)
        if not damaged:
            log.info("%s: already done, skipped (%s)", name, folder)
            return Finished(folder, files.read_json(seal)["seconds"])
        log.warning("%s: %s does not match its sum in %s; building the stage again", name, damaged, seal)
        seal.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    build(folder)
    sums = {path.relative_to(folder).as_posix(): files.sha256_file(path) for path in _results(folder)}
    files.write_json(seal, {"fingerprint": fingerprint, "seconds": time.monotonic() - began, "sha256": sums})
    log.info("%s: done in %.1f s (%s)", name, time.monotonic() - began, folder)
    return Finished(folder, 0.0)


def _results(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "done.json")


def _damaged(folder: pathlib.Path) -> str | None:
    """The first file that is missing or changed, if any."""
    try:
        sums = files.read_json(folder / "done.json")["sha256"]
    except (ValueError, KeyError):
        return "done.json"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file() or files.sha256_file(path) != expected:
            return str(name)
    return None
