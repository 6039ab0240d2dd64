"""What keeping freed memory is worth: the DIN training step with glibc's defaults and with `keep_freed_memory`.

    python benchmarks/allocator.py [--output=benchmarks/results/allocator.json]

Each case runs in a process of its own, in turns, since the setting cannot be taken back. The loss after the steps is
asserted to be the same.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

TURNS, WARM, STEPS = 3, 20, 100


def measure(keep: bool) -> dict[str, float]:
    """Milliseconds of wall, user and kernel time a step, at batch 512, history 200, 3,417 items."""
    from marsjax.allocator import keep_freed_memory

    if keep and not keep_freed_memory():
        raise SystemExit("this C library has no mallopt: nothing to measure")
    import numpy as np

    from marsjax.ctr import objective
    from marsjax.ctr.din import Din
    from marsjax.records import CtrBatch, ItemTables
    from marsjax.training.optimizer import AdamW, adamw
    from marsjax.training.step import init_state

    rng = np.random.default_rng(0)
    tables = ItemTables(rng.integers(0, 19, (3417, 6)).astype(np.int32))
    model, settings = Din(3417, 19, n_users=6040), AdamW(1e-3, 0.0, 10.0)
    history_BL = rng.integers(1, 3417, (512, 200)).astype(np.int32)
    batch = CtrBatch(
        rng.integers(1, 6041, 512).astype(np.int32),
        rng.integers(1, 3417, 512).astype(np.int32),
        rng.integers(0, 2, 512).astype(np.float32),
        np.ones(512, np.float32),
        history_BL,
        np.zeros_like(history_BL, bool),
    )
    lifted = objective.lifted_step(model, settings, "pmap")
    variables = objective.init_model(model, tables, seed=0)
    state = lifted.replicate(init_state(variables["params"], variables["statistics"], adamw(settings), seed=0))
    device_tables = lifted.replicate(tables)
    for step in range(WARM + STEPS):
        if step == WARM:
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        state, metrics = lifted.step(state, lifted.split(batch), device_tables)
        loss = float(np.ravel(lifted.collect(metrics)["loss"])[0])
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": wall / STEPS * 1e3,
        "user": (after.ru_utime - before.ru_utime) / STEPS * 1e3,
        "kernel": (after.ru_stime - before.ru_stime) / STEPS * 1e3,
        "loss": loss,
    }


def main() -> None:
    """Runs the cases in turns and prints (and writes) medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--case", choices=("kept", "default"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        sys.stdout.write(json.dumps(measure(arguments.case == "kept")))
        return
    from marsjax import files, provenance

    began = time.perf_counter()
    runs: dict[str, list[dict[str, float]]] = {"kept": [], "default": []}
    for _ in range(TURNS):
        for case, done in runs.items():
            output = subprocess.run(
                [sys.executable, __file__, f"--case={case}"], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            done.append(json.loads(output))
    losses = {run["loss"] for done in runs.values() for run in done}
    if len(losses) != 1:
        raise SystemExit(f"expected one loss whatever the allocator does, found {losses}")
    rows = []
    for kind in ("wall", "user", "kernel"):
        kept, default = (statistics.median(run[kind] for run in runs[case]) for case in ("kept", "default"))
        rows.append(
            {
                "question": "milliseconds of a DIN training step with freed memory kept and returned",
                "case": f"{kind} time, batch 512, history 200",
                "ours": kept,
                "other": default,
                "other_name": "glibc defaults",
                "ratio": default / kept,
                "target": None,
                "met": None,
            }
        )
        sys.stdout.write(f"{kind:7} kept {kept:6.1f} ms, default {default:6.1f} ms, ratio {default / kept:.2f}\n")
    if arguments.output:
        results = {
            "command": "python benchmarks/allocator.py",
            "commit": provenance.current_commit(),
            "machine": provenance.machine_description(),
            "wall_seconds": time.perf_counter() - began,
            "rows": rows,
        }
        files.write_json(arguments.output, results)


if __name__ == "__main__":
    main()
