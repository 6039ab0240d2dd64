"""The choice of the CTR backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from marsjax.ctr.din import Din
from marsjax.ctr.dnn import Dnn


def make_backbone(settings: Mapping[str, Any], *, n_items: int, n_categories: int, n_users: int) -> nn.Module:
    """The model that `settings` (the section `ctr` of a configuration) names.

    Raises ValueError for an unknown backbone.
    """
    shared = {
        "n_items": n_items,
        "n_categories": n_categories,
        "n_users": n_users if settings["user_id"] else 0,
        "embedding": settings["embedding"],
        "apart": settings["apart"],
        "tower": tuple(settings["tower"]),
        "activation": settings["activation"],
    }
    backbones = {
        "din": lambda: Din(**shared, attention=tuple(settings["attention"]), softmax=settings["softmax"]),
        "dnn": lambda: Dnn(**shared),
    }
    if settings["backbone"] not in backbones:
        raise ValueError(f"ctr.backbone: expected one of {sorted(backbones)}, found {settings['backbone']!r}")
    return backbones[settings["backbone"]]()
