"""Planted data, made in seconds: the quickstart.

    marsjax run --config=configs/synthetic.py --workdir=runs/quickstart

Variants: `1seed`, `shuffled` (features permuted between items: the gain of MARS must vanish).
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    config = default_config("mars")
    config.seeds = (0, 1, 2)
    config.split.history = "positives"  # a log of clicks
    config.split.low_fraction = 0.6  # about the planted shares
    config.split.high_fraction = 0.25
    config.alignment.width = 64  # small data, small model
    config.alignment.id_width = 16
    config.alignment.lambda_ = 0.01
    config.retrieval.prefix_stride = 1
    config.augmentation.theta_quantile = 0.25
    config.ctr.batch_size = 256
    config.ctr.epochs = 5
    config.evaluation.methods = ("base", "random_donor", "mars")
    if variant == "1seed":
        config.seeds = (0,)
    elif variant == "shuffled":
        config.data.synthetic.shuffle_features = True
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; expected 1seed or shuffled")
    return config
