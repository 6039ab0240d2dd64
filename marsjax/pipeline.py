"""The composition root: the stages of Figure 2 put together, in the order of the data flow."""

from __future__ import annotations

import copy
import functools
import logging
import math
import pathlib
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from ml_collections import ConfigDict

from marsjax import alignment, embeddings, files, jobs, retrieval, study
from marsjax.augmentation import baselines, mars, posterior, table, votes
from marsjax.augmentation.donors import find_donors
from marsjax.augmentation.methods import METHODS, Offer, Treatment, opinions
from marsjax.augmentation.operators import Mode
from marsjax.augmentation.queries import make_queries
from marsjax.configuration import check_choices, fingerprint, override, to_json
from marsjax.ctr import objective
from marsjax.ctr.backbones import BACKBONES, INPUTS, make_backbone
from marsjax.ctr.items import ID_TABLES, content_table, padded_tables
from marsjax.data import batches, inspection
from marsjax.data.permutation import permute_features, permute_labels
from marsjax.data.priors import item_counts, prior_numbers
from marsjax.data.sampling import sample_users
from marsjax.data.splits import make_rows
from marsjax.evaluation import features_page, metrics, page, report, study_page
from marsjax.evaluation.plots import Plot
from marsjax.features import encoding
from marsjax.features.encoders import IMAGE_ENCODERS, TEXT_ENCODERS
from marsjax.features.images import need_pillow
from marsjax.features.signature import Make, Options
from marsjax.features.text import render
from marsjax.progress import progress
from marsjax.provenance import current_commit, machine_description
from marsjax.records import (
    LOW,
    TEST,
    TRAIN,
    VALID,
    Borrowed,
    Dataset,
    Donors,
    Embeddings,
    Inputs,
    ItemTables,
    Log,
    Predictions,
    Problem,
    Queries,
    Rows,
)
from marsjax.serving import bundle as serving
from marsjax.serving import continuation, knowledge, lending, scoring, versions
from marsjax.serving import runner as offline
from marsjax.serving import storage as storing
from marsjax.serving.requests import read_requests, write_scores
from marsjax.sources import CONTENTS, SOURCES, item_images
from marsjax.stages import Stages
from marsjax.training import checkpoint, loop
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.step import init_state

log = logging.getLogger(__name__)

PyTree = Any


INPUT_KEYS = ("ctr.inputs", "ctr.components", "ctr.rate_folds")  # of the section ctr, what a model reads


class Loaded(NamedTuple):
    """Data ready for learning, with the fingerprint of their content and split."""

    dataset: Dataset
    rows: Rows
    inputs: Inputs  # what every CTR model reads
    tables: ItemTables
    fingerprint: str


class Context(NamedTuple):
    """What every stage of one seed reads."""

    config: ConfigDict
    loaded: Loaded
    stages: Stages
    seed: int


class Space(NamedTuple):
    """The trained encoder of the alignment stage; parameters and tables are on the device."""

    encoder: alignment.MultimodalEncoder
    params: PyTree
    tables: alignment.FeatureTables
    fingerprint: str


class Donation(NamedTuple):
    """What the queries may borrow, from whom."""

    queries: Queries
    donors: Donors
    borrowed: Borrowed
    item_ND: np.ndarray  # [N, D] float32, item vectors of the aligned space
    folder: pathlib.Path
    fingerprint: str


class Trained(NamedTuple):
    """A CTR model and its scores of the test rows and of the validation rows."""

    predictions: Predictions
    valid: Predictions
    load: Callable[[], PyTree]  # {"params", "statistics"} of the model; most who ask for scores do without
    name: str  # of its stage


class Shelf:
    """The data of a study, and the last of them that were made ready for learning: the jobs of a cell follow one
    another."""

    def __init__(self, dataset: Dataset, *, users: int):
        self.dataset = dataset
        self._users = users  # data.sample_users, as the data are
        self._last: tuple[str, Loaded] | None = None

    def ready(self, config: ConfigDict) -> Loaded:
        """The data as a cell asks for them. Raises ValueError where it asks for what they do not have."""
        asked = of_learning(config) | {"evaluation": None, "seeds": None}
        key = fingerprint(asked)
        if self._last is None or self._last[0] != key:
            dataset = self.dataset
            if config.data.permute_labels:
                dataset = permute_labels(dataset, seed=config.split.seed)
            if config.data.sample_users != self._users:
                dataset = sample_users(dataset, config.data.sample_users, seed=config.split.seed)
            self._last = key, load(config, dataset)
        return self._last[1]


class PlannedCell(NamedTuple):
    """A cell of a study, with all that it takes to run it."""

    cell: study.Cell
    config: ConfigDict
    workdir: pathlib.Path
    command: str
    fingerprint: str  # of what goes in

    @property
    def path(self) -> pathlib.Path:
        """Where its results are written."""
        return self.workdir / "cells" / f"{self.cell.name}.json"

    def known(self) -> dict[str, Any] | None:
        """Its results, where they are there and of these data and this configuration."""
        found = files.read_json(self.path) if self.path.exists() else {}
        return found if found.get("fingerprint") == self.fingerprint else None


# --- commands -------------------------------------------------------------------------------------------------------


def features(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Encodes item texts and images."""
    check(config)
    if not (config.features.text or config.features.image):
        raise ValueError(
            f"features: expected features.text (one of {', '.join(TEXT_ENCODERS)}) or features.image (one of "
            f"{', '.join(IMAGE_ENCODERS)}), found neither"
        )
    made = encode_stage(config, workdir, output=output)
    for modality, path in made.items():
        say(f"{modality} features: {path}")
    say(f"manifest: {(output or workdir / 'features') / encoding.MANIFEST}")


def run(config: ConfigDict, workdir: pathlib.Path, *, command: str = "marsjax.pipeline.run(config, workdir)") -> None:
    """All stages for every seed, then the report, which quotes `command`."""
    found = run_cell(config, Stages(workdir), load(config, workdir=workdir), command=command)
    files.write_json(workdir / "results.json", found)
    files.write_bytes(workdir / "results.md", report.as_markdown(found["rows"], found["comparisons"]).encode())
    say(report.as_table(found["rows"], found["comparisons"]))
    say(f"results: {workdir}/results.json, {workdir}/results.md")


def reproduce(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    quick: bool = False,
    parts: str = "",
    methods: str = "",
    processes: int = 1,
    command: str = "marsjax.pipeline.reproduce(config, workdir)",
) -> None:
    """The paper's section 4 and more: report.html, report.md and a JSON a cell. What is finished is not run again.

    With `processes` above 1 so many train side by side.
    """
    check(config)
    began, names = time.monotonic(), [name for name in parts.split(",") if name]
    plan = (study.quick if quick else study.full)(_methods(methods))
    if unknown := set(names) - {part.name for part in plan} - {cell.name for part in plan for cell in part.cells}:
        raise ValueError(
            f"--parts: expected some of {', '.join(part.name for part in plan)}, or names of their cells, found "
            f"{', '.join(sorted(unknown))}"
        )
    first = with_changes(config, study.QUICK if quick else {})
    dataset = read(first, workdir)
    tell(dataset.problems)
    shelf, stages, sections = Shelf(dataset, users=first.data.sample_users), Stages(workdir), []
    planned = {cell.name: plan_cell(config, dataset, cell, workdir, command) for part in plan for cell in part.cells}
    asked: dict[str, PlannedCell] = {}  # in the order in which they were asked for
    for name in names or [part.name for part in plan]:
        for part in plan:
            for cell in part.cells:
                if name in (part.name, cell.name) and planned[cell.name].known() is None:
                    asked[cell.name] = planned[cell.name]
    if processes > 1 and asked:
        jobs.run(cell_jobs(list(asked.values())), shelf, processes=processes, logs=workdir / "logs")
    for part in plan:
        results: dict[str, Any] = {}
        refused: dict[str, str] = {}
        for cell in part.cells:
            if cell.name in asked and planned[cell.name].known() is None:
                try:
                    shelf.ready(planned[cell.name].config)
                except ValueError as error:  # this cell asks of the data what they do not have
                    log.warning("%s cannot be run: %s", cell.name, error)
                    refused[cell.name] = str(error)
                    continue
                finish_cell(shelf, planned[cell.name])
            if (known := planned[cell.name].known()) is not None:
                results[cell.name] = known
                stages.commits |= set(known["commit"].split(", "))
        drawn: tuple[Any, ...] = ()
        wanted = not names or part.name in names
        if part.kind == "statistics":
            drawn = (study_page.statistics_table(inspection.statistics(dataset, split(first, dataset))),)
        elif part.kind == "features" and wanted and dataset.items.modalities:
            drawn = evidence(Context(first, load(first, dataset), stages, first.seeds[0]))
        elif part.kind == "cases" and wanted:
            drawn = cases(Context(first, load(first, dataset), stages, first.seeds[0]))
        sections.append(study_page.section(part, results, refused, drawn=drawn))
    facts = {
        "command": command,
        "commit": ", ".join(sorted(stages.commits | {current_commit()})),
        "machine": machine_description(),
        "seconds of this run": f"{time.monotonic() - began:.0f}",
    }
    page.write_page(page.Page(f"MARS on {dataset.name}", tuple(facts.items()), tuple(sections)), workdir)
    say(f"report: {workdir}/report.html, {workdir}/report.md; cells: {workdir}/cells")


def _methods(text: str) -> frozenset[str]:
    """The base and those that are named; all where none is."""
    names = [name for name in text.split(",") if name]
    if unknown := sorted(set(names) - METHODS.keys()):
        raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, found {', '.join(unknown)}")
    return frozenset(["base", *names] if names else METHODS)


def inspect(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints what the data hold and every problem found."""
    check(config)
    dataset = read(config, workdir)
    say(inspection.describe(dataset, split(config, dataset)))


def align(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains the aligned space of every seed and writes item and user vectors."""
    loaded, stages = load(config, workdir=workdir), Stages(workdir)
    for seed in config.seeds:
        context = Context(config, loaded, stages, seed)
        _, folder = embed_stage(context, align_stage(context))
        say(f"item and user vectors of seed {seed}: {folder}/embeddings.npz")


def augment(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Writes what every low-active user borrows, as Parquet."""
    output = output or workdir / "borrowed.parquet"
    table.need_pyarrow()
    context = Context(config, load(config, workdir=workdir), Stages(workdir), config.seeds[0])
    donation = borrow(context)
    candidates = table.read_candidates(donation.folder / "candidates.npz")
    table.write_parquet(output, candidates, donation.queries, context.loaded.rows, context.loaded.dataset)
    found, kept = int((candidates.item_QS > 0).sum()), donation.borrowed.start_Q1[-1]
    say(f"{kept} kept of {found} candidate items, for {len(donation.queries.user_Q)} queries: {output}")


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains and scores the CTR model with every method, for every seed."""
    loaded, stages = load(config, workdir=workdir), Stages(workdir)
    for seed in config.seeds:
        context = Context(config, loaded, stages, seed)
        donation = borrow(context)
        for method in config.evaluation.methods:
            train_stage(context, donation, method)


def export(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Writes a bundle of the method `export.method`, trained with the first seed."""
    output = output or workdir / "bundle"
    serving.need_new(output)
    if config.split.sparse_fraction:
        raise ValueError(
            f"export: expected split.sparse_fraction=0, found {config.split.sparse_fraction}; a bundle serves whole "
            "histories, and no model was trained on those of the sparse users"
        )
    if METHODS[config.export.method].offline:
        served = ", ".join(name for name, method in METHODS.items() if not method.offline)
        raise ValueError(
            f"export.method: expected one of {served}, found {config.export.method}; a bundle does not hold what it "
            "needs of a row"
        )
    context = Context(config, load(config, workdir=workdir), Stages(workdir), config.seeds[0])
    space = align_stage(context)
    vectors, _ = embed_stage(context, space)
    donation = augment_stage(context, space, vectors)
    trained = train_stage(context, donation, config.export.method)
    treatment = treat(context, donation, config.export.method)
    augmentation = treatment.augmentation
    dataset, rows = context.loaded.dataset, context.loaded.rows
    low_U = (rows.group_U == LOW) & (rows.train_length_U > 0)
    n_items, features = len(dataset.items.raw_id_N), context.loaded.tables.feature_NF
    serving.write_bundle(
        output,
        config=of_learning(config),
        lends={
            "method": config.export.method,
            "time_safe": augmentation is not None and augmentation.time_safe,
            "drop_target": augmentation is not None and augmentation.drop_target,
            "live": METHODS[config.export.method].live,
            "hidden": treatment.hidden_E is not None,
            "longest": int((rows.histories.train_end_U - rows.histories.start_U1[:-1])[low_U].max(initial=0)),
        },
        counts=counts(context.loaded, config.export.method),
        users=serving.latest_users(dataset.log, rows, augmentation, vectors.user_UD),
        items=serving.Items(
            raw_id_N=dataset.items.raw_id_N,
            title_N=dataset.items.title_N.astype(str),
            category_NG=dataset.items.category_NG,
            item_ND=vectors.item_ND,
            feature_NF=np.zeros((n_items, 0), np.float32) if features is None else features,
        ),
        ctr=trained.load(),
        space=serving.Encoder(space.encoder, space.params, space.tables),
        lenders=lenders_of(context, space, vectors, donation.donors),
        known=knowledge.make_knowledge(
            None
            if context.loaded.inputs.dense_EJ is None
            else item_counts(dataset.log, rows, n_items=n_items, folds=config.ctr.rate_folds),
            treatment.opinions,
        ),
    )
    say(
        f"bundle of {config.export.method}, seed {context.seed}: {output}; score with `marsjax score --bundle={output}`"
    )


def score(*, bundle: pathlib.Path | None, requests: pathlib.Path | None, output: pathlib.Path | None) -> None:
    """Scores a file of requests with a bundle."""
    missing = [f"--{name}" for name, value in (("bundle", bundle), ("requests", requests)) if value is None]
    if bundle is None or requests is None:
        raise ValueError(f"score: expected --bundle=DIR and --requests=FILE, found no {' and no '.join(missing)}")
    asked = read_requests(requests)
    output = output or requests.with_suffix(".scores.jsonl")
    write_scores(output, asked, scoring.score(serving.load_bundle(bundle), asked))
    say(f"{len(asked)} requests scored: {output}")


def publish(config: ConfigDict, *, bundle: pathlib.Path | None, root: pathlib.Path | None) -> None:
    """Makes a bundle the one that is served."""
    bundle, root = _given("publish", bundle=bundle, root=root)
    version = versions.publish(root, bundle, keep=config.serving.keep)
    say(f"{version} is served from {root}")


def rollback(config: ConfigDict, *, root: pathlib.Path | None) -> None:
    """Makes the version before the one that is served."""
    (root,) = _given("rollback", root=root)
    say(f"{versions.rollback(root)} is served from {root}")


def serve(config: ConfigDict, *, root: pathlib.Path | None) -> None:
    """Answers requests over HTTP until it is stopped."""
    (root,) = _given("serve", root=root)
    try:
        from marsjax.serving import service
    except ImportError as error:
        raise ImportError(f"marsjax serve needs the extra `serve`: pip install marsjax[serve] ({error})") from error
    cfg = config.serving
    settings = service.Settings(
        root=root,
        host=cfg.host,
        port=cfg.port,
        deadline=cfg.deadline_ms / 1000,
        store_deadline=cfg.store_deadline_ms / 1000,
        poll=cfg.poll_seconds,
        most_candidates=cfg.most_candidates,
        most_bytes=cfg.most_bytes,
        rate=cfg.rate,
        image_folder=cfg.image_folder,
        augment=cfg.augment,
        live=cfg.live,
        cache=cfg.cache,
    )
    storage = _storage(config, root, timeout=max(settings.store_deadline, 0.001))
    service.make_server(settings, storage).run()


def runner(config: ConfigDict, *, root: pathlib.Path | None) -> None:
    """Takes events into histories, vectors, donors and the model until it is stopped."""
    (root,) = _given("runner", root=root)
    cfg, stop = config.serving, threading.Event()
    settings = offline.Settings(
        root=root,
        batch=cfg.batch,
        lenders_seconds=cfg.lenders_seconds,
        rebuild_hour=cfg.rebuild_hour,
        train_seconds=cfg.train_seconds,
        training=continuation.Settings(least_events=cfg.train_events, rate=cfg.train_rate, margin=cfg.margin),
        keep=cfg.keep,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    storage = _storage(config, root, timeout=5.0)
    try:
        offline.run(settings, storage, stop)
    finally:
        storage.close()


# --- stages ---------------------------------------------------------------------------------------------------------


def borrow(context: Context) -> Donation:
    """Figure 2 up to the augmented histories: align, embed, retrieve, filter."""
    space = align_stage(context)
    vectors, _ = embed_stage(context, space)
    return augment_stage(context, space, vectors)


def check(config: ConfigDict) -> None:
    """Refuses what cannot work before anything long begins."""
    check_choices(
        config,
        {
            "data.source": SOURCES,
            "features.text": ("", *TEXT_ENCODERS),
            "features.image": ("", *IMAGE_ENCODERS),
            "features.dtype": encoding.DTYPES,
            "split.kind": ("leave_one_out", "last_fraction", "global_time"),
            "split.history": ("all", "positives"),
            "alignment.objective": alignment.OBJECTIVES,
            "alignment.entropy_sign": alignment.ENTROPY_SIGNS,
            "alignment.estimator": alignment.ESTIMATORS,
            "retrieval.backend": ("usearch", "exact"),
            "augmentation.strategy": mars.STRATEGIES,
            "augmentation.vectors": ("contextual", "static"),
            "baselines.mode": get_args(Mode),
            "ctr.backbone": BACKBONES,
            "ctr.inputs": INPUTS,
            "ctr.activation": ("prelu", "dice"),
            "training.sharding": ("pmap", "shard_map", "single"),
            "evaluation.methods": METHODS,
            "export.method": METHODS,
        },
        at_least_one=(
            "alignment.blocks", "alignment.targets", "alignment.history", "alignment.stein_items", "retrieval.donors",
            "retrieval.history", "posterior.components", "baselines.view_length", "ctr.cap", "ctr.batch_size",
            "ctr.epochs", "ctr.evaluations_per_epoch", "ctr.patience", "training.log_steps", "evaluation.bootstrap",
        ),
    )  # fmt: skip
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"config.seeds expects at least one seed, each once, got {tuple(config.seeds)}")
    if config.retrieval.prefix_stride < 0:
        raise ValueError(f"config.retrieval.prefix_stride expects 0 or more, got {config.retrieval.prefix_stride}")
    for key, value, low, high in (
        ("votes.sharpness", config.votes.sharpness, 0.0, 50.0),  # exp of more has no float32
        ("votes.evidence", config.votes.evidence, 0.0, math.inf),
        ("votes.shrink", config.votes.shrink, 1e-6, math.inf),  # 0: no vote where no donor knows the target
        ("short.share", config.short.share, 0.0, 1.0),
        ("posterior.folds", config.posterior.folds, 2, math.inf),
        ("ctr.rate_folds", config.ctr.rate_folds, 2, math.inf),
        ("ctr.id_decay", config.ctr.id_decay, 0.0, math.inf),
    ):
        if not low <= value <= high:
            raise ValueError(f"config.{key} expects a number from {low:g} to {high:g}, got {value}")
    later = [name for name in config.evaluation.methods if METHODS[name].posterior]
    if config.augmentation.time_safe and later:
        raise ValueError(
            "augmentation.time_safe: expected methods that can leave out what donors did later, found "
            f"{', '.join(later)} in evaluation.methods; leave these out, or let split.kind=global_time keep what is "
            "later out of training"
        )
    for modality in ("text", "image"):
        if config.features[modality] and config.data[f"{modality}_features"]:
            raise ValueError(
                f"features.{modality}: expected an encoder or data.{modality}_features, found "
                f"{config.features[modality]} and {config.data[f'{modality}_features']}; set one of them to ''"
            )
    mars.check_theta(config.augmentation.theta, config.augmentation.theta_quantile)


def read(config: ConfigDict, workdir: pathlib.Path | None = None) -> Dataset:
    """Reads, checks and numbers the data; encodes texts and images first where an encoder is named."""
    made: dict[str, pathlib.Path] = {}
    if config.features.text or config.features.image:
        if workdir is None:
            raise ValueError("features: expected a workdir to write what is encoded to, found none")
        made = encode_stage(config, workdir)
    data = config.data
    if "image" in made and config.features.image != "precomputed":
        # The encoder has read every image and told of the broken ones: the cheap check would tell of less.
        data = with_changes(config, {"data.image_folder": ""}).data
    dataset = SOURCES[data.source](data, made)
    if config.data.permute_features:
        dataset = permute_features(dataset, seed=config.split.seed)
    if config.data.permute_labels:
        dataset = permute_labels(dataset, seed=config.split.seed)
    return (
        sample_users(dataset, config.data.sample_users, seed=config.split.seed) if config.data.sample_users else dataset
    )


def tell(problems: Sequence[Problem]) -> None:
    """Every problem of the data, to the log."""
    for problem in problems:
        log.warning(
            "data: %d x %s, %s: %s", problem.occurrences, problem.kind, problem.action, ", ".join(problem.where)
        )


def split(config: ConfigDict, dataset: Dataset) -> Rows:
    """Splits the log, and ranks users by activity."""
    cfg = config.split
    return make_rows(
        dataset.log,
        split=cfg.kind,
        fraction_test=cfg.fraction_test,
        fraction_valid=cfg.fraction_valid,
        low_fraction=cfg.low_fraction,
        high_fraction=cfg.high_fraction,
        history=cfg.history,
        sparse_fraction=cfg.sparse_fraction,
        sparse_events=cfg.sparse_events,
        seed=cfg.seed,
    )


def load(config: ConfigDict, dataset: Dataset | None = None, *, workdir: pathlib.Path | None = None) -> Loaded:
    """Data ready for learning; tells every problem, and refuses splits that nothing can be learnt or judged on."""
    check(config)
    if dataset is None:
        dataset = read(config, workdir)
        tell(dataset.problems)
    rows = split(config, dataset)
    for name, number in (("training", TRAIN), ("validation", VALID), ("test", TEST)):
        label_R = dataset.log.label_E[rows.split_E == number]
        if not 0 < label_R.sum() < len(label_R):
            raise ValueError(
                f"split.kind={config.split.kind}: expected {name} rows of both labels, found {len(label_R)} rows, "
                f"{int(label_R.sum())} of them positive; give more data, another split or another label_threshold, "
                "and see `marsjax inspect`"
            )
    find_donors(rows, cap=1)  # refuses data without
    alignment.check_modalities(dataset.items, tuple(config.alignment.modalities))
    is_strong = config.ctr.inputs == "strong"
    return Loaded(
        dataset,
        rows,
        Inputs(feedback=True, dense_EJ=prior_numbers(dataset.log, rows, folds=config.ctr.rate_folds))
        if is_strong
        else Inputs(),
        ItemTables(
            dataset.items.category_NG,
            content_table(dataset.items, components=config.ctr.components) if is_strong else None,
        ),
        fingerprint(dataset.fingerprint, to_json(config.split)),
    )


def encode_stage(
    config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None
) -> dict[str, pathlib.Path]:
    """Encodes what has no vector yet, Eq. 3: the feature file of each modality that has an encoder.

    All goes to `workdir`, save the feature files, which go to `output` where it is given.
    """
    cfg, folder = config.features, output or workdir / "features"
    made = {}
    content = CONTENTS[config.data.source](config, workdir)
    encoders: dict[str, tuple[str, Mapping[str, Make]]] = {
        "text": (cfg.text, TEXT_ENCODERS), "image": (cfg.image, IMAGE_ENCODERS)
    }  # fmt: skip
    for modality, (name, known) in encoders.items():
        if not name:
            continue
        facts: dict[str, Any] = {}
        if name == "precomputed":
            values: Sequence[Any] = [str(item) for item in content.raw_id_I]
        elif modality == "text":
            values, facts = render(cfg.template, content.fields), {"template": cfg.template}
        else:
            need_pillow()
            values = content.image_I
        file = getattr(cfg, f"{modality}_file")
        options = Options(
            model=getattr(cfg, f"{modality}_model"),
            revision=getattr(cfg, f"{modality}_revision"),
            width=cfg.text_width,
            expected_width=getattr(cfg, f"{modality}_expected"),
            max_tokens=cfg.max_tokens,
            batch=cfg.batch,
            file=pathlib.Path(file) if file else None,
        )
        made[modality], problems = encoding.encode_items(
            modality,
            content.raw_id_I,
            values,
            known[name](options, values),
            encoding.READERS["text" if name == "precomputed" else modality],
            folder=folder,
            facts=facts,
            notes={"loaded_from": options.model} if options.model else {},
            dtype=cfg.dtype,
            strict=config.data.strict,
        )
        tell(problems)
    return made


def align_stage(context: Context) -> Space:
    """Trains the encoder with the joint loss, Eq. 14."""
    config, loaded, stages, seed = context
    cfg = config.alignment
    tables = jax.device_put(alignment.feature_tables(loaded.dataset.items, tuple(cfg.modalities)))
    encoder = alignment.make_encoder(to_json(cfg), n_items=len(loaded.dataset.items.raw_id_N))
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
    sign = alignment.ENTROPY_SIGNS[cfg.entropy_sign]
    weights = alignment.AlignmentLoss(cfg.beta, cfg.lambda_, sign, cfg.eta, cfg.estimator, cfg.objective)
    make_source = functools.partial(
        batches.alignment_source,
        loaded.dataset.log,
        loaded.rows,
        blocks=cfg.blocks,
        targets=cfg.targets,
        length=cfg.history,
        stein_items=cfg.stein_items,
        seed=seed,
    )
    _, per_epoch = make_source(steps=1)
    steps = max(1, round(cfg.epochs * per_epoch)) if cfg.epochs else 0  # 0: the encoder as it was drawn
    source, _ = make_source(steps=max(1, steps))
    template = jax.jit(encoder.init)(jax.random.key(seed), source[0], tables)["params"]  # op by op is slow on a GPU
    key = fingerprint("alignment", loaded.fingerprint, to_json(cfg), seed)

    def build(folder: pathlib.Path) -> None:
        items = 1 + np.random.default_rng(seed).permutation(encoder.n_items - 1)[: cfg.stein_items]
        items = items.astype(np.int32)

        def evaluate(params: PyTree, statistics: PyTree) -> dict[str, float]:
            return {name: float(value) for name, value in alignment.diagnostics(encoder, params, tables, items).items()}

        fitted = loop.fit(
            alignment.lifted_step(encoder, weights, settings, config.training.sharding),
            init_state(template, {}, adamw(settings), seed=seed),
            batches.iterate(source),
            tables,
            schedule=loop.Schedule(
                steps=steps,
                steps_per_evaluation=max(1, math.ceil(steps / 8)),
                checkpoint_seconds=config.training.checkpoint_seconds,
                log_steps=config.training.log_steps,
            ),
            folder=folder,
            title=f"alignment, seed {seed}",
            evaluate=evaluate,
        )
        checkpoint.save_params(folder / "params", fitted.params)
        files.write_json(folder / "diagnostics.json", fitted.evaluations)

    folder = stages(f"alignment-seed{seed}", key, build)
    loop.forget(folder)
    return Space(encoder, jax.device_put(checkpoint.load_params(folder / "params", template)), tables, key)


def embed_stage(context: Context, space: Space) -> tuple[Embeddings, pathlib.Path]:
    """Item and user tables, Eq. 13, and the folder that holds them in embeddings.npz, with their ids."""
    config, loaded, stages, seed = context
    histories, n_users = loaded.rows.histories, len(loaded.rows.group_U)
    key = fingerprint("embeddings", space.fingerprint, config.retrieval.history)

    def build(folder: pathlib.Path) -> None:
        with progress("user vectors", n_users) as advance:
            user_UD = embeddings.user_vectors(
                space.encoder, space.params, space.tables, histories, np.arange(n_users), histories.train_end_U,
                cap=config.retrieval.history, advance=advance,
            )  # fmt: skip
        item_ND = embeddings.item_vectors(space.encoder, space.params, space.tables, n_items=space.encoder.n_items)
        ids = {"raw_user_U": loaded.dataset.log.raw_user_U, "raw_item_N": loaded.dataset.items.raw_id_N}
        files.write_arrays(folder / "embeddings.npz", user_UD=user_UD, item_ND=item_ND, **ids)

    folder = stages(f"embeddings-seed{seed}", key, build)
    with np.load(folder / "embeddings.npz") as arrays:
        return Embeddings(arrays["item_ND"], arrays["user_UD"]), folder


def augment_stage(context: Context, space: Space, vectors: Embeddings) -> Donation:
    """Looks up a donor for every query (Eq. 15) and keeps the relevant part of its history (Eqs. 16-18)."""
    config, loaded, stages, seed = context
    histories, cap = loaded.rows.histories, config.retrieval.history
    queries = make_queries(loaded.rows, prefix_stride=config.retrieval.prefix_stride)
    donors = find_donors(loaded.rows, cap=cap)
    # What is blanked for a row is decided later, so it is no part of this stage.
    cfg = {
        name: value for name, value in to_json(config.augmentation).items() if name not in ("time_safe", "drop_target")
    }
    key = fingerprint("augmentation", space.fingerprint, to_json(config.retrieval), cfg)

    def build(folder: pathlib.Path) -> None:
        encode = space.encoder, space.params, space.tables
        donor_PD = vectors.user_UD[donors.user_P]
        centre_D = centre_of(config, donor_PD)
        with progress("query vectors", len(queries.user_Q)) as advance:
            query_QD = embeddings.user_vectors(
                *encode, histories, queries.user_Q, queries.end_Q, cap=cap, advance=advance
            )
        neighbours, recall = retrieval.nearest(
            query_QD - centre_D, donor_PD - centre_D, donors.user_P,
            k=min(config.retrieval.donors, len(donors.user_P)), backend=config.retrieval.backend,
        )  # fmt: skip
        with progress("borrowing", len(queries.user_Q)) as advance:
            candidates = mars.borrow(
                donors,
                neighbours,
                query_QD,
                embeddings.donor_vectors(config.augmentation.vectors, *encode, donors.item_PL, vectors.item_ND),
                strategy=config.augmentation.strategy,
                theta=config.augmentation.theta,
                theta_quantile=config.augmentation.theta_quantile,
                centre_D=centre_D,
                advance=advance,
            )
        files.write_arrays(folder / "candidates.npz", **candidates._asdict())
        statistics = table.statistics(candidates, queries, loaded.rows, loaded.dataset.log) | {"recall": recall}
        files.write_json(folder / "statistics.json", statistics)

    folder = stages(f"augmentation-seed{seed}", key, build)
    return Donation(
        queries, donors, mars.kept_items(table.read_candidates(folder / "candidates.npz")), vectors.item_ND, folder, key
    )


def opinions_stage(
    stages: Stages,
    events: Log,
    rows: Rows,
    user_P: np.ndarray,
    item_ND: np.ndarray | None,
    *,
    n_items: int,
    settings: posterior.Settings,
    advance: Callable[[int], None] = lambda _: None,
) -> posterior.Opinions:
    """`posterior.learn_opinions`, once for all methods that ask for the same: what donors say does not depend on how
    histories are shown, nor, without the aligned space, on the seed."""
    read = {
        "user_E": rows.user_E, "split_E": rows.split_E, "group_U": rows.group_U, "item_E": events.item_E,
        "label_E": events.label_E, "user_P": user_P,
    }  # fmt: skip
    aligned = {} if item_ND is None else {"item_ND": item_ND}
    key = fingerprint("opinions", files.digest_arrays(read | aligned), n_items, settings.components, settings.folds)

    def build(folder: pathlib.Path) -> None:
        learnt = posterior.learn_opinions(
            events, rows, user_P, item_ND, n_items=n_items, settings=settings, advance=advance
        )
        files.write_arrays(folder / "opinions.npz", **learnt._asdict())

    with np.load(stages("opinions", key, build) / "opinions.npz") as arrays:
        return posterior.Opinions(**arrays)


def train_stage(context: Context, donation: Donation | None, method: str) -> Trained:
    """Trains the CTR model on histories augmented by `method` and scores the test rows; the base needs no donation."""
    config, loaded, stages, seed = context
    cfg, events, rows = config.ctr, loaded.dataset.log, loaded.rows
    sizes = counts(loaded, method)
    model = make_backbone(to_json(cfg), **sizes)
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip, cfg.id_decay, ID_TABLES)
    tables, inputs = padded_tables(loaded.tables, sizes["n_items"]), loaded.inputs
    key = fingerprint("ctr", loaded.fingerprint, to_json(cfg), seed, read_by(config, donation, method))
    test_E = np.flatnonzero(rows.split_E == TEST)
    dense = METHODS[method].numbers + (0 if inputs.dense_EJ is None else inputs.dense_EJ.shape[1])
    make_template = functools.partial(objective.init_model, model, tables, seed=seed, dense=dense)

    def build(folder: pathlib.Path) -> None:
        template = make_template()
        train_E, valid_E = np.flatnonzero(rows.split_E == TRAIN), np.flatnonzero(rows.split_E == VALID)
        treatment = Treatment() if donation is None else treat(context, donation, method)
        shown = treatment.rows or rows
        gather: dict[str, Any] = {
            "size": cfg.batch_size,
            "cap": cfg.cap,
            "buckets": tuple(cfg.buckets),
            "augmentation": treatment.augmentation,
            "inputs": treated_inputs(context, treatment),
        }
        source, per_epoch = batches.ctr_source(
            events, shown, train_E, epochs=cfg.epochs, seed=seed, viewing=treatment.viewing, **gather
        )

        def score(params: PyTree, statistics: PyTree, row_R: np.ndarray) -> np.ndarray:
            evaluation = batches.evaluation_batches(events, shown, row_R, **gather)
            score_R = np.empty(len(row_R), np.float32)
            params, statistics, placed = jax.device_put((params, statistics, tables))
            score_R[evaluation.order_R] = objective.score(model, params, statistics, placed, evaluation.batches())
            return score_R

        def evaluate(params: PyTree, statistics: PyTree) -> dict[str, float]:
            score_R = score(params, statistics, valid_E)
            label_R = events.label_E[valid_E]
            low_R = rows.group_U[rows.user_E[valid_E]] == LOW
            values = {
                "valid_auc": metrics.auc(label_R, score_R),
                "valid_auc_low": metrics.auc(label_R[low_R], score_R[low_R]),
                "valid_logloss": metrics.logloss(label_R, score_R),
            }
            # No low-active users, or only clicks among theirs: there is no such AUC to write.
            return {name: value for name, value in values.items() if math.isfinite(value)}

        fitted = loop.fit(
            objective.lifted_step(model, settings, config.training.sharding, treatment.objective),
            init_state(template["params"], template["statistics"], adamw(settings), seed=seed),
            batches.iterate(source),
            tables,
            schedule=loop.Schedule(
                steps=len(source),
                steps_per_evaluation=math.ceil(per_epoch / cfg.evaluations_per_epoch),
                metric="valid_auc",
                patience=cfg.patience,
                plateau_factor=cfg.plateau_factor,
                checkpoint_seconds=config.training.checkpoint_seconds,
                log_steps=config.training.log_steps,
            ),
            folder=folder,
            title=f"{method}, seed {seed}",
            evaluate=evaluate,
        )
        trained = {"params": fitted.params, "statistics": fitted.statistics}
        checkpoint.save_params(folder / "params", trained)
        files.write_json(folder / "evaluations.json", fitted.evaluations)
        lent_R = np.zeros(len(test_E), np.int64)
        if treatment.augmentation is not None:
            lent_R = batches.lent_items(
                events, shown, test_E, size=cfg.batch_size, cap=cfg.cap, augmentation=treatment.augmentation
            )
        files.write_arrays(
            folder / "scores.npz",
            test=score(fitted.params, fitted.statistics, test_E),
            valid=score(fitted.params, fitted.statistics, valid_E),
            lent=lent_R,
        )

    folder = stages(f"{method}-seed{seed}", key, build)
    loop.forget(folder)
    score_E, lent_E = np.zeros(len(rows.user_E), np.float32), np.zeros(len(rows.user_E), np.int64)
    with np.load(folder / "scores.npz") as arrays:
        score_E[test_E], lent_E[test_E] = arrays["test"], arrays["lent"]
        score_E[rows.split_E == VALID] = arrays["valid"]
    return Trained(
        predictions_of(loaded, score_E, lent_E),
        predictions_of(loaded, score_E, split=VALID),
        lambda: checkpoint.load_params(folder / "params", make_template()),
        f"{method}-seed{seed}",
    )


def judge_stage(config: ConfigDict, stages: Stages, trained: Trained) -> report.Judged:
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
    loaded: Loaded,
    *,
    command: str,
    settings: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Every method of a configuration for every seed, and what came of it, ready for JSON.

    With `settings` (changes of the section `ctr` that leave the inputs alone) each method has the one that suits it;
    ValueError where they change anything else.
    """
    began, before = time.monotonic(), stages.seconds_before
    trained: dict[str, list[Trained]] = {method: [] for method in config.evaluation.methods}
    searched = search(config, stages, loaded, settings) if settings else []
    suited = suit(searched, config)
    for seed in config.seeds:
        context = Context(config, loaded, stages, seed)
        donation = borrow(context)
        for method, runs in trained.items():
            runs.append(train_stage(context._replace(config=suited.get(method, config)), donation, method))
    valid = {method: [run.valid for run in runs] for method, runs in trained.items()}
    if config.split.sparse_fraction and "base" in trained:
        trained["full_history"] = full_history(config, stages, loaded)
    results = {method: [run.predictions for run in runs] for method, runs in trained.items()}
    judged = {method: [judge_stage(config, stages, run) for run in runs] for method, runs in trained.items()}
    if loaded.dataset.oracle_E is not None:
        oracle = predictions_of(loaded, loaded.dataset.oracle_E)
        results["best_possible"] = [oracle] * len(config.seeds)
        judged["best_possible"] = [report.judge(oracle, n_resamples=config.evaluation.bootstrap)] * len(config.seeds)
    evaluated = report.combine(judged)
    rows = report.quality_rows(
        evaluated, dataset=dataset_name(config, loaded), inputs=config.ctr.inputs, split=config.split.kind
    )
    seen = report.validation_rows(valid)
    # The published method, and the variant of it that did best on the low-active users' validation rows.
    variants = {row["method"]: row["auc_low"]["mean"] or 0.0 for row in seen if row["method"].startswith("mars")}
    chosen = max(variants, key=lambda method: variants[method], default="mars")
    others = ("base", "best_possible", "full_history", *(name for name in variants if name not in ("mars", chosen)))
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
        "config": of_learning(config),
    }


def plan_cell(
    config: ConfigDict, dataset: Dataset, cell: study.Cell, workdir: pathlib.Path, command: str
) -> PlannedCell:
    """A cell with its configuration."""
    changed = with_changes(config, {**cell.changes, "evaluation.methods": ",".join(cell.methods)})
    tried = {name: dict(changes) for name, changes in cell.settings.items()}
    key = fingerprint("cell", dataset.fingerprint, of_learning(changed), tried)
    return PlannedCell(cell._replace(settings=tried, changes=dict(cell.changes)), changed, workdir, command, key)


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
    some = with_changes(config, {"evaluation.methods": ",".join(methods)})
    suited = suit(search(some, stages, loaded, planned.cell.settings), some) if planned.cell.settings else {}
    donation = borrow(Context(config, loaded, stages, seed))
    for method in methods:
        context = Context(suited.get(method, config), loaded, stages, seed)
        judge_stage(config, stages, train_stage(context, donation, method))


def train_ceiling(shelf: Shelf, planned: PlannedCell, seed: int) -> None:
    """The model of sparse users' whole histories for one seed."""
    stages, loaded = Stages(planned.workdir), shelf.ready(planned.config)
    (best,) = full_history(with_changes(planned.config, {"seeds": str(seed)}), stages, loaded)
    judge_stage(planned.config, stages, best)


def finish_cell(shelf: Shelf, planned: PlannedCell) -> None:
    """Writes the results of a cell; what is not trained yet is trained."""
    found = run_cell(
        planned.config, Stages(planned.workdir), shelf.ready(planned.config), command=planned.command,
        settings=planned.cell.settings,
    )  # fmt: skip
    files.write_json(planned.path, found | {"fingerprint": planned.fingerprint})


def suit(searched: Sequence[Mapping[str, Any]], config: ConfigDict) -> dict[str, ConfigDict]:
    """The configuration of each method with the setting that a search chose for it."""
    return {row["method"]: with_changes(config, row["changes"]) for row in searched if row["chosen"]}


def search(
    config: ConfigDict, stages: Stages, loaded: Loaded, settings: Mapping[str, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Tries each setting with each method on the first seed: one row for each, with the AUC of validation rows, and
    which is chosen, the best for low-active users (the first of equals). Test scores are written and not looked at."""
    for name, changes in settings.items():
        if wrong := [key for key in changes if not key.startswith("ctr.") or key in INPUT_KEYS]:
            raise ValueError(
                f"search: expected settings of the training and the model, found {', '.join(wrong)} in {name!r}; what "
                "changes the data or the inputs is a cell of its own"
            )
    context = Context(config, loaded, stages, config.seeds[0])
    donation = borrow(context)
    rows = []
    for method in config.evaluation.methods:
        tried = []
        for name, changes in settings.items():
            suited = context._replace(config=with_changes(config, changes))
            (seen,) = report.validation_rows({method: [train_stage(suited, donation, method).valid]})
            found = {group: seen[group]["mean"] for group in ("auc_low", "auc_all")}
            tried.append({"method": method, "setting": name, "changes": dict(changes), **found})
        best = max(tried, key=lambda row: row["auc_low"] or 0.0)
        rows += [row | {"chosen": row is best} for row in tried]
    return rows


def full_history(config: ConfigDict, stages: Stages, loaded: Loaded) -> list[Trained]:
    """The ceiling of sparse users: the base model with whole histories, on the same rows."""
    # How many events sparse users keep changes nothing here: told as by default, it is one stage for all of them.
    whole = with_changes(config, {"split.sparse_fraction": "0", "split.sparse_events": "5"})
    full = load(whole, loaded.dataset)
    group_B = predictions_of(loaded, np.zeros(len(loaded.rows.user_E), np.float32)).group_B
    out = []
    for seed in whole.seeds:
        context = Context(whole, full, stages, seed)
        trained = train_stage(context, None, "base")
        out.append(trained._replace(predictions=trained.predictions._replace(group_B=group_B)))
    return out


# --- parts ----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Results go to standard output; everything else is logged to standard error."""
    sys.stdout.write(text + "\n")


def of_learning(config: ConfigDict) -> dict[str, Any]:
    """The configuration without its section `serving`: no result depends on it, and it may hold a password."""
    return {name: value for name, value in to_json(config).items() if name != "serving"}


def with_changes(config: ConfigDict, changes: Mapping[str, str]) -> ConfigDict:
    """A copy with some values changed, as by flags."""
    changed = copy.deepcopy(config)
    for key, text in changes.items():
        override(changed, key, text)
    return changed


def dataset_name(config: ConfigDict, loaded: Loaded) -> str:
    """The data set's name, with how far histories were cut: ml1m, ml1m_sparse5."""
    sparse = f"_sparse{config.split.sparse_events}" if config.split.sparse_fraction else ""
    return f"{loaded.dataset.name}{sparse}"


def evidence(context: Context) -> tuple[page.Table | Plot | page.Case, ...]:
    """What the item features know: probes of categories, neighbours as pictures, the modality gap, and a map."""
    config, loaded, _, seed = context
    items, modalities = loaded.dataset.items, tuple(config.alignment.modalities)
    spaces = {name: (modality.feature_NF, modality.present_N) for name, modality in items.modalities.items()}
    drawn: list[page.Table | Plot | page.Case] = []
    if len(items.category_names) > 1:
        drawn += features_page.probe_tables(items, seed=seed)
    if modalities:
        space = align_stage(context)
        untrained = align_stage(context._replace(config=with_changes(config, {"alignment.epochs": "0"})))
        item_N = 1 + np.random.default_rng(seed).permutation(space.encoder.n_items - 1)[: config.alignment.stein_items]
        before, after = (
            {
                name: float(value)
                for name, value in alignment.diagnostics(
                    of.encoder, of.params, of.tables, item_N.astype(np.int32)
                ).items()
            }
            for of in (untrained, space)
        )
        drawn.append(features_page.gap_table(before, after))
        vectors, _ = embed_stage(context, space)
        drawn.append(features_page.map_of(vectors.item_ND, items, seed=seed))
        everyone_N = np.arange(len(vectors.item_ND)) > 0
        spaces["all that is aligned"] = vectors.item_ND, everyone_N
    return (*drawn, *features_page.neighbour_cases(items, spaces, image_files(context), seed=seed))


def image_files(context: Context) -> dict[str, pathlib.Path]:
    """Id -> image of the items, where there are some."""
    raw_ids = context.loaded.dataset.items.raw_id_N[1:].tolist()
    return item_images(context.config.data, context.stages.workdir, raw_ids)


def cases(context: Context, *, count: int = 4) -> tuple[page.Case, ...]:
    """Low-active users with what they did, what MARS lends them, what it left out of the donor's history, and what the
    donors' opinions lead one to expect of them."""
    config, loaded, _, seed = context
    dataset, rows = loaded.dataset, loaded.rows
    donation = borrow(context)
    candidates = table.read_candidates(donation.folder / "candidates.npz")
    user_Q = donation.queries.user_Q
    # Queries are sorted by user and end: the last of a user is the one with the whole training history.
    whole_Q = len(user_Q) - 1 - np.unique(user_Q[::-1], return_index=True)[1]
    chosen_Q = np.random.default_rng(seed).permutation(whole_Q)[:count]
    image_of = image_files(context)

    def card(item: int, note: str) -> page.ItemCard:
        name = str(dataset.items.raw_id_N[item])
        return page.ItemCard(str(dataset.items.title_N[item]) or name, note, image_of.get(name))

    settings = posterior_settings(config)
    try:
        opinions = posterior.learn_opinions(
            dataset.log, rows, donation.donors.user_P, donation.item_ND, n_items=len(donation.item_ND),
            settings=settings,
        )  # fmt: skip
        end_X = rows.histories.train_end_U[user_Q[chosen_Q]]
        expected_QN = posterior.expect_all(rows.histories, opinions, user_Q[chosen_Q], end_X, cap=settings.cap)
    except ValueError as error:  # too much to count: the rest is shown
        log.warning("cases: %s", error)
        expected_QN = np.zeros((len(chosen_Q), len(donation.item_ND)), np.float32)
    out = []
    for query, expected_N in zip(chosen_Q, expected_QN, strict=True):
        user, slot_S = user_Q[query], np.flatnonzero(candidates.item_QS[query] > 0)
        slot_S = slot_S[np.argsort(-candidates.similarity_QS[query, slot_S], kind="stable")]
        own = slice(rows.histories.start_U1[user], rows.histories.train_end_U[user])
        mine = [
            card(item, "liked" if label > 0 else "not liked")
            for item, label in zip(rows.histories.item_H[own][-8:], rows.histories.label_H[own][-8:], strict=True)
        ]
        kept = [slot for slot in slot_S if candidates.kept_QS[query, slot]]
        left = [slot for slot in slot_S[::-1] if not candidates.kept_QS[query, slot]]
        strips = [("own history, the last of it", tuple(mine))]
        for name, slots in (("lent, most similar first", kept[:8]), ("left out, least similar first", left[:8])):
            strips.append(
                (
                    name,
                    tuple(
                        card(
                            int(candidates.item_QS[query, slot]),
                            f"similarity {candidates.similarity_QS[query, slot]:+.2f}",
                        )
                        for slot in slots
                    ),
                )
            )
        met = np.unique(rows.histories.item_H[own])
        ranked = [int(item) for item in np.argsort(-expected_N, kind="stable") if item > 0 and item not in met]
        for name, sign in (("more", 1), ("less", -1)):
            foremost = [item for item in ranked[::sign] if sign * expected_N[item] > 0][:8]
            shown = tuple(card(item, f"expected {expected_N[item]:+.2f}") for item in foremost)
            strips.append((f"expected to like {name} than others do", shown))
        donors = np.unique(candidates.donor_QS[query, slot_S])
        facts = (
            f"{own.stop - own.start} training events; donor {', '.join(map(str, dataset.log.raw_user_U[donors]))}, "
            f"similarity {candidates.donor_similarity_QS[query, slot_S].max(initial=-1):.2f}; {len(kept)} items lent "
            f"of {len(slot_S)}"
        )
        out.append(page.Case(f"User {dataset.log.raw_user_U[user]}", facts, tuple(strips)))
    return tuple(out)


def _given(command: str, **paths: pathlib.Path | None) -> tuple[pathlib.Path, ...]:
    """The flags of a command, all of which must be given."""
    missing = [f"--{name}" for name, path in paths.items() if path is None]
    if missing:
        needed = " and ".join(f"--{name}=DIR" for name in paths)
        raise ValueError(f"{command}: expected {needed}, found no {' and no '.join(missing)}")
    return tuple(path for path in paths.values() if path is not None)


def _storage(config: ConfigDict, root: pathlib.Path, *, timeout: float) -> storing.Storage:
    url = config.serving.storage or f"sqlite:{root / 'storage.sqlite'}"
    # A runner that starts again on its machine goes on with what it had not acknowledged.
    return storing.open_storage(
        url,
        timeout=timeout,
        ttl=config.serving.ttl_days * 86400,
        consumer=platform.node() or "runner",
        append_timeout=5.0,
    )


def centre_of(config: ConfigDict, donor_PD: np.ndarray) -> np.ndarray:
    """What is subtracted from users and items before a cosine: the donors' mean, or nothing (the literal Eq. 15)."""
    return donor_PD.mean(axis=0) if config.retrieval.centre else np.zeros(donor_PD.shape[1], np.float32)


def lenders_of(context: Context, space: Space, vectors: Embeddings, donors: Donors) -> lending.Lenders:
    """The donors as a service needs them, with all that it looks up anew."""
    config, rows = context.config, context.loaded.rows
    # Histories of donors grow while they are served, up to as many items as a user is known by.
    spare = [(0, 0), (0, config.retrieval.history - donors.item_PL.shape[1])]
    donors = donors._replace(item_PL=np.pad(donors.item_PL, spare), time_PL=np.pad(donors.time_PL, spare))
    donor_PD = vectors.user_UD[donors.user_P]
    centre_D = centre_of(config, donor_PD)
    vector_PLD = None
    if config.augmentation.vectors == "contextual":
        vector_PLD = embeddings.contextual_vectors(space.encoder, space.params, space.tables, donors.item_PL)
    width = donors.item_PL.shape[1]
    lent = Borrowed(
        start_Q1=np.arange(len(donors.user_P) + 1) * width,
        item_S=donors.item_PL.ravel(),
        time_S=donors.time_PL.ravel(),
        donor_S=np.repeat(donors.user_P, width),
        similarity_S=np.zeros(donors.item_PL.size, np.float32),
    )
    mark_S = opinions(context.loaded.dataset.log, rows, lent, n_items=len(vectors.item_ND))
    return lending.Lenders(
        donors=donors,
        mark_PL=mark_S.reshape(donors.item_PL.shape),
        centre_D=centre_D,
        vector_PLD=vector_PLD,
        item_ND=vectors.item_ND,
        user_index=retrieval.build_index(donor_PD - centre_D, donors.user_P),
    )


def predictions_of(
    loaded: Loaded, score_E: np.ndarray, lent_E: np.ndarray | None = None, *, split: int = TEST
) -> Predictions:
    """Scores of all events (and how many items each was lent), cut to the rows of a split."""
    events, rows = loaded.dataset.log, loaded.rows
    test_E = np.flatnonzero(rows.split_E == split)
    user_B = rows.user_E[test_E]
    return Predictions(
        user_B=user_B,
        item_B=events.item_E[test_E],
        label_B=events.label_E[test_E],
        score_B=score_E[test_E],
        group_B=rows.group_U[user_B],
        lent_B=None if lent_E is None else lent_E[test_E],
    )


def posterior_settings(config: ConfigDict) -> posterior.Settings:
    """How opinions are expected."""
    return posterior.Settings(config.posterior.components, config.posterior.folds, config.retrieval.history)


def treat(context: Context, donation: Donation, method: str) -> Treatment:
    """What `method` lends."""
    config, loaded, _, seed = context
    cfg = config.augmentation
    offer = Offer(
        log=loaded.dataset.log,
        rows=loaded.rows,
        queries=donation.queries,
        donors=donation.donors,
        borrowed=donation.borrowed,
        item_ND=donation.item_ND,
        votes=votes.Settings(
            sharpness=config.votes.sharpness,
            evidence=config.votes.evidence,
            shrink=config.votes.shrink,
            cap=config.retrieval.history,
            time_safe=config.augmentation.time_safe,
        ),
        low_only=config.votes.low_only,
        posterior=posterior_settings(config),
        cut_share=config.short.share,
        baselines=baselines.Settings(config.baselines.mode, config.baselines.view_length),
        seed=seed,
        learn=functools.partial(opinions_stage, context.stages),
    )
    treatment = METHODS[method].treat(offer)
    lent = treatment.augmentation
    if lent is None:
        return treatment
    blanked = lent._replace(time_safe=lent.time_safe or cfg.time_safe, drop_target=lent.drop_target or cfg.drop_target)
    return treatment._replace(augmentation=blanked)


def treated_inputs(context: Context, treatment: Treatment) -> Inputs:
    """The inputs with what a method lends beside them; where it shows other histories, with the priors of these."""
    inputs, log = context.loaded.inputs, context.loaded.dataset.log
    prior_EJ = inputs.dense_EJ
    if treatment.rows is not None and prior_EJ is not None:
        prior_EJ = prior_numbers(log, treatment.rows, folds=context.config.ctr.rate_folds)
    parts = [part for part in (prior_EJ, treatment.dense_EJ) if part is not None]
    return inputs._replace(dense_EJ=np.concatenate(parts, axis=1) if parts else None, hidden_E=treatment.hidden_E)


def read_by(config: ConfigDict, donation: Donation | None, method: str) -> Any:
    """What a method reads beside data, model and seed, for the fingerprint of its stage."""
    if donation is None or method == "base":
        return "base"
    own = [to_json(config.baselines)] if METHODS[method].baseline else []
    if METHODS[method].posterior:
        own.append(to_json(config.posterior))
    if not METHODS[method].borrows:
        return [method, *own]
    return [
        method, donation.fingerprint, to_json(config.votes), to_json(config.short), config.augmentation.time_safe,
        config.augmentation.drop_target, *own,
    ]  # fmt: skip


def counts(loaded: Loaded, method: str) -> dict[str, int]:
    """Sizes of the embedding tables of the model of a method."""
    items = loaded.dataset.items
    return {
        "n_items": len(items.raw_id_N) + METHODS[method].mask_token,
        "n_categories": len(items.category_names),
        "n_users": len(loaded.dataset.log.raw_user_U),
        "n_features": 0 if loaded.tables.feature_NF is None else loaded.tables.feature_NF.shape[1],
    }
