"""Run by hosts_test.py: a process that trains stages on small planted data, alone or with others.

python hosts_worker.py alignment,base FOLDER alone|HOST:PORT NUMBER_OF_PROCESSES NUMBER [--KEY=VALUE ...]
"""

import faulthandler
import pathlib
import sys
import traceback

import numpy as np

from marsjax import hosts, pipeline
from marsjax.progress import log_to
from marsjax.stages import Stages
from marsjax.training import checkpoint
from tests.pipeline_test import small_config

WAITS = 240  # seconds, then it says where it stands and ends: one that waits for ever would say nothing


def save(folder):
    """At the end of a stage the first one may still write its checkpoint, when others are at the parameters."""
    params = {"a": np.ones((3, 4), np.float32)}
    manager = checkpoint.open_manager(folder / "checkpoints") if hosts.is_first() else None
    for step in range(30):
        hosts.from_first()
        if manager is not None:
            checkpoint.save(manager, step, params, {})
        else:
            checkpoint.save_params(folder / "others", params)
    checkpoint.save_params(folder / "first", params)


def train(stages, folder, changes):
    config = small_config(**{"training.sharding": "pmap", "ctr.buckets": "20", "alignment.epochs": "0.5"} | changes)
    context = pipeline.Context(config, pipeline.load(config), Stages(folder), seed=0)
    if "alignment" in stages:
        pipeline.align_stage(context)
    if "base" in stages:
        pipeline.train_stage(context, None, "base")


if __name__ == "__main__":
    log_to(sys.stdout, force=True)
    faulthandler.dump_traceback_later(WAITS, exit=True)
    stages, folder, coordinator, count, number, *flags = sys.argv[1:]
    if coordinator != "alone":
        hosts.join(coordinator, int(count), int(number))
    try:
        if stages == "saves":
            save(pathlib.Path(folder))
        else:
            train(
                stages.split(","), pathlib.Path(folder), dict(flag.removeprefix("--").split("=", 1) for flag in flags)
            )
    except Exception:
        traceback.print_exc()
        hosts.leave(1)
