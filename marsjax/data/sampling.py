"""A sample of the users, for a quick look."""

from __future__ import annotations

import numpy as np

from marsjax.files import digest_json
from marsjax.records import Dataset


def sample_users(dataset: Dataset, count: int, *, seed: int) -> Dataset:
    """The events of `count` users drawn evenly; the catalogue stays whole. All users where there are no more."""
    log = dataset.log
    n_users = len(log.start_U1) - 1
    if count >= n_users:
        return dataset
    kept_U = np.sort(np.random.default_rng(seed).permutation(n_users)[:count])
    length_U = np.diff(log.start_U1)[kept_U]
    start_U1 = np.concatenate([[0], np.cumsum(length_U)])
    event_X = np.repeat(log.start_U1[kept_U] - start_U1[:-1], length_U) + np.arange(start_U1[-1])
    return dataset._replace(
        log=log._replace(
            start_U1=start_U1,
            item_E=log.item_E[event_X],
            label_E=log.label_E[event_X],
            grade_E=None if log.grade_E is None else log.grade_E[event_X],
            time_E=log.time_E[event_X],
            raw_user_U=log.raw_user_U[kept_U],
        ),
        oracle_E=None if dataset.oracle_E is None else dataset.oracle_E[event_X],
        fingerprint=digest_json([dataset.fingerprint, count, seed]),
    )
