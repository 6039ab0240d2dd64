"""Publishing is all or nothing; going back is one call; damage is refused before it is served."""

import os
import shutil
import threading

import numpy as np
import pytest

from marsjax import files
from marsjax.serving import snapshots, versions
from marsjax.serving.bundle import check_bundle


@pytest.fixture
def variants(bundle_folder, tmp_path):
    """Two bundles that differ in their manifests."""
    other = tmp_path / "other"
    shutil.copytree(bundle_folder, other)
    manifest = files.read_json(other / "manifest.json")
    del manifest["sum"]
    manifest["trained"] = {"to": "1"}
    files.write_json(other / "manifest.json", manifest | {"sum": files.digest_json(manifest)})
    return bundle_folder, other


def test_versions_are_published_kept_and_rolled_back(variants, tmp_path):
    root = tmp_path / "root"
    assert versions.read_current(root) is None
    published = [versions.publish(root, variants[i % 2], keep=3) for i in range(4)]
    assert published == sorted(published)
    assert versions.read_current(root).version == published[3]
    assert [path.name for path in sorted((root / "versions").iterdir())] == published[1:]
    assert versions.rollback(root) == published[2]
    assert versions.rollback(root) == published[1]
    with pytest.raises(ValueError, match="expected an earlier version to go back to, found only"):
        versions.rollback(root)
    assert versions.read_current(root).version == published[1]
    newest = versions.publish(root, variants[0], keep=3)  # a number that was never used before
    assert newest > published[3]
    # What was served last, and of what was gone back from the newest.
    assert [path.name for path in sorted((root / "versions").iterdir())] == [published[1], published[3], newest]
    assert versions.rollback(root) == published[1]
    again = versions.publish(root, versions.folder_of(root, published[3]), keep=3)  # forward again
    assert versions.read_current(root).version == again


def test_what_follows_one_version_does_not_replace_another(variants, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(versions.Overtaken, match="expected x to be served, found nothing"):
        versions.publish(root, variants[0], keep=3, only_after="x")
    first = versions.publish(root, variants[0], keep=3)
    second = versions.publish(root, variants[1], keep=3, only_after=first)
    before = versions.read_current(root)
    with pytest.raises(versions.Overtaken, match=f"expected {first} to be served, found {second}"):
        versions.publish(root, variants[0], keep=3, only_after=first)
    assert versions.read_current(root) == before
    assert [path.name for path in sorted((root / "versions").iterdir())] == [first, second]


def test_a_version_is_on_the_disk_before_anything_points_to_it(variants, tmp_path, monkeypatch):
    """Else a loss of power would leave a pointer to files that are empty."""
    root, synced, pointed = tmp_path / "root", [], []
    sync, replace = os.fsync, os.replace

    def replacing(source, path):
        if str(path) == str(root / versions.POINTER):
            pointed.extend(synced)
        replace(source, path)

    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.stat(file).st_ino), sync(file)))
    monkeypatch.setattr(os, "replace", replacing)
    folder = versions.folder_of(root, versions.publish(root, variants[0], keep=1))
    assert {path.stat().st_ino for path in [*folder.rglob("*"), folder, folder.parent]} <= set(pointed)


def test_what_is_served_is_kept_however_old(variants, tmp_path):
    root = tmp_path / "root"
    first = versions.publish(root, variants[0], keep=2)
    versions.publish(root, variants[1], keep=2)
    versions.rollback(root)
    versions.publish(root, variants[1], keep=1)
    assert versions.read_current(root).version != first
    assert not versions.folder_of(root, first).exists()


def test_a_published_version_is_a_copy(variants, tmp_path):
    """Changing the exported bundle afterwards changes nothing that is served."""
    root = tmp_path / "root"
    version = versions.publish(root, variants[1], keep=2)
    with open(variants[1] / "users.npz", "r+b") as file:
        file.write(b"broken")
    check_bundle(versions.folder_of(root, version))
    with pytest.raises(ValueError, match=r"users.npz: expected sha256"):
        versions.publish(root, variants[1], keep=2)
    assert versions.read_current(root).version == version


@pytest.mark.parametrize("name", ["ctr/content.json", "donor_units.npy", "index/graph.usearch", "scoring.stablehlo"])
def test_one_flipped_bit_or_a_shorter_file_is_refused(variants, tmp_path, name):
    root = tmp_path / "root"
    versions.publish(root, variants[0], keep=3)
    version = versions.publish(root, variants[1], keep=3)
    path = versions.folder_of(root, version) / name
    data = bytearray(path.read_bytes())
    for damaged in (data[:-1], bytes([*data[: len(data) // 2], data[len(data) // 2] ^ 1, *data[len(data) // 2 + 1 :]])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="expected sha256"):
            check_bundle(versions.folder_of(root, version))
    assert versions.rollback(root) != version  # away from a damaged version: always
    versions.publish(root, variants[0], keep=3)


def test_a_damaged_pointer_is_named(variants, tmp_path):
    root = tmp_path / "root"
    versions.publish(root, variants[0], keep=1)
    for text in ("", "[]", '{"version": "x"}', '{"version": "x", "published": "y", "earlier": []}'):
        (root / versions.POINTER).write_text(text)
        with pytest.raises(ValueError, match="CURRENT: expected"):
            versions.read_current(root)


def test_clocks_do_not_order_versions(variants, tmp_path, monkeypatch):
    root = tmp_path / "root"
    first = versions.publish(root, variants[0], keep=3)
    monkeypatch.setattr(versions.time, "time", lambda: 5.0)  # long ago
    second = versions.publish(root, variants[1], keep=3)
    assert second > first
    current = versions.read_current(root)
    assert (current.version, current.published[second], current.earlier) == (second, 5.0, (first,))
    assert versions.rollback(root) == first


def test_a_version_is_as_old_as_it_is_though_it_is_served_again(variants, tmp_path, monkeypatch):
    root, clock = tmp_path / "root", [10.0]
    monkeypatch.setattr(versions.time, "time", lambda: clock[0])
    first = versions.publish(root, variants[0], keep=2)
    clock[0] = 20.0
    second = versions.publish(root, variants[1], keep=2)
    clock[0] = 30.0
    versions.rollback(root)
    assert snapshots.wanted(root) == snapshots.Wanted(first, "bundle", 10.0)
    assert versions.read_current(root).published == {first: 10.0, second: 20.0}
    versions.publish(root, variants[1], keep=2)
    choices = snapshots.at_start(root, snapshots.wanted(root))
    assert [(choice.version == first, choice.published) for choice in choices] == [(False, 30.0), (True, 10.0)]


def test_publishers_take_turns(variants, tmp_path):
    root, out = tmp_path / "root", []
    threads = [
        threading.Thread(target=lambda i=i: out.append(versions.publish(root, variants[i % 2], keep=10)))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(out)) == 4
    current = versions.read_current(root)
    assert sorted([*current.earlier, current.version]) == sorted(out)


def test_a_full_disk_publishes_nothing(variants, small_disk):
    root = small_disk / "root"
    published = []

    def fill():
        while True:
            published.append(versions.publish(root, variants[0], keep=99))

    with pytest.raises(OSError, match="[Nn]o space left"):
        fill()
    assert versions.read_current(root).version == published[-1]
    assert len(published) > 1
    check_bundle(versions.folder_of(root, published[-1]))
    assert not [path for path in (root / "versions").iterdir() if path.name.startswith(".")]


def test_keeping_nothing_is_refused(variants, tmp_path):
    with pytest.raises(ValueError, match="expected to keep 1 version or more"):
        versions.publish(tmp_path, variants[0], keep=0)


def test_donors_of_a_bundle_have_room_for_what_they_will_do(bundle_folder):
    """The runner gives them as many items as the bundle has columns."""
    described = files.read_json(bundle_folder / "manifest.json")["config"]
    (path,) = bundle_folder.rglob("donors.npz")
    with np.load(path) as arrays:
        widths = {arrays[name].shape[1] for name in ("item_PL", "time_PL", "mark_PL")}
    assert widths == {described["retrieval"]["history"]}
