"""Run by training_test.py in processes of their own, where the number of devices is set or a kill does no harm.

python training_worker.py compare alignment|dice OUT.npz
python training_worker.py train alignment|dice FOLDER
"""

import logging
import pathlib
import sys

import jax
import numpy as np
import optax

from marsjax import alignment
from marsjax.ctr import objective
from marsjax.ctr.backbones import make_backbone
from marsjax.data import batches
from marsjax.data.splits import make_rows
from marsjax.data.synthetic import make_synthetic
from marsjax.records import TRAIN, ItemTables
from marsjax.training import checkpoint, loop
from marsjax.training.optimizer import AdamW, adamw
from marsjax.training.step import init_state

CTR = {
    "backbone": "din",
    "user_id": True,
    "inputs": "ids",
    "content": 0,
    "embedding": 4,
    "tower": (8,),
    "attention": (8,),
    "softmax": True,
    "apart": False,
    "activation": "dice",
    "dtype": "float32",
}
SETTINGS = AdamW(1e-3, 1e-2, 10.0)


def data():
    dataset = make_synthetic(n_users=60, n_items=80, high_events=(20, 30), seed=0)
    return dataset, make_rows(dataset.log, split="leave_one_out")


def click_stage(size):
    dataset, rows = data()
    train_E = np.flatnonzero(rows.split_E == TRAIN)
    items = dataset.items
    source, per_epoch = batches.ctr_source(
        dataset.log, rows, train_E, size=size, cap=20, buckets=(10, 20), epochs=3, seed=0
    )
    model = make_backbone(
        CTR,
        n_items=len(items.raw_id_N),
        n_categories=len(items.category_names),
        n_users=len(rows.group_U),
        n_features=0,
    )
    tables = ItemTables(items.category_NG)
    return (
        (lambda mode: objective.lifted_step(model, SETTINGS, mode)),
        objective.init_model(model, tables, seed=0),
        source,
        tables,
    )


def alignment_stage(size):
    dataset, rows = data()
    tables = alignment.FeatureTables(
        {name: modality.feature_NF for name, modality in dataset.items.modalities.items()},
        {name: modality.present_N for name, modality in dataset.items.modalities.items()},
    )
    encoder = alignment.MultimodalEncoder(
        n_items=len(dataset.items.raw_id_N), modalities=("text", "image"), id_width=8, width=16, hidden=8
    )
    weights = alignment.AlignmentLoss(0.1, 0.01, 1.0, 0.1, "stein")
    source, _ = batches.alignment_source(
        dataset.log, rows, blocks=size, targets=4, length=10, stein_items=37, steps=40, seed=0
    )
    params = jax.jit(encoder.init)(jax.random.key(0), source[0], tables)["params"]
    # Ids that attention tells apart: with the small ones of the start the gradients of its queries and keys are noise.
    variables = {"params": params | {"item": 20 * params["item"]}, "statistics": {}}
    return (lambda mode: alignment.lifted_step(encoder, weights, SETTINGS, mode)), variables, source, tables


STAGES = {
    "alignment": alignment_stage,
    "dice": click_stage,
}


def compare(stage, path, steps=20):
    make, variables, source, tables = STAGES[stage](13)
    out = {}
    for mode in ("single", "pmap", "shard_map"):
        lifted = make(mode)
        assert lifted.n_devices == (1 if mode == "single" else 8)
        state = lifted.replicate(init_state(variables["params"], variables["statistics"], adamw(SETTINGS), seed=0))
        device_tables, losses, norms = lifted.replicate(tables), [], []
        for i in range(steps):
            state, metrics = lifted.step(state, lifted.split(source[i]), device_tables)
            metrics = lifted.collect(metrics)  # blocks: forced CPU devices deadlock when hundreds of steps pile up
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["gradient_norm"]))
            if i == 0:
                moments = optax.tree.get(lifted.collect(state.opt_state), "mu")  # a tenth of the gradient
                for name, leaf in checkpoint.flatten(moments).items():
                    out[f"{mode}_gradients{name}"] = np.array(leaf)
        out[f"{mode}_loss"], out[f"{mode}_gradient_norm"] = np.array(losses), np.array(norms)
        for kind in ("params", "statistics"):
            for name, leaf in checkpoint.flatten(lifted.collect(getattr(state, kind))).items():
                out[f"{mode}_{kind}{name}"] = leaf
    np.savez(path, **out)


def train(stage, folder):
    make, variables, source, tables = STAGES[stage](16)
    fitted = loop.fit(
        make("pmap"),
        init_state(variables["params"], variables["statistics"], adamw(SETTINGS), seed=0),
        batches.iterate(source),
        tables,
        schedule=loop.Schedule(steps=40, steps_per_evaluation=20, checkpoint_seconds=0.0, log_steps=1),
        folder=folder,
        title="worker",
    )
    np.savez(folder / "result.npz", **checkpoint.flatten({"params": fitted.params, "statistics": fitted.statistics}))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, force=True)
    if sys.argv[1] == "compare":
        compare(sys.argv[2], pathlib.Path(sys.argv[3]))
    else:
        train(sys.argv[2], pathlib.Path(sys.argv[3]))
