"""MicroLens-50K, each user's last 20% as test.

    marsjax run --config=configs/microlens.py --config.data.events_file=PATH/MicroLens-50k_pairs.csv \
        --config.data.items_file=PATH/MicroLens-50k_titles.csv --config.data.image_folder=PATH/MicroLens-50k_covers \
        --workdir=runs/microlens

For each click a video without one is drawn. Variants: none (MiniLM and MobileNetV2), `plain` (no weights).
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    if variant not in ("", "plain"):
        raise ValueError(f"unknown variant {variant!r}; expected none or plain")
    config = default_config("mars")
    config.data.source = "microlens"
    config.data.events_file = "MicroLens-50k_pairs.csv"
    config.data.items_file = "MicroLens-50k_titles.csv"
    config.data.image_folder = "MicroLens-50k_covers"
    config.split.kind = "last_fraction"
    config.split.history = "positives"  # what was drawn says nothing of the user
    config.features.text, config.features.image = ("tfidf", "colour") if variant == "plain" else ("minilm", "mobilenet")
    config.features.template = "{title}"
    return config
