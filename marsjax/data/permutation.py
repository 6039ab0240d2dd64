"""Controls without signal: labels permuted within users, features permuted between items."""

from __future__ import annotations

import numpy as np

from marsjax.files import digest_json
from marsjax.records import Dataset, Modality


def permute_labels(dataset: Dataset, *, seed: int) -> Dataset:
    """Each user's labels in random order: how much a user likes stays, what it likes is gone.

    A per-user AUC above 0.5, but for noise, is then a label that leaks. A model that sees no labels of earlier rows has
    0.5; one that does can have less: of two rows of a user with different labels the later one has the other's in its
    history, so whoever takes likes for a sign of more likes puts the wrong one first. The oracle, which belongs to the
    labels that were, is dropped.
    """
    log = dataset.log
    user_E = np.repeat(np.arange(len(log.start_U1) - 1), np.diff(log.start_U1))
    order_E = np.lexsort((np.random.default_rng(seed).random(len(user_E)), user_E))
    return dataset._replace(
        log=log._replace(label_E=log.label_E[order_E], grade_E=None if log.grade_E is None else log.grade_E[order_E]),
        oracle_E=None,
        fingerprint=digest_json([dataset.fingerprint, "permuted", seed]),
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
