"""Run by hosts_test.py: a process that trains stages on small planted data, alone or with others.

python hosts_worker.py alignment,base FOLDER alone|HOST:PORT NUMBER_OF_PROCESSES NUMBER [--KEY=VALUE ...]
"""

import pathlib
import sys
import traceback

from marsjax import hosts, pipeline
from marsjax.progress import log_to
from marsjax.stages import Stages
from tests.pipeline_test import small_config


def train(stages, folder, changes):
    config = small_config(**{"training.sharding": "pmap", "ctr.buckets": "20", "alignment.epochs": "0.5"} | changes)
    context = pipeline.Context(config, pipeline.load(config), Stages(folder), seed=0)
    if "alignment" in stages:
        pipeline.align_stage(context)
    if "base" in stages:
        pipeline.train_stage(context, None, "base")


if __name__ == "__main__":
    log_to(sys.stdout, force=True)
    stages, folder, coordinator, count, number, *flags = sys.argv[1:]
    if coordinator != "alone":
        hosts.join(coordinator, int(count), int(number))
    try:
        train(stages.split(","), pathlib.Path(folder), dict(flag.removeprefix("--").split("=", 1) for flag in flags))
    except Exception:
        traceback.print_exc()
        hosts.leave(1)
