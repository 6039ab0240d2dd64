"""The composition root: the stages of Figure 2 put together, in the order of the data flow."""

from __future__ import annotations

import functools
import logging
import math
import pathlib
import shlex
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from marsjax import alignment, embeddings, files, retrieval
from marsjax.augmentation import controls, mars, table
from marsjax.augmentation.queries import make_queries
from marsjax.configuration import fingerprint, to_json
from marsjax.ctr import objective
from marsjax.ctr.backbones import make_backbone
from marsjax.data import batches, inspection
from marsjax.data.histories import gather_histories
from marsjax.data.movielens import load_movielens
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.data.tabular import load_tabular
from marsjax.evaluation import metrics, report
from marsjax.progress import progress
from marsjax.records import (
    HIGH,
    TEST,
    TRAIN,
    VALID,
    Augmentation,
    Borrowed,
    Dataset,
    ItemTables,
    Predictions,
    Queries,
    Rows,
)
from marsjax.serving import bundle as serving
from marsjax.serving.requests import read_requests, write_scores
from marsjax.stages import stage
from marsjax.training import checkpoint, loop
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.step import init_state

log = logging.getLogger(__name__)

PyTree = Any


class Loaded(NamedTuple):
    """Data ready for learning, with the fingerprint of their content and split."""

    dataset: Dataset
    rows: Rows
    fingerprint: str


class Space(NamedTuple):
    """The trained encoder of the alignment stage."""

    encoder: alignment.MultimodalEncoder
    params: PyTree
    tables: alignment.FeatureTables
    fingerprint: str
    seconds_before: float  # spent on it by an earlier run, as in the two records below


class Donation(NamedTuple):
    """What the queries may borrow, from whom."""

    queries: Queries
    donors: mars.Donors
    borrowed: Borrowed
    folder: pathlib.Path
    fingerprint: str
    seconds_before: float


class Trained(NamedTuple):
    """A CTR model and its scores of the test rows."""

    predictions: Predictions
    params: PyTree
    statistics: PyTree
    seconds_before: float


# --- commands -------------------------------------------------------------------------------------------------------


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """All stages for every seed, then the report."""
    began, seconds_before = time.monotonic(), 0.0
    loaded = load(config)
    results: dict[str, list[Predictions]] = {method: [] for method in config.evaluation.methods}
    for seed in config.seeds:
        space = align_stage(config, loaded, workdir, seed)
        donation = augment_stage(config, loaded, space, workdir, seed)
        seconds_before += space.seconds_before + donation.seconds_before
        for method, predictions in results.items():
            trained = train_stage(config, loaded, donation, workdir, seed, method)
            predictions.append(trained.predictions)
            seconds_before += trained.seconds_before
    # A run that was stopped and continued took the time of its parts.
    write_report(config, loaded, results, workdir, seconds=time.monotonic() - began + seconds_before)


def inspect(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints what the data hold and every problem found."""
    dataset = read(config)
    say(inspection.describe(dataset, split(config, dataset)))


def align(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains the aligned space of every seed and writes item and user vectors."""
    loaded = load(config)
    for seed in config.seeds:
        space = align_stage(config, loaded, workdir, seed)
        folder = embed_stage(config, loaded, space, workdir, seed)
        say(f"item and user vectors of seed {seed}: {folder}/embeddings.npz")


def augment(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Writes what every low-active user borrows, as Parquet."""
    loaded = load(config)
    seed = config.seeds[0]
    donation = augment_stage(config, loaded, align_stage(config, loaded, workdir, seed), workdir, seed)
    output = output or workdir / "borrowed.parquet"
    candidates = table.read_candidates(donation.folder / "candidates.npz")
    table.write_parquet(output, candidates, donation.queries, loaded.rows, loaded.dataset)
    say(f"{donation.borrowed.start_Q1[-1]} borrowed items of {len(donation.queries.user_Q)} queries: {output}")


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains and scores the CTR model with every method, for every seed."""
    loaded = load(config)
    for seed in config.seeds:
        space = align_stage(config, loaded, workdir, seed)
        donation = augment_stage(config, loaded, space, workdir, seed)
        for method in config.evaluation.methods:
            train_stage(config, loaded, donation, workdir, seed, method)


def export(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Writes a bundle of the method `export.method`, trained with the first seed."""
    loaded, seed, method = load(config), config.seeds[0], config.export.method
    space = align_stage(config, loaded, workdir, seed)
    donation = augment_stage(config, loaded, space, workdir, seed)
    trained = train_stage(config, loaded, donation, workdir, seed, method)
    vectors = np.load(embed_stage(config, loaded, space, workdir, seed) / "embeddings.npz")
    donor_PD = vectors["user_UD"][donation.donors.user_P]
    centre_D = centre_of(config, donor_PD)
    output = output or workdir / "bundle"
    serving.write_bundle(
        output,
        config=to_json(config),
        counts=counts(loaded),
        users=bundle_users(config, loaded, donation, seed, method, vectors["user_UD"]),
        items=serving.Items(*loaded.dataset.items[:3], vectors["item_ND"]),
        ctr={"params": trained.params, "statistics": trained.statistics},
        alignment=space.params,
        donors=donation.donors._asdict() | {"centre_D": centre_D},
        write_index=lambda folder: retrieval.save_index(
            retrieval.build_index(donor_PD - centre_D, donation.donors.user_P), folder
        ),
    )
    say(f"bundle: {output}")


def score(*, bundle: pathlib.Path | None, requests: pathlib.Path | None, output: pathlib.Path | None) -> None:
    """Scores a file of requests with a bundle."""
    missing = [f"--{name}" for name, value in (("bundle", bundle), ("requests", requests)) if value is None]
    if bundle is None or requests is None:
        raise ValueError(f"score: expected --bundle=DIR and --requests=FILE, found no {' and no '.join(missing)}")
    read = read_requests(requests)
    output = output or requests.with_suffix(".scores.jsonl")
    write_scores(output, read, serving.score(serving.load_bundle(bundle), read))
    say(f"{len(read)} requests scored: {output}")


# --- stages ---------------------------------------------------------------------------------------------------------


def read(config: ConfigDict) -> Dataset:
    """Reads, checks and numbers the data."""
    data = config.data
    sources = {"synthetic": _synthetic, "movielens": _movielens, "tabular": _tabular}
    if data.source not in sources:
        raise ValueError(f"data.source: expected one of {sorted(sources)}, found {data.source!r}")
    return sources[data.source](data)


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
        seed=cfg.seed,
    )


def load(config: ConfigDict) -> Loaded:
    """Data ready for learning; tells every problem, and refuses splits that nothing can be learnt or judged on."""
    dataset = read(config)
    for problem in dataset.problems:
        log.warning(
            "data: %d x %s, %s: %s", problem.occurrences, problem.kind, problem.action, ", ".join(problem.where)
        )
    rows = split(config, dataset)
    for name, number in (("training", TRAIN), ("validation", VALID), ("test", TEST)):
        label_R = dataset.log.label_E[rows.split_E == number]
        if not 0 < label_R.sum() < len(label_R):
            raise ValueError(
                f"split.kind={config.split.kind}: expected {name} rows of both labels, found {len(label_R)} rows, "
                f"{int(label_R.sum())} of them positive; give more data or another split, and see `marsjax inspect`"
            )
    return Loaded(dataset, rows, fingerprint(dataset.fingerprint, to_json(config.split)))


def align_stage(config: ConfigDict, loaded: Loaded, workdir: pathlib.Path, seed: int) -> Space:
    """Trains the encoder with the joint loss, Eq. 14."""
    cfg = config.alignment
    tables = feature_tables(loaded.dataset, tuple(cfg.modalities))
    encoder = alignment.MultimodalEncoder(
        n_items=len(loaded.dataset.items.raw_id_N),
        modalities=tuple(cfg.modalities),
        id_width=cfg.id_width,
        width=cfg.width,
        hidden=cfg.hidden,
        normalise=cfg.normalise,
        residual=cfg.residual,
    )
    signs = {"dispersive": 1.0, "printed": -1.0}
    if cfg.entropy_sign not in signs:
        raise ValueError(f"alignment.entropy_sign: expected one of {sorted(signs)}, found {cfg.entropy_sign!r}")
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
    weights = alignment.AlignmentLoss(cfg.beta, cfg.lambda_, signs[cfg.entropy_sign], cfg.eta, cfg.estimator)
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
    source, _ = make_source(steps=max(1, round(cfg.epochs * per_epoch)))
    template = encoder.init(jax.random.key(seed), source[0], tables)["params"]
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
                steps=len(source),
                steps_per_evaluation=max(1, math.ceil(len(source) / 8)),
                checkpoint_seconds=config.training.checkpoint_seconds,
                log_steps=config.training.log_steps,
            ),
            folder=folder,
            title=f"alignment, seed {seed}",
            evaluate=evaluate,
        )
        checkpoint.save_params(folder / "params", fitted.params)
        files.write_json(folder / "diagnostics.json", fitted.evaluations)
        loop.forget(folder)

    folder, seconds = stage(workdir, f"alignment-seed{seed}", key, build)
    return Space(encoder, checkpoint.load_params(folder / "params", template), tables, key, seconds)


def embed_stage(config: ConfigDict, loaded: Loaded, space: Space, workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Item and user tables, Eq. 13."""
    histories = loaded.rows.histories
    key = fingerprint("embeddings", space.fingerprint, config.retrieval.history)

    def build(folder: pathlib.Path) -> None:
        n_users = len(loaded.rows.group_U)
        with progress("user vectors", n_users) as advance:
            user_UD = embeddings.user_vectors(
                *space[:3], histories, np.arange(n_users), histories.train_end_U, cap=config.retrieval.history,
                advance=advance,
            )  # fmt: skip
        item_ND = embeddings.item_vectors(*space[:3], n_items=space.encoder.n_items)
        files.write_arrays(folder / "embeddings.npz", user_UD=user_UD, item_ND=item_ND)

    return stage(workdir, f"embeddings-seed{seed}", key, build).folder


def augment_stage(config: ConfigDict, loaded: Loaded, space: Space, workdir: pathlib.Path, seed: int) -> Donation:
    """Looks up a donor for every query (Eq. 15) and keeps the relevant part of its history (Eqs. 16-18)."""
    rows, log_ = loaded.rows, loaded.dataset.log
    histories = rows.histories
    queries = make_queries(rows, prefix_stride=config.retrieval.prefix_stride)
    donors = find_donors(rows, cap=config.retrieval.history)
    cfg = {
        name: value for name, value in to_json(config.augmentation).items() if name not in ("time_safe", "drop_target")
    }
    key = fingerprint("augmentation", space.fingerprint, to_json(config.retrieval), cfg)

    def build(folder: pathlib.Path) -> None:
        tables_UN = np.load(embed_stage(config, loaded, space, workdir, seed) / "embeddings.npz")
        donor_PD = tables_UN["user_UD"][donors.user_P]
        with progress("query vectors", len(queries.user_Q)) as advance:
            query_QD = embeddings.user_vectors(
                *space[:3], histories, queries.user_Q, queries.end_Q, cap=config.retrieval.history, advance=advance
            )
        centre_D = centre_of(config, donor_PD)
        neighbours, recall = find_neighbours(config, query_QD - centre_D, donor_PD - centre_D, donors, folder)
        with progress("borrowing", len(queries.user_Q)) as advance:
            candidates = mars.borrow(
                donors,
                neighbours,
                query_QD,
                donor_vectors(config, space, donors, tables_UN["item_ND"]),
                strategy=config.augmentation.strategy,
                theta=config.augmentation.theta,
                theta_quantile=config.augmentation.theta_quantile,
                centre_D=centre_D,
                advance=advance,
            )
        files.write_arrays(folder / "candidates.npz", **candidates._asdict())
        files.write_json(
            folder / "statistics.json", table.statistics(candidates, queries, rows, log_) | {"recall": recall}
        )

    folder, seconds = stage(workdir, f"augmentation-seed{seed}", key, build)
    borrowed = mars.kept_items(table.read_candidates(folder / "candidates.npz"))
    return Donation(queries, donors, borrowed, folder, key, seconds)


def train_stage(
    config: ConfigDict, loaded: Loaded, donation: Donation, workdir: pathlib.Path, seed: int, method: str
) -> Trained:
    """Trains the CTR model on histories augmented by `method` and scores the test rows."""
    cfg, log_, rows = config.ctr, loaded.dataset.log, loaded.rows
    augmentation, source_key = choose_augmentation(config, loaded, donation, seed, method)
    model = make_backbone(to_json(cfg), **counts(loaded))
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
    tables = ItemTables(loaded.dataset.items.category_NG)
    key = fingerprint("ctr", loaded.fingerprint, to_json(cfg), seed, source_key)
    gather: dict[str, Any] = {
        "size": cfg.batch_size,
        "cap": cfg.cap,
        "buckets": tuple(cfg.buckets),
        "augmentation": augmentation,
    }
    test_E = np.flatnonzero(rows.split_E == TEST)
    template = objective.init_model(model, tables, seed=seed)

    def build(folder: pathlib.Path) -> None:
        train_E, valid_E = np.flatnonzero(rows.split_E == TRAIN), np.flatnonzero(rows.split_E == VALID)
        source, per_epoch = batches.ctr_source(log_, rows, train_E, epochs=cfg.epochs, seed=seed, **gather)

        def score(params: PyTree, statistics: PyTree, row_R: np.ndarray) -> np.ndarray:
            evaluation = batches.evaluation_batches(log_, rows, row_R, **gather)
            score_R = np.empty(len(row_R), np.float32)
            score_R[evaluation.order_R] = objective.score(model, params, statistics, tables, evaluation.batches())
            return score_R

        def evaluate(params: PyTree, statistics: PyTree) -> dict[str, float]:
            score_R = score(params, statistics, valid_E)
            label_R = log_.label_E[valid_E]
            return {"valid_auc": metrics.auc(label_R, score_R), "valid_logloss": metrics.logloss(label_R, score_R)}

        fitted = loop.fit(
            objective.lifted_step(model, settings, config.training.sharding),
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
        files.write_arrays(folder / "test.npz", score=score(fitted.params, fitted.statistics, test_E))
        loop.forget(folder)

    folder, seconds = stage(workdir, f"{method}-seed{seed}", key, build)
    score_B, user_B = np.load(folder / "test.npz")["score"], rows.user_E[test_E]
    predictions = Predictions(user_B, log_.item_E[test_E], log_.label_E[test_E], score_B, rows.group_U[user_B])
    return Trained(predictions, **checkpoint.load_params(folder / "params", template), seconds_before=seconds)


def write_report(
    config: ConfigDict, loaded: Loaded, results: dict[str, list[Predictions]], workdir: pathlib.Path, *, seconds: float
) -> None:
    """Tables of all methods, printed and written as JSON and Markdown."""
    rows = report.quality_rows(
        results,
        dataset=loaded.dataset.name,
        inputs=config.evaluation.inputs,
        split=config.split.kind,
        n_resamples=config.evaluation.bootstrap,
        seed=0,
    )
    report.write_results(
        workdir / "results.json",
        command="marsjax " + shlex.join(sys.argv[1:]),
        commit=report.current_commit(pathlib.Path(__file__).parent),
        machine=report.machine_description(),
        wall_seconds=seconds,
        rows=rows,
    )
    files.write_bytes(workdir / "results.md", report.as_markdown(rows).encode())
    say(report.as_table(rows))
    say(f"results: {workdir}/results.json, {workdir}/results.md")


# --- parts ----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Results go to standard output; everything else is logged to standard error."""
    sys.stdout.write(text + "\n")


def _synthetic(data: ConfigDict) -> Dataset:
    return make_synthetic(**to_json(data.synthetic))


def _features(folder: pathlib.Path, data: ConfigDict) -> dict[str, pathlib.Path]:
    named = {"text": data.text_features, "image": data.image_features}
    return {name: folder / path for name, path in named.items() if path}


def _movielens(data: ConfigDict) -> Dataset:
    folder = pathlib.Path(data.folder)
    features = _features(folder, data)
    return load_movielens(
        folder,
        text_features=features.get("text"),
        image_features=features.get("image"),
        image_folder=folder / data.image_folder if data.image_folder else None,
        label_threshold=data.label_threshold,
        min_item_events=data.min_item_events,
        strict=data.strict,
    )


def _tabular(data: ConfigDict) -> Dataset:
    return load_tabular(
        events_path=pathlib.Path(data.events_file),
        items_path=pathlib.Path(data.items_file) if data.items_file else None,
        columns={name: column for name, column in to_json(data.columns).items() if column},
        features=_features(pathlib.Path(), data),
        image_folder=pathlib.Path(data.image_folder) if data.image_folder else None,
        category_separator=data.category_separator,
        label_threshold=data.label_threshold,
        min_item_events=data.min_item_events,
        min_user_events=data.min_user_events,
        strict=data.strict,
    )


def feature_tables(dataset: Dataset, modalities: tuple[str, ...]) -> alignment.FeatureTables:
    """Raw features, moved and scaled by modality so that encoders of any scale train alike; absent rows stay zero."""
    features, present = {}, {}
    for name in modalities:
        if name not in dataset.items.modalities:
            raise ValueError(
                f"alignment.modalities: expected modalities of the data, {sorted(dataset.items.modalities)}, found "
                f"{name!r}; set --config.alignment.modalities, or give --config.data.{name}_features"
            )
        feature_NF, present_N = dataset.items.modalities[name]
        if not present_N.any():
            raise ValueError(f"modality {name!r}: expected features of at least one item, found none")
        moved_NF = (feature_NF - feature_NF[present_N].mean(axis=0)) * present_N[:, None]
        features[name] = (moved_NF / max(float(moved_NF[present_N].std()), 1e-12)).astype(np.float32)
        present[name] = present_N
    return alignment.FeatureTables(features, present)


def find_donors(rows: Rows, *, cap: int) -> mars.Donors:
    """The high-active users and the last `cap` items of their training histories."""
    histories = rows.histories
    user_P = np.flatnonzero((rows.group_U == HIGH) & (histories.train_end_U > histories.start_U1[:-1]))
    if not len(user_P):
        raise ValueError("expected high-active users with a training history, found none; see split.high_fraction")
    end_P = histories.train_end_U[user_P]
    times = histories._replace(item_H=histories.time_H)
    return mars.Donors(
        user_P.astype(np.int32),
        gather_histories(histories, user_P, end_P, cap=cap),
        gather_histories(times, user_P, end_P, cap=cap).astype(np.int64),
    )


def centre_of(config: ConfigDict, donor_PD: np.ndarray) -> np.ndarray:
    """What is subtracted from users and items before a cosine: the donors' mean, or nothing (the literal Eq. 15)."""
    return donor_PD.mean(axis=0) if config.retrieval.centre else np.zeros(donor_PD.shape[1], np.float32)


def find_neighbours(
    config: ConfigDict, query_QD: np.ndarray, donor_PD: np.ndarray, donors: mars.Donors, folder: pathlib.Path
):
    """Eq. 15 by the chosen backend, with its recall against the exact search."""
    k = min(config.retrieval.donors, len(donors.user_P))
    exact = retrieval.exact_search(query_QD, donor_PD, donors.user_P, k=k)
    if config.retrieval.backend == "exact":
        return exact, 1.0
    if config.retrieval.backend != "usearch":
        raise ValueError(f"retrieval.backend: expected usearch or exact, found {config.retrieval.backend!r}")
    index = retrieval.build_index(donor_PD, donors.user_P)
    retrieval.save_index(index, folder / "index")
    neighbours = retrieval.search(index, query_QD, k=k)
    recall = retrieval.recall(neighbours, exact)
    log.info("retrieval: recall@%d of the index against the exact search is %.4f", k, recall)
    return neighbours, recall


def donor_vectors(config: ConfigDict, space: Space, donors: mars.Donors, item_ND: np.ndarray):
    """Item vectors of donors for Eq. 16: in the context of the donor's own history, or static."""
    kind = config.augmentation.vectors
    if kind == "static":
        return lambda position_X: item_ND[donors.item_PL[position_X]]
    if kind != "contextual":
        raise ValueError(f"augmentation.vectors: expected contextual or static, found {kind!r}")
    with progress("donor item vectors", len(donors.user_P)) as advance:
        vector_PLD = embeddings.contextual_vectors(*space[:3], donors.item_PL, advance=advance)
    return lambda position_X: vector_PLD[position_X]


def choose_augmentation(
    config: ConfigDict, loaded: Loaded, donation: Donation, seed: int, method: str
) -> tuple[Augmentation | None, Any]:
    """What `method` lends, and what identifies it in fingerprints. Controls lend as many items as MARS does."""
    budget_Q = np.diff(donation.borrowed.start_Q1)
    n_items = len(loaded.dataset.items.raw_id_N)
    methods = {
        "base": lambda: None,
        "mars": lambda: donation.borrowed,
        "random_donor": lambda: controls.random_donor(donation.donors, budget_Q, seed=seed),
        "popular_items": lambda: controls.popular_items(donation.donors, budget_Q, n_items=n_items),
    }
    if method not in methods:
        raise ValueError(f"evaluation.methods: expected some of {sorted(methods)}, found {method!r}")
    borrowed = methods[method]()
    if borrowed is None:
        return None, "base"
    cfg = config.augmentation
    augmentation = Augmentation(donation.queries, borrowed, time_safe=cfg.time_safe, drop_target=cfg.drop_target)
    return augmentation, [method, donation.fingerprint, cfg.time_safe, cfg.drop_target]


def counts(loaded: Loaded) -> dict[str, int]:
    """Sizes of the embedding tables."""
    items = loaded.dataset.items
    return {
        "n_items": len(items.raw_id_N),
        "n_categories": len(items.category_names),
        "n_users": len(loaded.dataset.log.raw_user_U),
    }


def bundle_users(
    config: ConfigDict, loaded: Loaded, donation: Donation, seed: int, method: str, user_UD: np.ndarray
) -> serving.Users:
    """Users with their latest histories and what they borrow through their whole training history."""
    histories, n_users = loaded.rows.histories, len(loaded.rows.group_U)
    augmentation, _ = choose_augmentation(config, loaded, donation, seed, method)
    count_U, slot_S = np.zeros(n_users, np.int64), np.zeros(0, np.int64)
    items, times = np.zeros(0, np.int32), np.zeros(0, np.int64)
    if augmentation is not None:
        user_Q, start_Q1 = augmentation.queries.user_Q, augmentation.borrowed.start_Q1
        # Queries are sorted by user and end: the last of a user is the one with the whole training history.
        last_Q = np.flatnonzero(np.append(user_Q[1:] != user_Q[:-1], True)) if len(user_Q) else np.zeros(0, np.int64)
        length_X = np.diff(start_Q1)[last_Q]
        count_U[user_Q[last_Q]] = length_X
        slot_S = np.repeat(start_Q1[last_Q] - (np.cumsum(length_X) - length_X), length_X) + np.arange(length_X.sum())
        items, times = augmentation.borrowed.item_S[slot_S], augmentation.borrowed.time_S[slot_S]
    return serving.Users(
        raw_user_U=loaded.dataset.log.raw_user_U,
        group_U=loaded.rows.group_U,
        user_UD=user_UD,
        start_U1=histories.start_U1,
        item_H=histories.item_H,
        borrowed_U1=np.concatenate([[0], np.cumsum(count_U)]),
        borrowed_item_S=items,
        borrowed_time_S=times,
    )
