"""Tensors of a file that `torch.save` wrote before 2020, read without PyTorch and without unpickling.

Such a file is a few pickles (a magic number, a protocol version, facts of the machine, the objects, the keys of the
storages), and then the raw storages. Unpickling runs what a file says. Here its instructions are read as data: a call
becomes a tuple of what would be called and with what, and nothing is called. The worst a file can do is to be refused.
"""

from __future__ import annotations

import io
import pathlib
import pickletools
from typing import Any

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}
MARK = object()


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Name -> array of a saved state dictionary.

    Raises:
        ValueError: the file is damaged, or not of this format.
    """
    file = io.BytesIO(pathlib.Path(path).read_bytes())
    try:
        magic, _, _ = (_read_pickle(file) for _ in range(3))
        if magic != MAGIC:
            raise ValueError(f"magic number {magic!r}")
        tensors, keys = _read_pickle(file), _read_pickle(file)
        storages = _tensors_in(tensors)
        data = {}
        for key in keys:
            dtype, count = next((dtype, count) for dtype, name, count, *_ in storages.values() if name == key)
            if int.from_bytes(file.read(8), "little") != count:
                raise ValueError(f"another length of storage {key}")
            data[key] = np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype, count)
        arrays = {}
        for name, (_, key, _, offset, shape, stride) in storages.items():
            flat = data[key][offset:]
            strides = tuple(step * flat.itemsize for step in stride)
            if 1 + sum(step * (size - 1) for step, size in zip(stride, shape, strict=True)) > len(flat):
                raise ValueError(f"{name} reaches beyond its storage")
            arrays[name] = np.lib.stride_tricks.as_strided(flat, shape, strides).copy()
        return arrays
    except (ValueError, KeyError, IndexError, TypeError, StopIteration, AttributeError) as error:
        raise ValueError(f"{path}: expected tensors as torch.save wrote them before 2020, found {error}") from error


def _tensors_in(call: Any) -> dict[str, tuple[Any, ...]]:
    """Name -> (dtype, storage key, elements, offset, shape, stride), from what would be an OrderedDict of tensors."""
    found = {}
    for name, value in call.items():
        function, (storage, offset, shape, stride, *_) = value
        if function != "torch._utils _rebuild_tensor_v2":
            raise ValueError(f"{name} made by {function}")
        _, kind, key, _, count, _ = storage
        found[name] = (DTYPES[kind.split()[-1]], key, count, offset, shape, stride)
    return found


class _Dictionary(dict):
    """What is built by calling OrderedDict, and filled afterwards."""


def _read_pickle(file: io.BytesIO) -> Any:
    """One pickle as data. Calls are (function's name, arguments), and the storages that it refers to their tuples."""
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> Any:
        at = len(stack) - 1 - next(depth for depth, value in enumerate(reversed(stack)) if value is MARK)
        values = stack[at + 1 :]
        del stack[at:]
        return values

    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                stack.append(MARK)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "GLOBAL":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "NONE":
                stack.append(None)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append(_Dictionary())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                values = tuple(stack[-count:])
                del stack[-count:]
                stack.append(values)
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = since_mark()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                values = since_mark()
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "BUILD":  # attributes, such as the metadata of a state dictionary
                stack.pop()
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                pass  # the tuple that says which storage is on the stack already
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_Dictionary() if function == "collections OrderedDict" else (function, arguments))
            case _:
                raise ValueError(f"an instruction {opcode.name}")
    (value,) = stack
    return value
