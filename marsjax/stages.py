"""Stages that are not done twice: a folder each, named by what went in, sealed by the sums of what came out."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import tempfile
import time
from collections.abc import Callable

from marsjax import files, hosts
from marsjax.provenance import current_commit

log = logging.getLogger(__name__)

SEAL = "done.json"
SEEN_SECONDS = 60.0  # a disk of the network may show late what another host wrote


class Stages:
    """The stages of a working folder.

    Attributes:
        seconds_before: what earlier runs spent on the stages that this one skipped, each from its last start on.
        commits: the commits of the code that finished the stages used here.
    """

    def __init__(self, workdir: pathlib.Path):
        self.workdir = pathlib.Path(workdir)
        self.seconds_before = 0.0
        self.commits: set[str] = set()
        self._commit = current_commit()  # now: what is committed later is not the code that runs

    def __call__(self, name: str, fingerprint: str, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """The folder of a finished stage, built if it is not there.

        `fingerprint` covers the configuration and the data that the stage reads, not the code: another one is another
        folder, so nothing is overwritten. A stage that was interrupted is built again into the same folder, where
        `build` may find checkpoints to continue from. A finished stage whose files no longer match their sums is built
        again. Where another process is building the stage, it is waited for.
        """
        folder = self._folder(name, fingerprint)
        seal = _seal(folder)
        if not self._is_done(folder, name):
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder):
                # Another process may have built it since, and then the seal is another.
                if _seal(folder) == seal or not self._is_done(folder, name):
                    self._build(folder, name, fingerprint, build)
        done = files.read_json(folder / SEAL)
        self.commits.add(done["commit"])
        return folder

    def together(self, name: str, fingerprint: str, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
        """As a call, for a stage that all processes must build at the same time, since their devices train together.

        The first one's folder is that of the stage; what the others write is thrown away.

        Raises ValueError where the processes do not read the same data and configuration, or do not share a disk.
        """
        if hosts.count() == 1:
            return self(name, fingerprint, build)

        def announced(folder: pathlib.Path) -> None:
            hosts.from_first([name, fingerprint])
            build(folder)

        if hosts.is_first():
            folder = self(name, fingerprint, announced)
            hosts.from_first(None)
            return folder
        while (asked := hosts.from_first()) is not None:
            if asked != [name, fingerprint]:
                raise ValueError(
                    f"expected all processes to train {asked[0]}, found one that is at {name} or has other data or "
                    "another configuration; start all of them with the same flags and the same files"
                )
            with tempfile.TemporaryDirectory(prefix="marsjax-") as scratch:
                build(pathlib.Path(scratch))
        seal, deadline = self._folder(name, fingerprint) / SEAL, time.monotonic() + SEEN_SECONDS
        while not seal.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"expected {seal}, which the first process wrote, found none; give all processes the same "
                    "--workdir on a disk that all hosts share"
                )
            time.sleep(0.1)
        return self(name, fingerprint, build)

    def _folder(self, name: str, fingerprint: str) -> pathlib.Path:
        return self.workdir / "stages" / f"{name}-{fingerprint[:12]}"

    def _is_done(self, folder: pathlib.Path, name: str) -> bool:
        if not (folder / SEAL).exists():
            return False
        damaged = _damaged(folder)
        if damaged:
            log.warning("%s: %s does not match its sum in %s; building the stage again", name, damaged, folder / SEAL)
            return False
        self.seconds_before += files.read_json(folder / SEAL)["seconds"]
        log.info("%s: already done, skipped (%s)", name, folder)
        return True

    def _build(self, folder: pathlib.Path, name: str, fingerprint: str, build: Callable[[pathlib.Path], None]) -> None:
        (folder / SEAL).unlink(missing_ok=True)
        began = time.monotonic()
        build(folder)
        done = {
            "fingerprint": fingerprint,
            "commit": self._commit,
            "seconds": time.monotonic() - began,
            "sha256": {path.relative_to(folder).as_posix(): files.sha256_file(path) for path in _results(folder)},
        }
        files.write_json(folder / SEAL, done)
        log.info("%s: done in %.1f s (%s)", name, done["seconds"], folder)


def _alone(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a stage."""
    return files.locked(folder.parent / f".{folder.name}.lock", held=None)


def _results(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files but the seal and the checkpoints, which are of no use once the stage is sealed."""
    inside = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in inside if path.relative_to(folder).parts[0] not in (SEAL, "checkpoints"))


def _seal(folder: pathlib.Path) -> bytes | None:
    """The seal as it is; None where there is none."""
    try:
        return (folder / SEAL).read_bytes()
    except FileNotFoundError:
        return None


def _damaged(folder: pathlib.Path) -> str | None:
    """The first file that is missing or changed, if any."""
    try:
        done = files.read_json(folder / SEAL)
        sums, _, _ = done["sha256"], done["seconds"], done["commit"]
    except (ValueError, KeyError, TypeError):
        return SEAL
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file() or files.sha256_file(path) != expected:
            return str(name)
    return None
