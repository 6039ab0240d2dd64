"""Planted data, made in seconds: the quickstart.

    marsjax run --config=configs/synthetic.py --workdir=runs/quickstart

Variants: `1seed`, `shuffled` (features permuted between items: the gain of MARS must vanish).
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    config = default_config("mars")
    config.seeds = (0, 1, 2)
    if variant == "1seed":
        config.seeds = (0,)
    elif variant == "shuffled":
        config.data.synthetic.shuffle_features = True
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; expected 1seed or shuffled")
    return config
