"""How long the small default encoders take on MovieLens-1M, and whether they agree with vectors made elsewhere.

    python benchmarks/features.py --folder=PATH/ml-1m [--output=benchmarks/results/features.json]

PATH/ml-1m is the official folder with posters/, item_text.jsonl, and features/ as `configs/ml1m.py` names them. Encodes
with `marsjax features --config=configs/ml1m.py:encoded` into an empty folder, and a second time, when nothing has
changed.

Posters here have 128 x 192 pixels. Where vectors that were made elsewhere came from larger ones, they must lie farther
from ours the more we shrink ours, and at about the distance that a shrinking makes among ours: `size_rows` shows both.
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
from marsjax.features.images import read_image
from marsjax.features.mobilenet import make_mobilenet
from marsjax.features.signature import Options

GOAL_SECONDS, GOAL_COSINE = 900, 0.999
MADE_ELSEWHERE = {"text": "text_minilm_384.npz", "image": "image_mobilenetv2_1280.npz"}
SHRUNKEN, SIZES = 200, (1.0, 0.75, 0.5)  # posters; parts of their width and height


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
            cosine = row_cosine(
                *(x.feature[list(at)] for x, at in zip((ours, other), zip(*both, strict=True), strict=True))
            )
            for part, value in (("least", cosine.min()), ("median", np.median(cosine))):
                question = f"cosine of {modality} vectors to those made elsewhere, {len(both)} items"
                rows.append(performance(question, part, float(value), GOAL_COSINE, more=True))
        rows += size_rows(arguments.folder, pathlib.Path(workdir, "features", "image.npz"))
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


def size_rows(folder: pathlib.Path, ours_path: pathlib.Path) -> list[dict]:
    """Median cosines of shrunken posters to our own vectors and to those made elsewhere."""
    ours = read_features(ours_path)
    other = read_features(folder / "features" / MADE_ELSEWHERE["image"])
    ours_of, other_of = (dict(zip(map(str, x.raw_id), x.feature, strict=True)) for x in (ours, other))
    names = [name for name in ours_of if name in other_of][:: len(ours_of) // SHRUNKEN]
    images = [read_image((folder / "posters" / f"{name}.jpg").read_bytes()) for name in names]
    encoder, rows = make_mobilenet(Options(), images), []
    for part in SIZES:
        small = [image.resize((round(image.width * part), round(image.height * part)), 1) for image in images]
        vector_BF = encoder.encode(small).row_BF
        for whose, vector_of in (("ours", ours_of), ("those made elsewhere", other_of)):
            cosine_B = row_cosine(vector_BF, np.stack([vector_of[name] for name in names]))
            question = f"median cosine to {whose}, {len(names)} posters shrunken to a part of their width and height"
            rows.append(performance(question, f"{part:g}", float(np.median(cosine_B)), None, more=True))
    return rows


def row_cosine(a_BF: np.ndarray, b_BF: np.ndarray) -> np.ndarray:
    """[B] cosines, row by row."""
    a_BF, b_BF = a_BF.astype(np.float32), b_BF.astype(np.float32)
    return (a_BF * b_BF).sum(axis=1) / np.linalg.norm(a_BF, axis=1) / np.linalg.norm(b_BF, axis=1)


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
