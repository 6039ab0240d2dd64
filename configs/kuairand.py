"""KuaiRand-Pure or -1K: the standard log, the latest 20% of all events as test.

    marsjax run --config=configs/kuairand.py --config.data.events_file=PATH/log_standard_4_22_to_5_08_pure.csv \
        --config.data.items_file=PATH/video_features_basic_pure.csv --workdir=runs/kuairand

A click is is_click, times are in milliseconds, and the tags of a video are its categories. KuaiRand publishes no texts
and no images, so nothing is encoded and users are compared by what they did; vectors of your own go into
--config.data.text_features and --config.alignment.modalities=text.
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    if variant:
        raise ValueError(f"unknown variant {variant!r}; expected none")
    config = default_config("mars")
    config.data.source = "tabular"
    config.data.events_file = "log_standard_4_22_to_5_08_pure.csv"
    columns = config.data.columns
    columns.user, columns.item, columns.label, columns.time = "user_id", "video_id", "is_click", "time_ms"
    columns.categories = "tag"
    config.data.category_separator = ","
    config.split.kind = "global_time"
    config.split.history = "positives"
    config.alignment.modalities = ()
    return config
