"""MovieLens-1M, leave-one-out.

    marsjax run --config=configs/ml1m.py --config.data.folder=PATH/ml-1m --workdir=runs/ml1m

PATH/ml-1m is the official folder (ratings.dat, movies.dat; grouplens.org/datasets/movielens/1m). Item vectors are read
from the two files in features/ named below, which are not part of the download. Variants, joined by commas: `5seeds`,
`last_fraction` (each user's last 20% as test), `sparse3`, `sparse5`, `sparse10`, `sparse20` (a random 30% of the users
keep only their first 3, 5, 10 or 20 events), `paper` (MARS as printed).

What items are encoded from, instead of the two files: `encoded` (MiniLM and MobileNetV2) or `plain` (TF-IDF and colour
statistics, which need no weights), of title, genres, the texts in item_text.jsonl and posters/ID.jpg, which are not
part of the download either; `marsjax run` encodes first. `shuffled` is a control: each item has the features of another
one.
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    options = [option for option in variant.split(",") if option]
    sparse = {f"sparse{count}": count for count in (3, 5, 10, 20)}
    known = ("5seeds", "last_fraction", *sparse, "paper", "encoded", "plain", "shuffled")
    unknown = set(options) - set(known)
    if unknown:
        raise ValueError(f"unknown variant {sorted(unknown)}; expected {', '.join(known)}")
    config = default_config("paper" if "paper" in options else "mars")
    config.data.source = "movielens"
    config.data.folder = "ml-1m"
    config.data.label_threshold = 4.0
    config.data.min_item_events = 5
    if "paper" not in options:
        config.export.method = "mars_graded_posterior"  # ratings are grades; the best on validation rows
    config.data.text_features = "features/text_minilm_384.npz"  # relative to the folder
    config.data.image_features = "features/image_mobilenetv2_1280.npz"
    encoders = {"encoded": ("minilm", "mobilenet"), "plain": ("tfidf", "colour")}
    for option in sorted(encoders.keys() & options):
        config.features.text, config.features.image = encoders[option]
        config.features.template = "{title}. {categories}. {text}"
        config.data.item_texts = "item_text.jsonl"
        config.data.image_folder = "posters"
        config.data.text_features = config.data.image_features = ""
    if encoders.keys() <= set(options):
        raise ValueError(f"expected one of the variants {', '.join(encoders)} at a time, found {variant}")
    config.data.permute_features = "shuffled" in options
    if "5seeds" in options:
        config.seeds = (0, 1, 2, 3, 4)
    if "last_fraction" in options:
        config.split.kind = "last_fraction"
    counts = [sparse[option] for option in options if option in sparse]
    if len(counts) > 1:
        raise ValueError(f"expected one of the variants {', '.join(sparse)} at a time, found {variant}")
    for count in counts:
        config.split.sparse_fraction = 0.3
        config.split.sparse_events = count
    return config
