"""Files appear whole or not at all."""

import errno
import os

import numpy as np
import pytest

from marsjax import files


def test_round_trips(tmp_path):
    files.write_json(tmp_path / "a" / "x.json", {"b": [1, None]})
    assert files.read_json(tmp_path / "a" / "x.json") == {"b": [1, None]}
    files.write_arrays(tmp_path / "x.npz", one=np.arange(3), two=np.array(["a", "bc"]))
    with np.load(tmp_path / "x.npz") as arrays:
        np.testing.assert_array_equal(arrays["two"], ["a", "bc"])


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
