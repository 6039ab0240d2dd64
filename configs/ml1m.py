"""MovieLens-1M, leave-one-out.

    marsjax run --config=configs/ml1m.py --config.data.folder=PATH/ml-1m --workdir=runs/ml1m

PATH/ml-1m is the official folder (ratings.dat, movies.dat; grouplens.org/datasets/movielens/1m). Item features are
read from features/*.npz in it where they are. Variants, joined by commas: `5seeds`, `last_fraction` (each user's last
20% as test), `paper` (MARS as printed).
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    options = [option for option in variant.split(",") if option]
    unknown = set(options) - {"5seeds", "last_fraction", "paper"}
    if unknown:
        raise ValueError(f"unknown variant {sorted(unknown)}; expected 5seeds, last_fraction, paper")
    config = default_config("paper" if "paper" in options else "mars")
    config.data.source = "movielens"
    config.data.folder = "ml-1m"
    config.data.label_threshold = 4.0
    config.data.min_item_events = 5
    config.data.text_features = "features/text_minilm_384.npz"  # relative to the folder
    config.data.image_features = "features/image_mobilenetv2_1280.npz"
    if "5seeds" in options:
        config.seeds = (0, 1, 2, 3, 4)
    if "last_fraction" in options:
        config.split.kind = "last_fraction"
    return config
