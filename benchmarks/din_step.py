"""How fast is a training step of a DIN, and an epoch, against FuxiCTR's DIN in PyTorch?

    pip install fuxictr torch
    python -m benchmarks.din_step [--epoch [--folder=PATH/ml-1m [--users=N]]] [--output=FILE]

FuxiCTR is no dependency of this project: `--alone` measures our side without it.

Equal on both sides: the data, the batch, ids and categories embedded in 10 numbers each and a user id beside them, the
attention over (t, h, t - h, t * h) with layers of 80 and 40, its softmax, the tower of 200 and 80, the activation, Adam
at 1e-3 without decay after clipping the gradient's norm to 10, one read of the loss a step, float32, all cores, and an
allocator that keeps what is freed (`--allocator=default` does without, `benchmarks/allocator.py` says what that is).

Not equal, each as its library has it:

- Ours is `objective.lifted_step` under `pmap`, the default of the configuration. Theirs is `model_zoo.LongCTR.DIN`, the
  DIN in FuxiCTR's package, with its own `train_step`, `fit`, `evaluate` and feature map. The layers are those of its
  other DIN; only that one's reading of batches, as `NpzDataLoader` makes them, is written anew here.
- Our tower also reads target * interest: 4,000 parameters more. Our attention has no last bias: one fewer.
- An item has up to 6 categories on our side, whose mean is embedded, and the first of them on theirs, which knows one.
- Our activations count padding in no statistic, and we embed the catalogue once a step, theirs each entry of a history.
- In an epoch our batches are as long as their longest history needs (the buckets of the configuration); FuxiCTR's file
  has one length, here the longest history that there is. Either side saves its best parameters. Reading the data comes
  before the clock; compiling, which theirs does not need, is a row of its own. Each training is a process, by turns.

On a GPU (where JAX sees one) both train there, and both round products of float32 to TF32, which is the default of JAX;
batches lie in the host's memory, as loaders leave them, and each step moves its own.

A step's time is the median over turns: ours, theirs, ours, ... in one process. The time of the processors, all threads
together, is given too: other work on the machine cannot lengthen it by much. Beside it stands what the machine could
do at best: multiplications at the rate of a large float32 product and bytes at that of a copy, both measured in
the same run, whichever takes longer. Operations are those of the matrix products of the forward pass, times 3 with the
backward one (whose every product has two gradients). Bytes are `least_bytes`, no less than which layers that are
computed one after the other move; a program that fuses them may beat it.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import logging
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness

log = logging.getLogger("din_step")

TARGET = 2.0  # times as fast as FuxiCTR
BATCHES, HISTORIES, ACTIVATIONS = (512, 8192), (50, 200), ("dice", "prelu")
USERS, ITEMS, CATEGORIES, GENRES = 6040, 3416, 18, 6  # as MovieLens-1M has them; an item has at most 6 genres
EMBEDDING, ATTENTION, TOWER = 10, (80, 40), (200, 80)
RATE, CLIP, SEED, WARM, ROTATED = 1e-3, 10.0, 0, 3, 4
EPOCH_BATCH, EPOCH_ACTIVATION = 512, "dice"


class Size(NamedTuple):
    """One case of the steps."""

    batch: int
    history: int
    activation: str
    users: int = USERS
    items: int = ITEMS
    categories: int = CATEGORIES
    attention: tuple[int, ...] = ATTENTION
    tower: tuple[int, ...] = TOWER

    @property
    def case(self) -> str:
        """As a row names it."""
        return f"batch {self.batch}, history {self.history}, {self.activation}"


class Rows(NamedTuple):
    """Ids of one batch, which both sides read. Numbers from 1; 0 would be padding."""

    user_B: np.ndarray
    target_B: np.ndarray
    label_B: np.ndarray
    history_BL: np.ndarray


class Side(NamedTuple):
    """A library that is ready to train."""

    run: Callable[[int], float]  # so many steps more -> the last loss
    parameters: int


# --- what a step has to do ------------------------------------------------------------------------------------------


def matmul_flops(size: Size, *, folded: bool, tower_input: int) -> float:
    """Of the matrix products of a step, forward and backward. `folded`: the four blocks of the first layer are one."""
    depth, entries = 2 * EMBEDDING, size.batch * size.history
    widths = (depth if folded else 4 * depth, *size.attention, 1)
    attention = entries * (sum(2 * a * b for a, b in zip(widths, widths[1:], strict=False)) + 2 * depth)
    fold = size.batch * 2 * depth * size.attention[0] if folded else 0
    widths = (tower_input, *size.tower, 1)
    return 3.0 * (attention + fold + size.batch * sum(2 * a * b for a, b in zip(widths, widths[1:], strict=False)))


def least_bytes(size: Size, *, folded: bool, parameters: int) -> float:
    """What layers move that are computed one after the other, where each keeps only what its gradient needs.

    The embedded history: written, read by the attention, by the sum over it and backward, its gradient written and
    read. An output of a layer: written, read by the activation, read backward, its gradient written and read; Dice
    reads it twice more for its statistics and once more for their gradient. The input of the first layer, where it is
    built: written, read, read backward, its gradient written and read. A parameter: it, its gradient and the two
    moments of Adam read and written.
    """
    depth, entries = 2 * EMBEDDING, size.batch * size.history
    passes = 8 if size.activation == "dice" else 5
    numbers = entries * (6 * depth + passes * sum(size.attention)) + size.batch * passes * sum(size.tower)
    numbers += 0 if folded else entries * 5 * 4 * depth
    return 4.0 * (numbers + 8 * parameters)


# --- the two sides --------------------------------------------------------------------------------------------------


def draw(size: Size) -> tuple[np.ndarray, list[Rows]]:
    """Categories [N, G] of the items and some batches, the same for both sides; every history is full."""
    rng = np.random.default_rng(SEED)
    category_NG = rng.integers(1, size.categories + 1, (size.items + 1, GENRES)).astype(np.int32)
    category_NG[np.arange(GENRES)[None] >= rng.integers(1, GENRES + 1, size.items + 1)[:, None]] = 0
    category_NG[0] = 0
    drawn = [
        Rows(
            rng.integers(1, size.users + 1, size.batch).astype(np.int32),
            rng.integers(1, size.items + 1, size.batch).astype(np.int32),
            rng.integers(0, 2, size.batch).astype(np.float32),
            rng.integers(1, size.items + 1, (size.batch, size.history)).astype(np.int32),
        )
        for _ in range(ROTATED)
    ]
    return category_NG, drawn


def our_side(size: Size) -> Side:
    """The step that the pipeline trains with."""
    import jax

    from marsjax.ctr import objective
    from marsjax.ctr.din import Din
    from marsjax.records import CtrBatch, ItemTables
    from marsjax.training.optimizer import AdamW, adamw
    from marsjax.training.step import init_state

    category_NG, drawn = draw(size)
    tables, settings = ItemTables(category_NG), AdamW(RATE, 0.0, CLIP)
    model = Din(
        size.items + 1, size.categories + 1, n_users=size.users, embedding=EMBEDDING, attention=size.attention,
        tower=size.tower, activation=size.activation,
    )  # fmt: skip
    made = [
        CtrBatch(user_B, target_B, label_B, np.ones_like(label_B), history_BL, np.zeros(history_BL.shape, bool))
        for user_B, target_B, label_B, history_BL in drawn
    ]
    lifted = objective.lifted_step(model, settings, "pmap")
    variables = objective.init_model(model, tables, seed=SEED)
    state = lifted.replicate(init_state(variables["params"], variables["statistics"], adamw(settings), seed=SEED))
    placed, done = lifted.replicate(tables), 0

    def run(steps: int) -> float:
        nonlocal state, done
        for done in range(done + 1, done + steps + 1):  # noqa: B020 - the batches go on where they stopped
            state, metrics = lifted.step(state, lifted.split(made[done % ROTATED]), placed)
            loss = float(np.ravel(lifted.collect(metrics)["loss"])[0])
        return loss

    return Side(run, sum(leaf.size for leaf in jax.tree.leaves(variables["params"])))


class Fuxi(NamedTuple):
    """What is used of FuxiCTR."""

    torch: Any
    din: Any
    feature_map: Any
    loader: Any
    version: str
    gpu: int  # its number; -1: a CPU


def need_fuxictr() -> Fuxi:
    """Imports FuxiCTR. Stops with one line where it is not installed."""
    try:
        import torch
        from fuxictr.features import FeatureMap
        from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
        from fuxictr.version import __version__
        from model_zoo.LongCTR.DIN import DIN
    except ImportError as error:
        raise SystemExit(
            f"FuxiCTR cannot be imported ({error}): pip install fuxictr torch, or measure our side --alone"
        ) from None
    import jax

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    gpu = 0 if jax.default_backend() == "gpu" else -1
    if gpu == 0:
        if not torch.cuda.is_available():
            raise SystemExit("expected PyTorch to see the GPU that JAX does, found none: install its build for CUDA")
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it by default
    return Fuxi(torch, DIN, FeatureMap, NpzDataLoader, __version__, gpu)


def fuxi_model(fuxi: Fuxi, size: Size, folder: str, *, seed: int = SEED) -> Any:
    """FuxiCTR's DIN, whose checkpoints go to `folder`."""
    features = fuxi.feature_map("din_step", folder)
    features.features = collections.OrderedDict(
        (name, {"type": "categorical", "source": source, "vocab_size": rows, "padding_idx": 0})
        for name, source, rows in (
            ("user_id", "user", size.users + 1), ("item_id", "item", size.items + 1),
            ("category", "item", size.categories + 1),
        )
    )  # fmt: skip
    features.labels, features.default_emb_dim = ["label"], EMBEDDING
    pathlib.Path(folder, "din_step").mkdir(exist_ok=True)
    fuxi.torch.manual_seed(seed)
    activation = {"dice": "Dice", "prelu": "PReLU"}[size.activation]
    return fuxi.din(
        features, gpu=fuxi.gpu, embedding_dim=EMBEDDING, dnn_hidden_units=list(size.tower), dnn_activations=activation,
        attention_hidden_units=list(size.attention), attention_hidden_activations=activation, din_use_softmax=True,
        learning_rate=RATE, optimizer="adam", loss="binary_cross_entropy", metrics=["AUC"], verbose=0,
        model_root=folder, early_stop_patience=1 << 30, reduce_lr_on_plateau=False,
    )  # fmt: skip


def as_din_reads(torch: Any, columns: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Columns of a batch as the DIN of LongCTR wants them: the row, the histories with the target last, the mask."""
    items = {
        name: torch.cat([columns[f"{name}_history"], columns[name][:, None]], dim=1).flatten()
        for name in ("item_id", "category")
    }
    row = {"user_id": columns["user_id"], "label": columns["label"]}
    return row, items, (columns["item_id_history"] > 0).float()


def their_side(fuxi: Fuxi, size: Size, folder: str) -> Side:
    """FuxiCTR's own training step."""
    category_NG, drawn = draw(size)
    made = []
    for user_B, target_B, label_B, history_BL in drawn:
        columns = {
            "user_id": user_B, "label": label_B, "item_id": target_B, "item_id_history": history_BL,
            "category": category_NG[target_B, 0], "category_history": category_NG[history_BL, 0],
        }  # fmt: skip
        tensors = {name: fuxi.torch.from_numpy(value) for name, value in columns.items()}
        wide = {name: value if name == "label" else value.long() for name, value in tensors.items()}
        made.append(as_din_reads(fuxi.torch, wide))
    model = fuxi_model(fuxi, size, folder)
    model.train()
    model._max_gradient_norm, model._batch_index, done = CLIP, 0, 0  # `fit` and `train_epoch` set these

    def run(steps: int) -> float:
        nonlocal done
        for done in range(done + 1, done + steps + 1):  # noqa: B020 - the batches go on where they stopped
            row, items, mask = made[done % ROTATED]
            loss = model.train_step((row, dict(items), mask)).item()  # it puts what it moved to a GPU in their place
        return loss

    return Side(run, sum(value.numel() for value in model.parameters()))


# --- steps ----------------------------------------------------------------------------------------------------------


def whole(name: str, run: Callable[[int], float]) -> Callable[[int], float]:
    """The steps of a side, which must end with a finite loss."""

    def checked(steps: int) -> float:
        if not math.isfinite(loss := run(steps)):
            raise SystemExit(f"{name}: expected a finite loss, found {loss}")
        return loss

    return checked


def step_row(size: Size, fuxi: Fuxi | None, machine: harness.Machine, *, turns: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step of both sides, and how near they come to what the machine does at best."""
    log.info("steps: %s", size.case)
    with tempfile.TemporaryDirectory() as folder:
        sides = {"ours": our_side(size)} | ({} if fuxi is None else {"other": their_side(fuxi, size, folder)})
        runs = {side: whole(side, sides[side].run) for side in sides}
        timed = harness.take_turns(runs, turns=turns, seconds=seconds, warm=WARM)
    name = None if fuxi is None else f"FuxiCTR {fuxi.version}"
    question = "milliseconds of a training step of a DIN"
    row = harness.compare(question, size.case, timed["ours"], timed.get("other"), name, target=TARGET)
    depth = 2 * EMBEDDING
    for label, folded, tower_input in (
        ("ours", True, 3 * depth + EMBEDDING),
        ("other", False, 2 * depth + EMBEDDING),
    ):
        if label not in timed:
            continue
        flops = matmul_flops(size, folded=folded, tower_input=tower_input)
        moved = least_bytes(size, folded=folded, parameters=sides[label].parameters)
        least = harness.bound(machine, flops, moved)
        row |= {
            f"{label}_parameters": sides[label].parameters, f"{label}_gigaflops": flops / 1e9,
            f"{label}_gigabytes": moved / 1e9, f"{label}_bound": least * 1e3,
            f"{label}_bound_by": "operations" if flops / machine.flops >= moved / machine.bytes else "bytes",
            f"{label}_reached": least / timed[label].median,
        }  # fmt: skip
    log.info("%s: %s", size.case, " ".join(f"{key} {row[key]}" for key in ("ours", "other", "ratio")))
    return row


# --- epochs ---------------------------------------------------------------------------------------------------------


def epoch_config(folder: str, epochs: int, users: int) -> Any:
    """The configuration of planted data, or of MovieLens-1M (or `users` of it) where it is given, with the sizes of the
    steps."""
    from marsjax.configuration import load_config

    changes = {
        "ctr.attention": ",".join(map(str, ATTENTION)), "ctr.activation": EPOCH_ACTIVATION,
        "ctr.batch_size": str(EPOCH_BATCH), "ctr.epochs": str(epochs), "ctr.weight_decay": "0", "ctr.clip": str(CLIP),
        "ctr.learning_rate": str(RATE), "ctr.embedding": str(EMBEDDING), "ctr.tower": ",".join(map(str, TOWER)),
    }  # fmt: skip
    if not folder:
        return load_config("configs/synthetic.py", changes)
    changes |= {
        "data.folder": folder,
        "data.sample_users": str(users),
        "data.text_features": "",
        "data.image_features": "",
        "alignment.modalities": "",
    }
    return load_config("configs/ml1m.py", changes)


def size_of(loaded: Any, length: int) -> Size:
    """The sizes of the tables that the data need."""
    items = loaded.dataset.items
    return Size(
        EPOCH_BATCH, length, EPOCH_ACTIVATION, len(loaded.dataset.log.raw_user_U), len(items.raw_id_N) - 1,
        len(items.category_names) - 1,
    )  # fmt: skip


def write_columns(loaded: Any, folder: pathlib.Path, *, cap: int) -> Size:
    """The training and the validation rows as FuxiCTR's .npz has them: histories of one length, padded behind."""
    from marsjax.data.histories import gather_histories
    from marsjax.records import TRAIN, VALID

    events, rows = loaded.dataset.log, loaded.rows
    histories, category_N = rows.histories, loaded.tables.category_NG[:, 0]
    longest = min(cap, int((histories.end_E - histories.start_E)[rows.split_E >= 0].max()))
    for name, split in (("train", TRAIN), ("valid", VALID)):
        row_R = np.flatnonzero(rows.split_E == split)
        history_RL = gather_histories(histories, rows.user_E[row_R], histories.end_E[row_R], cap=longest)
        np.savez(
            folder / f"{name}.npz", user_id=rows.user_E[row_R] + 1, item_id=events.item_E[row_R],
            category=category_N[events.item_E[row_R]], item_id_history=history_RL,
            category_history=category_N[history_RL], label=events.label_E[row_R],
        )  # fmt: skip
    return size_of(loaded, longest)


def our_epochs(folder: str, epochs: int, seed: int, users: int) -> dict[str, Any]:
    """Trains as `pipeline.train_stage` does, twice: the second time everything is compiled."""
    import jax

    from marsjax import pipeline
    from marsjax.configuration import to_json
    from marsjax.ctr import objective
    from marsjax.ctr.backbones import make_backbone
    from marsjax.data import batches
    from marsjax.evaluation import metrics
    from marsjax.records import TRAIN, VALID
    from marsjax.training import loop
    from marsjax.training.optimizer import AdamW, adamw
    from marsjax.training.step import init_state

    config = epoch_config(folder, epochs, users)
    cfg, loaded = config.ctr, pipeline.load(config)
    events, rows, tables = loaded.dataset.log, loaded.rows, loaded.tables
    model = make_backbone(to_json(cfg), **pipeline.counts(loaded, "base"))
    settings = AdamW(cfg.learning_rate, cfg.weight_decay, cfg.clip)
    template = objective.init_model(model, tables, seed=seed)
    gather: dict[str, Any] = {"size": cfg.batch_size, "cap": cfg.cap, "buckets": tuple(cfg.buckets)}
    train_E, valid_E = (np.flatnonzero(rows.split_E == split) for split in (TRAIN, VALID))

    def evaluate(params: Any, statistics_: Any) -> dict[str, float]:
        evaluation = batches.evaluation_batches(events, rows, valid_E, **gather)
        score_R = np.empty(len(valid_E), np.float32)
        params, statistics_, placed = jax.device_put((params, statistics_, tables))
        score_R[evaluation.order_R] = objective.score(model, params, statistics_, placed, evaluation.batches())
        return {"valid_auc": metrics.auc(events.label_E[valid_E], score_R)}

    seconds = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as work:
            began = time.perf_counter()
            source, per_epoch = batches.ctr_source(events, rows, train_E, epochs=epochs, seed=seed, **gather)
            fitted = loop.fit(
                objective.lifted_step(model, settings, config.training.sharding),
                init_state(template["params"], template["statistics"], adamw(settings), seed=seed),
                batches.iterate(source),
                tables,
                schedule=loop.Schedule(len(source), per_epoch, "valid_auc", patience=epochs + 1),
                folder=pathlib.Path(work),
                title=f"ours, seed {seed}",
                evaluate=evaluate,
            )
            seconds.append((time.perf_counter() - began) / epochs)
    return {
        "seconds": seconds[1], "first_seconds": seconds[0], "auc": fitted.best_metric, "rows": len(train_E),
        "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(template["params"])),
    }  # fmt: skip


def their_epochs(fuxi: Fuxi, size: Size, folder: pathlib.Path, epochs: int, seed: int, workers: int) -> dict[str, Any]:
    """FuxiCTR's `fit` over its loader of .npz files."""
    columns = fuxi.feature_map("din_step", str(folder))
    one, many = {"type": "categorical"}, {"type": "sequence", "max_len": size.history}
    columns.features = collections.OrderedDict(
        user_id=one, item_id=one, category=one, item_id_history=many, category_history=many
    )
    columns.labels = ["label"]
    loaders = {}
    for name in ("train", "valid"):
        made = fuxi.loader(
            columns, str(folder / f"{name}.npz"), batch_size=size.batch, shuffle=name == "train", num_workers=workers
        )
        made.collate_fn = Collate(fuxi.torch, made.collate_fn)
        loaders[name] = made
    model = fuxi_model(fuxi, size, str(folder), seed=seed)
    began = time.perf_counter()
    model.fit(loaders["train"], epochs=epochs, validation_data=loaders["valid"], max_gradient_norm=CLIP)
    return {
        "seconds": (time.perf_counter() - began) / epochs, "auc": float(model._best_metric),
        "rows": loaders["train"].num_samples, "parameters": sum(value.numel() for value in model.parameters()),
    }  # fmt: skip


class Collate:
    """FuxiCTR's columns of a batch, as its DIN wants them; in the loader's process, as its own collators do."""

    def __init__(self, torch: Any, collate: Callable[[list], dict[str, Any]]):
        self._torch, self._collate = torch, collate

    def __call__(self, batch: list) -> tuple[dict[str, Any], dict[str, Any], Any]:
        return as_din_reads(self._torch, self._collate(batch))


def epoch_rows(arguments: argparse.Namespace, folder: str, fuxi: Fuxi | None) -> Iterable[dict[str, Any]]:
    """Seconds of an epoch of both sides, and the validation AUC beside it, over seeds."""
    from marsjax import pipeline

    config = epoch_config(folder, arguments.epochs, arguments.users)
    loaded = pipeline.load(config)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in (("ours",) if fuxi is None else ("ours", "theirs"))}
    with tempfile.TemporaryDirectory() as work:
        size = write_columns(loaded, pathlib.Path(work), cap=config.ctr.cap)
        for seed in range(arguments.seeds):
            for side, done in found.items():
                log.info("epochs: %s, seed %d, %s", loaded.dataset.name, seed, side)
                answer = pathlib.Path(work, "answer.json")
                words = [
                    sys.executable, "-m", "benchmarks.din_step", f"--side={side}", f"--seeds={seed}",
                    f"--epochs={arguments.epochs}",
                    f"--workers={arguments.workers}", f"--allocator={arguments.allocator}", f"--work={work}",
                    f"--size={json.dumps(size)}", f"--folder={folder}", f"--users={arguments.users if folder else 0}",
                ]  # fmt: skip
                # What either side prints goes where progress goes.
                subprocess.run(words, check=True, stdout=sys.stderr)
                done.append(json.loads(answer.read_text()))
                log.info("%s", done[-1])
    name = None if fuxi is None else f"FuxiCTR {fuxi.version}"
    rows = found["ours"][0]["rows"]
    case = f"{loaded.dataset.name}, {size.users} users, {rows} rows, batch {size.batch}, epochs {arguments.epochs}"
    timed = {side: harness.Timed([run["seconds"] for run in done], []) for side, done in found.items()}
    first = harness.Timed([run["first_seconds"] for run in found["ours"]], [])
    for question, ours in (
        ("seconds of an epoch of a DIN, with its validation", timed["ours"]),
        ("the same where ours has yet to compile", first),
    ):
        row = harness.compare(question, case, ours, timed.get("theirs"), name, scale=1.0, target=TARGET)
        row["ours_parameters"] = found["ours"][0]["parameters"]
        row["ours_rows_per_second"] = found["ours"][0]["rows"] / ours.median
        if "theirs" in timed:
            row["other_parameters"] = found["theirs"][0]["parameters"]
            row["other_rows_per_second"] = found["theirs"][0]["rows"] / timed["theirs"].median
        yield row if ours is timed["ours"] else row | {"target": None, "met": None}
    quality = {side: [run["auc"] for run in done] for side, done in found.items()}
    yield {
        "question": "the best validation AUC of these epochs, mean over seeds", "case": case,
        "ours": statistics.fmean(quality["ours"]),
        "other": statistics.fmean(quality["theirs"]) if fuxi else None, "other_name": name, "ratio": None,
        "target": None, "met": None, "turns": arguments.seeds,
        "ours_least": min(quality["ours"]), "ours_most": max(quality["ours"]),
        "other_least": min(quality["theirs"]) if fuxi else None,
        "other_most": max(quality["theirs"]) if fuxi else None,
    }  # fmt: skip


def rows_of(arguments: argparse.Namespace, fuxi: Fuxi | None, machine: harness.Machine) -> Iterable[dict[str, Any]]:
    """All that is asked for."""
    sizes = itertools.product(arguments.activations, arguments.batches, arguments.histories)
    steps = (
        step_row(Size(batch, history, activation), fuxi, machine, turns=arguments.turns, seconds=arguments.seconds)
        for activation, batch, history in sizes
    )
    epochs = (row for folder in dict.fromkeys(("", arguments.folder)) for row in epoch_rows(arguments, folder, fuxi))
    for row in itertools.chain(() if arguments.no_steps else steps, epochs if arguments.epoch else ()):
        notes = [
            f"{name}: {text}" for name, side in (("ours", "ours"), ("FuxiCTR", "other")) if (text := share(row, side))
        ]
        yield row | {"note": "; ".join(notes)}


# --- what is printed ------------------------------------------------------------------------------------------------


def share(row: dict[str, Any], side: str) -> str:
    """Of a step: the share of the bound reached, and how that was counted. Of an epoch: rows a second."""
    if f"{side}_rows_per_second" in row:
        return f"{row[f'{side}_rows_per_second']:,.0f} rows/s"
    if f"{side}_reached" not in row:
        return ""
    return (
        f"{row[f'{side}_reached']:.0%} of what {row[f'{side}_bound_by']} allow "
        f"({row[f'{side}_gigaflops']:.3g} GFLOP, {row[f'{side}_gigabytes']:.3g} GB)"
    )


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers, joined by commas."""
    return tuple(int(part) for part in text.split(",") if part)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=numbers, default=BATCHES, help="rows of a batch (default: 512,8192)")
    parser.add_argument("--histories", type=numbers, default=HISTORIES, help="lengths of histories (default: 50,200)")
    parser.add_argument("--activations", default=",".join(ACTIVATIONS), help="some of dice, prelu (default: both)")
    parser.add_argument("--turns", type=int, default=7, help="repeats of each case, by turns (default: 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a turn takes at least (default: 1)")
    parser.add_argument("--no-steps", action="store_true", help="only the epochs")
    parser.add_argument("--epoch", action="store_true", help="also whole epochs, on planted data")
    parser.add_argument("--folder", default="", help="with --epoch: also on MovieLens-1M, which lies there")
    parser.add_argument("--users", type=int, default=0, help="of MovieLens-1M, drawn by seed (default: 0, all)")
    parser.add_argument("--epochs", type=int, default=1, help="of each training (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each side (default: 3)")
    parser.add_argument("--workers", type=int, default=1, help="processes of FuxiCTR's loader (default: 1, its own)")
    parser.add_argument("--alone", action="store_true", help="measure our side only, without FuxiCTR")
    parser.add_argument("--allocator", choices=("kept", "default"), default="kept", help="freed memory (default: kept)")
    parser.add_argument("--output", type=pathlib.Path, help="write the rows there as JSON")
    for name in ("side", "work", "size"):  # how this command calls itself for one training
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.activations = tuple(name for name in arguments.activations.split(",") if name)
    if unknown := set(arguments.activations) - {*ACTIVATIONS}:
        parser.error(f"--activations: expected some of {', '.join(ACTIVATIONS)}, found {', '.join(sorted(unknown))}")
    if arguments.turns < 1 or arguments.seeds < (0 if arguments.side else 1):
        parser.error("--turns and --seeds: expected 1 or more")
    if arguments.users < 0 or (arguments.users and not arguments.folder):
        parser.error("--users: expected a number from 1 on with --folder, or 0 for all users")
    return arguments


def train_once(arguments: argparse.Namespace) -> None:
    """One training of one side; the answer goes to a file, as libraries print."""
    work, seed = pathlib.Path(arguments.work), arguments.seeds
    if arguments.side == "ours":
        found = our_epochs(arguments.folder, arguments.epochs, seed, arguments.users)
    else:
        values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in json.loads(arguments.size)]
        found = their_epochs(need_fuxictr(), Size(*values), work, arguments.epochs, seed, arguments.workers)
    (work / "answer.json").write_text(json.dumps(found))


def main(words: list[str] | None = None) -> None:
    """Measures, prints the tables, and writes the rows."""
    arguments = parse(words)
    harness.log_progress(log.name, "marsjax")
    from marsjax.allocator import keep_freed_memory

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU
    if arguments.allocator == "kept":
        keep_freed_memory()
    if arguments.side:
        train_once(arguments)
        return
    fuxi = None if arguments.alone else need_fuxictr()
    began = harness.begin()
    machine = harness.measure_device(None if fuxi is None else fuxi.torch)
    sys.stdout.write(machine.describe() + "\n")
    versions = "" if fuxi is None else f"torch {fuxi.torch.__version__}, fuxictr {fuxi.version}; "
    rows = harness.write_results(
        arguments.output, rows_of(arguments, fuxi, machine), began, program="-m benchmarks.din_step", words=words,
        machine=versions + machine.describe(),
    )  # fmt: skip
    sys.stdout.write("\nparameters:\n")
    for row in rows:
        counts = [f"{side} {row[f'{side}_parameters']:,}" for side in ("ours", "other") if f"{side}_parameters" in row]
        if counts:
            sys.stdout.write(f"{row['case']}: {', '.join(counts)}\n")


if __name__ == "__main__":
    main()
