"""What was known of a user and of an item before each event: counts and rates of likes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marsjax.records import TRAIN, Log, Rows

STRENGTH = 10.0  # events that the rate over all training events counts for, where a user or an item has few


class ItemCounts(NamedTuple):
    """What the training events say of the items."""

    overall: float  # rate of likes over all of them
    total_2N: np.ndarray  # [2, N] float64, events of the item, and likes among them
    others_2FN: np.ndarray  # [2, F, N] float64, the same of the users outside of each fold
    fold_U: np.ndarray  # [U] int64, the fold of each user, drawn with a fixed seed


def prior_numbers(log: Log, rows: Rows, *, folds: int = 5) -> np.ndarray:
    """Six numbers for each event, [E, 6] float32: rate of likes and count of events of the user in the visible history,
    of the item among the training events of all users at an earlier time, and of the item among all training events of
    the users of the other folds (`folds` of them, drawn with a fixed seed).

    Rates are shrunk to the rate over all training events and moved by it; counts are log(1 + n), scaled to about 1.
    The label of the event enters nowhere. An item's rate over all training events but the row's own would tell it:
    where the others have liked less, the row has liked more. So the last pair leaves out a fold of the users, the row's
    own among them. The first four know nothing later than the event.
    """
    histories, is_train_E = rows.histories, rows.split_E == TRAIN
    counted = item_counts(log, rows, n_items=int(log.item_E.max(initial=0)) + 1, folds=folds)
    likes_H1 = np.concatenate([[0.0], np.cumsum(histories.label_H, dtype=np.float64)])
    start_E = histories.start_E
    user = histories.end_E - start_E, likes_H1[histories.end_E] - likes_H1[start_E]
    item = earlier_events(log.item_E, log.time_E, np.stack([is_train_E, is_train_E * log.label_E]))
    others = counted.others_2FN[:, counted.fold_U[rows.user_E], log.item_E]
    columns = []
    for count_E, likes_E in (user, item, tuple(others)):
        columns += rate_and_count(count_E, likes_E, counted.overall)
    return np.stack(columns, axis=1).astype(np.float32)


def item_counts(log: Log, rows: Rows, *, n_items: int, folds: int = 5) -> ItemCounts:
    """Counts of the items among the training events, of all users and of those outside of each fold."""
    is_train_E = rows.split_E == TRAIN
    fold_U = np.random.default_rng(0).permutation(len(rows.group_U)) % folds
    key_E = fold_U[rows.user_E] * n_items + log.item_E
    sums_2FN = np.stack(
        [
            np.bincount(key_E, weight_E, minlength=folds * n_items).reshape(folds, n_items)
            for weight_E in (is_train_E, is_train_E * log.label_E)
        ]
    )
    total_2N = sums_2FN.sum(axis=1)
    return ItemCounts(float(log.label_E[is_train_E].mean()), total_2N, total_2N[:, None, :] - sums_2FN, fold_U)


def rate_and_count(count_X: np.ndarray, likes_X: np.ndarray, overall: float) -> list[np.ndarray]:
    """Two numbers a row, [X] each: the shrunk rate of likes less the rate over all, and the count."""
    rate_X = (likes_X + STRENGTH * overall) / (count_X + STRENGTH)
    return [4.0 * (rate_X - overall), np.log1p(count_X) / 4.0 - 1.0]


def earlier_events(item_E: np.ndarray, time_E: np.ndarray, value_VE: np.ndarray) -> np.ndarray:
    """Sums of values over the events of the same item at an earlier time, [V, E] float64."""
    order_E = np.lexsort((time_E, item_E))
    item_O, time_O = item_E[order_E], time_E[order_E]
    before_VO = np.cumsum(value_VE[:, order_E], axis=1, dtype=np.float64) - value_VE[:, order_E]
    is_new_item_O = np.append(True, item_O[1:] != item_O[:-1])[: len(item_O)]
    is_new_time_O = is_new_item_O | np.append(True, time_O[1:] != time_O[:-1])[: len(time_O)]
    # Events of one instant see what stood before the first of them; an item starts from before its own first event.
    at_O = np.arange(len(item_O))
    moment_O = np.maximum.accumulate(np.where(is_new_time_O, at_O, 0))
    first_O = np.maximum.accumulate(np.where(is_new_item_O, at_O, 0))
    out_VE = np.empty(value_VE.shape)
    out_VE[:, order_E] = before_VO[:, moment_O] - before_VO[:, first_O]
    return out_VE
