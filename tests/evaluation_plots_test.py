"""Plots: what is drawn is where the ticks say it is."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from marsjax.evaluation import plots
from marsjax.evaluation.plots import Plot, Series, svg

HOSTILE = "<script>alert(\"1\")</script> & 'B' \x00\ud800"
CLOSE = 0.11  # pixels: two ticks and the point are each rounded to a tenth


def plot(kind="lines", *series, names=(), **more):
    return Plot("a caption", kind, "x", "y", series, names, **more)


def parse(drawn):
    return ElementTree.fromstring(svg(drawn))


def texts(root, name):
    return [(text.text, float(text.get("x")), float(text.get("y"))) for text in root.iter("text") if
            text.get("class") == name]  # fmt: skip


def mapping(root, direction, along=float):
    """From values to pixels, as two ticks of the axis say. Ticks of x are below what they name, those of y beside."""
    ticks = [t for t in root.iter("text") if t.get("class") == "tick"]
    ticks = [t for t in ticks if (t.get("text-anchor") == "middle") == (direction == "x")]
    (a, at_a), (b, at_b) = ((along(float(t.text)), float(t.get(direction))) for t in (ticks[0], ticks[-1]))
    lift = 4 if direction == "y" else 0  # a text of 12 px is written on a line 4 px below its middle
    return lambda value: at_a - lift + (along(value) - a) / (b - a) * (at_b - at_a)


def marks(root, colour="c0"):
    """Of the data: a mark in a legend has no value in its title."""
    found = [path for path in root.iter("path") if path.get("class") == f"mark {colour}"]
    places = [
        re.match(r"translate\(([^ ]+) ([^)]+)\)", p.get("transform")).groups() for p in found if ": " in p[0].text
    ]
    return [(float(x), float(y)) for x, y in places]


def paths(root, name):
    return [path.get("d") for path in root.iter("path") if path.get("class").split()[0] == name]


@pytest.mark.parametrize("kind", ["lines", "points"])
@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("x", [(3, 5, 10, 20), tuple(range(1, 30)), (0.001, 0.01234, 1000.0)])
def test_a_point_is_where_the_ticks_say(kind, log_x, x):
    y = tuple(np.random.default_rng(0).normal(0.7, 0.1, len(x)).tolist())
    root = parse(plot(kind, Series("a", x, y), log_x=log_x))
    at_x, at_y = mapping(root, "x", math.log10 if log_x else float), mapping(root, "y")
    found = marks(root)
    np.testing.assert_allclose(found, [(at_x(a), at_y(b)) for a, b in zip(x, y, strict=True)], atol=CLOSE)
    lines = paths(root, "line")
    assert len(lines) == (kind == "lines")
    for line in lines:
        np.testing.assert_allclose(np.reshape(re.findall(r"[\d.]+", line), (-1, 2)).astype(float), found)


def test_intervals_of_series_at_one_place_stand_beside_each_other():
    x, y = (3, 5, 10), (0.6, 0.65, 0.7)
    low, high = (0.55, 0.64, None), (0.67, 0.66, 0.9)
    root = parse(plot("lines", *(Series(name, x, y, low, high) for name in "abc")))
    at_x, at_y = mapping(root, "x"), mapping(root, "y")
    errors = [re.match(r"M(\S+) (\S+)V([^M]+)", path).groups() for path in paths(root, "error")]
    assert len(errors) == 6  # not where an end is missing
    for (place, below, above), i in zip(np.array(errors, float), (0, 1) * 3, strict=True):
        assert below == pytest.approx(at_y(low[i]), abs=CLOSE)
        assert above == pytest.approx(at_y(high[i]), abs=CLOSE)
        assert abs(place - at_x(x[i])) <= 5 + CLOSE
    places = np.array([marks(root, f"c{i}") for i in range(3)])[..., 0]
    assert (np.diff(places, axis=0) > 4).all()
    np.testing.assert_allclose(places.mean(0), [at_x(value) for value in x], atol=CLOSE)
    root = parse(plot("lines", *(Series(name, x, y) for name in "abc")))  # without intervals nothing is moved
    assert marks(root, "c0") == marks(root, "c1") == marks(root, "c2")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("second", [0.7, -0.2])
def test_bars_begin_at_zero_and_end_at_their_value(sign, second):
    names, y = ("one", "two", "three"), (sign * 0.71, sign * second, sign * 0.73)
    low, high = tuple(value - 0.1 for value in y), tuple(value + 0.05 for value in y)
    root = parse(plot("bars", Series("a", (0, 1, 2), y, low, high), names=names))
    at_x = mapping(root, "x")
    assert 0 in [float(text) for text, _, _ in texts(root, "tick")]
    bars = [[float(rect.get(key)) for key in ("x", "width", "y", "height")] for rect in root.iter("rect")]
    rows = {text: y - 4 for text, _, y in texts(root, None)}
    for name, value, (x, width, top, height) in zip(names, y, bars, strict=True):
        assert [x, x + width] == pytest.approx(sorted([at_x(0), at_x(value)]), abs=2 * CLOSE)
        assert top + height / 2 == pytest.approx(rows[name], abs=CLOSE)
    ends = [re.match(r"M(\S+) \S+H([^M]+)", path).groups() for path in paths(root, "error")]
    expected = [[at_x(a), at_x(b)] for a, b in zip(low, high, strict=True)]
    np.testing.assert_allclose(np.array(ends, float), expected, atol=CLOSE)
    assert [text for text, _, _ in texts(root, "value")] == [f"{value:g}" for value in y]


def test_points_over_names_stand_beside_their_name_in_any_order():
    names = tuple(f"method {i}" for i in range(20))
    root = parse(plot("points", Series("a", (19, 3), (0.5, -0.5)), names=names, zero_line=True))
    at_x, rows = mapping(root, "x"), {text: y - 4 for text, _, y in texts(root, None)}
    np.testing.assert_allclose(marks(root), [(at_x(0.5), rows[names[19]]), (at_x(-0.5), rows[names[3]])], atol=CLOSE)
    (zero,) = paths(root, "zero")
    assert float(re.match(r"M(\S+)", zero)[1]) == pytest.approx(at_x(0), abs=CLOSE)


@pytest.mark.parametrize("seed", range(200))
def test_ticks_are_round_and_cover_the_data(seed):
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=rng.integers(1, 4)) * 10 ** rng.uniform(-7, 9) + rng.choice([0, 0.7, -3, 1e4])).tolist()
    axis = plots.round_axis(values)
    steps = np.diff(axis.ticks)
    assert steps == pytest.approx(steps[0])
    assert 10 ** (math.log10(steps[0]) % 1) == pytest.approx(1, rel=1e-3) or f"{steps[0]:e}"[0] in "125"
    assert axis.low == axis.ticks[0] <= min(values) + 1e-6 * steps[0]
    assert axis.high == axis.ticks[-1] >= max(values) - 1e-6 * steps[0]
    assert 2 <= len(axis.ticks) <= 9
    assert len(set(axis.labels)) == len(axis.labels)


def test_labels_of_ticks_are_the_ticks():
    assert plots.round_axis([0.12, 0.5]).labels == ("0.1", "0.2", "0.3", "0.4", "0.5")
    assert plots.round_axis([-0.012, 0.013]).labels == (
        "-0.015",
        "-0.010",
        "-0.005",
        "0.000",
        "0.005",
        "0.010",
        "0.015",
    )
    assert plots.round_axis([0, 2e7]).labels[-1] == "2e+07"
    assert plots.x_axis([20, 3, 5, 10, 5], log=False).labels == ("3", "5", "10", "20")  # few: the data themselves
    assert plots.x_axis(range(31), log=False).labels == ("0", "10", "20", "30")  # many
    assert plots.x_axis([0, 1, 100], log=False).labels[1] == "20"  # 0 and 1 are too near each other


@pytest.mark.parametrize("seed", range(100))
def test_log_ticks_are_round_and_cover_the_data(seed):
    rng = np.random.default_rng(seed)
    values = (10 ** rng.uniform(-9, 9, rng.integers(1, 3))).tolist()
    axis = plots.log_axis(values)
    assert axis.low == axis.ticks[0] <= min(values)
    assert axis.high == axis.ticks[-1] >= max(values)
    assert axis.ticks[1] > min(values)
    assert axis.ticks[-2] < max(values)
    steps = np.diff(np.log10(axis.ticks))
    assert steps.max() < 0.4 or steps == pytest.approx(steps[0])  # 1, 2, 5, or powers of ten alone
    assert 2 <= len(axis.ticks) <= 11
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert all(f"{tick:e}"[0] in "125" and f"{tick:.9e}"[2:11] == "0" * 9 for tick in axis.ticks)


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_gap_is_left_open(gap):
    y = (0.1, 0.2, gap, 0.4, 0.5)
    root = parse(plot("lines", Series("a", (1, 2, 3, 4, 5), y, (0.0, 0.1, gap, gap, 0.4), (0.2, 0.3, gap, 0.5, gap))))
    assert len(marks(root)) == 4
    (line,) = paths(root, "line")
    assert re.sub(r"[^ML]", "", line) == "MLML"
    assert len(paths(root, "error")) == 2
    assert not re.search(r"nan|inf|None", svg(plot("lines", Series("a", (1, 2, 3, 4, 5), y))))
    assert len(marks(parse(plot("points", Series("a", (1, gap, 3, 4, 5), (0.1,) * 5))))) == 4


@pytest.mark.parametrize("kind", ["lines", "bars", "points"])
@pytest.mark.parametrize("series", [(), ((),), ((None, math.nan),), ((), (None,))])
def test_nothing_to_draw_is_said(kind, series):
    series = [Series(f"s{i}", tuple(range(len(y))), y) for i, y in enumerate(series)]
    root = parse(plot(kind, *series, names=("a", "b") if kind == "bars" else (), log_x=kind == "points"))
    assert "no data" in [text.text for text in root.iter("text")]
    assert marks(root) == []


def test_a_line_without_data_is_named_beside_the_others():
    root = parse(plot("lines", Series("a", (1, 2), (0.1, 0.2)), Series("b", (), ())))
    assert {"a", "b: no data"} <= {text.text for text in root.iter("text")}


def test_few_colours_and_then_grey():
    root = parse(plot("lines", *(Series(f"m{i}", (1, 2), (i, i + 1)) for i in range(10))))
    lines = [path.get("class").split()[1] for path in root.iter("path") if path.get("class").startswith("line ")]
    assert lines == [f"c{i}" for i in range(7)] + ["c-"] * 3


# Machado, Oliveira and Fernandes 2009: what the colour-blind see, in linear RGB.
SEEN = {
    "all": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("seen", SEEN)
def test_colours_are_told_apart(seen):
    """By more than 15 in CIE Lab, where 2 is just seen."""
    names = re.findall(r"\.c(?:\d|-)\{--c:([^}]+)\}", plots.STYLE)
    assert len(set(names)) == len(names) == 8
    hexes = [re.search(r"--ink:(#\w{6})", plots.STYLE)[1] if name == "var(--ink)" else name for name in names]
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in hexes]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = np.clip(linear @ np.array(SEEN[seen]).T, 0, 1) @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(8, 1)]
    assert apart.min() > 15


@pytest.mark.parametrize("kind", ["lines", "bars", "points"])
def test_text_is_text(kind):
    series = (Series(HOSTILE, (0, 1), (0.1, 0.2)), Series("b", (0, 1), (0.1, 0.2)))
    hostile = Plot(HOSTILE, kind, HOSTILE, HOSTILE, series, () if kind == "lines" else (HOSTILE, "b"))
    root = ElementTree.fromstring(svg(hostile, alone=True))  # raises where it is no XML
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert {e.tag.split("}")[1] for e in root.iter()} <= {"svg", "title", "desc", "style", "path", "rect", "text"}
    clean = HOSTILE[:-2] + "\ufffd\ufffd"
    assert root[0].text == clean
    assert clean in root[1].text
    assert any(clean in "".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "http" not in svg(hostile)


def test_labels_keep_their_order_and_their_distance():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 20):
        wanted = rng.choice([rng.uniform(0, 320, count), np.full(count, 319.0), np.zeros(count)]).tolist()
        placed = np.array(plots._spread(wanted, 0.0, 320.0))
        order = np.argsort(wanted, kind="stable")
        assert (np.diff(placed[order]) > 15.99).all()
        assert placed.min() >= -1e-9
        assert placed.max() <= 320
    assert plots._spread([300.0, 10.0, 100.0], 0.0, 320.0) == [300.0, 10.0, 100.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plot("pie"), "expected kind lines, bars or points, found 'pie'"),
        (plot("bars", Series("a", (1,), (1,))), "expected x_names for bars"),
        (plot("lines", Series("a", (0,), (1,)), names=("a",)), "expected no x_names for lines"),
        (plot("points", Series("a", (2,), (1,)), names=("a", "b")), "count into the 2 x_names"),
        (plot("points", Series("a", (0.5,), (1,)), names=("a", "b")), "count into the 2 x_names"),
        (plot("lines", Series("a", (0, 1), (1, 2)), log_x=True), "expected x above 0"),
        (plot("lines", Series("a", (0, 1), (1,))), "of one length"),
        (plot("lines", Series("a", (0,), (1,), (1,))), "both low and high"),
        (plot("lines", Series("a", (0,), (1,), (1,), (1, 2))), "of one length"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        svg(wrong)
