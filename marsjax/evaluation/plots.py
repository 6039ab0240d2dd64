"""Plots as SVG, drawn here: nothing is loaded, and the text stays text."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

WIDTH = 720  # of the viewBox; all lengths below are in its units, pixels at full width
LETTER = 6.8  # the width of a usual letter at 12 px, in a wide font
LONGEST = 30  # letters of a name that are shown; the whole of it is in the tooltip and in the table
# Okabe and Ito's colours, safe for the colour-blind, without the yellow that white swallows. Each has a shape too; all
# further series share one grey, dark enough not to be what the purple looks like to the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "var(--ink)")
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.8L4.6 3.4H-4.6z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 4.8L4.6-3.4H-4.6z",
    "M-1.6-4.6h3.2v3h3v3.2h-3v3h-3.2v-3h-3v-3.2h3z",
    "M-4.4-3L0-4.8L4.4-3V3L0 4.8L-4.4 3z",
)
STYLE = (
    ":root{color-scheme:light dark;--paper:#fff;--ink:#1a1d21;--muted:#5b636d;--rule:#dfe3e8;--raised:#f5f6f8}"
    "@media(prefers-color-scheme:dark){"
    ":root{--paper:#14171b;--ink:#e7eaee;--muted:#a2abb6;--rule:#333a43;--raised:#1d2127}}"
    ".plot{background:var(--paper);font:12px system-ui,sans-serif}.plot text{fill:var(--ink)}"
    ".plot .tick{fill:var(--muted)}.plot .value{fill:var(--muted);font-size:11px}"
    ".plot .grid{stroke:var(--rule);fill:none}.plot .zero{stroke:var(--muted);fill:none}"
    ".plot .line{stroke:var(--c);fill:none;stroke-width:2;stroke-linejoin:round}"
    ".plot .lead{stroke:var(--c);fill:none;opacity:.45}.plot .error{stroke:var(--c);fill:none;stroke-width:1.3}"
    ".plot .bar{fill:var(--c)}.plot .bar+.error{stroke:var(--ink)}"
    ".plot .mark{fill:var(--c);stroke:var(--paper);stroke-width:.8}"
    + "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(COLOURS))
    + ".c-{--c:#5f6770}"
)


class Series(NamedTuple):
    """One method or setting. None and NaN are gaps; `x` counts into `Plot.x_names` where there are some."""

    name: str
    x: tuple[float | None, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] | None = None  # 95% intervals
    high: tuple[float | None, ...] | None = None


class Plot(NamedTuple):
    """Lines over numbers, bars over names (from zero, always), or points over either. Names run down the page."""

    caption: str
    kind: str  # "lines", "bars", "points"
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_names: tuple[str, ...] = ()  # of bars and points
    log_x: bool = False
    zero_line: bool = False


class Point(NamedTuple):
    """A point that can be drawn, with both ends of its interval or none."""

    x: float
    y: float
    low: float | None
    high: float | None


class Axis(NamedTuple):
    """From `low` to `high`; the ticks lie within and, unless there are no data, so do the data."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]


def escape(text: str) -> str:
    """Text for HTML and XML: markup is quoted, and characters that XML forbids are replaced."""
    return html.escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def points(series: Series) -> list[Point | None]:
    """The points in their order; None for each gap.

    Raises:
        ValueError: the lengths differ, or one end of the intervals is missing.
    """
    low, high = ((None,) * len(series.x) if side is None else side for side in (series.low, series.high))
    lengths = [len(side) for side in (series.x, series.y, low, high)]
    if len(set(lengths)) > 1 or (series.low is None) != (series.high is None):
        raise ValueError(
            f"series {series.name!r}: expected x and y, and both low and high or neither, of one length, found "
            f"{lengths}; use None where a value is missing"
        )
    found: list[Point | None] = []
    for x, y, below, above in zip(series.x, series.y, low, high, strict=True):
        place, value, below, above = (_finite(number) for number in (x, y, below, above))
        if below is None or above is None:
            below = above = None
        found.append(None if place is None or value is None else Point(place, value, below, above))
    return found


def shown(point: Point) -> str:
    """0.71 [0.70, 0.72]"""
    return f"{point.y:.6g}" + ("" if point.low is None else f" [{point.low:.6g}, {point.high:.6g}]")


def round_axis(values: Iterable[float], *, count: int = 5) -> Axis:
    """Ticks at multiples of 1, 2 or 5 times a power of ten, the first and last of them around the data."""
    values = list(values)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value
        pad = 0.1 * abs(low) or 1.0
        low, high = low - pad, high + pad
    power = math.floor(math.log10((high - low) / count))
    factor = next((m for m in (1, 2, 5) if m * 10.0**power >= (high - low) / count * (1 - 1e-9)), 10)
    step = factor * 10.0**power
    numbers = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ticks = tuple(float(f"{number * factor}e{power}") for number in numbers)  # decimal, so that 0.3 is 0.3
    # The shortest way to write them that tells them apart.
    ways = [f".{d}f" for d in range(7) if max(abs(tick) for tick in ticks) < 1e6] + ["g", ".17g"]
    way = next(way for way in ways if all(float(f"{tick:{way}}") == tick for tick in ticks))
    return Axis(ticks[0], ticks[-1], ticks, tuple(f"{tick:{way}}" for tick in ticks))


def log_axis(values: Iterable[float]) -> Axis:
    """Ticks at powers of ten, or at 1, 2 and 5 times them where the data span less than three."""
    values = list(values)
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        step = math.ceil((last - first) / 8)
        ticks = [float(f"1e{first + step * i}") for i in range(math.ceil((last - first) / step) + 1)]
    else:
        every = [float(f"{m}e{power}") for power in range(first - 1, last + 1) for m in (1, 2, 5)]
        ticks = [max(tick for tick in every if tick <= low)]
        ticks += [tick for tick in every if low < tick < high] + [min(t for t in every if t >= high and t > ticks[0])]
    return Axis(ticks[0], ticks[-1], tuple(ticks), tuple(f"{tick:g}" for tick in ticks))


def x_axis(values: Iterable[float], *, log: bool) -> Axis:
    """Ticks at the data themselves where these are few, short and apart (3, 5, 10, 20 events); else round ones."""
    own = sorted(set(values))
    along = [math.log10(value) if log else value for value in own]
    apart = all(b - a > 0.07 * (along[-1] - along[0]) for a, b in zip(along, along[1:], strict=False))
    if 2 <= len(own) <= 9 and apart and all(float(f"{value:.3g}") == value for value in own):
        return Axis(own[0], own[-1], tuple(own), tuple(f"{value:g}" for value in own))
    return log_axis(own) if log else round_axis(own)


def svg(plot: Plot, *, alone: bool = False) -> str:
    """The plot as an SVG element that takes its colours from STYLE; `alone`: as a file with the style in it.

    Raises:
        ValueError: an unknown kind, names that do not fit it, or numbers that cannot be drawn.
    """
    found = [points(series) for series in plot.series]
    _check(plot, found)
    body, height = _over_names(plot, found) if plot.x_names else _over_numbers(plot, found)
    if not any(any(series) for series in found):
        body += _text(WIDTH / 2, height / 2, "no data", anchor="middle")
    y_BP = [point.y for series in found for point in series if point]
    spread = f"{min(y_BP):.4g} to {max(y_BP):.4g}" if y_BP else "no data"
    names = ", ".join(series.name for series in plot.series)
    described = f"{plot.kind} over {plot.x_label}; {plot.y_label}: {spread}; {names}"
    file = f' xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}"' if alone else ""
    style = f"<style>{STYLE}</style>" if alone else ""
    return (
        f'<svg{file} class="plot" role="img" viewBox="0 0 {WIDTH} {height:.0f}"><title>{escape(plot.caption)}</title>'
        f"<desc>{escape(described)}</desc>{style}{body}</svg>"
    )


def _check(plot: Plot, found: Sequence[Sequence[Point | None]]) -> None:
    places = [point.x for series in found for point in series if point]
    if plot.kind not in ("lines", "bars", "points"):
        raise ValueError(f"plot {plot.caption!r}: expected kind lines, bars or points, found {plot.kind!r}")
    if (plot.kind == "bars" and not plot.x_names) or (plot.kind == "lines" and plot.x_names):
        wanted = "x_names for bars" if plot.kind == "bars" else "no x_names for lines"
        raise ValueError(f"plot {plot.caption!r}: expected {wanted}, found {len(plot.x_names)}")
    if plot.x_names and not all(x == int(x) and 0 <= x < len(plot.x_names) for x in places):
        raise ValueError(
            f"plot {plot.caption!r}: expected x that count into the {len(plot.x_names)} x_names from 0, found {places}"
        )
    if plot.log_x and (plot.x_names or not all(x > 0 for x in places)):
        raise ValueError(
            f"plot {plot.caption!r}: expected x above 0 and no x_names for log_x, found {plot.x_names or min(places)}; "
            "leave the value out or set log_x to False"
        )


def _over_numbers(plot: Plot, found: Sequence[Sequence[Point | None]]) -> tuple[str, float]:
    """Lines, or points over numbers: body and height. Lines are named at their right end."""
    count = len(plot.series)
    labelled = plot.kind == "lines" and count > 1
    body, top = _legend(plot) if plot.kind == "points" else ("", 0.0)
    across, up = x_axis((p.x for s in found for p in s if p), log=plot.log_x), round_axis(_values(plot, found))
    names = [
        s.name if any(f) else f"{_cut(s.name, LONGEST - 9)}: no data" for s, f in zip(plot.series, found, strict=True)
    ]
    left = 12 + max(_width(label) for label in up.labels)
    right = WIDTH - (32 + max(_width(_cut(name)) for name in names) if labelled else 16)
    top += 30
    bottom = top + max(280, 16 * count * labelled)
    at_x, at_y = _scale(across, left + 20, right - 20, log=plot.log_x), _scale(up, bottom, top)
    body += _text(2, top - 16, plot.y_label) + _text((left + right) / 2, bottom + 38, plot.x_label, anchor="middle")
    for tick, label in zip(up.ticks, up.labels, strict=True):
        body += f'<path class="grid" d="M{left:.1f} {at_y(tick):.1f}H{right:.1f}"/>'
        body += _text(left - 6, at_y(tick) + 4, label, "tick", "end")
    for tick, label in zip(across.ticks, across.labels, strict=True):
        body += f'<path class="grid" d="M{at_x(tick):.1f} {bottom:.1f}v5"/>'
        body += _text(at_x(tick), bottom + 18, label, "tick", "middle")
    if up.low <= 0 <= up.high and plot.zero_line:
        body += f'<path class="zero" d="M{left:.1f} {at_y(0):.1f}H{right:.1f}"/>'
    # Intervals at one place would hide each other, so series that have some stand a little beside it.
    beside = min(5.0, 24 / max(count, 1)) if any(p and p.low is not None for s in found for p in s) else 0.0
    ends: list[tuple[float, float] | None] = []
    for i, (series, drawn) in enumerate(zip(plot.series, found, strict=True)):
        place = [p and (at_x(p.x) + (i - (count - 1) / 2) * beside, at_y(p.y)) for p in drawn]
        if plot.kind == "lines":
            line = "".join(
                f"{'L' if before else 'M'}{xy[0]:.1f} {xy[1]:.1f}"
                for before, xy in zip([None, *place], place, strict=False) if xy
            )  # fmt: skip
            body += f'<path class="line {_colour(i)}" d="{line}"/>' if line else ""
        size = 0.6 if plot.kind == "lines" and len(drawn) > 15 else 1.0
        for p, xy in zip(drawn, place, strict=True):
            if p and xy:
                ends_y = None if p.low is None or p.high is None else (at_y(p.low), at_y(p.high))
                body += _error(i, xy[0], ends_y, turned=False) + _mark(
                    i, *xy, f"{series.name}, {p.x:g}: {shown(p)}", size
                )
        ends.append(next((xy for xy in reversed(place) if xy), None))
    if labelled:
        wanted = [end[1] if end else bottom for end in ends]
        for i, y in enumerate(_spread(wanted, top, bottom)):
            if end := ends[i]:
                body += f'<path class="lead {_colour(i)}" d="M{end[0] + 5:.1f} {end[1]:.1f}L{right + 4:.1f} {y:.1f}"/>'
            body += _mark(i, right + 10, y, plot.series[i].name) + _text(right + 20, y + 4, names[i])
    return body, bottom + 48


def _over_names(plot: Plot, found: Sequence[Sequence[Point | None]]) -> tuple[str, float]:
    """Bars, or points over names: body and height. Names run down, values across."""
    count, bars = max(len(plot.series), 1), plot.kind == "bars"
    lane = 15 if bars else 11
    row = max(24, count * lane + 10)
    body, top = _legend(plot)
    across = round_axis(_values(plot, found))
    left, right = 12 + max(_width(_cut(name)) for name in plot.x_names), WIDTH - (56 if bars else 20)
    top += 26
    bottom = top + row * len(plot.x_names)
    at_x = _scale(across, left, right)
    body += _text(2, top - 10, plot.x_label) + _text((left + right) / 2, bottom + 38, plot.y_label, anchor="middle")
    for tick, label in zip(across.ticks, across.labels, strict=True):
        body += f'<path class="grid" d="M{at_x(tick):.1f} {top:.1f}V{bottom:.1f}"/>'
        body += _text(at_x(tick), bottom + 18, label, "tick", "middle")
    for number, name in enumerate(plot.x_names):
        body += _text(left - 8, top + (number + 0.5) * row + 4, name, anchor="end")
    if bars or plot.zero_line:
        body += f'<path class="zero" d="M{at_x(0):.1f} {top:.1f}V{bottom:.1f}"/>'
    for i, (series, drawn) in enumerate(zip(plot.series, found, strict=True)):
        for p in drawn:
            if not p:
                continue
            x, y = at_x(p.y), top + (p.x + 0.5) * row + (i - (count - 1) / 2) * lane
            ends = None if p.low is None or p.high is None else (at_x(p.low), at_x(p.high))
            tip, error = f"{series.name}, {plot.x_names[int(p.x)]}: {shown(p)}", _error(i, y, ends, turned=True)
            if bars:
                start, width = min(x, at_x(0)), abs(x - at_x(0))
                body += f'<rect class="bar {_colour(i)}" x="{start:.1f}" y="{y - lane / 2 + 1:.1f}" '
                body += f'width="{width:.1f}" height="{lane - 2}"><title>{escape(tip)}</title></rect>{error}'
                body += _text(max(x, at_x(0), *(ends or ())) + 6, y + 4, f"{p.y:.4g}", "value")
            else:
                body += error + _mark(i, x, y, tip)
    return body, bottom + 48


def _values(plot: Plot, found: Sequence[Sequence[Point | None]]) -> list[float]:
    """All that the axis of values must hold."""
    held = [v for series in found for p in series if p for v in (p.y, p.low, p.high) if v is not None]
    return held + [0.0] * (plot.zero_line or plot.kind == "bars")


def _scale(axis: Axis, start: float, end: float, *, log: bool = False) -> Callable[[float], float]:
    along = math.log10 if log else float
    low, high = along(axis.low), along(axis.high)
    return lambda value: start + (along(value) - low) / (high - low) * (end - start)


def _spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights of labels, in the order of what is wanted, near it and at least a line apart."""
    gap = min(16.0, (bottom - top) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        placed[i] = max(wanted[i], placed[order[rank - 1]] + gap) if rank else max(wanted[i], top)
    limit = bottom
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _legend(plot: Plot) -> tuple[str, float]:
    """One entry a series, in as many rows as it takes, and the height; nothing for a single series."""
    body, x, y = "", 2.0, 0.0
    for i, series in enumerate(plot.series if len(plot.series) > 1 else ()):
        width = 34 + _width(_cut(series.name))
        if x + width > WIDTH and x > 2:
            x, y = 2.0, y + 18
        body += _mark(i, x + 6, y + 10, series.name) + _text(x + 16, y + 14, series.name)
        x += width
    return body, y + 22 if body else 0.0


def _mark(i: int, x: float, y: float, tip: str, size: float = 1.0) -> str:
    where = f'transform="translate({x:.1f} {y:.1f})scale({size})" d="{SHAPES[i % len(SHAPES)]}"'
    return f'<path class="mark {_colour(i)}" {where}><title>{escape(tip)}</title></path>'


def _error(i: int, middle: float, ends: tuple[float, float] | None, *, turned: bool) -> str:
    """An interval with caps, upright or turned; nothing where there is none."""
    if ends is None:
        return ""
    low, high = (f"{end:.1f}" for end in ends)
    side, beside = f"{middle:.1f}", f"{middle - 3:.1f}"
    upright = f"M{side} {low}V{high}M{beside} {low}h6M{beside} {high}h6"
    lying = f"M{low} {side}H{high}M{low} {beside}v6M{high} {beside}v6"
    return f'<path class="error {_colour(i)}" d="{lying if turned else upright}"/>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    short = _cut(text, 100 if style == "" and anchor == "middle" else LONGEST)
    tip = f"<title>{escape(text)}</title>" if short != text else ""
    name = f' class="{style}"' if style else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(short)}{tip}</text>'


def _colour(i: int) -> str:
    return f"c{i}" if i < len(COLOURS) else "c-"


def _width(text: str) -> float:
    """An upper bound in most fonts, since an SVG cannot ask for the width of its text."""
    return LETTER * sum(
        2.0 if unicodedata.east_asian_width(c) in "WF" else 1.75 if c in "MWmw@%" else 1.2 if c.isupper() else 1.0
        for c in text
    )


def _cut(text: str, longest: int = LONGEST) -> str:
    if _width(text) <= LETTER * longest:
        return text
    return next(text[:end] for end in range(len(text), -1, -1) if _width(text[:end]) <= LETTER * (longest - 1)) + "…"


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
