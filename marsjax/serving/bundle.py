"""A bundle: all that scoring needs in one folder, checked by sums, loadable in any process.

manifest.json      versions, counts, configuration, sha256 of every file
ctr/, alignment/   parameters (orbax)
scoring.stablehlo  the scoring function (`jax.export`), for any batch and history length; only where flatbuffers, with
                   which jax writes it, was installed
scoring.npz        what that function reads beside the batch: parameters and tables
items.npz          ids, titles, categories, static vectors, content
knowledge.npz      rates and counts of likes, and opinions that go together, where the model reads them
features.npz       what the encoder reads of the items
users.npz          ids, activity groups, vectors, latest histories, what each low-active user borrows
donors.npz         training histories of the high-active users, and the vector subtracted before a cosine
donor_units.npy    the donors' item vectors in the context of their histories, where Eq. 16 reads these
index/             the index over their vectors, less that vector
"""

from __future__ import annotations

import importlib.metadata
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from marsjax import __version__, alignment, embeddings, files
from marsjax.ctr import objective
from marsjax.ctr.backbones import make_backbone
from marsjax.ctr.items import padded_tables
from marsjax.records import AlignmentBatch, Augmentation, ItemTables, Log, Rows
from marsjax.serving import knowledge, lending, portable
from marsjax.serving.knowledge import Knowledge
from marsjax.training import checkpoint

log = logging.getLogger(__name__)

FORMAT = 5
PACKAGES = ("jax", "flax", "numpy", "orbax-checkpoint", "usearch")
MANIFEST = "manifest.json"
SCORING, READ_BY_SCORING = "scoring.stablehlo", "scoring.npz"
PyTree = Any


class Users(NamedTuple):
    """Users as a bundle holds them; the arrays of users.npz."""

    raw_user_U: np.ndarray  # [U] str, ascending
    group_U: np.ndarray  # [U] int8
    user_UD: np.ndarray  # [U, D] float32
    start_U1: np.ndarray  # [U + 1] int64 into item_H
    item_H: np.ndarray  # [H] int32, the latest histories
    time_H: np.ndarray  # [H] int64
    label_H: np.ndarray  # [H] float32
    grade_H: np.ndarray  # [H] float32, or [0] where the model reads none
    borrowed_U1: np.ndarray  # [U + 1] int64 into borrowed_item_S
    borrowed_item_S: np.ndarray  # [S] int32
    borrowed_time_S: np.ndarray  # [S] int64
    borrowed_donor_S: np.ndarray  # [S] int32, the number of the user who lends
    borrowed_similarity_S: np.ndarray  # [S] float32, Eq. 16
    borrowed_mark_S: np.ndarray  # [S] int8, what the lender thought of it, as in `CtrBatch.feedback_BL`


class Items(NamedTuple):
    """Items as a bundle holds them; the arrays of items.npz."""

    raw_id_N: np.ndarray  # [N] str, "" and then ascending
    title_N: np.ndarray  # [N] str
    category_NG: np.ndarray  # [N, G] int32
    item_ND: np.ndarray  # [N, D] float32
    feature_NF: np.ndarray  # [N, F] float32, content that the CTR model reads; F is 0 where it reads none


class Bundle(NamedTuple):
    """A loaded bundle; parameters, statistics and tables, which hold the embedded items, are on the device."""

    model: nn.Module
    params: PyTree
    statistics: PyTree
    tables: ItemTables
    users: Users
    items: Items
    lenders: lending.Lenders
    known: Knowledge
    manifest: dict[str, Any]
    folder: pathlib.Path


class Encoder(NamedTuple):
    """What makes vectors of users (Eq. 13): a module, its parameters, and what it reads of the items."""

    module: alignment.MultimodalEncoder
    params: PyTree
    tables: alignment.FeatureTables


def latest_users(
    log: Log, rows: Rows, augmentation: Augmentation | None, user_UD: np.ndarray, *, graded: bool = False
) -> Users:
    """Users with their latest histories (and grades, where `graded`), and what they borrow through their whole training
    history."""
    n_users = len(rows.group_U)
    count_U, slot_S = np.zeros(n_users, np.int64), np.zeros(0, np.int64)
    if augmentation is not None and len(augmentation.queries.user_Q):
        user_Q, start_Q1 = augmentation.queries.user_Q, augmentation.borrowed.start_Q1
        # Queries are sorted by user and end: the last of a user is the one with the whole training history.
        last_Q = np.flatnonzero(np.append(user_Q[1:] != user_Q[:-1], True))
        length_X = np.diff(start_Q1)[last_Q]
        count_U[user_Q[last_Q]] = length_X
        slot_S = np.repeat(start_Q1[last_Q] - (np.cumsum(length_X) - length_X), length_X) + np.arange(length_X.sum())
    lent = None if augmentation is None else augmentation.borrowed

    def of_lent(name: str, dtype: type) -> np.ndarray:
        value_S = None if lent is None else getattr(lent, name)
        return np.zeros(len(slot_S), dtype) if value_S is None else value_S[slot_S].astype(dtype)

    return Users(
        raw_user_U=log.raw_user_U,
        group_U=rows.group_U,
        user_UD=user_UD,
        start_U1=rows.histories.start_U1,
        item_H=rows.histories.item_H,
        time_H=rows.histories.time_H,
        label_H=rows.histories.label_H,
        grade_H=rows.histories.grade_H if graded and rows.histories.grade_H is not None else np.zeros(0, np.float32),
        borrowed_U1=np.concatenate([[0], np.cumsum(count_U)]),
        borrowed_item_S=of_lent("item_S", np.int32),
        borrowed_time_S=of_lent("time_S", np.int64),
        borrowed_donor_S=of_lent("donor_S", np.int32),
        borrowed_similarity_S=of_lent("similarity_S", np.float32),
        borrowed_mark_S=of_lent("feedback_S", np.int8),
    )


def need_new(folder: pathlib.Path) -> None:
    """Raises ValueError where `folder` exists."""
    if pathlib.Path(folder).exists():
        raise ValueError(
            f"{folder}: expected a folder that does not exist yet, since bundles never change; give another"
        )


def write_bundle(
    folder: pathlib.Path,
    *,
    config: Mapping[str, Any],
    lends: Mapping[str, Any],
    counts: Mapping[str, int],
    users: Users,
    items: Items,
    ctr: PyTree,
    space: Encoder,
    lenders: lending.Lenders,
    known: Knowledge,
) -> None:
    """Writes a bundle beside `folder` and renames it, so that it appears whole or not at all.

    `lends` says what the method decides beside the configuration: its name (`method`), whether the model was trained on
    borrowed items that are `time_safe`, and without the target (`drop_target`), whether what a user borrows can be
    looked up anew (`live`), whether the model knows users with few rows by their histories alone (`hidden`), and the
    longest history of a user that borrows (`longest`).

    Raises:
        ValueError: `folder` exists.
        OSError: the disk is full; nothing is left behind.
    """
    need_new(folder)
    tables = _tables(items, counts["n_items"])
    model = make_backbone(config["ctr"], **counts)
    with files.write_folder(folder) as partial:
        checkpoint.save_params(partial / "ctr", ctr)
        checkpoint.save_params(partial / "alignment", space.params)
        if portable.can_export():
            function = portable.export_scoring(
                model, ctr["params"], ctr["statistics"], tables, dense=knowledge.dense_width(known)
            )
            files.write_bytes(partial / SCORING, function)
            files.write_arrays(partial / READ_BY_SCORING, **portable.read_arrays(ctr, tables))
        files.write_arrays(partial / "items.npz", **items._asdict())
        files.write_arrays(partial / "users.npz", **users._asdict())
        files.write_arrays(partial / "knowledge.npz", **known._asdict())
        features = {
            f"{kind}_{name}": np.asarray(value)
            for kind, values in (("feature", space.tables.feature_NF), ("present", space.tables.present_N))
            for name, value in values.items()
        }
        files.write_arrays(partial / "features.npz", **features)
        lending.write_lenders(partial, lenders)
        _seal(partial, {"config": dict(config), "lends": dict(lends), "counts": dict(counts)})


def continue_bundle(folder: pathlib.Path, bundle: Bundle, *, ctr: PyTree, trained: Mapping[str, Any]) -> None:
    """Writes the bundle with other parameters of the CTR model; `trained` says in the manifest where they come from.

    Raises as `write_bundle`.
    """
    need_new(folder)
    with files.write_folder(folder) as partial:
        for name in bundle.manifest["sha256"]:
            if not name.startswith("ctr/") and name != READ_BY_SCORING:
                files.copy_file(bundle.folder / name, partial / name)
        checkpoint.save_params(partial / "ctr", ctr)
        if SCORING in bundle.manifest["sha256"]:
            files.write_arrays(partial / READ_BY_SCORING, **portable.read_arrays(ctr, bundle.tables))
        content = {name: bundle.manifest[name] for name in ("config", "lends", "counts")}
        _seal(partial, content | {"trained": dict(trained)})


def _seal(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    manifest = {
        "format": FORMAT,
        "versions": {"marsjax": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
        **content,
        "sha256": {path.relative_to(folder).as_posix(): files.sha256_file(path) for path in _files(folder)},
    }
    files.write_json(folder / MANIFEST, manifest | {"sum": files.digest_json(manifest)})


def check_bundle(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a bundle, after every file was held against its sum.

    Raises:
        ValueError: no bundle, another format, a file missing, added or changed.
    """
    folder = pathlib.Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: expected a bundle written by `marsjax export` (manifest.json), found none")
    manifest = files.read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format", "none") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"{folder / MANIFEST}: expected a bundle of format {FORMAT}, found {found}; export it again")
    expected = manifest.get("sum", "no sum")
    found = files.digest_json({name: value for name, value in manifest.items() if name != "sum"})
    if found != expected:
        raise ValueError(
            f"{folder / MANIFEST}: expected a content of sha256 {expected}, found {found}; the bundle is "
            "damaged or was changed, export it again"
        )
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    if present != set(manifest["sha256"]):
        different = ", ".join(sorted(present ^ set(manifest["sha256"]))[:3])
        raise ValueError(
            f"{folder}: expected exactly the files of the manifest, found a difference in {different}; export it again"
        )
    for name, expected in manifest["sha256"].items():
        found = files.sha256_file(folder / name)
        if found != expected:
            raise ValueError(f"{folder / name}: expected sha256 {expected}, found {found}; export it again")
    return manifest


def load_bundle(folder: pathlib.Path) -> Bundle:
    """Loads a bundle; every file is held against its sum first. What is not for the device stays on the disk until it
    is needed. Raises as `check_bundle`."""
    folder = pathlib.Path(folder)
    manifest = check_bundle(folder)
    users, items = Users(**files.map_arrays(folder / "users.npz")), Items(**files.map_arrays(folder / "items.npz"))
    model = make_backbone(manifest["config"]["ctr"], **manifest["counts"])
    known = Knowledge(**files.map_arrays(folder / "knowledge.npz"))
    tables = _tables(items, manifest["counts"]["n_items"])
    dense = knowledge.dense_width(known)
    template = jax.eval_shape(lambda: objective.init_model(model, tables, seed=0, dense=dense))
    trained = jax.device_put(checkpoint.load_params(folder / "ctr", template))
    lenders = lending.read_lenders(folder, items.item_ND)
    return Bundle(
        model,
        trained["params"],
        trained["statistics"],
        objective.with_vectors(model, trained["params"], jax.device_put(tables)),
        users,
        items,
        lenders,
        knowledge.on_device(known),
        manifest,
        folder,
    )


def _tables(items: Items, n_items: int) -> ItemTables:
    return padded_tables(
        ItemTables(items.category_NG, items.feature_NF if items.feature_NF.shape[1] else None), n_items
    )


def load_encoder(bundle: Bundle) -> Encoder:
    """The encoder of the aligned space, on the device."""
    module = alignment.make_encoder(bundle.manifest["config"]["alignment"], n_items=len(bundle.items.raw_id_N))
    arrays = files.map_arrays(bundle.folder / "features.npz")
    tables = alignment.FeatureTables(
        *({name: arrays[f"{kind}_{name}"] for name in module.modalities} for kind in ("feature", "present"))
    )
    one_BL, one_BT = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    batch = AlignmentBatch(one_BL, one_BL, one_BT, one_BT, one_BL[0])
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, tables)["params"])
    params = checkpoint.load_params(bundle.folder / "alignment", template)
    params = jax.device_put(params)
    return Encoder(module, params, embeddings.with_vectors(module, params, tables))


def item_numbers(bundle: Bundle, names: Sequence[str]) -> np.ndarray:
    """Item numbers [X] int32; 0 where the bundle does not know the id."""
    return (_find(bundle.items.raw_id_N[1:], names) + 1).astype(np.int32)


def user_numbers(bundle: Bundle, names: Sequence[str]) -> np.ndarray:
    """User numbers [X] int64; -1 where the bundle does not know the id."""
    return _find(bundle.users.raw_user_U, names)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _find(sorted_X: np.ndarray, names: Sequence[str]) -> np.ndarray:
    wanted = np.asarray(names, str)
    at = np.minimum(np.searchsorted(sorted_X, wanted), len(sorted_X) - 1)
    found = np.where(sorted_X[at] == wanted, at, -1) if len(wanted) else np.zeros(0, np.int64)
    wrong = [x for x, name in enumerate(names) if "\x00" in name]
    found[wrong] = -1  # arrays of text lose NULs at the end of a name, which would then be another one
    return found
