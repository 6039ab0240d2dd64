"""What the first few events of a user tell about the others, read by a logistic regression on a handful of numbers.

    python benchmarks/short_histories.py --data=PATH/ml-1m [--events=3,5,10,20] [--seeds=5] [--output=FILE]

A deep model may fail to find what its inputs hold, or find what is not there. This cannot: it has at most fifteen
weights, learnt from 200,000 training rows of all users, each shown with a history as short as a sparse user's. So it
says how much a method can gain that knows the user by these events alone. Sparse users' validation rows are judged; no
test row is read. `base` is the user's rate of likes and the item's, with their counts (the numbers of the strong
inputs); `base_graded` adds the same by grade (those of the graded inputs); `collaborative_posterior` is the base and
what this method lends, `collaborative_graded_posterior` the graded base and the same of grades.
"""

import argparse
import functools
import pathlib
import sys
import time

import numpy as np

from marsjax import files, pipeline, provenance
from marsjax.augmentation import posterior
from marsjax.augmentation.donors import find_donors
from marsjax.configuration import load_config
from marsjax.data.grades import graded_log, graded_rows
from marsjax.data.histories import cut_histories
from marsjax.data.priors import prior_numbers
from marsjax.evaluation import report
from marsjax.records import LOW, TRAIN, VALID, Predictions

ROWS, RIDGE, NEWTON_STEPS = 200_000, 1e-3, 30
READ = {  # by each of them
    "base": ("rates",),
    "base_graded": ("rates", "rates by grade"),
    "collaborative_posterior": ("rates", "expected"),
    "collaborative_graded_posterior": ("rates", "rates by grade", "expected by grade"),
}


def logistic(x_BF: np.ndarray, label_B: np.ndarray) -> np.ndarray:
    """Weights [F + 1], the constant first, by Newton's method with a small ridge."""
    x_BF = np.c_[np.ones(len(x_BF)), x_BF]
    weight_F, ridge = np.zeros(x_BF.shape[1]), RIDGE * np.eye(x_BF.shape[1])
    for _ in range(NEWTON_STEPS):
        p_B = 1 / (1 + np.exp(-x_BF @ weight_F))
        gradient_F = x_BF.T @ (p_B - label_B) / len(label_B) + ridge @ weight_F
        weight_F -= np.linalg.solve((x_BF * (p_B * (1 - p_B))[:, None]).T @ x_BF / len(label_B) + ridge, gradient_F)
    return weight_F


def probe(folder: str, events: int, seeds: int) -> tuple[dict[str, list[Predictions]], str]:
    """Scores of the sparse users' validation rows by the numbers given, and the data set's name."""
    changes = {"data.folder": folder, "ctr.inputs": "strong"}
    config = load_config(f"configs/ml1m.py:last_fraction,sparse{events}", changes)
    loaded = pipeline.load(config)
    log, rows = loaded.dataset.log, loaded.rows
    settings = pipeline.posterior_settings(config)
    user_P = find_donors(rows, cap=settings.cap).user_P
    n_items = len(loaded.dataset.items.raw_id_N)
    learn = functools.partial(posterior.learn_opinions, n_items=n_items, settings=settings)
    opinions, by_grade = learn(log, rows, user_P, None), learn(graded_log(log), rows, user_P, None)
    valid_B = np.flatnonzero((rows.split_E == VALID) & (rows.group_U[rows.user_E] == LOW))
    results: dict[str, list[Predictions]] = {name: [] for name in READ}
    for seed in range(seeds):
        short, _ = cut_histories(rows, share=1.0, seed=seed)
        train_B = np.random.default_rng(seed).permutation(np.flatnonzero(rows.split_E == TRAIN))[:ROWS]
        row_X = np.concatenate([train_B, valid_B])
        shown = (log, short, opinions), (graded_log(log), graded_rows(short), by_grade)
        numbers = {
            "rates": prior_numbers(*shown[0][:2], folds=config.ctr.rate_folds)[row_X],
            "rates by grade": prior_numbers(*shown[1][:2], folds=config.ctr.rate_folds)[row_X],
            "expected": posterior.expect(*shown[0], row_X, settings=settings),
            "expected by grade": posterior.expect(*shown[1], row_X, settings=settings),
        }
        for method, read in READ.items():
            x_XF = np.concatenate([numbers[name] for name in read], axis=1)
            weight_F = logistic(x_XF[: len(train_B)], log.label_E[train_B])
            score_B = 1 / (1 + np.exp(-(weight_F[0] + x_XF[len(train_B) :] @ weight_F[1:])))
            user_B = rows.user_E[valid_B]
            results[method].append(
                Predictions(user_B, log.item_E[valid_B], log.label_E[valid_B], score_B, rows.group_U[user_B])
            )
    return results, pipeline.dataset_name(config, loaded)


def main() -> None:
    """Prints (and writes) AUC and GAUC of sparse users for each number of events."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of MovieLens-1M")
    parser.add_argument("--events", default="3,5,10,20", help="events that sparse users keep (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="of the rows drawn and how they are cut (default: 5)")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    began, rows = time.perf_counter(), []
    for events in arguments.events.split(","):
        results, dataset = probe(arguments.data, int(events), arguments.seeds)
        evaluated = report.evaluate(results)
        found = report.quality_rows(evaluated, dataset=dataset, inputs="logistic", split="last_fraction, validation")
        kept = [row for row in found if row["group"] == "low" and row["metric"] in ("auc", "gauc")]
        for row in kept:
            gain = (
                "" if row["method"] == "base" else f"  {row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
            )
            sys.stdout.write(f"{dataset:14} {row['method']:34} {row['metric']:5} {row['mean']:.4f}{gain}\n")
        rows += kept
    if arguments.output:
        written = {
            "command": f"python benchmarks/short_histories.py --data=PATH/ml-1m --events={arguments.events} "
            f"--seeds={arguments.seeds}",
            "commit": provenance.current_commit(),
            "machine": provenance.machine_description(),
            "wall_seconds": time.perf_counter() - began,
            "rows": rows,
        }
        files.write_json(arguments.output, written)


if __name__ == "__main__":
    main()
