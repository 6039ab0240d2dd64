"""MIND, news with clicks: the latest 20% of all events as test.

    marsjax run --config=configs/mind.py --config.data.folder=PATH/MINDsmall_train,PATH/MINDsmall_dev \
        --workdir=runs/mind

News have no images. Variants: none (MiniLM), `plain` (TF-IDF, no weights).
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    if variant not in ("", "plain"):
        raise ValueError(f"unknown variant {variant!r}; expected none or plain")
    config = default_config("mars")
    config.data.source = "mind"
    config.data.folder = "MINDsmall_train"
    config.split.kind = "global_time"
    config.split.history = "positives"  # what was shown and left is most of the log
    config.features.text = "tfidf" if variant == "plain" else "minilm"
    config.features.template = "{title}. {category}. {abstract}"
    config.alignment.modalities = ("text",)
    return config
