"""Files of tensors are data: nothing in them is run, and what is damaged is refused."""

import collections
import os
import pathlib
import pickle
import pickletools
import struct

import numpy as np
import pytest

from marsjax.features.torch_file import MAGIC, read_tensors


def saved(objects: bytes, keys=("7",), data=b""):
    """A file as torch.save wrote it before 2020, with `objects` as the pickle of the tensors."""
    head = [pickle.dumps(value, 2) for value in (MAGIC, 1001, {"protocol_version": 1001, "little_endian": True})]
    return b"".join([*head, objects, pickle.dumps(list(keys), 2), data])


def tensor(shape, stride, count=6, function=b"ctorch._utils\n_rebuild_tensor_v2\n"):
    """The pickle of {"a": tensor}, written by hand as its instructions."""
    ints = lambda values: b"(" + b"".join(b"K" + bytes([value]) for value in values) + b"t"  # noqa: E731
    storage = (
        b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"7" + b"X\x03\0\0\0cpuK" + bytes([count]) + b"NtQ"
    )
    arguments = storage + b"K\0" + ints(shape) + ints(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\0\0\0a" + function + arguments + b"Ru."


FLOATS = struct.pack("<q6f", 6, *range(6))


def test_tensors_are_read_with_their_strides(tmp_path):
    path = tmp_path / "x.pth"
    for shape, stride, expected in (
        ((2, 3), (3, 1), [[0, 1, 2], [3, 4, 5]]),
        ((3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]]),
    ):
        path.write_bytes(saved(tensor(shape, stride), data=FLOATS))
        np.testing.assert_array_equal(read_tensors(path)["a"], expected)


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize(
    "objects",
    [
        pickle.dumps(Evil(), 2),
        pickle.dumps(collections.OrderedDict(a=Evil()), 2),
        tensor((2, 3), (3, 1), function=b"cos\nsystem\n"),
    ],
)
def test_what_a_file_would_call_is_not_called(tmp_path, monkeypatch, objects):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("x.pth").write_bytes(saved(objects, data=FLOATS))
    assert "system" in " ".join(str(argument) for _, argument, _ in pickletools.genops(objects))
    with pytest.raises(ValueError, match="x.pth: expected tensors as torch.save wrote them"):
        read_tensors(pathlib.Path("x.pth"))
    assert not pathlib.Path("was_run").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\3\4 a newer file",
        saved(tensor((2, 3), (3, 1)), data=FLOATS[:-3]),
        saved(tensor((2, 4), (4, 1)), data=FLOATS),
        saved(tensor((2, 3), (3, 1)), data=struct.pack("<q6f", 5, *range(6))),
        saved(tensor((2, 3), (3, 1)), keys=("8",)),
    ],
    ids=["empty", "zip", "cut", "beyond", "length", "key"],
)
def test_damaged_files_are_refused(tmp_path, data):
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(ValueError, match="x.pth: expected tensors as torch.save wrote them before 2020"):
        read_tensors(tmp_path / "x.pth")
