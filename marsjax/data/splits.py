"""Train, validation and test rows, histories without leakage, and activity groups."""

from __future__ import annotations

import numpy as np

from marsjax.records import HIGH, LOW, MIDDLE, NEW, TEST, TRAIN, VALID, Histories, Log, Rows


def make_rows(
    log: Log,
    *,
    split: str,
    fraction_test: float = 0.2,
    fraction_valid: float = 0.1,
    low_fraction: float = 0.3,
    high_fraction: float = 0.3,
    history: str = "all",
    sparse_fraction: float = 0.0,
    sparse_events: int = 5,
    seed: int = 0,
) -> Rows:
    """Splits a log and tells what each event may see: only what stands before it among its user's events.

    They stand in time order, and those of the same instant in the order of the file, so the history of an event holds
    what the user did at the same instant where the file has it earlier.

    Args:
        split: "leave_one_out" (the last event of a user is test and the one before validation; a user of fewer than 3
            events is all training), "last_fraction" (the last `fraction_test` of each user is test, at least one event
            of a user with 5 or more, and `fraction_valid` before it validation; a user of fewer than 5 is all
            training), or "global_time" (quantiles of the time of all events; one moment is never divided).
        low_fraction, high_fraction: shares of the users with training events that are low- and high-active, by the
            number of these. Exact counts: ties are broken by a permutation seeded with `seed`. Users without training
            events, as "global_time" has them, are a group of their own.
        history: "all" events, or "positives" only.
        sparse_fraction, sparse_events: makes a share of the users sparse: of their training events they keep the first
            `sparse_events`, to learn from and as history of every later row. They are drawn with `seed` among those
            who have more, and are the low-active users; nobody else is, however short. Validation and test rows stay
            the same rows whatever is kept, so what a longer history is worth can be read off. 0 is off.

    Raises:
        ValueError: unknown split or history; `sparse_events` below 1, or as many as anybody has; fractions outside
            [0, 1) or together not below 1 (at most 1 for groups).
    """
    if not (fraction_test >= 0 and fraction_valid >= 0 and fraction_test + fraction_valid < 1):
        raise ValueError(
            f"split: expected fractions from 0 that leave something to train on, found test {fraction_test} and "
            f"validation {fraction_valid}"
        )
    if not (0 <= sparse_fraction <= 1 and sparse_events >= 1):
        raise ValueError(
            f"split: expected sparse_fraction from 0 to 1 and sparse_events of 1 or more, found {sparse_fraction} and "
            f"{sparse_events}"
        )
    if sparse_fraction and sparse_fraction + high_fraction > 1:
        raise ValueError(
            f"split: expected sparse_fraction and high_fraction together at most 1, found {sparse_fraction} and "
            f"{high_fraction}; the sparse users are the low-active ones"
        )
    if not (low_fraction >= 0 and high_fraction >= 0 and low_fraction + high_fraction <= 1):
        raise ValueError(
            f"split: expected low_fraction and high_fraction from 0 and together at most 1, found {low_fraction} and "
            f"{high_fraction}"
        )
    n_users, n_events = len(log.start_U1) - 1, len(log.item_E)
    length_U = np.diff(log.start_U1)
    user_E = np.repeat(np.arange(n_users, dtype=np.int32), length_U)
    from_end_E = np.repeat(log.start_U1[1:], length_U) - 1 - np.arange(n_events)

    if split == "leave_one_out":
        enough_E = (length_U >= 3)[user_E]
        split_E = np.full(n_events, TRAIN, np.int8)
        split_E[enough_E & (from_end_E == 1)] = VALID
        split_E[enough_E & (from_end_E == 0)] = TEST
    elif split == "last_fraction":
        enough_U = length_U >= 5
        test_U = np.where(enough_U, np.maximum(np.ceil(length_U * fraction_test), fraction_test > 0), 0)
        valid_U = np.where(enough_U, np.maximum(np.ceil(length_U * fraction_valid), fraction_valid > 0), 0)
        is_test_E = from_end_E < test_U[user_E]
        split_E = np.where(is_test_E, TEST, np.where(from_end_E < (test_U + valid_U)[user_E], VALID, TRAIN))
    elif split == "global_time":
        bounds = np.quantile(log.time_E, [1 - fraction_test - fraction_valid, 1 - fraction_test], method="lower")
        split_E = np.where(log.time_E > bounds[1], TEST, np.where(log.time_E > bounds[0], VALID, TRAIN))
    else:
        raise ValueError(f"split: expected leave_one_out, last_fraction or global_time, found {split!r}")
    split_E = split_E.astype(np.int8)
    train_length_U = np.bincount(user_E[split_E == TRAIN], minlength=n_users)
    sparse_U = np.zeros(n_users, bool)
    if sparse_fraction:
        drawn_U = np.random.default_rng(seed).permutation(n_users)
        drawn_U = drawn_U[train_length_U[drawn_U] > sparse_events]
        if not len(drawn_U):
            raise ValueError(
                f"split: expected users with more than sparse_events={sparse_events} training events, found none; the "
                f"longest history has {train_length_U.max(initial=0)}"
            )
        sparse_U[drawn_U[: int(round(sparse_fraction * n_users))]] = True
        train_length_U = np.where(sparse_U, np.minimum(train_length_U, sparse_events), train_length_U)
        at_E = np.arange(n_events) - np.repeat(log.start_U1[:-1], length_U)
        split_E[(split_E == TRAIN) & (at_E >= train_length_U[user_E])] = -1
        low_fraction = 0.0
    group_U = activity_groups(train_length_U, low_fraction=low_fraction, high_fraction=high_fraction, seed=seed)
    group_U[sparse_U] = LOW
    return Rows(
        user_E=user_E,
        split_E=split_E,
        histories=_histories(log, user_E, train_length_U, history, sparse_U),
        group_U=group_U,
        train_length_U=train_length_U,
    )


def _histories(
    log: Log, user_E: np.ndarray, train_length_U: np.ndarray, history: str, sparse_U: np.ndarray
) -> Histories:
    kinds = {"all": np.ones(len(log.item_E), bool), "positives": log.label_E > 0}
    if history not in kinds:
        raise ValueError(f"history: expected one of {sorted(kinds)}, found {history!r}")
    in_E = kinds[history]
    before_E1 = np.concatenate([[0], np.cumsum(in_E)]).astype(np.int64)  # history entries before each event
    # Training events are the first of each user under every split.
    train_end_U = before_E1[log.start_U1[:-1] + train_length_U]
    end_E = before_E1[:-1]
    # Where all events are history it is the log itself, which nobody writes to.
    entries = slice(None) if history == "all" else in_E
    return Histories(
        start_U1=before_E1[log.start_U1],
        item_H=log.item_E[entries],
        time_H=log.time_E[entries],
        label_H=log.label_E[entries],
        grade_H=None if log.grade_E is None else log.grade_E[entries],
        end_E=np.where(sparse_U[user_E], np.minimum(end_E, train_end_U[user_E]), end_E),
        train_end_U=train_end_U,
        start_E=before_E1[log.start_U1[:-1]][user_E],
    )


def activity_groups(train_length_U: np.ndarray, *, low_fraction: float, high_fraction: float, seed: int) -> np.ndarray:
    """LOW, MIDDLE, HIGH or NEW for each user, [U] int8: exact shares of the users ranked by training events.

    In 5-core data a third of the users share the least length, so a threshold would miss the 30% by far; the rank
    with seeded ties does not. Users without training events are NEW and take no part in the ranking: they have no
    history to be augmented, and would fill the low-active group where a split by time leaves many of them.
    """
    order_U = np.lexsort((np.random.default_rng(seed).permutation(len(train_length_U)), train_length_U))
    ranked_U = order_U[train_length_U[order_U] > 0]
    n_ranked = len(ranked_U)
    group_U = np.full(len(train_length_U), NEW, np.int8)
    group_U[ranked_U] = MIDDLE
    group_U[ranked_U[: int(round(low_fraction * n_ranked))]] = LOW
    group_U[ranked_U[n_ranked - int(round(high_fraction * n_ranked)) :]] = HIGH
    return group_U
