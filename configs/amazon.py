"""Amazon reviews, leave-one-out: the dumps of 2014 or 2023.

    marsjax run --config=configs/amazon.py:beauty --config.data.events_file=PATH/reviews_Beauty_5.json.gz \
        --config.data.items_file=PATH/meta_Beauty.json.gz --workdir=runs/beauty

Variants: `beauty` (the 7-core of the published 5-core of 2014, as in the paper), `toys`
(reviews_Toys_and_Games_5.json.gz and meta_Toys_and_Games.json.gz of 2014), none (any category of either year;
`--config.data.core=5` makes a 5-core). Counts are held against the published ones. Texts are encoded by TF-IDF;
`minilm`, after a comma, takes MiniLM. Images are not part of the dumps: put those that you have in a folder as
ASIN.jpg, and name it and an encoder: --config.data.image_folder=PATH/images --config.features.image=mobilenet
--config.alignment.modalities=text,image
"""

from marsjax.defaults import default_config

# variant -> core, reviews, users, items; the paper gives those of Beauty, the 5-core of Toys is published as it is.
KNOWN = {"beauty": (7, 60_276, 4_322, 2_423), "toys": (5, 167_597, 19_412, 11_924)}


def get_config(variant: str = ""):
    options = [option for option in variant.split(",") if option]
    if unknown := set(options) - {*KNOWN, "minilm"}:
        raise ValueError(f"unknown variant {sorted(unknown)}; expected {', '.join(KNOWN)}, minilm")
    if KNOWN.keys() <= set(options):
        raise ValueError(f"expected one of the variants {', '.join(KNOWN)} at a time, found {variant}")
    config = default_config("mars")
    config.data.source = "amazon"
    config.data.events_file = "reviews.json.gz"
    config.data.items_file = "meta.json.gz"
    config.data.label_threshold = 4.0
    for option in KNOWN.keys() & options:
        data = config.data
        data.core, data.expected_events, data.expected_users, data.expected_items = KNOWN[option]
    config.features.text = "minilm" if "minilm" in options else "tfidf"
    config.features.template = "{title}. {brand}. {categories}. {description}"
    config.alignment.modalities = ("text",)
    return config
