"""Results as rows, tables and files."""

from __future__ import annotations

import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from marsjax import files
from marsjax.evaluation.metrics import relative_improvement, summarise
from marsjax.evaluation.significance import paired_bootstrap, t_test_paired
from marsjax.records import GROUP_NAMES, Predictions

GROUPS = ("all", *GROUP_NAMES)
COMPARED = ("auc", "gauc")  # metrics whose difference to the base is tested


def quality_rows(
    results: Mapping[str, Sequence[Predictions]],
    *,
    dataset: str,
    inputs: str,
    split: str,
    base: str = "base",
    n_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row for each method, group and metric.

    Keys: method, dataset, inputs, split, group, metric, mean, std (over seeds, ddof 1, 0 for one seed), seeds,
    p_vs_base (paired bootstrap over users), difference, low, high (to the base, 95%), p_t_test (over seeds) and, for
    auc, rela_impr (Eq. 20). Undefined values are None.

    Raises:
        ValueError: two predictions are not on the same rows.
    """
    first = next(iter(results.values()))[0]
    for method, seeds in results.items():
        for predictions in seeds:
            same = all(
                np.array_equal(getattr(first, f), getattr(predictions, f)) for f in ("user_B", "item_B", "label_B")
            )
            if not same:
                raise ValueError(f"{method}: expected predictions on the same rows as the other methods, found others")
    summaries = {method: [summarise(p) for p in seeds] for method, seeds in results.items()}
    rows = []
    for method, seeds in results.items():
        for number, group in enumerate(GROUPS, start=-1):
            keep_B = np.ones(len(first.user_B), bool) if number < 0 else first.group_B == number
            for metric in summaries[method][0][group]:
                value_S = [summary[group][metric] for summary in summaries[method]]
                row: dict[str, Any] = {
                    "method": method,
                    "dataset": dataset,
                    "inputs": inputs,
                    "split": split,
                    "group": group,
                    "metric": metric,
                    "mean": float(np.mean(value_S)),
                    "std": float(np.std(value_S, ddof=1)) if len(value_S) > 1 else 0.0,
                    "seeds": len(value_S),
                    "p_vs_base": None,
                }
                if metric in COMPARED and method != base and base in results and keep_B.any():
                    base_S = [summary[group][metric] for summary in summaries[base]]
                    interval = paired_bootstrap(
                        first.user_B[keep_B],
                        first.label_B[keep_B],
                        np.stack([p.score_B[keep_B] for p in seeds]),
                        np.stack([p.score_B[keep_B] for p in results[base]]),
                        metric=metric,
                        n_resamples=n_resamples,
                        seed=seed,
                    )
                    row |= {
                        "p_vs_base": interval.p_value,
                        "difference": interval.difference,
                        "low": interval.low,
                        "high": interval.high,
                        "p_t_test": t_test_paired(value_S, base_S) if len(value_S) == len(base_S) else None,
                    }
                    if metric == "auc":
                        row["rela_impr"] = relative_improvement(row["mean"], float(np.mean(base_S)))
                rows.append({name: _clean(value) for name, value in row.items()})
    return rows


def _clean(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of methods; a group AUC that no user has is left out."""
    by_key = {(row["method"], row["group"], row["metric"]): row for row in rows}
    wanted = [("auc", "all"), ("auc", "low"), ("gauc", "all"), ("gauc", "low"), ("logloss", "all"), ("ece", "all")]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    wanted = [(metric, group) for metric, group in wanted if by_key[methods[0], group, metric]["mean"] is not None]
    header = ["method"]
    for metric, group in wanted:
        header.append(f"{metric} {group}")
        if metric in COMPARED:
            header.append("to base [95%], p")
    lines = []
    for method in methods:
        line = [method]
        for metric, group in wanted:
            row = by_key[method, group, metric]
            spread = f" ± {row['std']:.4f}" if row["seeds"] > 1 else ""
            line.append("-" if row["mean"] is None else f"{row['mean']:.4f}{spread}")
            if metric in COMPARED:
                known = row.get("difference") is not None
                line.append(
                    f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], {row['p_vs_base']:.3f}"
                    if known
                    else ""
                )
        lines.append(line)
    return header, lines


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain text for a terminal."""
    header, lines = cells(rows)
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    text = [
        "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) for line in [header, *lines]
    ]
    return "\n".join(line.rstrip() for line in [_title(rows), text[0], "-" * len(text[0]), *text[1:]])


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table."""
    header, lines = cells(rows)
    text = [header, ["---"] * len(header), *lines]
    return _title(rows) + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in text) + "\n"


def _title(rows: Sequence[Mapping[str, Any]]) -> str:
    count = next(row["mean"] for row in rows if row["metric"] == "rows")
    low = next(row["mean"] for row in rows if row["metric"] == "rows" and row["group"] == "low")
    first = rows[0]
    return (
        f"{first['dataset']}, {first['split']}, {first['seeds']} seed(s); {count:.0f} test rows, {low:.0f} of "
        "low-active users; intervals and p: paired bootstrap over users"
    )


def write_results(
    path: pathlib.Path,
    *,
    command: str,
    commit: str,
    machine: str,
    wall_seconds: float,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Writes results as JSON: what was run, where, how long, and the rows."""
    files.write_json(
        path,
        {"command": command, "commit": commit, "machine": machine, "wall_seconds": wall_seconds, "rows": list(rows)},
    )


def machine_description() -> str:
    """Processor, cores, memory and versions, without names."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    return (
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, devices: {devices}; Python {platform.python_version()}, "
        f"jax {jax.__version__}, numpy {np.__version__}"
    )


def current_commit(folder: pathlib.Path) -> str:
    """The git commit of the code, with "+changes" where tracked files differ from it; "unknown" outside git."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")
