"""The data that a configuration names: events and items (`SOURCES`), and the texts and images of items (`CONTENTS`)."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from marsjax.configuration import to_json
from marsjax.data.amazon import amazon_content, load_amazon
from marsjax.data.checks import sum_problems
from marsjax.data.content import find_images
from marsjax.data.drawings import write_drawings
from marsjax.data.feature_files import read_features
from marsjax.data.microlens import load_microlens, microlens_content
from marsjax.data.mind import load_mind, mind_content
from marsjax.data.movielens import load_movielens, movielens_content
from marsjax.data.synthetic import latent_items, make_synthetic
from marsjax.data.tabular import image_names, load_tabular, tabular_content
from marsjax.features.text import columns_of
from marsjax.records import Content, Dataset

Paths = Mapping[str, pathlib.Path]  # modality -> the feature file that was made for it


def _synthetic(data: ConfigDict, made: Paths) -> Dataset:
    read = {name: read_features(path) for name, path in made.items()}
    return make_synthetic(read or None, **to_json(data.synthetic))


def _features(folder: pathlib.Path, data: ConfigDict, made: Paths) -> dict[str, pathlib.Path]:
    named = {"text": data.text_features, "image": data.image_features}
    return {name: made.get(name, folder / path) for name, path in named.items() if path or name in made}


def _movielens(data: ConfigDict, made: Paths) -> Dataset:
    folder = pathlib.Path(data.folder)
    features = _features(folder, data, made)
    return load_movielens(
        folder,
        text_features=features.get("text"),
        image_features=features.get("image"),
        image_folder=folder / data.image_folder if data.image_folder else None,
        label_threshold=data.label_threshold,
        min_item_events=data.min_item_events,
        min_user_events=data.min_user_events,
        strict=data.strict,
        checksums=_path(data.checksums),
    )


def _tabular(data: ConfigDict, made: Paths) -> Dataset:
    return load_tabular(
        events_path=pathlib.Path(data.events_file),
        items_path=pathlib.Path(data.items_file) if data.items_file else None,
        columns={name: column for name, column in to_json(data.columns).items() if column},
        image_folder=pathlib.Path(data.image_folder) if data.image_folder else None,
        category_separator=data.category_separator,
        label_threshold=data.label_threshold,
        **_recipe(data, made),
    )


def _drawn_content(config: ConfigDict, workdir: pathlib.Path) -> Content:
    """Draws the items of the planted data, and reads the drawings as a user's own items.csv and images."""
    drawn = to_json(config.data.synthetic)
    raw_id_I, item_ID = latent_items(**drawn)
    folder = workdir / "drawings"
    write_drawings(folder, raw_id_I=raw_id_I, item_ID=item_ID, missing=drawn["missing"], seed=drawn["seed"])
    return tabular_content(
        items_path=folder / "items.csv", item="id", fields=columns_of(config.features.template),
        image_folder=folder / "images",
    )  # fmt: skip


def _movie_content(config: ConfigDict, workdir: pathlib.Path) -> Content:
    data, folder = config.data, pathlib.Path(config.data.folder)
    return movielens_content(
        folder,
        texts=folder / data.item_texts if data.item_texts else None,
        image_folder=folder / data.image_folder if data.image_folder else None,
    )


def _table_content(config: ConfigDict, workdir: pathlib.Path) -> Content:
    data = config.data
    if not data.items_file:
        raise ValueError("features: expected data.items_file with one row an item, found none")
    if config.features.image not in ("", "precomputed") and not data.image_folder:
        raise ValueError("features.image: expected data.image_folder, found none")
    return tabular_content(
        items_path=pathlib.Path(data.items_file),
        item=data.columns.item,
        fields=columns_of(config.features.template) if config.features.text not in ("", "precomputed") else (),
        image=data.columns.image,
        image_folder=pathlib.Path(data.image_folder) if data.image_folder else None,
        later={ours: data.columns[ours] for ours in ("title", "categories") if data.columns[ours]},
    )


def _amazon_content(config: ConfigDict, workdir: pathlib.Path) -> Content:
    data = config.data
    return amazon_content(
        pathlib.Path(data.items_file),
        reviews=_path(data.events_file),
        core=data.core,
        image_folder=_path(data.image_folder),
    )


def _microlens_content(config: ConfigDict, workdir: pathlib.Path) -> Content:
    return microlens_content(pathlib.Path(config.data.items_file), image_folder=_path(config.data.image_folder))


def _mind_content(config: ConfigDict, workdir: pathlib.Path) -> Content:
    return mind_content(_mind_folders(config.data))


def item_images(data: ConfigDict, workdir: pathlib.Path, raw_ids: Sequence[str]) -> dict[str, pathlib.Path]:
    """Id -> image file, of those items that have one; none where the configuration names no folder that is there.

    Posters of MovieLens are shown where they lie beside the official files, also where no model reads them.
    """
    folders = {
        "synthetic": workdir / "drawings" / "images",
        "movielens": pathlib.Path(data.folder, data.image_folder or "posters"),
    }
    folder = folders.get(data.source, pathlib.Path(data.image_folder) if data.image_folder else None)
    if folder is None or not folder.is_dir():
        return {}
    names = list(raw_ids)
    if data.source == "tabular" and data.items_file and data.columns.image:
        path = pathlib.Path(data.items_file)
        name_of = image_names(items_path=path, item=data.columns.item, image=data.columns.image)
        names = [name_of.get(name, "") for name in raw_ids]
    found = zip(raw_ids, find_images(folder, names), strict=True)
    return {name: path for name, path in found if path is not None}


CONTENTS = {
    "synthetic": _drawn_content,
    "movielens": _movie_content,
    "tabular": _table_content,
    "amazon": _amazon_content,
    "microlens": _microlens_content,
    "mind": _mind_content,
}


def _recipe(data: ConfigDict, made: Paths) -> dict[str, Any]:
    """What tables and all recipes of published data but MovieLens are told."""
    sums = sum_problems(pathlib.Path(data.checksums)) if data.checksums else []
    return {
        "features": _features(pathlib.Path(), data, made),
        "expected": {"events": data.expected_events, "users": data.expected_users, "items": data.expected_items},
        "min_item_events": data.min_item_events,
        "min_user_events": data.min_user_events,
        "strict": data.strict,
        "problems": tuple(sums),
    }


def _amazon(data: ConfigDict, made: Paths) -> Dataset:
    return load_amazon(
        pathlib.Path(data.events_file),
        metadata=_path(data.items_file),
        core=data.core,
        label_threshold=data.label_threshold,
        **_recipe(data, made),
    )


def _microlens(data: ConfigDict, made: Paths) -> Dataset:
    return load_microlens(
        pathlib.Path(data.events_file), titles=_path(data.items_file), negatives=data.negatives, **_recipe(data, made)
    )


def _mind(data: ConfigDict, made: Paths) -> Dataset:
    return load_mind(_mind_folders(data), **_recipe(data, made))


def _mind_folders(data: ConfigDict) -> list[pathlib.Path]:
    return [pathlib.Path(name.strip()) for name in data.folder.split(",")]


def _path(name: str) -> pathlib.Path | None:
    return pathlib.Path(name) if name else None


SOURCES = {
    "synthetic": _synthetic,
    "movielens": _movielens,
    "tabular": _tabular,
    "amazon": _amazon,
    "microlens": _microlens,
    "mind": _mind,
}
