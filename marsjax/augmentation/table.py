"""Candidates on disk: arrays for the next stage, Parquet for any other stack, and a summary."""

from __future__ import annotations

import pathlib

import numpy as np

from marsjax import files
from marsjax.augmentation.mars import Candidates
from marsjax.records import LOW, TEST, TRAIN, Dataset, Log, Queries, Rows


def read_candidates(path: pathlib.Path) -> Candidates:
    """What `files.write_arrays(path, **candidates._asdict())` wrote, left on disk."""
    return Candidates(**files.map_arrays(path))


def statistics(candidates: Candidates, queries: Queries, rows: Rows, log: Log) -> dict[str, float]:
    """How much is borrowed, from how near, and whether the donor knows the target.

    `rows_that_borrow_*` is the share of the low-active users' rows that have a query. `borrows_target_*` is the share
    of those whose query borrows the target item, and `borrows_target_auc_*` how well that alone tells positive rows
    from negative ones: a value on training rows above that on test rows is the label leaking into the choice of donor.
    """
    kept_QS, real_QS = candidates.kept_QS, candidates.item_QS > 0
    near_QS = np.where(real_QS, candidates.donor_similarity_QS, np.nan)
    out = {
        "queries": float(len(kept_QS)),
        "candidates_per_query": float(real_QS.sum() / max(len(kept_QS), 1)),
        "borrowed_per_query": float(kept_QS.sum() / max(len(kept_QS), 1)),
        "keep_rate": float(kept_QS.sum() / max(real_QS.sum(), 1)),
        "donor_similarity": float(np.nanmean(near_QS)) if real_QS.any() else 0.0,
        "distinct_donors": float(len(np.unique(candidates.donor_QS[real_QS]))),
    }
    for name, split in (("train", TRAIN), ("test", TEST)):
        row_R = np.flatnonzero((rows.split_E == split) & (queries.query_E >= 0))
        has_R = np.zeros(len(row_R), bool)
        for begin in range(0, len(row_R), 4096):
            part_R = row_R[begin : begin + 4096]
            query_R = queries.query_E[part_R]
            same_RS = candidates.item_QS[query_R] == log.item_E[part_R][:, None]
            has_R[begin : begin + 4096] = (same_RS & kept_QS[query_R]).any(axis=1)
        asked = (rows.split_E == split) & (rows.group_U[rows.user_E] == LOW)
        out[f"rows_that_borrow_{name}"] = float(len(row_R) / max(asked.sum(), 1))
        positive_R = log.label_E[row_R] > 0
        if positive_R.any() and not positive_R.all():
            out[f"borrows_target_{name}"] = float(has_R.mean())
            out[f"borrows_target_auc_{name}"] = float(0.5 + (has_R[positive_R].mean() - has_R[~positive_R].mean()) / 2)
    return out


def need_pyarrow() -> None:
    """Raises ImportError with the remedy where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError("writing Parquet needs pyarrow: pip install marsjax[tabular]") from error


def write_parquet(path: pathlib.Path, candidates: Candidates, queries: Queries, rows: Rows, dataset: Dataset) -> None:
    """One row a candidate item, with ids of the source.

    Columns: user, history_length (how many items of the own history the donor was looked up with), donor, similarity
    (of user and donor), item, donor_time (when the donor met it), donor_label (what came of it then), item_similarity
    (Eq. 16), kept, position (place in the borrowed sequence from 0, -1 where not kept).

    Raises:
        ImportError: pyarrow is not installed.
        OSError: the disk is full; nothing is left behind.
    """
    need_pyarrow()
    import pyarrow
    import pyarrow.parquet

    query_S, slot_S = np.nonzero(candidates.item_QS > 0)
    kept_S = candidates.kept_QS[query_S, slot_S]
    position_QS = np.cumsum(candidates.kept_QS, axis=1) - 1
    user_S = queries.user_Q[query_S]
    raw_user_U, raw_item_N = dataset.log.raw_user_U, dataset.items.raw_id_N
    donor_S, item_S, time_S = (
        value_QS[query_S, slot_S] for value_QS in (candidates.donor_QS, candidates.item_QS, candidates.time_QS)
    )
    columns = {
        "user": raw_user_U[user_S],
        "history_length": (queries.end_Q - rows.histories.start_U1[queries.user_Q])[query_S],
        "donor": raw_user_U[donor_S],
        "similarity": candidates.donor_similarity_QS[query_S, slot_S],
        "item": raw_item_N[item_S],
        "donor_time": time_S,
        "donor_label": _labels(dataset, rows, donor_S, item_S, time_S),
        "item_similarity": candidates.similarity_QS[query_S, slot_S],
        "kept": kept_S,
        "position": np.where(kept_S, position_QS[query_S, slot_S], -1).astype(np.int32),
    }
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    files.write_bytes(path, table.getvalue().to_pybytes())


def _labels(dataset: Dataset, rows: Rows, user_S: np.ndarray, item_S: np.ndarray, time_S: np.ndarray) -> np.ndarray:
    """The labels of these users' events with these items at these times, [S] int8; of several the last one's."""
    log, n_items = dataset.log, len(dataset.items.raw_id_N)
    pair_S = user_S.astype(np.int64) * n_items + item_S
    pair_E = rows.user_E.astype(np.int64) * n_items + log.item_E
    event_X = np.flatnonzero(np.isin(pair_E, pair_S))[::-1]
    of_events_X2 = np.stack([pair_E[event_X], log.time_E[event_X]], axis=1)
    _, first, at = np.unique(
        np.concatenate([of_events_X2, np.stack([pair_S, time_S], axis=1)]),
        axis=0,
        return_index=True,
        return_inverse=True,
    )
    # Of equal rows the first is an event, and the last of them, for they are in reverse.
    label_X = (log.label_E[event_X] > 0).astype(np.int8)
    return label_X[first[np.ravel(at)[len(event_X) :]]]
