"""How long the small default encoders take on MovieLens-1M, and whether they agree with vectors made elsewhere.

    python benchmarks/features.py --folder=PATH/ml-1m [--output=benchmarks/results/features.json]

PATH/ml-1m is the official folder with posters/, item_text.jsonl, and features/ as `configs/ml1m.py` names them. Encodes
with `marsjax features --config=configs/ml1m.py:encoded` into an empty folder, and a second time, when nothing has
changed.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from marsjax import provenance
from marsjax.data.feature_files import read_features

GOAL_SECONDS, GOAL_COSINE = 900, 0.999
MADE_ELSEWHERE = {"text": "text_minilm_384.npz", "image": "image_mobilenetv2_1280.npz"}


def main() -> None:
    """Encodes, compares, prints (and writes) the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    commit, began, rows = provenance.current_commit(), time.perf_counter(), []
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable, "-m", "marsjax.main", "features", "--config=configs/ml1m.py:encoded",
            f"--config.data.folder={arguments.folder}", f"--workdir={workdir}",
        ]  # fmt: skip
        for case, goal in (("all 3883 texts and 3256 posters", GOAL_SECONDS), ("nothing has changed", None)):
            start, before = time.perf_counter(), processor_seconds()
            subprocess.run(command, check=True)
            seconds = time.perf_counter() - start
            rows.append(performance("seconds of `marsjax features` on MovieLens-1M", case, seconds, goal, more=False))
            question = "processor seconds of it, all cores together: what other work on the machine cannot lengthen"
            rows.append(performance(question, case, processor_seconds() - before, None, more=False))
        for modality, name in MADE_ELSEWHERE.items():
            ours = read_features(pathlib.Path(workdir, "features", f"{modality}.npz"))
            other = read_features(arguments.folder / "features" / name)
            place = {str(raw_id): row for row, raw_id in enumerate(other.raw_id)}
            both = [(row, place[str(raw_id)]) for row, raw_id in enumerate(ours.raw_id) if str(raw_id) in place]
            a, b = (
                x.feature[list(at)].astype(np.float32)
                for x, at in zip((ours, other), zip(*both, strict=True), strict=True)
            )
            cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            for part, value in (("least", cosine.min()), ("median", np.median(cosine))):
                question = f"cosine of {modality} vectors to those made elsewhere, {len(both)} items"
                rows.append(performance(question, part, float(value), GOAL_COSINE, more=True))
    results = {
        "command": "python benchmarks/features.py --folder=PATH/ml-1m",
        "commit": commit,
        "machine": provenance.machine_description(),
        "wall_seconds": time.perf_counter() - began,
        "rows": rows,
    }
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    if arguments.output:
        from marsjax.files import write_json

        write_json(arguments.output, results)


def processor_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def performance(question: str, case: str, ours: float, target: float | None, *, more: bool) -> dict:
    """A row in the form of all performance results."""
    met = None if target is None else (ours >= target if more else ours <= target)
    return {
        "question": question, "case": case, "ours": ours, "other": None, "other_name": None, "ratio": None,
        "target": target, "met": met,
    }  # fmt: skip


if __name__ == "__main__":
    main()
