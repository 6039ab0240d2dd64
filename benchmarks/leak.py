"""Does the choice of a donor see the label?

    python -m benchmarks.leak --folder=PATH/ml-1m [--seeds=5] [--workdir=FOLDER] [--output=FILE]

Whether a low-active user's donor lends the very item that is to be scored is a number of 0 and 1, and its AUC says how
well that alone tells the rows with a like from the others, among the rows that borrow. Test rows ask with a history
that ends before them, as a service does. A training row whose donor was found by the whole training history was found
by its own item and all that came later, and a model learns to trust what it will not have. Measured for donors by the
prefix before each training row (`retrieval.prefix_stride` of the configuration, ours) and by the whole training
history (0). Borrowed is all of a donor's history (`augmentation.strategy=most_similar`), so that only its choice
counts. What is left between training and test rows may also come from their age and from how long the histories are.

Stages are kept where --workdir says, so that a run which was killed continues, and that of a study may be given; they
go by the configuration and the data, and know nothing of a change of the code.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import statistics
import tempfile
from collections.abc import Iterable
from typing import Any

from benchmarks import harness
from marsjax import pipeline
from marsjax.configuration import load_config
from marsjax.stages import Stages

log = logging.getLogger("leak")

DONORS = {"by the prefix before the row": {}, "by the whole training history": {"retrieval.prefix_stride": "0"}}


def statistics_of(context: pipeline.Context) -> dict[str, float]:
    """`table.statistics` of what is lent."""
    space = pipeline.align_stage(context)
    donation = pipeline.augment_stage(context, space, pipeline.embed_stage(context, space)[0])
    return json.loads((donation.folder / "statistics.json").read_text())


def rows_of(base: str, changes: dict[str, str], workdir: pathlib.Path, seeds: int) -> Iterable[dict[str, Any]]:
    """A row for each choice of donors."""
    config = load_config(base, changes)
    if not config.retrieval.prefix_stride:
        raise SystemExit(f"{base}: expected retrieval.prefix_stride of 1 or more to compare with 0, found 0")
    loaded, stages = pipeline.load(config), Stages(workdir)
    for name, of_donors in DONORS.items():
        config = load_config(base, {**changes, **of_donors, "augmentation.strategy": "most_similar"})
        found = []
        for seed in range(seeds):
            log.info("donors %s, seed %d", name, seed)
            found.append(statistics_of(pipeline.Context(config, loaded, stages, seed)))
        if not all(f"borrows_target_auc_{split}" in each for each in found for split in ("train", "test")):
            raise SystemExit(f"{base}: expected likes and others among the rows of low-active users, found one of them")
        train, test = ([each[f"borrows_target_auc_{split}"] for each in found] for split in ("train", "test"))
        gap = [a - b for a, b in zip(train, test, strict=True)]
        yield {
            "question": "AUC of whether a donor lends the target, on training rows and on test rows",
            "case": f"donors {name}, {seeds} seeds", "ours": statistics.mean(train), "other": statistics.mean(test),
            "other_name": "test rows", "ratio": None, "target": None, "met": None, "gap": statistics.mean(gap),
            "gap_sd": statistics.stdev(gap) if seeds > 1 else None,
            "lent_train": statistics.mean(each["borrows_target_train"] for each in found),
            "lent_test": statistics.mean(each["borrows_target_test"] for each in found),
            "note": f"training less test {statistics.mean(gap):+.4f}",
        }  # fmt: skip


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/ml1m.py", help="configuration (default: %(default)s)")
    parser.add_argument("--folder", default="", help="of the data; MovieLens-1M for the default configuration")
    parser.add_argument("--seeds", type=int, default=5, help="alignments, from seed 0 on (default: 5)")
    parser.add_argument("--workdir", type=pathlib.Path, help="keep stages there (default: nowhere)")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    arguments = parser.parse_args(words)
    if arguments.seeds < 1:
        parser.error(f"--seeds: expected 1 or more, found {arguments.seeds}")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measures, prints the table, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name, "marsjax")
    from marsjax.allocator import keep_freed_memory

    keep_freed_memory()
    began = harness.begin()
    # As the study reads histories, so that its stages serve here.
    changes = {"retrieval.history": "50"} | ({"data.folder": arguments.folder} if arguments.folder else {})
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(arguments.config, changes, arguments.workdir or pathlib.Path(folder), arguments.seeds)
        harness.write_results(arguments.output, rows, began, program="-m benchmarks.leak", words=words)


if __name__ == "__main__":
    main()
