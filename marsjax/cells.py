"""Cells of a study: every method of one configuration for every seed, cut into jobs, run and judged."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from marsjax import files, jobs, pipeline, study
from marsjax.configuration import fingerprint
from marsjax.data.grades import grades_fingerprint
from marsjax.data.permutation import permute_labels
from marsjax.data.sampling import sample_users
from marsjax.evaluation import report
from marsjax.provenance import current_commit, machine_description
from marsjax.records import (
    Dataset,
)
from marsjax.stages import Stages

PATHS = (  # of the section data: where files lie changes nothing, and what they hold is in the data's fingerprint
    "folder", "events_file", "items_file", "text_features", "image_features", "image_folder", "item_texts", "checksums",
)  # fmt: skip
INPUT_KEYS = ("ctr.inputs", "ctr.components", "ctr.rate_folds")  # of the section ctr, what a model reads


class Shelf:
    """The data of a study, and the last of them that were made ready for learning: the jobs of a cell follow one
    another."""

    def __init__(self, dataset: Dataset, *, users: int):
        self.dataset = dataset
        self._users = users  # data.sample_users, as the data are
        self._last: tuple[str, pipeline.Loaded] | None = None

    def ready(self, config: ConfigDict) -> pipeline.Loaded:
        """The data as a cell asks for them. Raises ValueError where it asks for what they do not have."""
        asked = pipeline.of_learning(config) | {"evaluation": None, "seeds": None}
        key = fingerprint(asked)
        if self._last is None or self._last[0] != key:
            dataset = permute_labels(self.dataset, config.data.permute_labels, seed=config.split.seed)
            if config.data.sample_users != self._users:
                dataset = sample_users(dataset, config.data.sample_users, seed=config.split.seed)
            self._last = key, pipeline.load(config, dataset)
        return self._last[1]


class PlannedCell(NamedTuple):
    """A cell of a study, with all that it takes to run it."""

    cell: study.Cell
    config: ConfigDict
    workdir: pathlib.Path
    command: str
    data: str  # fingerprint of the data, and of grades where they are read
    fingerprint: str  # of all that goes in

    @property
    def path(self) -> pathlib.Path:
        """Where its results are written."""
        return self.workdir / "cells" / f"{self.cell.name}.json"

    def known(self) -> dict[str, Any] | None:
        """Its results, where they are there and of these data and this configuration."""
        found = files.read_json(self.path) if self.path.exists() else {}
        return found if found.get("fingerprint") == self.fingerprint else None


def share(planned: Iterable[PlannedCell], wanted: Iterable[PlannedCell]) -> None:
    """Cells of several parts may ask for the same, as a sweep does at the value by default: what one of `planned` found
    is written for those `wanted` too."""
    known = {one.fingerprint: results for one in planned if (results := one.known()) is not None}
    for one in wanted:
        if one.known() is None and one.fingerprint in known:
            files.write_json(one.path, known[one.fingerprint])


def judge_stage(config: ConfigDict, stages: Stages, trained: pipeline.Trained) -> report.Judged:
    """Every metric of a training, and the resamples that it is compared by, which take longer than to load it."""
    predictions, n_resamples = trained.predictions, config.evaluation.bootstrap
    arrays = {name: value for name, value in predictions._asdict().items() if value is not None}
    key = fingerprint("judged", files.digest_arrays(arrays), n_resamples)

    def build(folder: pathlib.Path) -> None:
        report.write_judged(folder / "judged.npz", report.judge(predictions, n_resamples=n_resamples))

    return report.read_judged(stages(f"judged-{trained.name}", key, build) / "judged.npz")


def run_cell(
    config: ConfigDict,
    stages: Stages,
    loaded: pipeline.Loaded,
    *,
    command: str,
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Every method of a configuration for every seed, and what came of it, ready for JSON.

    With `settings` (changes of the section `ctr` that leave the inputs alone) each method has the one that suits it;
    ValueError where they change anything else.
    """
    began, before = time.monotonic(), stages.seconds_before
    trained: dict[str, list[pipeline.Trained]] = {method: [] for method in config.evaluation.methods}
    searched = search(config, stages, loaded, settings) if settings else []
    suited = suit(searched, config)
    for seed in config.seeds:
        context = pipeline.Context(config, loaded, stages, seed)
        donation = pipeline.borrow(context)
        for method, runs in trained.items():
            runs.append(pipeline.train_stage(context._replace(config=suited.get(method, config)), donation, method))
    valid = {method: [run.valid for run in runs] for method, runs in trained.items()}
    if config.split.sparse_fraction and "base" in trained:
        trained["full_history"] = full_history(config, stages, loaded)
    results = {method: [run.predictions for run in runs] for method, runs in trained.items()}
    judged = {method: [judge_stage(config, stages, run) for run in runs] for method, runs in trained.items()}
    if loaded.dataset.oracle_E is not None:
        oracle = pipeline.predictions_of(loaded, loaded.dataset.oracle_E)
        results["best_possible"] = [oracle] * len(config.seeds)
        judged["best_possible"] = [report.judge(oracle, n_resamples=config.evaluation.bootstrap)] * len(config.seeds)
    evaluated = report.combine(judged)
    rows = report.quality_rows(
        evaluated, dataset=pipeline.dataset_name(config, loaded), inputs=config.ctr.inputs, split=config.split.kind
    )
    seen = report.validation_rows(valid)
    # The published method, and the variant of it that did best on the low-active users' validation rows.
    variants = {row["method"]: row["auc_low"]["mean"] or 0.0 for row in seen if row["method"].startswith("mars")}
    chosen = max(variants, key=lambda method: variants[method], default="mars")
    # Not with its other variants, but for the same one of labels where it reads grades.
    apart = (name for name in variants if name not in ("mars", chosen, chosen.replace("_graded", "")))
    others = ("base", "best_possible", "full_history", *apart)
    return {
        "command": command,
        "commit": ", ".join(sorted(stages.commits | {current_commit()})),
        "machine": machine_description(),
        # Stages that an earlier run finished took the time that they took there.
        "wall_seconds": time.monotonic() - began + stages.seconds_before - before,
        "rows": rows,
        "comparisons": [
            row
            for method in dict.fromkeys(("mars", chosen))
            for row in report.comparisons(evaluated, method=method, apart_from=others)
        ],
        "validation": seen,
        "search": searched,
        "by_length": report.length_rows(results, loaded.rows.train_length_U),
        "config": pipeline.of_learning(config),
    }


def plan_cell(
    config: ConfigDict, dataset: Dataset, cell: study.Cell, workdir: pathlib.Path, command: str
) -> PlannedCell:
    """A cell with its configuration."""
    changed = pipeline.with_changes(config, {**cell.changes, "evaluation.methods": ",".join(cell.methods)})
    tried = {name: dict(changes) for name, changes in cell.settings.items()}
    data = dataset.fingerprint
    if pipeline.grade_readers(changed):
        data = fingerprint(data, grades_fingerprint(dataset.log))
    key = cell_key(data, pipeline.of_learning(changed), tried)
    whole = cell._replace(settings=tried, changes=dict(cell.changes))
    return PlannedCell(whole, changed, workdir, command, data, key)


def cell_key(data: str, learning: Mapping[str, Any], tried: Mapping[str, Any]) -> str:
    """What a cell is known by: the data's fingerprint, the configuration without its paths, and what is tried."""
    kept = {name: value for name, value in learning["data"].items() if name not in PATHS}
    return fingerprint("cell", data, {**learning, "data": kept}, tried)


def cell_jobs(cells: Sequence[PlannedCell], *, together: int = 4) -> dict[jobs.Name, jobs.Job]:
    """What runs cells in parts that can be done side by side, the first cell first.

    Of a cell and seed, what all its methods share comes first, with the base, and then its methods, `together` at a
    time. Where each method has the setting that suits it, the first seed finds it, for each method in a job of its own,
    since the other seeds wait for it.
    """
    made: dict[jobs.Name, jobs.Job] = {}
    for planned in cells:
        config, name = planned.config, planned.cell.name
        methods = [method for method in config.evaluation.methods if method != "base"]
        step = 1 if planned.cell.settings else together
        for seed in config.seeds:
            shared = (name, seed, "shared")
            late = planned.cell.settings and seed != config.seeds[0]
            first = ((name, config.seeds[0], "shared"),) if late else ()
            made[shared] = jobs.Job(train_some, (planned, seed, ("base",)), first)
            for i in range(0, len(methods), step):
                some = tuple(methods[i : i + step])
                after = (shared, (name, config.seeds[0], some[0])) if late else (shared,)
                made[name, seed, some[0]] = jobs.Job(train_some, (planned, seed, some), after)
            if config.split.sparse_fraction:
                made[name, seed, "full_history"] = jobs.Job(train_ceiling, (planned, seed))
        of_cell = tuple(job for job in made if job[0] == name)
        made[name, "report"] = jobs.Job(finish_cell, (planned,), of_cell)
    return made


def train_some(shelf: Shelf, planned: PlannedCell, seed: int, methods: Sequence[str]) -> None:
    """Some methods of a cell for one seed."""
    config, stages, loaded = planned.config, Stages(planned.workdir), shelf.ready(planned.config)
    some = pipeline.with_changes(config, {"evaluation.methods": ",".join(methods)})
    suited = suit(search(some, stages, loaded, planned.cell.settings), some) if planned.cell.settings else {}
    donation = pipeline.borrow(pipeline.Context(config, loaded, stages, seed))
    for method in methods:
        context = pipeline.Context(suited.get(method, config), loaded, stages, seed)
        judge_stage(config, stages, pipeline.train_stage(context, donation, method))


def train_ceiling(shelf: Shelf, planned: PlannedCell, seed: int) -> None:
    """The model of sparse users' whole histories for one seed."""
    stages, loaded = Stages(planned.workdir), shelf.ready(planned.config)
    (best,) = full_history(pipeline.with_changes(planned.config, {"seeds": str(seed)}), stages, loaded)
    judge_stage(planned.config, stages, best)


def finish_cell(shelf: Shelf, planned: PlannedCell) -> None:
    """Writes the results of a cell; what is not trained yet is trained."""
    found = run_cell(
        planned.config, Stages(planned.workdir), shelf.ready(planned.config), command=planned.command,
        settings=planned.cell.settings,
    )  # fmt: skip
    files.write_json(planned.path, found | {"data": planned.data, "fingerprint": planned.fingerprint})


def suit(searched: Sequence[Mapping[str, Any]], config: ConfigDict) -> dict[str, ConfigDict]:
    """The configuration of each method with the setting that a search chose for it."""
    return {row["method"]: pipeline.with_changes(config, row["changes"]) for row in searched if row["chosen"]}


def search(
    config: ConfigDict, stages: Stages, loaded: pipeline.Loaded, settings: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Tries each setting with each method on the first seed: one row for each, with the AUC of validation rows, and
    which is chosen, the best for low-active users (the first of equals). Test scores are written and not looked at."""
    for name, changes in settings.items():
        if wrong := [key for key in changes if not key.startswith("ctr.") or key in INPUT_KEYS]:
            raise ValueError(
                f"search: expected settings of the training and the model, found {', '.join(wrong)} in {name!r}; what "
                "changes the data or the inputs is a cell of its own"
            )
    context = pipeline.Context(config, loaded, stages, config.seeds[0])
    donation = pipeline.borrow(context)
    rows = []
    for method in config.evaluation.methods:
        tried = []
        for name, changes in settings.items():
            suited = context._replace(config=pipeline.with_changes(config, changes))
            (seen,) = report.validation_rows({method: [pipeline.train_stage(suited, donation, method).valid]})
            found = {group: seen[group]["mean"] for group in ("auc_low", "auc_all")}
            tried.append({"method": method, "setting": name, "changes": dict(changes), **found})
        best = max(tried, key=lambda row: row["auc_low"] or 0.0)
        rows += [row | {"chosen": row is best} for row in tried]
    return rows


def full_history(config: ConfigDict, stages: Stages, loaded: pipeline.Loaded) -> list[pipeline.Trained]:
    """The ceiling of sparse users: the base model with whole histories, on the same rows."""
    # How many events sparse users keep changes nothing here: told as by default, it is one stage for all of them.
    whole = pipeline.with_changes(config, {"split.sparse_fraction": "0", "split.sparse_events": "5"})
    full = pipeline.load(whole, loaded.dataset)
    group_B = pipeline.predictions_of(loaded, np.zeros(len(loaded.rows.user_E), np.float32)).group_B
    out = []
    for seed in whole.seeds:
        context = pipeline.Context(whole, full, stages, seed)
        trained = pipeline.train_stage(context, None, "base")
        out.append(trained._replace(predictions=trained.predictions._replace(group_B=group_B)))
    return out
