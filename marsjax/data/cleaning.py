"""The border where data enters: raw columns become numbered, sorted, checked records, and every defect is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from marsjax.files import digest_arrays
from marsjax.records import Dataset, Items, Log, Modality, Problem

SHOWN = 5  # places that a problem names
HARMLESS = ("reordered", "kept")  # actions that lose nothing; strict refuses "reordered" all the same


class RawItems(NamedTuple):
    """A catalogue as read: one row an item, not yet numbered."""

    raw_id: np.ndarray  # [I] str
    title: np.ndarray  # [I] str
    categories: Sequence[Sequence[str]]  # I lists of names


class RawFeatures(NamedTuple):
    """Features of one modality as read."""

    raw_id: np.ndarray  # [I] str
    feature: np.ndarray  # [I, F]
    source: str  # file name, for messages


def build_dataset(
    *,
    name: str,
    user_R: np.ndarray,
    item_R: np.ndarray,
    label_R: np.ndarray,
    time_R: np.ndarray,
    where: Callable[[np.ndarray], list[str]],
    items: RawItems | None,
    features: Mapping[str, RawFeatures],
    label_threshold: float | None = None,
    min_item_events: int = 1,
    min_user_events: int = 1,
    strict: bool = False,
    problems: Sequence[Problem] = (),
    oracle_R: np.ndarray | None = None,
) -> Dataset:
    """Checks and numbers a log of R rows.

    Args:
        user_R, item_R: ids as strings; "" is missing.
        label_R: float; NaN is missing. With `label_threshold` the label is `value >= threshold`, without it the
            column must be 0 or 1.
        time_R: float or integer; NaN is missing. Rows of one user with equal times keep their order.
        where: row numbers -> places such as "ratings.dat:17".
        items: the catalogue; None takes the items from the log.
        min_item_events, min_user_events: items, then users, with fewer events are dropped, once.
        strict: refuse everything that would be dropped, masked or reordered.
        problems: what the reader found before.

    Raises:
        ValueError: nothing is left, features have a wrong shape, or `strict` and a problem was found.
    """
    found = list(problems)

    def drop(kind: str, bad_R: np.ndarray) -> np.ndarray:
        if bad_R.any():
            at = np.flatnonzero(bad_R)
            found.append(Problem(kind, len(at), "dropped", tuple(where(row_R[at[:SHOWN]]))))
        return ~bad_R

    user_R, item_R = np.asarray(user_R, str), np.asarray(item_R, str)
    label_R, time_R = np.asarray(label_R, np.float64), np.asarray(time_R)
    row_R = np.arange(len(user_R))

    def narrow(keep_R: np.ndarray) -> None:
        nonlocal user_R, item_R, label_R, time_R, row_R
        user_R, item_R, label_R, time_R, row_R = (v[keep_R] for v in (user_R, item_R, label_R, time_R, row_R))

    narrow(drop("missing_id", (user_R == "") | (item_R == "")))
    narrow(drop("missing_time", ~np.isfinite(time_R.astype(np.float64))))
    if label_threshold is None:
        narrow(drop("label_not_0_or_1", ~np.isin(label_R, (0.0, 1.0))))
    else:
        narrow(drop("missing_label", ~np.isfinite(label_R)))
        label_R = (label_R >= label_threshold).astype(np.float64)
    time_R = time_R.astype(np.int64)

    if items is None:
        catalogue = np.unique(item_R)
        items = RawItems(catalogue, np.full(len(catalogue), ""), [()] * len(catalogue))
    else:
        _, first = np.unique(items.raw_id, return_index=True)
        repeated = len(items.raw_id) - len(first)
        if repeated:
            extra = np.setdiff1d(np.arange(len(items.raw_id)), first)[:SHOWN]
            found.append(Problem("duplicate_item", repeated, "dropped", tuple(str(items.raw_id[i]) for i in extra)))
            first = np.sort(first)
            items = RawItems(items.raw_id[first], items.title[first], [items.categories[int(i)] for i in first])
        narrow(drop("unknown_item", ~np.isin(item_R, items.raw_id)))

    # Sort by user and time; the file order decides ties.
    user_names, user_U = np.unique(user_R, return_inverse=True)
    order_R = np.lexsort((np.arange(len(user_U)), time_R, user_U))
    by_user_R = np.argsort(user_U, kind="stable")
    moved_R = order_R != by_user_R
    if moved_R.any():
        at = np.flatnonzero(moved_R)
        places = tuple(where(row_R[by_user_R[at[:SHOWN]]]))
        found.append(Problem("unsorted_event", len(at), "reordered", places))
    narrow(order_R)

    # The same user, item and time: the first in the file stays.
    same = np.lexsort((row_R, time_R, item_R, user_R))
    repeats = (user_R[same][1:] == user_R[same][:-1]) & (item_R[same][1:] == item_R[same][:-1])
    repeats &= time_R[same][1:] == time_R[same][:-1]
    bad_R = np.zeros(len(row_R), bool)
    bad_R[same[1:][repeats]] = True
    narrow(drop("duplicate_event", bad_R))

    for kind, values, least in (("rare_item", "item", min_item_events), ("rare_user", "user", min_user_events)):
        if least > 1:
            names, inverse, count = np.unique(
                item_R if values == "item" else user_R, return_inverse=True, return_counts=True
            )
            rare_R = (count < least)[inverse]
            if rare_R.any():
                note = f"{int((count < least).sum())} of {len(names)} {values}s have fewer than {least} events"
                found.append(Problem(kind, int(rare_R.sum()), "filtered", (note,)))
            narrow(~rare_R)
    if not len(row_R):
        raise ValueError(
            f"{name}: expected events, found none after dropping "
            + (", ".join(f"{p.occurrences} x {p.kind}" for p in found) or "nothing")
            + "; look at the columns that the configuration maps"
        )

    # Only items that occur: rows of the tables are dear, and an item without events is never shown.
    occurs = np.isin(items.raw_id, item_R)
    kept = np.flatnonzero(occurs)
    kept = kept[np.argsort(items.raw_id[kept])]
    raw_id_N = np.concatenate([[""], items.raw_id[kept]])
    item_E = (np.searchsorted(raw_id_N[1:], item_R) + 1).astype(np.int32)
    user_names, user_E = np.unique(user_R, return_inverse=True)
    start_U1 = np.searchsorted(user_E, np.arange(len(user_names) + 1)).astype(np.int64)
    single = int((np.diff(start_U1) == 1).sum())
    if single:
        at = np.flatnonzero(np.diff(start_U1) == 1)[:SHOWN]
        found.append(Problem("user_of_one_event", single, "kept", tuple(f"user {user_names[u]}" for u in at)))
    log = Log(start_U1, item_E, label_R.astype(np.float32), time_R, user_names)
    category_NG, category_names = _categories([items.categories[int(i)] for i in kept])
    modalities = {
        modality: _modality(modality, raw, raw_id_N, found) for modality, raw in features.items()
    }  # fmt: skip
    records = Items(raw_id_N, np.concatenate([[""], items.title[kept]]), category_NG, category_names, modalities)
    if strict:
        refused = [problem for problem in found if problem.action not in ("kept", "filtered")]
        if refused:
            raise ValueError(
                f"{name}: strict reading refuses "
                + "; ".join(f"{p.occurrences} x {p.kind} ({', '.join(p.where)})" for p in refused)
                + ". Mend the files, or read without strict to have them "
                + " or ".join(sorted({p.action for p in refused}))
            )
    oracle_E = None if oracle_R is None else np.asarray(oracle_R)[row_R].astype(np.float32)
    return Dataset(name, log, records, tuple(found), _fingerprint(log, records), oracle_E)


def _categories(categories: Sequence[Sequence[str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbered categories [N, G], and their names; the names are numbered in alphabetical order."""
    count_I = np.array([len(names) for names in categories], int)
    flat = np.array([name for names in categories for name in names], str)
    known = np.unique(flat[flat != ""]) if len(flat) else np.array([], str)
    category_NG = np.zeros((len(categories) + 1, max(int(count_I.max(initial=0)), 1)), np.int32)
    row = np.repeat(np.arange(len(categories)), count_I)
    column = np.arange(len(flat)) - np.repeat(np.cumsum(count_I) - count_I, count_I)
    real = flat != ""
    category_NG[row[real] + 1, column[real]] = np.searchsorted(known, flat[real]) + 1
    return category_NG, ("", *(str(name) for name in known))


def _modality(modality: str, raw: RawFeatures, raw_id_N: np.ndarray, found: list[Problem]) -> Modality:
    """Features in the order of the items. No NaN passes: a row that has one is masked."""
    feature = np.asarray(raw.feature)
    if feature.ndim != 2 or len(feature) != len(raw.raw_id) or not feature.shape[1]:
        raise ValueError(
            f"{raw.source}: expected one {modality} vector for each of {len(raw.raw_id)} ids, an array "
            f"[{len(raw.raw_id)}, width], found shape {feature.shape}; write ids and vectors of the same items"
        )
    feature = feature.astype(np.float32)
    finite = np.isfinite(feature).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        places = tuple(f"{raw.source} item {raw.raw_id[i]}" for i in bad[:SHOWN])
        found.append(Problem(f"non_finite_{modality}_feature", len(bad), "masked", places))
    feature_NF = np.zeros((len(raw_id_N), feature.shape[1]), np.float32)
    present_N = np.zeros(len(raw_id_N), bool)
    at = np.minimum(np.searchsorted(raw_id_N[1:], raw.raw_id), max(len(raw_id_N) - 2, 0))
    use = finite & (raw_id_N[1:][at] == raw.raw_id)
    feature_NF[at[use] + 1] = feature[use]
    present_N[at[use] + 1] = True
    missing = int((~present_N[1:]).sum())
    if missing:
        lack = raw_id_N[1:][~present_N[1:]][:SHOWN]
        found.append(Problem(f"item_without_{modality}", missing, "kept", tuple(f"item {i}" for i in lack)))
    return Modality(feature_NF, present_N)


def _fingerprint(log: Log, items: Items) -> str:
    arrays = {**log._asdict(), "raw_id": items.raw_id_N, "title": items.title_N, "category": items.category_NG}
    for modality, (feature_NF, present_N) in items.modalities.items():
        arrays |= {f"{modality}.feature": feature_NF, f"{modality}.present": present_N}
    return digest_arrays(arrays)
