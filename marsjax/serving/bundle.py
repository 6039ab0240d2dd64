"""A bundle: all that scoring needs in one folder, checked by sums, loadable in any process.

manifest.json     versions, counts, configuration, sha256 of every file
ctr/, alignment/  parameters (orbax)
items.npz         ids, titles, categories, static vectors
users.npz         ids, activity groups, vectors, latest histories, what each low-active user borrows
donors.npz        training histories of the high-active users, and the vector subtracted before a cosine
index/            the index over their vectors, less that vector
"""

from __future__ import annotations

import importlib.metadata
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from marsjax import __version__, files
from marsjax.ctr import objective
from marsjax.ctr.backbones import make_backbone
from marsjax.ctr.items import padded_tables
from marsjax.records import Augmentation, CtrBatch, ItemTables, Log, Rows
from marsjax.training import checkpoint

log = logging.getLogger(__name__)

FORMAT = 2
PACKAGES = ("jax", "flax", "numpy", "orbax-checkpoint", "usearch")
PyTree = Any


class Users(NamedTuple):
    """Users as a bundle holds them; the arrays of users.npz."""

    raw_user_U: np.ndarray  # [U] str, ascending
    group_U: np.ndarray  # [U] int8
    user_UD: np.ndarray  # [U, D] float32
    start_U1: np.ndarray  # [U + 1] int64 into item_H
    item_H: np.ndarray  # [H] int32, the latest histories
    borrowed_U1: np.ndarray  # [U + 1] int64 into borrowed_item_S
    borrowed_item_S: np.ndarray  # [S] int32
    borrowed_time_S: np.ndarray  # [S] int64


class Items(NamedTuple):
    """Items as a bundle holds them; the arrays of items.npz."""

    raw_id_N: np.ndarray  # [N] str, "" and then ascending
    title_N: np.ndarray  # [N] str
    category_NG: np.ndarray  # [N, G] int32
    item_ND: np.ndarray  # [N, D] float32


class Bundle(NamedTuple):
    """A loaded bundle."""

    model: nn.Module
    params: PyTree
    statistics: PyTree
    users: Users
    items: Items
    manifest: dict[str, Any]
    folder: pathlib.Path


class Request(NamedTuple):
    """Candidates to score for one user, by ids of the source."""

    user: str
    items: tuple[str, ...]
    history: tuple[str, ...] | None = None  # replaces the history in the bundle
    time: int | None = None  # for time-safe borrowing


def latest_users(log: Log, rows: Rows, augmentation: Augmentation | None, user_UD: np.ndarray) -> Users:
    """Users with their latest histories, and what they borrow through their whole training history."""
    n_users = len(rows.group_U)
    count_U, slot_S = np.zeros(n_users, np.int64), np.zeros(0, np.int64)
    items, times = np.zeros(0, np.int32), np.zeros(0, np.int64)
    if augmentation is not None and len(augmentation.queries.user_Q):
        user_Q, start_Q1 = augmentation.queries.user_Q, augmentation.borrowed.start_Q1
        # Queries are sorted by user and end: the last of a user is the one with the whole training history.
        last_Q = np.flatnonzero(np.append(user_Q[1:] != user_Q[:-1], True))
        length_X = np.diff(start_Q1)[last_Q]
        count_U[user_Q[last_Q]] = length_X
        slot_S = np.repeat(start_Q1[last_Q] - (np.cumsum(length_X) - length_X), length_X) + np.arange(length_X.sum())
        items, times = augmentation.borrowed.item_S[slot_S], augmentation.borrowed.time_S[slot_S]
    return Users(
        raw_user_U=log.raw_user_U,
        group_U=rows.group_U,
        user_UD=user_UD,
        start_U1=rows.histories.start_U1,
        item_H=rows.histories.item_H,
        borrowed_U1=np.concatenate([[0], np.cumsum(count_U)]),
        borrowed_item_S=items,
        borrowed_time_S=times,
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
    blanked: Mapping[str, bool],
    counts: Mapping[str, int],
    users: Users,
    items: Items,
    ctr: PyTree,
    alignment: PyTree,
    donors: Mapping[str, np.ndarray],
    write_index: Callable[[pathlib.Path], None],
) -> None:
    """Writes a bundle beside `folder` and renames it, so that it appears whole or not at all.

    `blanked` says whether the model was trained on borrowed items that are `time_safe`, and without the target
    (`drop_target`): the method decides, beside the configuration.

    Raises:
        ValueError: `folder` exists.
        OSError: the disk is full; nothing is left behind.
    """
    need_new(folder)
    with files.write_folder(folder) as partial:
        checkpoint.save_params(partial / "ctr", ctr)
        checkpoint.save_params(partial / "alignment", alignment)
        files.write_arrays(partial / "items.npz", **items._asdict())
        files.write_arrays(partial / "users.npz", **users._asdict())
        files.write_arrays(partial / "donors.npz", **donors)
        write_index(partial / "index")
        manifest = {
            "format": FORMAT,
            "versions": {"marsjax": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
            "counts": dict(counts),
            "config": dict(config),
            "blanked": dict(blanked),
            "sha256": {path.relative_to(partial).as_posix(): files.sha256_file(path) for path in _files(partial)},
        }
        files.write_json(partial / "manifest.json", manifest | {"sum": files.digest_json(manifest)})


def load_bundle(folder: pathlib.Path) -> Bundle:
    """Loads a bundle; every file is held against its sum first.

    Raises:
        ValueError: no bundle, another format, a file missing, added or changed.
    """
    folder = pathlib.Path(folder)
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder}: expected a bundle written by `marsjax export` (manifest.json), found none")
    manifest = files.read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format", "none") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(
            f"{folder / 'manifest.json'}: expected a bundle of format {FORMAT}, found {found}; export it again"
        )
    expected, found = manifest.pop("sum", "no sum"), files.digest_json(manifest)
    if found != expected:
        raise ValueError(
            f"{folder / 'manifest.json'}: expected a content of sha256 {expected}, found {found}; the bundle is "
            "damaged or was changed, export it again"
        )
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {"manifest.json"}
    if present != set(manifest["sha256"]):
        different = ", ".join(sorted(present ^ set(manifest["sha256"]))[:3])
        raise ValueError(
            f"{folder}: expected exactly the files of the manifest, found a difference in {different}; export it again"
        )
    for name, expected in manifest["sha256"].items():
        found = files.sha256_file(folder / name)
        if found != expected:
            raise ValueError(f"{folder / name}: expected sha256 {expected}, found {found}; export it again")
    with np.load(folder / "users.npz") as arrays:
        users = Users(**{name: arrays[name] for name in Users._fields})
    with np.load(folder / "items.npz") as arrays:
        items = Items(**{name: arrays[name] for name in Items._fields})
    model = make_backbone(manifest["config"]["ctr"], **manifest["counts"])
    tables = padded_tables(ItemTables(items.category_NG), manifest["counts"]["n_items"])
    template = jax.eval_shape(lambda: objective.init_model(model, tables, seed=0))
    trained = checkpoint.load_params(folder / "ctr", template)
    return Bundle(model, trained["params"], trained["statistics"], users, items, manifest, folder)


def score(bundle: Bundle, requests: Sequence[Request], *, size: int = 256) -> list[np.ndarray]:
    """Click probabilities of every request's items, [C] float32 each.

    An unknown user has no history of its own but the one given, and borrows nothing. Unknown history items are
    passed over, and counted in a warning.

    Raises:
        ValueError: a candidate that the bundle does not know; the message names it.
    """
    if not requests:
        return []
    config, blanked, users = bundle.manifest["config"], bundle.manifest["blanked"], bundle.users
    cap = int(config["ctr"]["cap"])
    count_R = np.array([len(request.items) for request in requests])
    target_B = _numbers(bundle, [item for request in requests for item in request.items])
    if (target_B == 0).any():
        at = int(np.argmax(target_B == 0))
        name = [item for request in requests for item in request.items][at]
        row = int(np.searchsorted(np.cumsum(count_R), at, side="right"))
        raise ValueError(f"request {row + 1}: expected items that the bundle knows, found {name!r}; drop it")
    user_R = _user_numbers(bundle, [request.user for request in requests])
    unknown = 0
    history_RL, borrowed_RL = np.zeros((len(requests), cap), np.int32), np.zeros((len(requests), cap), bool)
    for row, (request, user) in enumerate(zip(requests, user_R, strict=True)):
        own = users.item_H[users.start_U1[user] : users.start_U1[user + 1]] if user >= 0 else np.zeros(0, np.int32)
        if request.history is not None:
            own = _numbers(bundle, request.history)
            unknown += int((own == 0).sum())
            own = own[own > 0]
        own = own[-cap:]
        lent = slice(users.borrowed_U1[user], users.borrowed_U1[user + 1]) if user >= 0 else slice(0, 0)
        items, times = users.borrowed_item_S[lent], users.borrowed_time_S[lent]
        room = cap - len(own)
        items, times = items[len(items) - min(room, len(items)) :], times[len(times) - min(room, len(times)) :]
        if blanked["time_safe"] and request.time is not None:
            items = np.where(times <= request.time, items, 0)
        history_RL[row, : len(items)] = items
        history_RL[row, len(items) : len(items) + len(own)] = own
        borrowed_RL[row, : len(items)] = items > 0
    if unknown:
        log.warning("%d history items of the requests are unknown to the bundle and were passed over", unknown)
    row_B = np.repeat(np.arange(len(requests)), count_R)

    def batches() -> Iterator[CtrBatch]:
        for begin in range(0, len(row_B), size):
            part = slice(begin, begin + size)
            n = len(row_B[part])
            history_BL, borrowed_BL = history_RL[row_B[part]], borrowed_RL[row_B[part]]
            if blanked["drop_target"]:
                same_BL = borrowed_BL & (history_BL == target_B[part][:, None])
                history_BL, borrowed_BL = np.where(same_BL, 0, history_BL), borrowed_BL & ~same_BL
            values = (user_R[row_B[part]].astype(np.int32) + 1, target_B[part], np.zeros(n, np.float32),
                      np.ones(n, np.float32), history_BL, borrowed_BL)  # fmt: skip
            yield CtrBatch(*(np.pad(value, [(0, size - n)] + [(0, 0)] * (value.ndim - 1)) for value in values))

    tables = padded_tables(ItemTables(bundle.items.category_NG), bundle.manifest["counts"]["n_items"])
    score_B = objective.score(bundle.model, bundle.params, bundle.statistics, tables, batches())
    return np.split(score_B, np.cumsum(count_R)[:-1])


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _numbers(bundle: Bundle, names: Sequence[str]) -> np.ndarray:
    """Item numbers [X] int32; 0 where the bundle does not know the id."""
    return (_find(bundle.items.raw_id_N[1:], names) + 1).astype(np.int32)


def _user_numbers(bundle: Bundle, names: Sequence[str]) -> np.ndarray:
    return _find(bundle.users.raw_user_U, names)


def _find(sorted_X: np.ndarray, names: Sequence[str]) -> np.ndarray:
    wanted = np.asarray(names, str)
    at = np.minimum(np.searchsorted(sorted_X, wanted), len(sorted_X) - 1)
    return np.where(sorted_X[at] == wanted, at, -1) if len(wanted) else np.zeros(0, np.int64)
