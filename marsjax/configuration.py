"""Configurations: read from a Python file, overridden by flags, and refused by name where a key or a type is wrong."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from marsjax.files import digest_json

FLAG = "--config."


def split_overrides(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of a command line.

    Returns {key: text}, where the last one of a key counts, and the words that are left.

    Raises:
        ValueError: a key without a value.
    """
    overrides, rest, queue = {}, [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith(FLAG):
            rest.append(word)
            continue
        flag, equals, text = word.partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise ValueError(f"{flag}: expected {flag}=VALUE, found no value")
            text = queue.pop(0)
        overrides[flag.removeprefix(FLAG)] = text
    return overrides, rest


def load_config(spec: str, overrides: Mapping[str, str]) -> ConfigDict:
    """Runs `get_config(variant)` of a file, applies overrides and locks the result.

    Args:
        spec: FILE or FILE:VARIANT; without a variant `get_config` is given "".
        overrides: dotted key -> text, such as {"ctr.batch_size": "1024"}.

    Raises:
        ValueError: no such file, a file that fails, an unknown variant or key, or a value of the wrong type.
    """
    return with_overrides(_run(spec), overrides)


def with_overrides(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Applies overrides to a configuration and locks it; raises as `load_config`."""
    config.lock()
    for key, text in overrides.items():
        override(config, key, text)
    for key, value in _leaves(config).items():
        for part in value if isinstance(value, tuple | list) else [value]:
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"config.{key} expects a finite number, got {part}")
    return config


def _run(spec: str) -> ConfigDict:
    file, colon, variant = spec.partition(":")
    path = pathlib.Path(file)
    module_spec = importlib.util.spec_from_file_location("marsjax_config", path) if path.is_file() else None
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"--config: expected FILE.py or FILE.py:VARIANT, found no such Python file {file!r}")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("expected a function get_config(variant), found none")
        takes_variant = bool(inspect.signature(module.get_config).parameters)
        if colon and not takes_variant:
            raise ValueError(f"get_config() has no variants, found {variant!r}")
        config = module.get_config(variant) if takes_variant else module.get_config()
    except Exception as error:
        # A file of the user's own may fail in any way. Messages of ml_collections name the key; str() of a KeyError
        # would quote it.
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{file}: {kind}{message}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{file}: get_config must return an ml_collections.ConfigDict, found {type(config).__name__}")
    return config


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one dotted key from text, by the type of the value that is there.

    "none" is a value of placeholders (`config_dict.placeholder(type)`) only.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value of the wrong type.
    """
    *parents, last = key.split(".")
    node: Any = config
    for name in [*parents, last]:
        if not isinstance(node, ConfigDict) or name not in node:
            near = difflib.get_close_matches(key, [*_leaves(config)], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "`--config=FILE --help` lists every key"
            raise ValueError(f"unknown config key {key}; {hint}")
        parent, node = node, node[name]
    if isinstance(node, ConfigDict):
        raise ValueError(f"config.{key} is a section; set one of {', '.join(f'{key}.{name}' for name in node)}")
    fields = dict(parent.items(preserve_field_references=True))
    if isinstance(fields[last], FieldReference) and text.lower() == "none":
        parent[last] = None
    else:
        parent[last] = _parse(key, text, node, parent.get_type(last))


def _parse(key: str, text: str, now: Any, kind: type) -> Any:
    if kind in (tuple, list):
        parts = [part.strip(" '\"") for part in text.strip("()[] ").split(",") if part.strip()]
        return kind(_parse(key, part, None, type(now[0]) if now else str) for part in parts)
    if kind is str:
        return text
    names = {int: "int (a whole number)", float: "float (a finite number)", bool: "bool (true or false)"}
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"config.{key} expects {names.get(kind, kind.__name__)}, got {text!r}") from None
    return value


def check_choices(
    config: ConfigDict, choices: Mapping[str, Collection[str]], *, at_least_one: Sequence[str] = ()
) -> None:
    """Refuses values that are none of the choices of their key, and numbers below 1.

    A key that holds several values needs at least one, and each must be a choice.

    Raises:
        ValueError: naming the key, the choices and what was found; or a key is missing.
    """
    leaves = _leaves(config)
    if lacking := [key for key in (*choices, *at_least_one) if key not in leaves]:
        raise ValueError(
            f"expected a configuration with every key, found none of {', '.join(lacking[:3])}; start from "
            "marsjax.defaults.default_config()"
        )
    for key, known in choices.items():
        value = leaves[key]
        values = [value] if isinstance(value, str) else list(value)
        wrong = [name for name in values if name not in known]
        if wrong or not values:
            near = difflib.get_close_matches(wrong[0], [*known], n=1) if wrong else []
            hint = f"; did you mean {near[0]}?" if near else ""
            found = repr(wrong[0]) if wrong else "none"
            expected = ", ".join(name or "'' (none)" for name in sorted(known))
            raise ValueError(f"config.{key} expects one of {expected}, got {found}{hint}")
    for key in at_least_one:
        if leaves[key] < 1:
            raise ValueError(f"config.{key} expects 1 or more, got {leaves[key]}")


def _leaves(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, in the order of the keys."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
    return leaves


def describe(config: ConfigDict, *sources: pathlib.Path | str) -> str:
    """Every key with its value, one a line, ready to be copied as a flag.

    Where a source file explains a field at the end of its line (`ctr.cap = 200  # longest history`), so does this; the
    first explanation counts.
    """
    notes: dict[str, str] = {}
    explained = re.compile(r"^\s*(\w+(?:\.\w+)+) = [^#\n]*(?:\n[^#=\n]*)?# (.+)$", re.MULTILINE)
    for source in sources:
        for name, note in explained.findall(pathlib.Path(source).read_text()):
            notes.setdefault(name.removeprefix("config."), note)
    lines = []
    for key, value in _leaves(config).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        # A file writes `columns.user` for data.columns.user.
        note = notes.get(key) or notes.get(".".join(key.split(".")[-2:]))
        line = f"  {FLAG}{key}={text}"
        lines.append(f"{line:<48}  # {note}" if note else line)
    return "\n".join(lines)


def to_json(config: Any) -> Any:
    """Plain dictionaries, lists, numbers and strings."""
    if isinstance(config, ConfigDict):
        return {name: to_json(config[name]) for name in config}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    return config


def fingerprint(*parts: Any) -> str:
    """sha256 over JSON values: equal parts have equal fingerprints."""
    return digest_json([to_json(part) for part in parts])
