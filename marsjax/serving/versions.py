"""The bundles of a service: one folder a version, and a pointer to the one that is served.

versions/000007-1f3a99c2/   a bundle, under a number that grows and the head of its sum
CURRENT   {"version": ..., "published": {version: seconds}, "earlier": [versions served before, the latest last]}

A version appears by a rename, and is served from the next rename on, that of the pointer.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from marsjax import files
from marsjax.serving.bundle import check_bundle

POINTER, VERSIONS, LOCK = "CURRENT", "versions", ".lock"


class Current(NamedTuple):
    """What the pointer says."""

    version: str
    published: Mapping[str, float]  # when each version that is there was published, in seconds since the epoch
    earlier: tuple[str, ...]  # the latest last


class Overtaken(ValueError):
    """Another version is served than the one that a bundle was to follow."""


def publish(root: pathlib.Path, bundle: pathlib.Path, *, keep: int, only_after: str | None = None) -> str:
    """Copies a bundle into `root`, points to it and removes all but `keep` versions, those served last and then the
    newest; returns the version.

    Args:
        only_after: the version that must be served now; None: any. What was made from one version must not undo that
            somebody has published another one, or gone back, meanwhile.

    Raises:
        ValueError: no bundle or a damaged one, or (Overtaken) not after `only_after`; nothing has changed.
        OSError: the disk is full; nothing has changed.
    """
    if keep < 1:
        raise ValueError(f"publish: expected to keep 1 version or more, found {keep}")
    bundle, root = pathlib.Path(bundle), pathlib.Path(root)
    manifest = check_bundle(bundle)
    with _locked(root):
        before = read_current(root)
        served = "nothing" if before is None else before.version
        if only_after is not None and served != only_after:
            raise Overtaken(f"{root}: expected {only_after} to be served, found {served}; begin anew from that")
        number = 1 + max((int(path.name.split("-")[0]) for path in _versions(root)), default=0)
        version = f"{number:06d}-{manifest['sum'][:8]}"
        with files.write_folder(root / VERSIONS / version) as partial:
            for path in sorted(bundle.rglob("*")):
                if path.is_file():
                    files.copy_file(path, partial / path.relative_to(bundle))
            check_bundle(partial)  # what was copied, not what was there before
            files.sync_folder(partial)
        files.sync_folder(root / VERSIONS, deep=False)  # that it has this name
        earlier, times = ((), {}) if before is None else ((*before.earlier, before.version), before.published)
        _point(root, version, earlier, {**times, version: time.time()})
        _remove_old(root, keep)
    return version


def rollback(root: pathlib.Path) -> str:
    """Points to the version that was served before; returns it. The version left stays on the disk.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    root = pathlib.Path(root)
    with _locked(root):
        current = read_current(root)
        there = {path.name for path in _versions(root)}
        earlier = [] if current is None else [version for version in current.earlier if version in there]
        if current is None or not earlier:
            found = "nothing published" if current is None else f"only {current.version}"
            raise ValueError(
                f"{root}: expected an earlier version to go back to, found {found}; publish another bundle"
            )
        check_bundle(root / VERSIONS / earlier[-1])
        _point(root, earlier[-1], tuple(earlier[:-1]), current.published)
    return earlier[-1]


def read_current(root: pathlib.Path) -> Current | None:
    """What is served now; None before anything was published. Raises ValueError where the pointer is damaged."""
    path = pathlib.Path(root) / POINTER
    if not path.is_file():
        return None
    value: Any = files.read_json(path)
    try:
        times = {str(version): float(at) for version, at in value["published"].items()}
        return Current(str(value["version"]), times, tuple(map(str, value["earlier"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected version, published and earlier, found {type(error).__name__}: {error}; publish again"
        ) from error


def folder_of(root: pathlib.Path, version: str) -> pathlib.Path:
    """The bundle of a version."""
    return pathlib.Path(root) / VERSIONS / version


def _point(root: pathlib.Path, version: str, earlier: tuple[str, ...], times: Mapping[str, float]) -> None:
    there = {path.name for path in _versions(root)}
    kept = [name for name in earlier if name in there and name != version]
    published = {name: at for name, at in times.items() if name in there}
    files.write_json(root / POINTER, {"version": version, "published": published, "earlier": kept})


def _versions(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in (root / VERSIONS).glob("[0-9]*-*") if path.is_dir())


def _remove_old(root: pathlib.Path, keep: int) -> None:
    """Keeps what was served last, and then the newest of what was gone back from: it may have been a mistake, and what
    the runner trained is nowhere else."""
    current, there = read_current(root), _versions(root)
    served = () if current is None else (current.version, *current.earlier[::-1])
    kept = list(dict.fromkeys([*served, *(path.name for path in there[::-1])]))[:keep]
    for path in there:
        if path.name not in kept:
            files.remove_folder(path)


def _locked(root: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """One publisher at a time: the others wait."""
    root.mkdir(parents=True, exist_ok=True)
    return files.locked(root / LOCK, held=None)
