"""The choice of the CTR backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from marsjax.ctr.din import Din
from marsjax.ctr.dnn import Dnn
from marsjax.records import GRADE_MARKS


def make_backbone(
    settings: Mapping[str, Any], *, n_items: int, n_categories: int, n_users: int, n_features: int
) -> nn.Module:
    """The model that `settings` (the section `ctr` of a configuration) names, for tables of these sizes.

    Raises ValueError for an unknown backbone.
    """
    shared = {
        "n_items": n_items,
        "n_categories": n_categories,
        "n_users": n_users if settings["user_id"] else 0,
        "embedding": settings["embedding"],
        "content": settings["content"] if settings["inputs"] != "ids" and n_features else 0,
        "levels": LEVELS[settings["inputs"]],
        "apart": settings["apart"],
        "tower": tuple(settings["tower"]),
        "activation": settings["activation"],
        "dtype": settings["dtype"],
    }
    if settings["backbone"] not in BACKBONES:
        raise ValueError(f"ctr.backbone: expected one of {sorted(BACKBONES)}, found {settings['backbone']!r}")
    return BACKBONES[settings["backbone"]](settings, shared)


def _din(settings: Mapping[str, Any], shared: dict[str, Any]) -> nn.Module:
    return Din(**shared, attention=tuple(settings["attention"]), softmax=settings["softmax"])


def _dnn(settings: Mapping[str, Any], shared: dict[str, Any]) -> nn.Module:
    return Dnn(**shared)


BACKBONES = {"din": _din, "dnn": _dnn}
DTYPES = ("float32", "bfloat16")
# Marks of history items: of ids and categories; of content, feedback and priors too; of feedback and priors by grade.
LEVELS = {"ids": 0, "strong": 2, "graded": GRADE_MARKS}
INPUTS = tuple(LEVELS)
