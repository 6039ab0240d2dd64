"""The report of a study: what the cells found, as sections of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from marsjax.evaluation import paper, report
from marsjax.evaluation.page import Case, Section, Table
from marsjax.evaluation.plots import Plot, Series

Results = Mapping[str, Any]  # what a cell wrote: rows, comparisons, validation, by_length
Part = Any  # marsjax.study.Part
Drawn = tuple[Table | Plot | Case, ...]


def section(part: Part, results: Mapping[str, Results], refused: Mapping[str, str], *, drawn: Drawn = ()) -> Section:
    """A section of what is finished of a part; what is not run yet, or cannot be run on the data, is named."""
    missing = [cell.label for cell in part.cells if cell.name not in {**results, **refused}]
    text = part.text
    for cell in part.cells:
        if cell.name in refused:
            text += f"\n\n{cell.label}: cannot be run on these data ({refused[cell.name]})."
    if missing:
        text += f"\n\nNot run yet: {', '.join(missing)}. Run the same command with `--parts={part.name}`."
    finished = [(cell, results[cell.name]) for cell in part.cells if cell.name in results]
    parts = drawn + (DRAWN[part.kind](part, finished) if finished else ())
    return Section(part.title, text, parts)


def find(result: Results, method: str, group: str, metric: str) -> Mapping[str, Any] | None:
    """The row of a method, group and metric."""
    for row in result["rows"]:
        if (row["method"], row["group"], row["metric"]) == (method, group, metric):
            return row
    return None


def methods_of(result: Results) -> list[str]:
    """Methods in the order in which they were run."""
    return list(dict.fromkeys(row["method"] for row in result["rows"]))


def of_methods(part: Part, finished: Sequence[tuple[Any, Results]]) -> Drawn:
    """Table 2: every method, what it gains over the base, and what was seen on validation rows."""
    drawn: list[Table | Plot | Case] = []
    for cell, result in finished:
        of_cell: list[Table | Plot] = [quality(result)]
        for group in ("low", "all"):
            of_cell += gains(result, group, "auc")
        of_cell += [beside_the_paper(result), *compared(result), validation(result), *by_length(result)]
        drawn += [part._replace(caption=f"{cell.label}: {part.caption}") for part in of_cell]
    return tuple(drawn)


def quality(result: Results) -> Table:
    """Every method by every metric."""
    header, lines = report.cells(result["rows"])
    return Table(report.title(result["rows"]), tuple(header), tuple(map(tuple, lines)))


def compared(result: Results) -> list[Table]:
    """What the published method, and the variant that validation rows chose, are better by than the others."""
    tables = []
    for family in report.families(result["comparisons"]):
        header, lines = report.comparison_cells(family)
        tables.append(Table(f"{family[0]['method']} against the others", tuple(header), tuple(map(tuple, lines))))
    return tables


def gains(result: Results, group: str, metric: str) -> list[Plot]:
    """Differences to the base with their intervals, method by method."""
    rows = [find(result, method, group, metric) for method in methods_of(result)]
    known = [row for row in rows if row is not None and row.get("difference") is not None]
    known = [row for row in known if row["method"] not in ("best_possible", "full_history")]
    if not known:
        return []
    series = Series(
        f"{metric.upper()} minus the base's",
        tuple(float(i) for i in range(len(known))),
        tuple(row["difference"] for row in known),
        tuple(row["low"] for row in known),
        tuple(row["high"] for row in known),
    )
    who = {"low": "low-active users", "all": "all users"}[group]
    return [
        Plot(
            f"Gain in {metric.upper()} over the base, {who}, 95% of resampled users",
            "points",
            f"{metric.upper()} minus the base's",
            "",
            (series,),
            tuple(row["method"] for row in known),
            zero_line=True,
        )
    ]


def beside_the_paper(result: Results) -> Table:
    """AUC and RelaImpr of all users beside what the paper prints, where it does."""
    dataset = result["rows"][0]["dataset"]
    lines = []
    for method in methods_of(result):
        row = find(result, method, "all", "auc")
        assert row is not None
        printed = paper.METHODS.get(method, {}).get(dataset)
        lines.append(
            (
                method,
                f"{row['mean']:.4f}",
                f"{row['rela_impr']:+.2f}%" if row.get("rela_impr") is not None else "",
                "" if printed is None or printed.auc is None else f"{printed.auc:.4f}",
                "" if printed is None else f"{printed.rela_impr:+.2f}%",
            )
        )
    header = ("method", "AUC", "RelaImpr (Eq. 20)", "AUC in the paper", "RelaImpr in the paper")
    return Table("AUC of all users beside the paper's Table 2", header, tuple(lines))


def validation(result: Results) -> Table:
    """What choices are made by."""

    def shown(value: Mapping[str, Any]) -> str:
        return "-" if value["mean"] is None else f"{value['mean']:.4f} ± {value['std']:.4f}"

    lines = tuple(
        (row["method"], shown(row["auc_low"]), shown(row["auc_all"]))
        for row in sorted(result["validation"], key=lambda row: -(row["auc_low"]["mean"] or 0.0))
    )
    return Table("AUC of validation rows, by which variants are chosen", ("method", "low-active", "all"), lines)


def by_length(result: Results) -> list[Plot]:
    """What methods gain by how much history users have."""
    series = [
        Series(row["method"], tuple(row["length"]), tuple(row["gain"]))
        for row in result["by_length"]
        if row["method"] not in ("base", "best_possible", "full_history")
    ]
    followed = (
        "mars", "mars_posterior", "mars_graded_posterior", "mars_short_posterior", "mars_short_graded_posterior",
        "random_donor", "short_histories",
    )  # fmt: skip
    shown = [line for line in series if line.name in followed]
    caption = "Gain in AUC over the base by the user's own history (tenths of the test rows)"
    if not shown:
        return []
    log_x = all(length > 0 for line in shown for length in line.x if length is not None)  # new users have none
    return [
        Plot(caption, "lines", "training events", "AUC minus the base's", tuple(shown), log_x=log_x, zero_line=True)
    ]


def of_variants(part: Part, finished: Sequence[tuple[Any, Results]]) -> Drawn:
    """One method under several configurations, beside one base."""
    lines = []
    for cell, result in finished:
        for method in methods_of(result):
            if method in ("best_possible",):
                continue
            low, whole = find(result, method, "low", "auc"), find(result, method, "all", "auc")
            assert low is not None
            assert whole is not None
            values = (*report.value_and_difference(low), *report.value_and_difference(whole))
            lines.append((cell.label, method, *values))
    header = ("variant", "method", "AUC low-active", "to base [95%], p", "AUC all", "to base [95%], p")
    drawn: list[Table | Plot | Case] = [Table(part.title, header, tuple(lines))]
    followed = dict.fromkeys(
        m for _, result in finished for m in methods_of(result) if m not in ("base", "best_possible")
    )
    series = []
    for method in followed:
        rows = [find(result, method, "low", "auc") for _, result in finished]
        series.append(
            Series(
                method,
                tuple(float(i) for i in range(len(rows))),
                tuple(_of(row, "difference") for row in rows),
                tuple(_of(row, "low") for row in rows),
                tuple(_of(row, "high") for row in rows),
            )
        )
    names = tuple(cell.label for cell, _ in finished)
    caption = f"{part.title}: gain in AUC over the base, low-active users"
    drawn.append(Plot(caption, "points", "AUC minus the base's", "", tuple(series), names, zero_line=True))
    return tuple(drawn)


def _of(row: Mapping[str, Any] | None, key: str) -> float:
    value = None if row is None else row.get(key)
    return float("nan") if value is None else float(value)


def of_sparse(part: Part, finished: Sequence[tuple[Any, Results]]) -> Drawn:
    """AUC against the length of history, and how much of what was lost each method recovers."""
    drawn: list[Table | Plot | Case] = []
    for metric in ("auc", "gauc"):
        if any(_of(find(result, "base", "low", metric), "mean") != _of(find(result, "base", "low", metric), "mean")
               for _, result in finished):  # fmt: skip
            continue  # undefined: one test row a user
        lines = []
        for cell, result in finished:
            base, ceiling = (_of(find(result, method, "low", metric), "mean") for method in ("base", "full_history"))
            for method in methods_of(result):
                row = find(result, method, "low", metric)
                assert row is not None
                recovered = (_of(row, "mean") - base) / (ceiling - base) if ceiling > base else float("nan")
                share = "" if method in ("base", "full_history") or recovered != recovered else f"{recovered:+.0%}"
                lines.append((cell.label, method, *report.value_and_difference(row), share))
        header = ("history", "method", metric.upper(), "to base [95%], p", "of the loss recovered")
        drawn.append(Table(f"{metric.upper()} of sparse users", header, tuple(lines)))
        methods = dict.fromkeys(method for _, result in finished for method in methods_of(result))
        series = tuple(
            Series(
                method,
                tuple(cell.x for cell, _ in finished),
                tuple(_of(find(result, method, "low", metric), "mean") for _, result in finished),
            )
            for method in methods
            if method != "best_possible"
        )
        drawn.append(
            Plot(f"{metric.upper()} of sparse users", "lines", part.x_label, metric.upper(), series, log_x=True)
        )
        for cell, result in finished:
            for plot in gains(result, "low", metric):
                drawn.append(plot._replace(caption=f"{cell.label}: {plot.caption}"))
    return tuple(drawn)


def of_control(part: Part, finished: Sequence[tuple[Any, Results]]) -> Drawn:
    """Every method where nothing is to be gained."""
    tables = [(cell, quality(result)) for cell, result in finished]
    return tuple(table._replace(caption=f"{cell.label}: {table.caption}") for cell, table in tables)


def of_search(part: Part, finished: Sequence[tuple[Any, Results]]) -> Drawn:
    """What was tried and chosen on validation rows, then the methods with what was chosen."""
    drawn: list[Table | Plot | Case] = []
    for _, result in finished:
        settings = list(dict.fromkeys(row["setting"] for row in result["search"]))
        by_method: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in result["search"]:
            by_method.setdefault(row["method"], {})[row["setting"]] = row

        def shown(row: Mapping[str, Any]) -> str:
            value = "-" if row["auc_low"] is None else f"{row['auc_low']:.4f}"
            return f"{value} (chosen)" if row["chosen"] else value

        lines = tuple((method, *(shown(rows[name]) for name in settings)) for method, rows in by_method.items())
        drawn.append(Table("AUC of low-active users' validation rows, first seed", ("method", *settings), lines))
        drawn += [quality(result), *compared(result)]
    return tuple(drawn) + of_sparse(part, finished)


def of_sweep(part: Part, finished: Sequence[tuple[Any, Results]]) -> Drawn:
    """AUC of low-active users against one value."""
    table, _ = of_variants(part, finished)
    series = []
    for method in dict.fromkeys(m for _, result in finished for m in methods_of(result) if m != "best_possible"):
        rows = [find(result, method, "low", "auc") for _, result in finished]
        series.append(Series(method, tuple(cell.x for cell, _ in finished), tuple(_of(row, "mean") for row in rows)))
    log_x = all(cell.x > 0 for cell, _ in finished) and part.name != "theta"
    return table, Plot(part.title, "lines", part.x_label, "AUC low-active", tuple(series), log_x=log_x)


def statistics_table(statistics: Mapping[str, Any]) -> Table:
    """Table 1 beside the paper's."""
    printed = paper.STATISTICS.get(statistics["name"])
    ours = {
        "users": f"{statistics['users']:,}",
        "items": f"{statistics['items']:,}",
        "interactions": f"{statistics['events']:,}",
        "mean length": f"{statistics['mean_length']:.2f}",
        "sparsity, %": f"{statistics['sparsity_percent']:.2f}",
    }
    theirs = [""] * 5
    if printed is not None:
        theirs = [
            f"{printed.users:,}",
            f"{printed.items:,}",
            f"{printed.interactions:,}",
            f"{printed.mean_length:.2f}",
            f"{printed.sparsity:.2f}",
        ]
    lines = [(name, value, other) for (name, value), other in zip(ours.items(), theirs, strict=True)]
    lines += [(f"{name}-active users", f"{group['users']:,}", "") for name, group in statistics["groups"].items()]
    lines += [(f"{name} rows", f"{count:,}", "") for name, count in statistics["splits"].items()]
    lines.append(("share of likes", f"{statistics['label_rate']:.3f}", ""))
    return Table(f"Statistics of {statistics['name']}", ("", "here", "in the paper"), tuple(lines))


def _nothing(part: Part, finished: Sequence[tuple[Any, Results]]) -> Drawn:
    return ()


DRAWN: dict[str, Callable[[Part, Sequence[tuple[Any, Results]]], Drawn]] = {
    "statistics": _nothing,
    "features": _nothing,
    "methods": of_methods,
    "variants": of_variants,
    "sparse": of_sparse,
    "sweep": of_sweep,
    "control": of_control,
    "search": of_search,
    "cases": _nothing,
}
