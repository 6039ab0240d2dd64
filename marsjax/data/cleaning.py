"""The border where data enters: raw columns become numbered, sorted, checked records, and every defect is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from marsjax.data.grades import rank_grades
from marsjax.files import digest_arrays
from marsjax.records import Dataset, Items, Log, Modality, Problem

SHOWN = 5  # places that a problem names
ACCEPTED = ("kept", "filtered", "ignored")  # actions that strict reading does not refuse, see `Problem.action`


class Ids(NamedTuple):
    """A column of ids as read: numbers of its distinct names, which are far fewer. Names may repeat or be unused."""

    code_R: np.ndarray  # [R] int, positions in name_X
    name_X: np.ndarray  # [X] str; "" is missing

    def strings(self) -> np.ndarray:
        """[R] str, the column itself."""
        return self.name_X[self.code_R]


def float_ids(value_X: np.ndarray) -> np.ndarray:
    """Ids that a program kept as floats, as it does where some are missing, as text [X].

    Missing ones (NaN, infinite) are "". If all others are whole they lose their ".0", so that they are those of a file
    that has integers.
    """
    missing_X = ~np.isfinite(value_X)
    value_X = np.where(missing_X, 0, value_X)
    whole = (value_X % 1 == 0).all() and (np.abs(value_X).astype(np.float64) < 2**63).all()
    return np.where(missing_X, "", (value_X.astype(np.int64) if whole else value_X).astype(str))


def as_texts(texts: Sequence[str]) -> np.ndarray:
    """[I] objects that are str. A fixed-width array takes 4 bytes for each character of the longest text, every row."""
    return np.array(texts, object)


class RawItems(NamedTuple):
    """A catalogue as read: one row an item, not yet numbered."""

    raw_id: np.ndarray  # [I] str
    title: np.ndarray  # [I] str or objects that are str
    categories: Sequence[Sequence[str]]  # I lists of names


class RawFeatures(NamedTuple):
    """Features of one modality as read."""

    raw_id: np.ndarray  # [I] str
    feature: np.ndarray  # [I, F]
    source: str  # file name, for messages


def build_dataset(
    *,
    name: str,
    user_R: np.ndarray | Ids,
    item_R: np.ndarray | Ids,
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
        user_R, item_R: ids, as strings or already numbered; "" is missing.
        label_R: float; NaN is missing. With `label_threshold` the label is `value >= threshold`, and the grade says
            how large the value is (`rank_grades`); without it the column must be 0 or 1.
        time_R: integer, float or datetime64; NaN, NaT and what is outside +-(2^63 - 1) are missing. Rows are sorted and
            compared as precisely as given, and rows of one user with equal times keep their order. Integers stay as
            they are. Of floats and datetime64 whole seconds are kept, or, where any time has a fraction, microseconds
            of all.
        where: row numbers -> places such as "ratings.dat:17".
        items: the catalogue; None takes the items from the log.
        min_item_events, min_user_events: items, then users, with fewer events are dropped, once.
        strict: refuse everything that would be dropped, masked, reordered or noted.
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

    # From here on users and items are numbers, whose order is that of the names.
    user_code_R, user_names = _number(user_R)
    item_code_R, item_names = _number(item_R)
    label_R, time_R = np.asarray(label_R, np.float64), np.asarray(time_R)
    if time_R.dtype.kind == "f":
        time_R = time_R.astype(np.float64)
    row_R = np.arange(len(user_code_R))
    value_R = label_R

    def narrow(keep_R: np.ndarray) -> None:
        nonlocal user_code_R, item_code_R, label_R, time_R, row_R, value_R
        if keep_R.dtype == bool and keep_R.all():
            return
        user_code_R, item_code_R, label_R, time_R, row_R, value_R = (
            v[keep_R] for v in (user_code_R, item_code_R, label_R, time_R, row_R, value_R)
        )

    narrow(drop("missing_id", (user_names == "")[user_code_R] | (item_names == "")[item_code_R]))
    # Both comparisons are false for NaN, and the first for the least int64, which stands for a missing integer.
    lacking_R = np.isnat(time_R) if time_R.dtype.kind == "M" else ~((time_R > -(2**63)) & (time_R < 2**63))
    narrow(drop("missing_time", lacking_R))
    if label_threshold is None:
        bad_R = (label_R != 0) & (label_R != 1)
        label_X = np.unique(label_R[np.isfinite(label_R)])
        narrow(drop("label_not_0_or_1", bad_R))
        if bad_R.any() and not np.isin(label_X, (0, 1)).all():  # a rating, most likely
            shown = ", ".join(f"{value:g}" for value in label_X[:SHOWN]) + (", ..." if len(label_X) > SHOWN else "")
            hint = f"labels are {shown}: --config.data.label_threshold=VALUE counts that and more as 1"
            found[-1] = found[-1]._replace(where=(*found[-1].where, hint))
    else:
        narrow(drop("missing_label", ~np.isfinite(label_R)))
        label_R = (label_R >= label_threshold).astype(np.float64)

    if items is None:
        items = RawItems(item_names, np.full(len(item_names), ""), [()] * len(item_names))
    else:
        _, first = np.unique(items.raw_id, return_index=True)
        repeated = len(items.raw_id) - len(first)
        if repeated:
            extra = np.setdiff1d(np.arange(len(items.raw_id)), first)[:SHOWN]
            found.append(Problem("duplicate_item", repeated, "dropped", tuple(str(items.raw_id[i]) for i in extra)))
            first = np.sort(first)
            items = RawItems(items.raw_id[first], items.title[first], [items.categories[int(i)] for i in first])
        narrow(drop("unknown_item", ~np.isin(item_names, items.raw_id)[item_code_R]))

    # Sort by user and time; the file order decides ties.
    order_R = np.lexsort((time_R, user_code_R))  # stable
    by_user_R = np.argsort(user_code_R, kind="stable")
    moved_R = order_R != by_user_R
    if moved_R.any():
        at = np.flatnonzero(moved_R)
        places = tuple(where(row_R[by_user_R[at[:SHOWN]]]))
        found.append(Problem("unsorted_event", len(at), "reordered", places))
    narrow(order_R)

    # The same user, item and time: the first in the file stays, and the others either say the same or contradict it.
    first_R = _first_alike(user_code_R, item_code_R, time_R)
    repeats_R = first_R != np.arange(len(row_R))
    agrees_R = label_R == label_R[first_R]
    keep_R = drop("duplicate_event", repeats_R & agrees_R)
    narrow(keep_R & drop("conflicting_label", repeats_R & ~agrees_R))
    time_R = _whole(time_R)

    for values, least in (("item", min_item_events), ("user", min_user_events)):
        if least > 1:
            code_R = item_code_R if values == "item" else user_code_R
            count_X = np.bincount(code_R)
            rare_R = (count_X < least)[code_R]
            if rare_R.any():
                rare, known = ((count_X > 0) & (count_X < least)).sum(), (count_X > 0).sum()
                note = f"{rare} of {known} {values}s have fewer than {least} events"
                found.append(Problem(f"rare_{values}", int(rare_R.sum()), "filtered", (note,)))
            narrow(~rare_R)
    if not len(row_R):
        raise ValueError(
            f"{name}: expected events, found none after dropping "
            + (", ".join(f"{p.occurrences} x {p.kind}" for p in found) or "nothing")
            + "; look at the columns that the configuration maps"
        )

    # Only items that occur: rows of the tables are dear, and an item without events is never shown.
    occurring, position_R = np.unique(item_code_R, return_inverse=True)
    item_E = (position_R + 1).astype(np.int32)
    kept = np.flatnonzero(np.isin(items.raw_id, item_names[occurring]))
    kept = kept[np.argsort(items.raw_id[kept])]  # the order of the names, as that of the codes
    raw_id_N = np.concatenate([[""], items.raw_id[kept]])
    occurring, user_E = np.unique(user_code_R, return_inverse=True)
    user_names = user_names[occurring]
    start_U1 = np.searchsorted(user_E, np.arange(len(user_names) + 1)).astype(np.int64)
    single = int((np.diff(start_U1) == 1).sum())
    if single:
        at = np.flatnonzero(np.diff(start_U1) == 1)[:SHOWN]
        found.append(Problem("user_of_one_event", single, "kept", tuple(f"user {user_names[u]}" for u in at)))
    log = Log(start_U1, item_E, label_R.astype(np.float32), time_R, user_names, rank_grades(value_R))
    category_NG, category_names = _categories([items.categories[int(i)] for i in kept])
    modalities = {
        modality: _modality(modality, raw, raw_id_N, found) for modality, raw in features.items()
    }  # fmt: skip
    title_N = np.concatenate([as_texts([""]), items.title[kept]])
    records = Items(raw_id_N, title_N, category_NG, category_names, modalities)
    if strict:
        refused = [problem for problem in found if problem.action not in ACCEPTED]
        if refused:
            raise ValueError(
                f"{name}: strict reading refuses "
                + "; ".join(f"{p.occurrences} x {p.kind} ({', '.join(p.where)})" for p in refused)
                + ". Mend the files, or read without strict to have them "
                + " or ".join(sorted({p.action for p in refused}))
            )
    oracle_E = None if oracle_R is None else np.asarray(oracle_R)[row_R].astype(np.float32)
    return Dataset(name, log, records, tuple(found), _fingerprint(log, records), oracle_E)


def _number(ids: np.ndarray | Ids) -> Ids:
    """Numbers ids by distinct names in alphabetical order."""
    if not isinstance(ids, Ids):
        name_X, code_R = np.unique(np.asarray(ids, str), return_inverse=True)
        return Ids(code_R, name_X)
    name_X, code_X = np.unique(ids.name_X, return_inverse=True)
    return Ids(code_X[ids.code_R], name_X)


def _first_alike(user_R: np.ndarray, item_R: np.ndarray, time_R: np.ndarray) -> np.ndarray:
    """For each of R rows, sorted by user and time, the first one of the same user, item and time, [R] int."""
    order_R = np.lexsort((item_R, user_R))  # stable, so that times ascend within each user and item
    user_R, item_R, time_R = user_R[order_R], item_R[order_R], time_R[order_R]
    starts_R = np.ones(len(order_R), bool)
    starts_R[1:] = (user_R[1:] != user_R[:-1]) | (item_R[1:] != item_R[:-1]) | (time_R[1:] != time_R[:-1])
    first_R = np.empty(len(order_R), np.int64)
    first_R[order_R] = order_R[np.flatnonzero(starts_R)[np.cumsum(starts_R) - 1]]
    return first_R


def _whole(time_R: np.ndarray) -> np.ndarray:
    """Times as int64 in the same order: integers as they are, others in seconds, or microseconds if any needs them."""
    if time_R.dtype.kind == "M":
        micro_R = time_R.astype("datetime64[us]").astype(np.int64)
        return micro_R if (micro_R % 1_000_000).any() else micro_R // 1_000_000
    if time_R.dtype.kind == "f" and (time_R % 1).any():
        # A clock so fine that microseconds of its unit overflow keeps its unit.
        fits = np.abs(time_R).max() < 2**63 / 1e6
        return np.rint(time_R * 1e6 if fits else time_R).astype(np.int64)
    return time_R.astype(np.int64)


def _categories(categories: Sequence[Sequence[str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbered categories [N, G], and their names; the names are numbered in alphabetical order."""
    count_I = np.array([len(names) for names in categories], int)
    flat = as_texts([name for names in categories for name in names])
    known = np.unique(flat[flat != ""])
    category_NG = np.zeros((len(categories) + 1, max(int(count_I.max(initial=0)), 1)), np.int32)
    row = np.repeat(np.arange(len(categories)), count_I)
    column = np.arange(len(flat)) - np.repeat(np.cumsum(count_I) - count_I, count_I)
    real = flat != ""
    category_NG[row[real] + 1, column[real]] = np.searchsorted(known, flat[real]) + 1
    return category_NG, ("", *(str(name) for name in known))


def _modality(modality: str, raw: RawFeatures, raw_id_N: np.ndarray, found: list[Problem]) -> Modality:
    """Features in the order of the items; the first row of an id stays. A row that has a NaN, or that is all zero and
    so stands for none, is masked."""
    feature = np.asarray(raw.feature)
    if feature.ndim != 2 or len(feature) != len(raw.raw_id) or not feature.shape[1]:
        raise ValueError(
            f"{raw.source}: expected one {modality} vector for each of {len(raw.raw_id)} ids, an array "
            f"[{len(raw.raw_id)}, width], found shape {feature.shape}; write ids and vectors of the same items"
        )

    def tell(kind: str, action: str, at: np.ndarray) -> None:
        if len(at):
            places = tuple(f"{raw.source} item {raw_id[i]}" for i in at[:SHOWN])
            found.append(Problem(kind, len(at), action, places))

    raw_id, feature = np.asarray(raw.raw_id, str), feature.astype(np.float32)
    first = np.sort(np.unique(raw_id, return_index=True)[1])
    tell(f"duplicate_{modality}_feature", "dropped", np.setdiff1d(np.arange(len(raw_id)), first))
    raw_id, feature = raw_id[first], feature[first]
    finite, zero = np.isfinite(feature).all(axis=1), ~feature.any(axis=1)
    tell(f"non_finite_{modality}_feature", "masked", np.flatnonzero(~finite))
    tell(f"zero_{modality}_feature", "masked", np.flatnonzero(zero))
    feature_NF = np.zeros((len(raw_id_N), feature.shape[1]), np.float32)
    present_N = np.zeros(len(raw_id_N), bool)
    at = np.minimum(np.searchsorted(raw_id_N[1:], raw_id), max(len(raw_id_N) - 2, 0))
    known = raw_id_N[1:][at] == raw_id
    # Also what was filtered has no item any more, so this is no fault of the file.
    tell(f"{modality}_of_unknown_item", "ignored", np.flatnonzero(~known))
    use = finite & ~zero & known
    feature_NF[at[use] + 1] = feature[use]
    present_N[at[use] + 1] = True
    missing = int((~present_N[1:]).sum())
    if missing:
        lack = raw_id_N[1:][~present_N[1:]][:SHOWN]
        found.append(Problem(f"item_without_{modality}", missing, "kept", tuple(f"item {i}" for i in lack)))
    return Modality(feature_NF, present_N)


def _fingerprint(log: Log, items: Items) -> str:
    arrays = {**log._asdict(), "raw_id": items.raw_id_N, "title": items.title_N, "category": items.category_NG}
    del arrays["grade_E"]  # see `grades`
    for modality, (feature_NF, present_N) in items.modalities.items():
        arrays |= {f"{modality}.feature": feature_NF, f"{modality}.present": present_N}
    return digest_arrays({name: _narrow(array) for name, array in arrays.items()})


def _narrow(array: np.ndarray) -> np.ndarray:
    """Strings as wide as the longest: what was dropped on the way here may have been wider."""
    return array if array.dtype.kind != "U" else array.astype(f"<U{max(1, int(np.char.str_len(array).max(initial=0)))}")
