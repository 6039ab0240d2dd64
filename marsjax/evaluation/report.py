"""Results as rows, tables and files."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from marsjax import files
from marsjax.evaluation.metrics import auc, relative_improvement, summarise
from marsjax.evaluation.significance import bootstrap, draw_users, holm, interval, t_test_paired
from marsjax.records import GROUP_NAMES, LOW, NEW, Predictions

COMPARED = ("auc", "gauc")  # metrics whose difference is tested
ENOUGH_SEEDS = 5  # with fewer, no difference is claimed
COLUMNS = (  # metric and group
    ("auc", "all"), ("auc", "low"), ("gauc", "all"), ("gauc", "low"), ("logloss", "all"), ("ece", "all"),
    ("lent", "low"),
)  # fmt: skip
SHORT_COLUMNS = (("auc", "low"), ("gauc", "low"), ("auc", "all"))  # fit a screen

Key = tuple[str, str, str]  # method, group, metric


class Judged(NamedTuple):
    """Every metric of one training on its test rows; a group without rows was not drawn."""

    value: Mapping[str, Mapping[str, float]]  # group -> metric -> value, nan where undefined
    drawn: Mapping[str, np.ndarray]  # group -> [len(COMPARED), R] float64, see `significance.bootstrap`


class Evaluation(NamedTuple):
    """Every metric of every method and group; the group of new users is left out where nobody is new."""

    value_S: Mapping[Key, list[float]]  # one a seed, nan where undefined
    drawn_R: Mapping[Key, np.ndarray]  # means over seeds of COMPARED in groups with rows: [R]


def judge(predictions: Predictions, *, n_resamples: int = 1000, seed: int = 0) -> Judged:
    """Metrics of one training, and the compared ones for resampled users: the same users for all trainings that are
    judged on the same rows with the same `n_resamples` and `seed`."""
    drawn = {}
    for number, group in enumerate(("all", *GROUP_NAMES), start=-1):
        keep_B = predictions.group_B == number if number >= 0 else np.ones(len(predictions.user_B), bool)
        if not keep_B.any():
            continue
        user_names, user_B = np.unique(predictions.user_B[keep_B], return_inverse=True)
        count_RU = draw_users(len(user_names), n_resamples=n_resamples, seed=seed)
        drawn[group] = np.stack([
            bootstrap(user_B, predictions.label_B[keep_B], predictions.score_B[None, keep_B], count_RU, metric=metric)
            for metric in COMPARED
        ])  # fmt: skip
    return Judged(summarise(predictions), drawn)


def write_judged(path: pathlib.Path, judged: Judged) -> None:
    """Writes what `read_judged` reads."""
    metrics = list(next(iter(judged.value.values())))
    value_GM = np.array([[of_group[metric] for metric in metrics] for of_group in judged.value.values()])
    drawn = {f"drawn_{group}": drawn_MR for group, drawn_MR in judged.drawn.items()}
    files.write_arrays(path, groups=np.array(list(judged.value)), metrics=np.array(metrics), value_GM=value_GM, **drawn)


def read_judged(path: pathlib.Path) -> Judged:
    """What `write_judged` wrote."""
    with np.load(path) as arrays:
        groups, metrics = arrays["groups"].tolist(), arrays["metrics"].tolist()
        value = {
            group: dict(zip(metrics, value_M.tolist(), strict=True))
            for group, value_M in zip(groups, arrays["value_GM"], strict=True)
        }
        return Judged(value, {group: arrays[f"drawn_{group}"] for group in groups if f"drawn_{group}" in arrays})


def combine(judged: Mapping[str, Sequence[Judged]]) -> Evaluation:
    """The seeds of each method, judged on the same rows and resamples, put together."""
    groups = [group for group in ("all", *GROUP_NAMES) if group != GROUP_NAMES[NEW]]
    groups += [GROUP_NAMES[NEW]] if GROUP_NAMES[NEW] in next(iter(judged.values()))[0].drawn else []
    value_S: dict[Key, list[float]] = {}
    drawn_R: dict[Key, np.ndarray] = {}
    for method, seeds in judged.items():
        for group in groups:
            for metric in seeds[0].value[group]:
                value_S[method, group, metric] = [float(one.value[group][metric]) for one in seeds]
            if group in seeds[0].drawn:
                mean_MR = np.mean([one.drawn[group] for one in seeds], axis=0)
                drawn_R |= {(method, group, metric): mean_MR[number] for number, metric in enumerate(COMPARED)}
    return Evaluation(value_S, drawn_R)


def evaluate(results: Mapping[str, Sequence[Predictions]], *, n_resamples: int = 1000, seed: int = 0) -> Evaluation:
    """Judges each method's seeds and puts them together.

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
    return combine({
        method: [judge(predictions, n_resamples=n_resamples, seed=seed) for predictions in seeds]
        for method, seeds in results.items()
    })  # fmt: skip


def quality_rows(
    evaluation: Evaluation, *, dataset: str, inputs: str, split: str, base: str = "base"
) -> list[dict[str, Any]]:
    """One row for each method, group and metric.

    Keys: method, dataset, inputs, split, group, metric, mean, std (over seeds, ddof 1, 0 for one seed), seeds,
    p_vs_base (paired bootstrap over users), difference, low, high (to the base, 95%), p_t_test (over seeds) and, for
    auc, rela_impr (Eq. 20). Undefined values are None.
    """
    rows = []
    for (method, group, metric), value_S in evaluation.value_S.items():
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
        if method != base and (base, group, metric) in evaluation.drawn_R:
            test = _test(evaluation, method, base, group, metric)
            row |= {"p_vs_base": test.pop("p"), **test}
            if metric == "auc":
                base_S = evaluation.value_S[base, group, metric]
                row["rela_impr"] = relative_improvement(row["mean"], float(np.mean(base_S)))
        rows.append({name: _clean(value) for name, value in row.items()})
    return rows


def comparisons(
    evaluation: Evaluation, *, method: str = "mars", apart_from: Sequence[str] = ("base", "best_possible")
) -> list[dict[str, Any]]:
    """`method` against every other method that lends, for all and for low-active users; empty where it is not there.

    Keys: method, against, group, metric, difference, low, high (95%), p (paired bootstrap over users), p_holm (p
    adjusted for the number of methods compared with, Holm) and p_t_test (over seeds). Undefined values are None.
    """
    methods = dict.fromkeys(name for name, _, _ in evaluation.value_S)
    if method not in methods:
        return []
    others = [name for name in methods if name != method and name not in apart_from]
    rows = []
    for group in ("all", GROUP_NAMES[LOW]):
        for metric in COMPARED:
            family = []
            for other in others:
                value_S, other_S = (evaluation.value_S[name, group, metric] for name in (method, other))
                if np.isfinite([*value_S, *other_S]).all():
                    test = _test(evaluation, method, other, group, metric)
                    family.append({"method": method, "against": other, "group": group, "metric": metric} | test)
            adjusted = holm([row["p"] for row in family])
            rows += [row | {"p_holm": float(p)} for row, p in zip(family, adjusted, strict=True)]
    return [{name: _clean(value) for name, value in row.items()} for row in rows]


def validation_rows(results: Mapping[str, Sequence[Predictions]]) -> list[dict[str, Any]]:
    """AUC of validation rows, by which variants are chosen: method, auc_all and auc_low (mean and std; None where
    undefined)."""
    rows = []
    for method, seeds in results.items():
        row: dict[str, Any] = {"method": method}
        for name, group in (("auc_all", None), ("auc_low", LOW)):
            keeps = [np.ones(len(p.label_B), bool) if group is None else p.group_B == group for p in seeds]
            value_S = [auc(p.label_B[keep_B], p.score_B[keep_B]) for p, keep_B in zip(seeds, keeps, strict=True)]
            spread = float(np.std(value_S, ddof=1)) if len(value_S) > 1 else 0.0
            row[name] = {"mean": _clean(float(np.mean(value_S))), "std": _clean(spread)}
        rows.append(row)
    return rows


def length_rows(
    results: Mapping[str, Sequence[Predictions]], length_U: np.ndarray, *, bins: int = 10, base: str = "base"
) -> list[dict[str, Any]]:
    """What each method gains in AUC by the length of the user's training history: method, length, gain, rows.

    Test rows are cut into `bins` equal parts by length (mean of a part, events); values are means over seeds. Empty
    without the base; a part without both labels is left out.
    """
    if base not in results:
        return []
    first = results[base][0]
    order_B = np.argsort(length_U[first.user_B], kind="stable")
    parts = [part for part in np.array_split(order_B, bins) if 0 < first.label_B[part].sum() < len(part)]

    def aucs(method: str) -> np.ndarray:
        return np.array([np.mean([auc(p.label_B[part], p.score_B[part]) for p in results[method]]) for part in parts])

    base_X = aucs(base)
    return [
        {
            "method": method,
            "length": [float(length_U[first.user_B[part]].mean()) for part in parts],
            "gain": (aucs(method) - base_X).tolist(),
            "rows": [len(part) for part in parts],
        }
        for method in results
    ]


def _test(evaluation: Evaluation, method: str, other: str, group: str, metric: str) -> dict[str, Any]:
    value_S, other_S = (evaluation.value_S[name, group, metric] for name in (method, other))
    found = interval(evaluation.drawn_R[method, group, metric], evaluation.drawn_R[other, group, metric])
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "p": found.p_value,
        "p_t_test": t_test_paired(value_S, other_S) if len(value_S) == len(other_S) else None,
    }


def _clean(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cells(rows: Sequence[Mapping[str, Any]], *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of methods; a metric that no method has is left out. Where it is to be short, it
    says what is gained over the base, without the spreads over seeds."""
    by_key = {(row["method"], row["group"], row["metric"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    wanted = [
        (metric, group)
        for metric, group in (SHORT_COLUMNS if short else COLUMNS)
        if by_key[methods[0], group, metric]["mean"] is not None
    ]
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
            value, difference = value_and_difference(row, spread=not short)
            line.append(f"{row['mean']:.1f}" if metric == "lent" else value)
            if metric in COMPARED:
                line.append(difference)
        lines.append(line)
    return header, lines


def value_and_difference(row: Mapping[str, Any], *, spread: bool = True) -> tuple[str, str]:
    """A mean with its spread, and its difference to the base; empty where there is none."""
    over_seeds = f" ± {row['std']:.4f}" if spread and row["seeds"] > 1 else ""
    value = "-" if row["mean"] is None else f"{row['mean']:.4f}{over_seeds}"
    return value, _difference(row, row["p_vs_base"]) if row.get("difference") is not None else ""


def _difference(row: Mapping[str, Any], p: float) -> str:
    """+0.0131 [+0.0049, +0.0224], p 0.006, t 0.063: the p-values of the bootstrap and of the t-test."""
    by_seeds = "" if row["p_t_test"] is None else f", t {row['p_t_test']:.3f}"
    return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], p {p:.3f}{by_seeds}"


def families(compared: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The comparisons of each method with the others, apart."""
    names = dict.fromkeys(row["method"] for row in compared)
    return [[row for row in compared if row["method"] == name] for name in names]


def comparison_cells(compared: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of one method's comparisons."""
    columns = list(dict.fromkeys((row["metric"], row["group"]) for row in compared))
    by_key = {(row["against"], row["metric"], row["group"]): row for row in compared}
    header = [f"{compared[0]['method']} minus", *(f"{metric} {group} [95%], Holm's p" for metric, group in columns)]
    return header, [
        [other, *(_difference(row, row["p_holm"]) if (row := by_key.get((other, *column))) and row["p"] is not None
                  else "-" for column in columns)]
        for other in dict.fromkeys(row["against"] for row in compared)
    ]  # fmt: skip


def as_table(rows: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]] = ()) -> str:
    """Plain text for a terminal, the short table of methods."""
    text = [title(rows, short=True)]
    for header, lines in [cells(rows, short=True), *(comparison_cells(family) for family in families(compared))]:
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        padded = [
            "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, *lines]
        ]
        text += [padded[0], "-" * len(padded[0]), *padded[1:], ""]
    return "\n".join(text[:-1])


def as_markdown(rows: Sequence[Mapping[str, Any]], compared: Sequence[Mapping[str, Any]] = ()) -> str:
    """Markdown tables with everything."""
    tables = [cells(rows), *(comparison_cells(family) for family in families(compared))]
    return "\n".join([title(rows), "", *(_markdown(*table) for table in tables)])


def as_short_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The short table of methods."""
    return "\n".join([title(rows, short=True), "", _markdown(*cells(rows, short=True))])


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, ["---"] * len(header), *lines))


def title(rows: Sequence[Mapping[str, Any]], *, short: bool = False) -> str:
    """What was run, how often, on how many rows, and what the columns mean."""
    first = rows[0]
    counted = {
        (row["metric"], row["group"]): row["mean"] for row in rows if row["method"] == first["method"]
    }  # the same for all methods
    count, low = counted["rows", "all"], counted["rows", "low"]
    more = ""
    if not short:
        users, low_users = (counted.get(("gauc_users", group)) or 0 for group in ("all", "low"))
        more = f"; lent: borrowed items a row; gauc counts {users:.0f} users, {low_users:.0f} of them low-active"
    claim = "" if first["seeds"] >= ENOUGH_SEEDS else f"; fewer than {ENOUGH_SEEDS} seeds: no claim"
    return (
        f"{first['dataset']}, {first['split']}, {first['inputs']} inputs, {first['seeds']} seed(s); {count:.0f} test "
        f"rows, {low:.0f} of low-active users; intervals and p: paired bootstrap over users; t: p of a t-test "
        f"over seeds{more}{claim}"
    )
