"""Planted data, made in seconds: the quickstart.

    marsjax run --config=configs/synthetic.py --workdir=runs/quickstart

Variants, joined by commas: `1seed`, `unaligned` (the Stein loss of Eq. 14 has no weight), `shuffled` (features permuted
between items: content tells nothing, and the gain of MARS must vanish), `drawn` (texts are written and images drawn for
the items, and `marsjax features` makes vectors of them; more items of fewer topics, so that categories can be probed).
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    options = [option for option in variant.split(",") if option]
    unknown = set(options) - {"1seed", "unaligned", "shuffled", "drawn"}
    if unknown:
        raise ValueError(f"unknown variant {sorted(unknown)}; expected 1seed, unaligned, shuffled, drawn")
    config = default_config("mars")
    config.seeds = (0,) if "1seed" in options else (0, 1, 2)
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
    config.evaluation.methods = (
        "base",
        "random_donor",
        "mars",
        "mars_posterior",
        "mars_short_posterior",
        "collaborative_posterior",
    )
    if "unaligned" in options:
        config.alignment.beta = 0.0
    if "drawn" in options:
        config.features.text = "tfidf"
        config.features.image = "colour"
        config.features.template = "{text}"
        config.features.text_width = 64
        # Ten groups of about 80 items, as many as a probe of categories needs; as many topics are liked as elsewhere.
        config.data.synthetic.n_items = 800
        config.data.synthetic.n_topics = 30
        config.data.synthetic.topics_per_type = 4
    if "shuffled" in options:
        config.data.synthetic.shuffle_features = True
    return config
