"""What the commands do: stages and cells put together, and what they print and write."""

from __future__ import annotations

import logging
import os
import pathlib
import platform
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from marsjax import alignment, cells, embeddings, files, hosts, jobs, pipeline, retrieval, study
from marsjax.augmentation import posterior, table
from marsjax.augmentation.methods import METHODS, opinions
from marsjax.data import inspection
from marsjax.data.grades import check_grades, middle_grades
from marsjax.data.priors import item_counts
from marsjax.evaluation import features_page, page, report, study_page
from marsjax.evaluation.plots import Plot
from marsjax.features import encoding
from marsjax.features.encoders import IMAGE_ENCODERS, TEXT_ENCODERS
from marsjax.provenance import current_commit, machine_description
from marsjax.records import (
    LOW,
    Borrowed,
    Donors,
    Embeddings,
)
from marsjax.serving import bundle as serving
from marsjax.serving import continuation, knowledge, lending, scoring, versions
from marsjax.serving import rebuild as sharded
from marsjax.serving import runner as offline
from marsjax.serving import storage as storing
from marsjax.serving.requests import read_requests, write_scores
from marsjax.sources import item_images
from marsjax.stages import Stages

log = logging.getLogger(__name__)


def features(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Encodes item texts and images."""
    pipeline.check(config)
    if not (config.features.text or config.features.image):
        raise ValueError(
            f"features: expected features.text (one of {', '.join(TEXT_ENCODERS)}) or features.image (one of "
            f"{', '.join(IMAGE_ENCODERS)}), found neither"
        )
    made = pipeline.encode_stage(config, workdir, output=output)
    for modality, path in made.items():
        say(f"{modality} features: {path}")
    say(f"manifest: {(output or workdir / 'features') / encoding.MANIFEST}")


def run(config: ConfigDict, workdir: pathlib.Path, *, command: str = "marsjax.commands.run(config, workdir)") -> None:
    """All stages for every seed, then the report, which quotes `command`."""
    found = cells.run_cell(config, Stages(workdir), pipeline.load(config, workdir=workdir), command=command)
    if not hosts.is_first():
        return
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
    command: str = "marsjax.commands.reproduce(config, workdir)",
) -> None:
    """The paper's section 4 and more: report.html, report.md and a JSON a cell. What is finished is not run again.

    With `processes` above 1 so many train side by side.
    """
    pipeline.check(config)
    began, names = time.monotonic(), [name for name in parts.split(",") if name]
    make_plan, compared = study.quick if quick else study.full, _methods(methods)
    plan = make_plan(compared)
    if unknown := set(names) - {part.name for part in plan} - {cell.name for part in plan for cell in part.cells}:
        raise ValueError(
            f"--parts: expected some of {', '.join(part.name for part in plan)}, or names of their cells, found "
            f"{', '.join(sorted(unknown))}"
        )
    first = pipeline.with_changes(config, study.QUICK if quick else {})
    dataset = pipeline.read(first, workdir)
    pipeline.tell(dataset.problems)
    if dataset.log.grade_E is None and (graded := sorted(name for name in compared if METHODS[name].graded)):
        if methods:
            check_grades(dataset.log, ", ".join(graded))
        log.info("the log has labels alone, so these are left out: %s", ", ".join(graded))
        plan = make_plan(compared - set(graded))
    shelf, stages = cells.Shelf(dataset, users=first.data.sample_users), Stages(workdir)
    sections: list[page.Section] = []
    hours = 0.0  # of what the cells hold; stages that several share count in each
    left_out: list[str] = []  # parts that were not asked for, and of which nothing is there
    planned = {
        cell.name: cells.plan_cell(config, dataset, cell, workdir, command) for part in plan for cell in part.cells
    }
    asked: dict[str, cells.PlannedCell] = {}  # in the order in which they were asked for
    for name in names or [part.name for part in plan]:
        for part in plan:
            for cell in part.cells:
                if name in (part.name, cell.name):
                    asked[cell.name] = planned[cell.name]
    cells.share(planned.values(), asked.values())
    unknown_cells = {one.fingerprint: one for one in asked.values() if one.known() is None}
    if processes > 1 and unknown_cells:
        jobs.run(cells.cell_jobs(list(unknown_cells.values())), shelf, processes=processes, logs=workdir / "logs")
        cells.share(planned.values(), asked.values())
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
                cells.finish_cell(shelf, planned[cell.name])
                cells.share(planned.values(), asked.values())
            if (known := planned[cell.name].known()) is not None:
                results[cell.name] = known
                stages.commits |= set(known["commit"].split(", "))
                hours += known["wall_seconds"] / 3600
        drawn: tuple[Any, ...] = ()
        wanted = not names or part.name in names
        if part.kind == "statistics":
            drawn = (study_page.statistics_table(inspection.statistics(dataset, pipeline.split(first, dataset))),)
        elif part.kind == "features" and wanted and dataset.items.modalities:
            if len(dataset.items.category_names) > 1:
                part = part._replace(text=f"{features_page.PROBES}\n\n{part.text}")
            drawn = evidence(pipeline.Context(first, pipeline.load(first, dataset), stages, first.seeds[0]))
        elif part.kind == "cases" and wanted:
            drawn = cases(pipeline.Context(first, pipeline.load(first, dataset), stages, first.seeds[0]))
        if drawn or results or refused or wanted:
            sections.append(study_page.section(part, results, refused, drawn=drawn))
        else:
            left_out.append(part.name)
    if left_out:
        names_left = ", ".join(f"`{name}`" for name in left_out)
        sections.append(page.Section("Not run yet", f"{names_left}: name some by `--parts` in the same command.", ()))
    facts = {
        "command": command,
        "commit": ", ".join(sorted(stages.commits | {current_commit()})),
        "machine": machine_description(),
        "hours of work in the cells, one process": f"{hours:.1f}",
        "seconds of this run": f"{time.monotonic() - began:.0f}",
    }
    page.write_page(page.Page(f"MARS on {dataset.name}", tuple(facts.items()), tuple(sections)), workdir)
    written = f"; cells: {workdir}/cells" if (workdir / "cells").is_dir() else ""
    say(f"report: {workdir}/report.html, {workdir}/report.md{written}")


def _methods(text: str) -> frozenset[str]:
    """The base and those that are named; all where none is."""
    names = [name for name in text.split(",") if name]
    if unknown := sorted(set(names) - METHODS.keys()):
        raise ValueError(f"--methods: expected some of {', '.join(METHODS)}, found {', '.join(unknown)}")
    return frozenset(["base", *names] if names else METHODS)


def inspect(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints what the data hold and every problem found."""
    pipeline.check(config)
    dataset = pipeline.read(config, workdir)
    say(inspection.describe(dataset, pipeline.split(config, dataset)))


def align(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains the aligned space of every seed and writes item and user vectors."""
    loaded, stages = pipeline.load(config, workdir=workdir), Stages(workdir)
    for seed in config.seeds:
        context = pipeline.Context(config, loaded, stages, seed)
        _, folder = pipeline.embed_stage(context, pipeline.align_stage(context))
        say(f"item and user vectors of seed {seed}: {folder}/embeddings.npz")


def augment(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Writes what every low-active user borrows, as Parquet."""
    output = output or workdir / "borrowed.parquet"
    table.need_pyarrow()
    context = pipeline.Context(config, pipeline.load(config, workdir=workdir), Stages(workdir), config.seeds[0])
    donation = pipeline.borrow(context)
    candidates = table.read_candidates(donation.folder / "candidates.npz")
    table.write_parquet(output, candidates, donation.queries, context.loaded.rows, context.loaded.dataset)
    found, kept = int((candidates.item_QS > 0).sum()), donation.borrowed.start_Q1[-1]
    user_Q = donation.queries.user_Q
    asked = f"{len(user_Q)} queries of {len(np.unique(user_Q))} low-active users"
    say(f"{kept} kept of {found} candidate items, for {asked}: {output}")


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains and scores the CTR model with every method, for every seed."""
    loaded, stages = pipeline.load(config, workdir=workdir), Stages(workdir)
    for seed in config.seeds:
        context = pipeline.Context(config, loaded, stages, seed)
        donation = pipeline.borrow(context)
        for method in config.evaluation.methods:
            pipeline.train_stage(context, donation, method)


def export(config: ConfigDict, workdir: pathlib.Path, *, output: pathlib.Path | None = None) -> None:
    """Writes a bundle of the method `export.method`, trained with the first seed."""
    output = output or workdir / "bundle"
    serving.need_new(output)
    if config.split.sparse_fraction:
        raise ValueError(
            f"export: expected split.sparse_fraction=0, found {config.split.sparse_fraction}; a bundle serves whole "
            "histories, and no model was trained on those of the sparse users"
        )
    if config.ctr.inputs == "graded":
        raise ValueError(
            "export: expected ctr.inputs=ids or strong, found graded; events that are served have no grades"
        )
    if METHODS[config.export.method].offline:
        served = ", ".join(name for name, method in METHODS.items() if not method.offline)
        raise ValueError(
            f"export.method: expected one of {served}, found {config.export.method}; a bundle does not hold what it "
            "needs of a row"
        )
    pipeline.check_time_safe(config, "export.method", [config.export.method])
    context = pipeline.Context(config, pipeline.load(config, workdir=workdir), Stages(workdir), config.seeds[0])
    space = pipeline.align_stage(context)
    vectors, _ = pipeline.embed_stage(context, space)
    donation = pipeline.augment_stage(context, space, vectors)
    trained = pipeline.train_stage(context, donation, config.export.method)
    treatment = pipeline.treat(context, donation, config.export.method)
    augmentation = treatment.augmentation
    dataset, rows = context.loaded.dataset, context.loaded.rows
    low_U = (rows.group_U == LOW) & (rows.train_length_U > 0)
    n_items, features = len(dataset.items.raw_id_N), context.loaded.tables.feature_NF
    serving.write_bundle(
        output,
        config=pipeline.of_learning(config),
        lends={
            "method": config.export.method,
            "time_safe": augmentation is not None and augmentation.time_safe,
            "drop_target": augmentation is not None and augmentation.drop_target,
            "live": METHODS[config.export.method].live,
            "hidden": treatment.hidden_E is not None,
            "longest": int((rows.histories.train_end_U - rows.histories.start_U1[:-1])[low_U].max(initial=0)),
        },
        counts=pipeline.counts(context.loaded, config.export.method),
        users=serving.latest_users(
            dataset.log, rows, augmentation, vectors.user_UD, graded=METHODS[config.export.method].graded
        ),
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
            middle_grades(dataset.log, rows),
        ),
    )
    say(
        f"bundle of {config.export.method}, seed {context.seed}: {output}; `marsjax score --bundle={output} "
        f"--requests=FILE` scores with it, `marsjax publish --bundle={output} --root=DIR` serves it"
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
    # One thread scores, in parts that stay in the cache of one core; XLA would spread each over all cores, which takes
    # more of their time and gains nothing beside a loop that answers. Read when the first array is made.
    os.environ.setdefault("NPROC", "1")
    # Whatever thread has the interpreter gives it up after 5 ms otherwise: longer than a request takes.
    sys.setswitchinterval(0.0005)
    service.make_server(settings, storage).run()


def runner(config: ConfigDict, *, root: pathlib.Path | None) -> None:
    """Takes events into histories, vectors, donors and the model until it is stopped."""
    (root,) = _given("runner", root=root)
    cfg, stop = config.serving, threading.Event()
    settings = offline.Settings(
        root=root,
        batch=cfg.batch,
        lenders_seconds=cfg.lenders_seconds,
        index_threads=cfg.index_threads,
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


def rebuild(config: ConfigDict, *, root: pathlib.Path | None, output: pathlib.Path | None) -> None:
    """Makes vectors of all users in the store anew."""
    root, output = _given("rebuild", root=root, output=output)
    cfg, storage = config.serving, _storage(config, root, timeout=30.0)
    try:
        written, left = sharded.rebuild(root, storage, output, shards=cfg.shards, workers=cfg.workers)
    except storing.StorageError as error:
        raise OSError(f"{error}; run again when the store answers") from error
    finally:
        storage.close()
    say(f"{written} vectors are in the store; {left} users have gone on since, and are the runner's")


def say(text: str) -> None:
    """Results go to standard output; everything else is logged to standard error."""
    sys.stdout.write(text + "\n")


def evidence(context: pipeline.Context) -> tuple[page.Table | Plot | page.Case, ...]:
    """What the item features know: probes of categories, neighbours as pictures, the modality gap, and a map."""
    config, loaded, _, seed = context
    items, modalities = loaded.dataset.items, tuple(config.alignment.modalities)
    spaces = {name: (modality.feature_NF, modality.present_N) for name, modality in items.modalities.items()}
    drawn: list[page.Table | Plot | page.Case] = []
    if len(items.category_names) > 1:
        drawn += features_page.probe_tables(items, seed=seed)
    if modalities:
        space = pipeline.align_stage(context)
        untrained = pipeline.align_stage(
            context._replace(config=pipeline.with_changes(config, {"alignment.epochs": "0"}))
        )
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
        vectors, _ = pipeline.embed_stage(context, space)
        drawn.append(features_page.map_of(vectors.item_ND, items, seed=seed))
        everyone_N = np.arange(len(vectors.item_ND)) > 0
        spaces["all that is aligned"] = vectors.item_ND, everyone_N
    return (*drawn, *features_page.neighbour_cases(items, spaces, image_files(context), seed=seed))


def image_files(context: pipeline.Context) -> dict[str, pathlib.Path]:
    """Id -> image of the items, where there are some."""
    raw_ids = context.loaded.dataset.items.raw_id_N[1:].tolist()
    return item_images(context.config.data, context.stages.workdir, raw_ids)


def cases(context: pipeline.Context, *, count: int = 4) -> tuple[page.Case, ...]:
    """Low-active users with what they did, what MARS lends them, what it left out of the donor's history, and what the
    donors' opinions lead one to expect of them."""
    config, loaded, _, seed = context
    dataset, rows = loaded.dataset, loaded.rows
    donation = pipeline.borrow(context)
    candidates = table.read_candidates(donation.folder / "candidates.npz")
    user_Q = donation.queries.user_Q
    # Queries are sorted by user and end: the last of a user is the one with the whole training history.
    whole_Q = len(user_Q) - 1 - np.unique(user_Q[::-1], return_index=True)[1]
    chosen_Q = np.random.default_rng(seed).permutation(whole_Q)[:count]
    image_of = image_files(context)

    def card(item: int, note: str) -> page.ItemCard:
        name = str(dataset.items.raw_id_N[item])
        return page.ItemCard(str(dataset.items.title_N[item]) or name, note, image_of.get(name))

    settings = pipeline.posterior_settings(config)
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


def lenders_of(
    context: pipeline.Context, space: pipeline.Space, vectors: Embeddings, donors: Donors
) -> lending.Lenders:
    """The donors as a service needs them, with all that it looks up anew."""
    config, rows = context.config, context.loaded.rows
    # Histories of donors grow while they are served, up to as many items as a user is known by.
    spare = [(0, 0), (0, config.retrieval.history - donors.item_PL.shape[1])]
    donors = donors._replace(item_PL=np.pad(donors.item_PL, spare), time_PL=np.pad(donors.time_PL, spare))
    donor_PD = vectors.user_UD[donors.user_P]
    centre_D = pipeline.centre_of(config, donor_PD)
    unit_PLD = unit_ND = None
    if config.augmentation.vectors == "contextual":
        vector_PLD = embeddings.contextual_vectors(*pipeline.encoder_and_vectors(space), donors.item_PL)
        unit_PLD = embeddings.units(vector_PLD, centre_D)
    else:
        unit_ND = embeddings.units(vectors.item_ND, centre_D)
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
        unit_PLD=unit_PLD,
        unit_ND=unit_ND,
        user_index=retrieval.build_index(donor_PD - centre_D, donors.user_P),
    )
