"""Vectors that were made elsewhere: looked up by item id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from marsjax.data.feature_files import read_features
from marsjax.features.signature import Encoded, Encoder, Options
from marsjax.files import digest_json, sha256_file

BATCH = 4096


def make_precomputed(options: Options, ids: Sequence[str]) -> Encoder:
    """Finds the vector of an id, the first one where it has several; an id without has NaN, which counts as broken.

    Args:
        options: `file` is an .npz, .npy or Parquet as `data.feature_files.read_features` reads it.
        ids: of the items; the rows of an .npy, which has none, are in this order.

    Raises:
        ValueError: the file is missing or damaged, or has not one vector an id.
    """
    if options.file is None:
        raise ValueError("precomputed: expected a file of vectors, found none; set features.text_file or image_file")
    id_I, feature_IF, _ = read_features(options.file, item_ids=np.asarray(ids, str))
    if feature_IF.ndim != 2 or len(feature_IF) != len(id_I) or not feature_IF.shape[1]:
        raise ValueError(
            f"{options.file}: expected one vector for each of {len(id_I)} ids, found shape {feature_IF.shape}; write "
            "ids and vectors of the same items"
        )
    position: dict[str, int] = {}
    for place, name in enumerate(id_I):
        position.setdefault(str(name), place)

    def encode(batch: Sequence[Any]) -> Encoded:
        row_BF = np.full((len(batch), feature_IF.shape[1]), np.nan, np.float32)
        for row, name in enumerate(batch):
            if name in position:
                row_BF[row] = feature_IF[position[name]]
        return Encoded(row_BF, np.zeros(len(batch), bool))

    facts = {"encoder": "precomputed", "file": options.file.name, "weights_sha256": sha256_file(options.file)}
    if options.file.suffix == ".npy":  # the order of the items says which row is whose
        facts["ids_sha256"] = digest_json([str(name) for name in ids])
    return Encoder(feature_IF.shape[1], options.batch or BATCH, facts, encode)
