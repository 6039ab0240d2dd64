"""Which bundle and which donors should answer, and how they come into memory.

lenders/000003/   donors of a bundle with newer histories, vectors and index, and a manifest with their sums
LENDERS           {"version": of the bundle, "lenders": name of the folder}
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from marsjax import files
from marsjax.serving import lending, versions
from marsjax.serving.bundle import Bundle, load_bundle
from marsjax.serving.engine import Snapshot

POINTER, FOLDER, MANIFEST = "LENDERS", "lenders", "manifest.json"
IN_BUNDLE, UNREADABLE = "bundle", "?"  # in place of the name of a folder of donors
KEPT = 3  # folders of donors


class Wanted(NamedTuple):
    """What the pointers say."""

    version: str
    lenders: str  # "bundle": those in it
    published: float

    @property
    def key(self) -> str:
        return f"{self.version} {self.lenders}"


def wanted(root: pathlib.Path) -> Wanted | None:
    """What should answer; None before anything was published. Raises ValueError where the pointer to
    the bundle is damaged; with the one to the donors, it is `load` that does."""
    current = versions.read_current(root)
    if current is None:
        return None
    path, lenders = pathlib.Path(root) / POINTER, IN_BUNDLE
    published = current.published.get(current.version, 0.0)
    if path.is_file():
        try:
            value = files.read_json(path)
        except ValueError:
            return Wanted(current.version, UNREADABLE, published)
        if isinstance(value, dict) and value.get("version") == current.version:
            lenders = str(value.get("lenders"))
    return Wanted(current.version, lenders, published)


def at_start(root: pathlib.Path, found: Wanted) -> list[Wanted]:
    """What may answer where nothing does yet, the best first: what `found` names, its bundle with the donors in it, and
    the versions that were served before, the latest first. Anything is better than no answer."""
    current = versions.read_current(root)
    earlier, times = ((), {}) if current is None else (current.earlier[::-1], current.published)
    others = (Wanted(version, IN_BUNDLE, times.get(version, 0.0)) for version in (found.version, *earlier))
    return list(dict.fromkeys([found, *others]))


def key_of(snapshot: Snapshot) -> str:
    """As `Wanted.key`."""
    return f"{snapshot.version} {snapshot.lenders_version}"


def load(root: pathlib.Path, found: Wanted, now: Snapshot | None) -> Snapshot:
    """Loads what `found` names; the bundle of `now` is used again where it is the same.

    Raises:
        ValueError, OSError: damaged or missing files.
    """
    same = now is not None and now.version == found.version
    bundle = now.bundle if same and now is not None else load_bundle(versions.folder_of(root, found.version))
    lenders = bundle.lenders
    if found.lenders == UNREADABLE:
        raise ValueError(f"{pathlib.Path(root) / POINTER}: expected JSON, found none; the runner writes it again")
    if found.lenders != IN_BUNDLE:
        folder = pathlib.Path(root) / FOLDER / pathlib.Path(found.lenders).name
        _check(folder)
        lenders = lending.read_lenders(folder, bundle.items.item_ND)
    return Snapshot(found.version, bundle, lenders, found.lenders, found.published)


def publish_lenders(root: pathlib.Path, version: str, lenders: lending.Lenders) -> str:
    """Writes donors with a new index beside the ones that are read, and points to them; returns their name.

    Raises OSError where the disk is full; nothing has changed.
    """
    folder = pathlib.Path(root) / FOLDER
    there = sorted(path for path in folder.glob("[0-9]*") if path.is_dir())
    name = f"{1 + int(there[-1].name if there else 0):06d}"
    with files.write_folder(folder / name) as partial:
        lending.write_lenders(partial, lenders)
        sums = {
            path.relative_to(partial).as_posix(): files.sha256_file(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        files.write_json(partial / MANIFEST, {"version": version, "sha256": sums})
        files.sync_folder(partial)
    files.sync_folder(folder, deep=False)  # that it has this name
    files.write_json(pathlib.Path(root) / POINTER, {"version": version, "lenders": name})
    for path in there[: -(KEPT - 1)]:
        files.remove_folder(path)
    return name


def _check(folder: pathlib.Path) -> None:
    manifest = files.read_json(folder / MANIFEST)
    sums = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict):
        raise ValueError(f"{folder / MANIFEST}: expected sums of the files, found none; the runner builds it again")
    for name, expected in sums.items():
        found = files.sha256_file(folder / name)
        if found != expected:
            raise ValueError(f"{folder / name}: expected sha256 {expected}, found {found}; the runner builds it again")


def current_bundle(root: pathlib.Path) -> tuple[str, Bundle] | None:
    """Version and bundle that are published; None before anything was."""
    current = versions.read_current(root)
    return None if current is None else (current.version, load_bundle(versions.folder_of(root, current.version)))
