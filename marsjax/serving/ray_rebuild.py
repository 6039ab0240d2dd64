"""Shards of users embedded by processes of Ray Data, on as many machines as its cluster has.

Ray sends this class and the names of shards between its own processes; what is loaded are the files of `rebuild`.
"""

from __future__ import annotations

import logging
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
        shards = map(rebuild.Shard, map(str, batch["source"]), map(str, batch["target"]))
        return {"users": np.array([rebuild.embed_shard(self._model, shard) for shard in shards])}


def embed_shards(root: pathlib.Path, version: str, shards: Sequence[rebuild.Shard], *, workers: int) -> int:
    """Writes the vectors of all shards; returns how many users these are.

    The cluster is the one that RAY_ADDRESS names, else this machine.

    Raises ValueError where a shard cannot be embedded.
    """
    ray.init(ignore_reinit_error=True, logging_level=logging.WARNING, log_to_driver=False)
    ray.data.DataContext.get_current().raise_original_map_exception = True
    listed = ray.data.from_items([shard._asdict() for shard in shards], override_num_blocks=len(shards))
    done = listed.map_batches(
        Embedder,
        fn_constructor_args=(str(root), version),
        batch_size=1,
        concurrency=workers,
        num_cpus=1,
    )
    try:
        return sum(int(row["users"]) for row in done.iter_rows())
    except ray.exceptions.RayError as error:
        raise ValueError(f"Ray: expected every shard to be embedded, found {error.cause or error}") from error
    finally:
        ray.shutdown()
