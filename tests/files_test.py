"""Files appear whole or not at all."""

import errno
import hashlib
import itertools
import os
import shutil
import zipfile

import numpy as np
import pytest

from marsjax import files


def test_round_trips(tmp_path):
    files.write_json(tmp_path / "a" / "x.json", {"b": [1, None]})
    assert files.read_json(tmp_path / "a" / "x.json") == {"b": [1, None]}
    files.write_arrays(tmp_path / "x.npz", one=np.arange(3), two=np.array(["a", "bc"]))
    with np.load(tmp_path / "x.npz") as arrays:
        np.testing.assert_array_equal(arrays["two"], ["a", "bc"])


ARRAYS = {
    "numbers": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "texts": np.array(["a", "bc", "caf\u00e9"]),
    "nothing": np.zeros((0, 5), np.float64),
    "alone": np.float64(2.5),
    "flags": np.array([True, False, True]),
    "after_three_bytes": np.arange(5),
}


def test_arrays_are_mapped_where_they_lie(tmp_path):
    files.write_arrays(tmp_path / "x.npz", **ARRAYS)
    mapped = files.map_arrays(tmp_path / "x.npz")
    (tmp_path / "x.npz").unlink()  # as versions are that nobody serves any more
    assert list(mapped) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(mapped[name], array)
        assert mapped[name].dtype == np.asarray(array).dtype
        assert mapped[name].ctypes.data % files.ALIGNED == 0 or not mapped[name].size
        assert not mapped[name].flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            mapped[name][...] = array


def test_other_programs_read_the_arrays_and_theirs_are_mapped(tmp_path):
    files.write_arrays(tmp_path / "ours.npz", **ARRAYS)
    np.savez(tmp_path / "theirs.npz", **ARRAYS)
    with np.load(tmp_path / "ours.npz") as ours, zipfile.ZipFile(tmp_path / "ours.npz") as archive:
        assert archive.testzip() is None
        for name, array in files.map_arrays(tmp_path / "theirs.npz").items():
            np.testing.assert_array_equal(ours[name], array)


def test_what_cannot_be_mapped_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "small.npz", one=np.arange(3))
    with pytest.raises(ValueError, match="small.npz: expected arrays without compression, found one.npy"):
        files.map_arrays(tmp_path / "small.npz")
    files.write_arrays(tmp_path / "cut.npz", one=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:4000])
    with pytest.raises(zipfile.BadZipFile):
        files.map_arrays(tmp_path / "cut.npz")


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left while writing .*x.json; nothing was left") as error:
        files.write_json(path, 2)
    assert error.value.errno == errno.ENOSPC
    assert files.read_json(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", float("nan"))


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="x.json: expected JSON"):
        files.read_json(tmp_path / "x.json")


def test_digest_sees_names_types_shapes_and_bytes():
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": np.zeros((2, 3), np.float32)},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": np.eye(2, 3, dtype=np.float32)},
    ]
    assert len({files.digest_arrays(each) for each in [base, *others]}) == 5
    assert files.digest_arrays({"x": base["a"], "y": base["a"]}) == files.digest_arrays(
        {"y": base["a"], "x": base["a"]}
    )


def test_digest_tells_a_scalar_from_an_array_of_one():
    digests = {files.digest_arrays({"a": np.ones(shape, np.float32)}) for shape in [(), (1,), (1, 1)]}
    assert len(digests) == 3


@pytest.mark.parametrize("texts", [["a", "", "longer \N{PILE OF POO}"], [], [""], ["a", "\ud800"]])
def test_digest_of_texts_is_that_of_a_fixed_width_array(texts):
    assert files.digest_arrays({"a": np.array(texts, object)}) == files.digest_arrays({"a": np.array(texts, str)})


def test_python_objects_are_refused_before_anything_is_written(tmp_path):
    objects = np.array([{}], object)
    with pytest.raises(ValueError, match="names: expected plain numbers.*found Python objects"):
        files.write_arrays(tmp_path / "x.npz", names=objects)
    with pytest.raises(ValueError, match="names: expected plain numbers"):
        files.digest_arrays({"names": objects})
    assert not list(tmp_path.iterdir())


def test_sum_of_a_file(tmp_path):
    files.write_bytes(tmp_path / "x", b"abc")
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "x", b"abc")
    assert not list(tmp_path.iterdir())


def write_two(folder, text):
    with files.write_folder(folder) as partial:
        files.write_bytes(partial / "a", text)
        files.write_bytes(partial / "b", text)


def test_folder_is_replaced_as_a_whole(tmp_path):
    write_two(tmp_path / "x", b"old")
    files.write_bytes(tmp_path / "x" / "c", b"old")
    write_two(tmp_path / "x", b"new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == {"a": b"new", "b": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "io"), KeyboardInterrupt()])
def test_failed_folder_keeps_the_old_one(tmp_path, error):
    write_two(tmp_path / "x", b"old")
    with pytest.raises(type(error)) as raised, files.write_folder(tmp_path / "x") as partial:  # noqa: PT012
        files.write_bytes(partial / "a", b"new")
        raise error
    full = getattr(error, "errno", None) == errno.ENOSPC
    assert ("no space left while writing" in str(raised.value)) == full
    assert (tmp_path / "x" / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_failed_renaming_puts_the_old_folder_back(tmp_path, monkeypatch):
    write_two(tmp_path / "x", b"old")
    replace = os.replace

    def refuse(source, target):
        if os.path.basename(source) == "new":
            raise OSError(errno.EIO, "io")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="io"):
        write_two(tmp_path / "x", b"new")
    assert (tmp_path / "x" / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_folder_that_gains_a_file_while_it_is_removed_goes_too(tmp_path, monkeypatch):
    """The threads of a writer that failed may still be at work."""
    (tmp_path / "folder").mkdir()
    remove, late = shutil.rmtree, iter(["a", "b"])

    def removes_and_gains(folder, **options):
        remove(folder, **options)
        for name in itertools.islice(late, 1):
            folder.mkdir()
            (folder / name).write_bytes(b"x")

    monkeypatch.setattr(files.shutil, "rmtree", removes_and_gains)
    files.remove_folder(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    files.remove_folder(tmp_path / "folder")


@pytest.mark.parametrize("at", [1, 2])
def test_interrupt_between_the_renames_keeps_what_was_there(tmp_path, monkeypatch, at):
    with files.write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("old")
    replace, calls = os.replace, itertools.count(1)

    def interrupted(source, target):
        if next(calls) == at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.write_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f" / "x").read_text() == "old"
