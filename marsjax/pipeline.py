"""The stages of Figure 2, in the order of the data flow: from events to a trained CTR model and its scores."""

from __future__ import annotations

import copy
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from ml_collections import ConfigDict

from marsjax import alignment, embeddings, files, hosts, retrieval
from marsjax.augmentation import baselines, mars, posterior, table, votes
from marsjax.augmentation.donors import find_donors
from marsjax.augmentation.methods import METHODS, Offer, Treatment
from marsjax.augmentation.operators import Mode
from marsjax.augmentation.queries import make_queries
from marsjax.configuration import check_choices, fingerprint, override, to_json
from marsjax.ctr import objective
from marsjax.ctr.backbones import BACKBONES, DTYPES, INPUTS, make_backbone
from marsjax.ctr.items import ID_TABLES, content_table, padded_tables
from marsjax.ctr.touched import TABLES, check_tables, rows_of_users, touch, touched_score, touched_step
from marsjax.data import batches
from marsjax.data.content import unused_files
from marsjax.data.grades import (
    check_grades,
    grade_marks,
    graded_log,
    graded_rows,
    grades_fingerprint,
    middle_grades,
)
from marsjax.data.histories import feedback
from marsjax.data.permutation import PERMUTED, permute_features, permute_labels
from marsjax.data.priors import prior_numbers
from marsjax.data.sampling import sample_users
from marsjax.data.splits import make_rows
from marsjax.evaluation import metrics
from marsjax.features import encoding
from marsjax.features.encoders import IMAGE_ENCODERS, TEXT_ENCODERS
from marsjax.features.images import need_pillow
from marsjax.features.signature import Make, Options
from marsjax.features.text import render
from marsjax.progress import progress
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
from marsjax.sources import CONTENTS, SOURCES
from marsjax.stages import Stages
from marsjax.training import checkpoint, loop
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.step import init_state, init_variables

log = logging.getLogger(__name__)

PyTree = Any


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
            "ctr.tables": TABLES,
            "ctr.dtype": DTYPES,
            "training.sharding": ("pmap", "shard_map", "single"),
            "evaluation.methods": METHODS,
            "export.method": METHODS,
            "data.permute_labels": PERMUTED,
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
    check_tables(config.ctr.tables, config.ctr, sharding=config.training.sharding)
    check_time_safe(config, "evaluation.methods", config.evaluation.methods)
    for modality in ("text", "image"):
        if config.features[modality] and config.data[f"{modality}_features"]:
            raise ValueError(
                f"features.{modality}: expected an encoder or data.{modality}_features, found "
                f"{config.features[modality]} and {config.data[f'{modality}_features']}; set one of them to ''"
            )
    mars.check_theta(config.augmentation.theta, config.augmentation.theta_quantile)


def check_time_safe(config: ConfigDict, key: str, methods: Sequence[str]) -> None:
    """Raises ValueError where `methods`, the value of `key`, cannot leave out what donors did later, and are to."""
    later = [name for name in methods if METHODS[name].posterior]
    if config.augmentation.time_safe and later:
        raise ValueError(
            "augmentation.time_safe: expected methods that can leave out what donors did later, found "
            f"{', '.join(later)} in {key}; leave these out, or let split.kind=global_time keep what is "
            "later out of training"
        )


def read(config: ConfigDict, workdir: pathlib.Path | None = None) -> Dataset:
    """Reads, checks and numbers the data; encodes texts and images first where an encoder is named."""
    made: dict[str, pathlib.Path] = {}
    if config.features.text or config.features.image:
        if workdir is None:
            raise ValueError("features: expected a workdir to write what is encoded to, found none")
        for process in range(hosts.count()):  # one after the other: the first encodes, and the others find it done
            if process == hosts.index():
                try:
                    made = encode_stage(config, workdir)
                except encoding.Refused as error:
                    raise encoding.Refused("; ".join((str(error), *_refused_events(config)))) from error
            hosts.from_first()
    data = config.data
    if "image" in made and config.features.image != "precomputed":
        # The encoder has read every image and told of the broken ones: the cheap check would tell of less.
        data = with_changes(config, {"data.image_folder": ""}).data
    dataset = SOURCES[data.source](data, made)
    if config.data.permute_features:
        dataset = permute_features(dataset, seed=config.split.seed)
    dataset = permute_labels(dataset, config.data.permute_labels, seed=config.split.seed)
    return (
        sample_users(dataset, config.data.sample_users, seed=config.split.seed) if config.data.sample_users else dataset
    )


def _refused_events(config: ConfigDict) -> list[str]:
    """What reading the events says, where it refuses them: who mends a shop's files wants to hear of all at once."""
    # Without features and images, of which the encoders have told.
    alone = {"data.image_folder": "", "data.text_features": "", "data.image_features": ""}
    try:
        SOURCES[config.data.source](with_changes(config, alone).data, {})
    except ValueError as error:
        return [str(error)]
    return []


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
    for reader in grade_readers(config):
        check_grades(dataset.log, reader)
    is_strong = config.ctr.inputs != "ids"
    return Loaded(
        dataset,
        rows,
        Inputs(mark_H=marks(config, dataset.log, rows), dense_EJ=priors(config, dataset.log, rows))
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
    refused: list[str] = []  # by strict reading; all modalities are read before it is told
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
            tell(unused_files(content.image_I))
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
        try:
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
        except encoding.Refused as error:
            refused.append(str(error))
    if refused:
        raise encoding.Refused("; ".join(refused))
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
    one, per_epoch = make_source(steps=1)
    steps = max(1, round(cfg.epochs * per_epoch)) if cfg.epochs else 0  # 0: the encoder as it was drawn
    template = init_variables(encoder, (), jax.random.key(seed), one[0], tables)["params"]
    key = fingerprint("alignment", loaded.fingerprint, to_json(cfg), seed)

    def build(folder: pathlib.Path) -> None:
        items = 1 + np.random.default_rng(seed).permutation(encoder.n_items - 1)[: cfg.stein_items]
        items = items.astype(np.int32)

        def evaluate(params: PyTree, statistics: PyTree) -> dict[str, float]:
            return {name: float(value) for name, value in alignment.diagnostics(encoder, params, tables, items).items()}

        lifted = alignment.lifted_step(encoder, weights, settings, config.training.sharding)
        source, _ = make_source(steps=max(1, steps), own=lifted.own)
        fitted = loop.fit(
            lifted,
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
            title=f"{'' if steps else 'untrained '}alignment, seed {seed}",
            evaluate=evaluate,
        )
        checkpoint.save_params(folder / "params", fitted.params)
        files.write_json(folder / "diagnostics.json", fitted.evaluations)

    name = f"alignment-seed{seed}" if steps else f"untrained-alignment-seed{seed}"
    folder = stages.together(name, key, build)
    loop.forget(folder)
    return Space(encoder, jax.device_put(checkpoint.load_params(folder / "params", template)), tables, key)


def encoder_and_vectors(space: Space) -> tuple[alignment.MultimodalEncoder, PyTree, alignment.FeatureTables]:
    """What the functions of `embeddings` read first; making it is worth while for many histories."""
    return space.encoder, space.params, embeddings.with_vectors(space.encoder, space.params, space.tables)


def embed_stage(context: Context, space: Space) -> tuple[Embeddings, pathlib.Path]:
    """Item and user tables, Eq. 13, and the folder that holds them in embeddings.npz, with their ids."""
    config, loaded, stages, seed = context
    histories, n_users = loaded.rows.histories, len(loaded.rows.group_U)
    key = fingerprint("embeddings", space.fingerprint, config.retrieval.history)

    def build(folder: pathlib.Path) -> None:
        encode = encoder_and_vectors(space)
        with progress("user vectors", n_users) as advance:
            user_UD = embeddings.user_vectors(
                *encode, histories, np.arange(n_users), histories.train_end_U, cap=config.retrieval.history,
                advance=advance,
            )  # fmt: skip
        item_ND = embeddings.item_vectors(*encode, n_items=space.encoder.n_items)
        ids = {"raw_user_U": loaded.dataset.log.raw_user_U, "raw_item_N": loaded.dataset.items.raw_id_N}
        files.write_arrays(folder / "embeddings.npz", user_UD=user_UD, item_ND=item_ND, **ids)

    folder = stages(f"embeddings-seed{seed}", key, build)
    arrays = files.map_arrays(folder / "embeddings.npz")
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
        encode = encoder_and_vectors(space)
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
                embeddings.donor_units(config.augmentation.vectors, *encode, donors.item_PL, vectors.item_ND, centre_D),
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
        arrays = {name: value for name, value in learnt._asdict().items() if value is not None}
        files.write_arrays(folder / "opinions.npz", **arrays)

    return posterior.Opinions(**files.map_arrays(stages("opinions", key, build) / "opinions.npz"))


def train_stage(context: Context, donation: Donation | None, method: str) -> Trained:
    """Trains the CTR model on histories augmented by `method` and scores the test rows; the base needs no donation."""
    config, loaded, stages, seed = context
    cfg, events, rows = config.ctr, loaded.dataset.log, loaded.rows
    sizes = counts(loaded, method)
    model = make_backbone(to_json(cfg), **sizes)
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip, cfg.id_decay, ID_TABLES)
    tables, inputs = padded_tables(loaded.tables, sizes["n_items"]), loaded.inputs
    reads_grades = METHODS[method].graded or cfg.inputs == "graded"
    grades = [grades_fingerprint(events)] if reads_grades else []
    key = fingerprint("ctr", loaded.fingerprint, to_json(cfg), seed, read_by(config, donation, method), *grades)
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
        step_of = model, settings, config.training.sharding, treatment.objective
        make_source = functools.partial(
            batches.ctr_source, events, shown, train_E, epochs=cfg.epochs, seed=seed, viewing=treatment.viewing,
            **gather,
        )  # fmt: skip
        if cfg.tables == "dense":
            lifted = objective.lifted_step(*step_of)
            source, per_epoch = make_source(own=lifted.own)
            served: Any = batches.iterate(source)
        else:
            lifted = touched_step(*step_of, apart=cfg.tables == "sharded")
            source, per_epoch = make_source()
            rows_of = {"n_items": sizes["n_items"], "n_users": rows_of_users(model)}
            renumbered = batches.BatchSource(
                lambda index: batches.cut(touch(source[index], **rows_of), lifted.own), len(source)
            )
            served = batches.iterate(renumbered)

        def score(params: PyTree, statistics: PyTree, row_R: np.ndarray) -> np.ndarray:
            evaluation = batches.evaluation_batches(events, shown, row_R, **gather)
            score_R = np.empty(len(row_R), np.float32)
            if cfg.tables == "dense":
                params, statistics, placed = jax.device_put((params, statistics, tables))
                found_R = objective.score(model, params, statistics, placed, evaluation.batches())
            else:
                found_R = touched_score(model, params, statistics, tables, evaluation.batches())
            score_R[evaluation.order_R] = found_R
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
            lifted,
            init_state(template["params"], template["statistics"], adamw(settings), seed=seed),
            served,
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

    folder = stages.together(f"{method}-seed{seed}", key, build)
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


def of_learning(config: ConfigDict) -> dict[str, Any]:
    """The configuration without the sections that no result depends on; `serving` may hold a password."""
    return {name: value for name, value in to_json(config).items() if name not in ("export", "serving")}


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


def centre_of(config: ConfigDict, donor_PD: np.ndarray) -> np.ndarray:
    """What is subtracted from users and items before a cosine: the donors' mean, or nothing (the literal Eq. 15)."""
    return donor_PD.mean(axis=0) if config.retrieval.centre else np.zeros(donor_PD.shape[1], np.float32)


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
    if config.ctr.inputs == "graded" and lent.borrowed.feedback_S is not None:
        # What is lent says liked or not, and is read as the mean grade of what was liked, or not.
        middle_3 = np.append(np.int8(0), grade_marks(offer.log, middle_grades(offer.log, offer.rows)))
        lent = lent._replace(borrowed=lent.borrowed._replace(feedback_S=middle_3[lent.borrowed.feedback_S]))
    blanked = lent._replace(time_safe=lent.time_safe or cfg.time_safe, drop_target=lent.drop_target or cfg.drop_target)
    return treatment._replace(augmentation=blanked)


def grade_readers(config: ConfigDict) -> list[str]:
    """What in the configuration reads grades."""
    inputs = ["ctr.inputs=graded"] if config.ctr.inputs == "graded" else []
    return [*inputs, *(method for method in config.evaluation.methods if METHODS[method].graded)]


def marks(config: ConfigDict, log: Log, rows: Rows) -> np.ndarray:
    """What a model with these inputs sees of the feedback on history items, [H] int8."""
    if config.ctr.inputs == "graded":
        return grade_marks(log, graded_rows(rows).histories.label_H)
    return feedback(rows.histories.label_H)


def priors(config: ConfigDict, log: Log, rows: Rows) -> np.ndarray:
    """Rates and counts that a model with these inputs reads, [E, 6], or with mean grades too [E, 9]."""
    prior_EJ = prior_numbers(log, rows, folds=config.ctr.rate_folds)
    if config.ctr.inputs != "graded":
        return prior_EJ
    by_grade_EJ = prior_numbers(graded_log(log), graded_rows(rows), folds=config.ctr.rate_folds)
    return np.concatenate([prior_EJ, by_grade_EJ[:, ::2]], axis=1)


def treated_inputs(context: Context, treatment: Treatment) -> Inputs:
    """The inputs with what a method lends beside them; where it shows other histories, with the priors of these."""
    inputs, log = context.loaded.inputs, context.loaded.dataset.log
    prior_EJ = inputs.dense_EJ
    if treatment.rows is not None and prior_EJ is not None:
        prior_EJ = priors(context.config, log, treatment.rows)
        inputs = inputs._replace(mark_H=marks(context.config, log, treatment.rows))
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
