"""Whether files that a user supplies are the ones that a recipe was written for: counts and sums."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping

import numpy as np

from marsjax.data.cleaning import SHOWN
from marsjax.records import Problem


def count_problems(found: Mapping[str, int], expected: Mapping[str, int]) -> list[Problem]:
    """One problem "count_differs" that tells every count that is not as published; 0 expects nothing."""
    different = [
        f"{found[what]} {what}, expected {number}"
        for what, number in expected.items()
        if number and what in found and found[what] != number
    ]
    return [Problem("count_differs", len(different), "noted", tuple(different))] if different else []


def sum_problems(path: pathlib.Path) -> list[Problem]:
    """One problem "checksum_differs" that tells every file whose sum is not the listed one.

    Args:
        path: a list as sha256sum or md5sum write it, one `SUM  NAME` a line, with names relative to its folder.

    Raises:
        ValueError: the list or one of its files is missing, or a line is something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected sums as sha256sum writes them, found no such file")
    different = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        expected, _, name = line.partition(" ")
        kind = {64: "sha256", 32: "md5"}.get(len(expected))
        name = name.strip().removeprefix("*")
        if kind is None or not name:
            raise ValueError(f"{path}:{number}: expected a sum and a file name, found {line!r}")
        file = path.parent / name
        if not file.is_file():
            raise ValueError(f"{path}:{number}: expected the file {file}, found none")
        with file.open("rb") as data:
            if hashlib.file_digest(data, kind).hexdigest() != expected.lower():
                different.append(name)
    if not different:
        return []
    return [Problem("checksum_differs", len(different), "noted", tuple(different[:SHOWN]))]


def k_core(user_R: np.ndarray, item_R: np.ndarray, k: int) -> np.ndarray:
    """The rows whose user and item have at least k such rows each, the largest such set, [R] bool."""
    _, user_R = np.unique(user_R, return_inverse=True)
    _, item_R = np.unique(item_R, return_inverse=True)
    keep_R, count = np.ones(len(user_R), bool), -1
    while keep_R.sum() != count:
        count = keep_R.sum()
        for code_R in (user_R, item_R):
            keep_R &= np.bincount(code_R[keep_R], minlength=code_R.max(initial=0) + 1)[code_R] >= k
    return keep_R
