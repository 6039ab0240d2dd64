"""Shards of users embedded by processes of Ray Data, on as many machines as its cluster has.

Ray sends this class and the names of shards between its own processes; what is loaded are the files of `rebuild`.
"""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import ray
import ray.data

from marsjax.serving import rebuild
from marsjax.serving.runner import load_model


class Embedder:
    """A process that loads the model once."""

    def __init__(self, root: str, version: str):
        self._model = load_model(pathlib.Path(root), version)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embeds shards; what is wrong with one is told in words, which Ray would bury under its own."""
        users, errors = [], []
        for source, target in zip(batch["source"], batch["target"], strict=True):
            count, said = 0, ""
            try:
                count = rebuild.embed_shard(self._model, rebuild.Shard(str(source), str(target)))
            except (ValueError, OSError) as error:
                said = str(error)
            users.append(count)
            errors.append(said)
        return {"users": np.array(users), "error": np.array(errors)}


def embed_shards(root: pathlib.Path, version: str, shards: Sequence[rebuild.Shard], *, workers: int) -> int:
    """Writes the vectors of all shards; returns how many users these are.

    The cluster is the one that RAY_ADDRESS names, else this machine.

    Raises ValueError where a shard cannot be embedded, and RuntimeError where Ray itself fails.
    """
    # Here a processor is what a worker is given, however many there are, and one more lists the shards.
    processors = None if "RAY_ADDRESS" in os.environ else workers + 1
    ray.init(num_cpus=processors, ignore_reinit_error=True, logging_level=logging.WARNING, log_to_driver=False)
    listed = ray.data.from_items([shard._asdict() for shard in shards], override_num_blocks=len(shards))
    done = listed.map_batches(
        Embedder,
        fn_constructor_args=(str(root), version),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    users = 0
    try:
        for row in done.iter_rows():
            if row["error"]:
                raise ValueError(str(row["error"]))
            users += int(row["users"])
    finally:
        ray.shutdown()
    return users
