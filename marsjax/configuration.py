"""Configurations: read from a Python file, overridden by flags, and refused by name where a key or a type is wrong."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


def load_config(spec: str, overrides: Mapping[str, str]) -> ConfigDict:
    """Runs `get_config(variant)` of a file and applies overrides.

    Args:
        spec: FILE or FILE:VARIANT.
        overrides: dotted key -> text, such as {"ctr.batch_size": "1024"}.

    Raises:
        ValueError: no such file, no get_config, an unknown variant or key, or a value of the wrong type.
    """
    file, _, variant = spec.partition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"--config: expected FILE or FILE:VARIANT, found no file {file!r}")
    module_spec = importlib.util.spec_from_file_location("marsjax_config", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{file}: expected a function get_config(variant), found none")
    config = module.get_config(variant)
    config.lock()
    for key, text in overrides.items():
        override(config, key, text)
    _check_finite(config, "")
    return config


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one dotted key from text, by the type of the value that is there."""
    *parents, last = key.split(".")
    node: Any = config
    for depth, name in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict) or name not in node:
            known = _keys(config)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown config key {'.'.join(key.split('.')[: depth + 1])}{hint}")
        if depth < len(parents):
            node = node[name]
    if isinstance(node[last], ConfigDict):
        raise ValueError(f"config.{key} is a section; set one of {', '.join(f'{key}.{name}' for name in node[last])}")
    node[last] = _parse(key, text, node[last], node.get_type(last))


def _parse(key: str, text: str, now: Any, kind: type) -> Any:
    wrong = ValueError(f"config.{key} expects {_name(kind, now)}, got {text!r}")
    if (now is None or kind is float) and text.lower() in ("none", "null"):
        return None
    if kind is bool:
        values = {"true": True, "false": False, "1": True, "0": False}
        if text.lower() not in values:
            raise wrong
        return values[text.lower()]
    if kind is tuple:
        body = text.strip("()[] ")
        parts = [part.strip(" '\"") for part in body.split(",") if part.strip()]
        element = type(now[0]) if now else str
        return tuple(_parse(key, part, None if element is float else part, element) for part in parts)
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        raise wrong from None
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong
    return value


def _name(kind: type, now: Any) -> str:
    if kind is tuple:
        return f"a list such as {','.join(str(part) for part in now) or 'a,b'}"
    return {int: "int (a whole number)", float: "float (a finite number)", bool: "bool (true or false)"}.get(
        kind, kind.__name__
    )


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    out = []
    for name in config:
        if isinstance(config[name], ConfigDict):
            out += [f"{prefix}{name}", *_keys(config[name], f"{prefix}{name}.")]
        else:
            out.append(f"{prefix}{name}")
    return out


def _check_finite(config: ConfigDict, prefix: str) -> None:
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            _check_finite(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"config.{prefix}{name} expects a finite number, got {value}")


def describe(config: ConfigDict) -> str:
    """Every key with its value, one a line, ready to be copied as a flag."""
    lines = []
    for key in _keys(config):
        node: Any = config
        for name in key.split("."):
            node = node[name]
        if not isinstance(node, ConfigDict):
            text = ",".join(str(part) for part in node) if isinstance(node, tuple) else str(node)
            lines.append(f"  --config.{key}={text}")
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
    return hashlib.sha256(json.dumps([to_json(part) for part in parts], sort_keys=True).encode()).hexdigest()
