"""Controls without signal: labels permuted within users or over the log, features permuted between items."""

from __future__ import annotations

import numpy as np

from marsjax.files import digest_json
from marsjax.records import Dataset, Modality

PERMUTED = {"": "", "users": "permuted", "log": "permuted over the log"}  # data.permute_labels, and its fingerprint


def permute_labels(dataset: Dataset, among: str, *, seed: int) -> Dataset:
    """Labels and grades in random order: among each of the "users", or over the whole "log". "" leaves them.

    Over the log nothing is left to learn, and every AUC above 0.5, but for noise, is a label that leaks. Among users
    how much each likes stays, and what it likes is gone, so that a per-user AUC above 0.5 is a leak. There a model that
    sees no labels of earlier rows has 0.5; one that does can have less: of two rows of a user with different labels the
    later one has the other's in its history, so whoever takes likes for a sign of more likes puts the wrong one first.
    The oracle, which belongs to the labels that were, is dropped.
    """
    if not among:
        return dataset
    log = dataset.log
    random_E = np.random.default_rng(seed).random(len(log.label_E))
    user_E = np.repeat(np.arange(len(log.start_U1) - 1), np.diff(log.start_U1))
    order_E = np.lexsort((random_E, user_E)) if among == "users" else np.argsort(random_E)
    return dataset._replace(
        log=log._replace(label_E=log.label_E[order_E], grade_E=None if log.grade_E is None else log.grade_E[order_E]),
        oracle_E=None,
        fingerprint=digest_json([dataset.fingerprint, PERMUTED[among], seed]),
    )


def permute_features(dataset: Dataset, *, seed: int) -> Dataset:
    """Each item that has features of a modality has those of another such item: content tells nothing any more."""
    modalities = {}
    for number, (name, (feature_NF, present_N)) in enumerate(dataset.items.modalities.items()):
        has = np.flatnonzero(present_N)
        shuffled_NF = feature_NF.copy()
        shuffled_NF[has] = feature_NF[np.random.default_rng([seed, number]).permutation(has)]
        modalities[name] = Modality(shuffled_NF, present_N)
    return dataset._replace(
        items=dataset.items._replace(modalities=modalities),
        fingerprint=digest_json([dataset.fingerprint, "permuted features", seed]),
    )
