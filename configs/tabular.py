"""Your own log: Parquet or CSV, one row an interaction.

    marsjax run --config=configs/tabular.py --config.data.events_file=events.parquet \
        --config.data.items_file=items.parquet \
        --config.data.text_features=text.npz --config.data.image_features=image.npz --workdir=runs/mine

Map your columns with --config.data.columns.user=NAME and so on. Test rows are the latest 20%
of all events.
"""

from marsjax.defaults import default_config


def get_config(variant: str = ""):
    if variant not in ("", "paper"):
        raise ValueError(f"unknown variant {variant!r}; expected none or paper (MARS as printed)")
    config = default_config("paper" if variant == "paper" else "mars")
    config.data.source = "tabular"
    config.data.events_file = "events.parquet"
    config.split.kind = "global_time"
    return config
