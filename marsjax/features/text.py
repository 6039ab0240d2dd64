"""The text of an item: its columns through a template."""

from __future__ import annotations

import string
from collections.abc import Mapping

import numpy as np


def columns_of(template: str) -> tuple[str, ...]:
    """The columns that a template such as "{title}. {description}" names, each once.

    Raises:
        ValueError: unbalanced braces, no column, or a format that would be applied to it.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"features.template: expected columns in braces, found {template!r} ({error})") from error
    if any(form or conversion for _, _, form, conversion in parts):
        raise ValueError(
            f"features.template: expected plain {{column}}, found a format or a conversion in {template!r}"
        )
    names = tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
    if not names or "" in names:
        raise ValueError(f"features.template: expected at least one {{column}}, found {template!r}")
    return names


def render(template: str, fields: Mapping[str, np.ndarray]) -> list[str]:
    """One text for each item, with runs of white space as one blank; "" where all its columns are empty.

    Args:
        fields: column -> [I] str.

    Raises:
        ValueError: the template names a column that is not there.
    """
    names = columns_of(template)
    if unknown := [name for name in names if name not in fields]:
        raise ValueError(
            f"features.template: expected some of the columns {', '.join(fields)}, found {', '.join(unknown)}"
        )
    parts = list(string.Formatter().parse(template))
    texts = []
    for values in zip(*(fields[name] for name in names), strict=True):
        value = dict(zip(names, values, strict=True))
        full = "".join(literal + (str(value[name]) if name is not None else "") for literal, name, _, _ in parts)
        texts.append(" ".join(full.split()) if any(str(part).strip() for part in values) else "")
    return texts
