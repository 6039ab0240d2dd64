"""The tables of docs/performance.md are those of the committed results."""

import pytest

from tests.readme_test import ROOT, read


def rows_of(name):
    return read(name)["rows"]


def din_step():
    names = {"dice": "Dice", "prelu": "PReLU"}
    for row in rows_of("din_step") + rows_of("din_step_8192"):
        if "training step" in row["question"]:
            _, batch, _, history, activation = row["case"].replace(",", "").split()
            case = f"step, batch {int(batch):,}, history {history}, {names[activation]}"
            yield case, f"{row['ratio']:.2f}", f"{row['ratio_least']:.2f} to {row['ratio_most']:.2f}"


def stein():
    by_case = {}
    for row in rows_of("stein"):
        by_case.setdefault(row["case"], {})[row["other_name"]] = row["ratio"]
    for case, ratio in by_case.items():
        if "floor" in ratio:
            over = [ratio.get("naive"), ratio.get("SSGE"), 1 / ratio["floor"], 1 / ratio["two scores"]]
            yield case, *("" if value is None else f"{value:.1f}" for value in over)


def tables():
    for row in rows_of("tables"):
        yield row["case"].split()[0], f"{row['ratio']:.2f}"


def input_pipeline():
    rows = rows_of("input_pipeline")
    made = {row["case"]: row["ours"] for row in rows if row["ratio"] is None}
    for row in rows:
        if row["ratio"] is not None:
            case = row["case"].removeprefix("batch 512, ")
            yield case, f"{1 / row['ratio']:.3f}", f"{made[row['case']]:.2f}"


def devices():
    rows = rows_of("devices")
    for history in (50, 200):
        case = f"batch 512, history {history}, "
        found = {row["case"].removeprefix(case): 1 / row["ratio"] for row in rows if row["other_name"] == "one device"}
        (half,) = (1 / row["ratio"] for row in rows if row["case"] == f"{case}cpu")
        yield str(history), *(f"{found[f'{count} devices']:.2f}" for count in (2, 4, 8)), f"{half:.2f}"


def encoding():
    by_length = {}
    for row in rows_of("encoding"):
        if row["ratio"] is None:
            continue  # what is made once
        by_length.setdefault(row["case"].split()[-1], []).append(f"{row['ratio']:.2f}")
    for length, ratios in by_length.items():
        yield length, *ratios


def retrieval():
    for users in (10_000, 100_000):
        rows = [row for row in rows_of("retrieval") if row["case"].startswith(f"{users} users")]
        search = [row for row in rows if "0.99" in row["question"]]
        others = [
            next(row["ratio"] for row in search if name in row["other_name"])
            for name in ("faiss", "hnswlib", "f32", "i8")
        ]
        (whole,) = (row["ratio"] for row in rows if "whole" in row["question"])
        yield f"{users:,}", *(f"{ratio:.2f}" for ratio in (*others, whole))


def hosts():
    for row in rows_of("hosts"):
        yield row["case"], f"{1 / row['ratio']:.2f}"


def scale():
    rows = rows_of("scale")
    peak = {row["case"]: row["ours"] for row in rows if row["question"] == "peak memory, GB"}
    for row in rows:
        if row["question"].startswith("seconds of the pipeline"):
            users = row["case"].split(",")[0]
            yield f"{int(users.split()[0]):,}", f"{row['ours']:.1f}", f"{peak[users]:.2f}"


@pytest.mark.parametrize("table", [din_step, stein, tables, encoding, input_pipeline, devices, retrieval, hosts, scale])
def test_the_page_of_performance_quotes_the_committed_results(table):
    text = (ROOT / "docs" / "performance.md").read_text()
    lines = [f"| {' | '.join(cells)} |" for cells in table()]
    assert len(lines) >= 2
    for line in lines:
        assert line in text


def test_the_page_of_performance_quotes_what_encoding_reaches():
    text = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    rows = rows_of("encoding")
    reached = [row["reached"] for row in rows if "reached" in row]
    assert f"{min(reached):.0%}".removesuffix("%") + f" to {max(reached):.0%} is reached" in text
    (once,) = (row["ours"] for row in rows if row["ratio"] is None)
    assert f"take {once:.0f} ms, once" in text
