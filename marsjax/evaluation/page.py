"""A report as values, and the same report as Markdown or as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import quote

from marsjax import files
from marsjax.evaluation.plots import STYLE, Plot, escape, points, shown, svg
from marsjax.features.images import BrokenImage, need_pillow, thumbnail

SIDE = 200  # pixels of an image that is embedded, at most
MOST_BYTES = 200_000  # of a file that is embedded as it is, where nothing can make it smaller
MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif", b"RIFF": "image/webp"}
MOST_LINES = 100  # of the numbers of a plot that Markdown shows beside it
NUMBER = re.compile(r"[+\-\u2212]?(\d[\d,]*)?\.?\d+(e[+-]?\d+)?%?(?![^\s,;)])", re.IGNORECASE)
NOTHING = {"", "-", "\u2013", "\u2014", "nan", "n/a"}  # cells of numbers that are missing
# The page may load nothing, whatever is written into it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
PAGE_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:1.5rem 1rem 4rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 1rem}
h2{font-size:1.4rem;line-height:1.3;margin:3rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:0 0 .25rem}h4{font-size:.85rem;margin:1rem 0 .4rem;color:var(--muted)}
p{max-width:46rem;margin:.6rem 0}a{color:inherit;text-underline-offset:.2em}
code{font:.88em ui-monospace,Menlo,Consolas,monospace;background:var(--raised);padding:.1em .3em;border-radius:3px}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;margin:0 0 1.5rem;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0}nav{font-size:.95rem}nav ol{margin:.3rem 0;padding-left:1.5rem}
figure{margin:1.6rem 0}figcaption,caption{font-weight:600;font-size:.92rem;text-align:left;padding-bottom:.5rem}
caption span{position:sticky;left:0;display:inline-block;max-width:min(1068px,calc(100vw - 2rem))}
.scroll{overflow:auto;max-height:90vh;margin:1.6rem 0}.scroll:focus-visible{outline:2px solid #0072b2}
table{border-collapse:separate;border-spacing:0;font-size:13px;line-height:18px}
th,td{padding:6px 7px;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);background:var(--paper)}
thead th{position:sticky;top:0;z-index:2;background:var(--raised);vertical-align:bottom}
tbody th{position:sticky;left:0;z-index:1;font-weight:500;min-width:6rem;max-width:38vw}
thead th:first-child{left:0;z-index:3}tbody tr:hover>*{background:var(--raised)}
.n{text-align:right;font-variant-numeric:tabular-nums}td.t{min-width:15rem}.drawn{overflow-x:auto}
.plot{display:block;width:100%;min-width:600px;max-width:820px;height:auto}
summary{cursor:pointer;font-size:.85rem;color:var(--muted)}details .scroll{margin:.6rem 0}
.case{margin:1.6rem 0;padding:1rem;border:1px solid var(--rule);border-radius:6px}.case p{margin:0;font-size:.9rem}
.strip{display:flex;flex-wrap:wrap;gap:.9rem .8rem;list-style:none;margin:0;padding:0}
.strip li{width:92px;font-size:.75rem;line-height:1.3;display:flex;flex-direction:column}
.strip small{color:var(--muted);font-size:.7rem}
.poster{width:92px;height:138px;object-fit:contain;border-radius:3px;margin-bottom:.3rem;display:grid;place-items:center;
background:var(--raised);color:var(--muted)}div.poster{border:1px solid var(--rule)}
"""


class Table(NamedTuple):
    """Columns whose cells are all numbers are set to the right."""

    caption: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


class ItemCard(NamedTuple):
    """An item as it is shown in a strip."""

    title: str
    note: str  # "similarity 0.42, rated 4+"
    image: pathlib.Path | None


class Case(NamedTuple):
    """One user's borrowing: strips of items by name ("own history", "kept from the donor", "rejected", "target")."""

    caption: str
    facts: str
    strips: tuple[tuple[str, tuple[ItemCard, ...]], ...]


class Section(NamedTuple):
    """Paragraphs are separated by blank lines; `code` in backticks is the only markup, and in `text` alone."""

    title: str
    text: str
    parts: tuple[Table | Plot | Case, ...]


class Page(NamedTuple):
    """A whole report."""

    title: str
    facts: tuple[tuple[str, str], ...]  # command, commit, machine, wall time
    sections: tuple[Section, ...]


def write_page(page: Page, folder: pathlib.Path, *, name: str = "report") -> None:
    """Writes name.md, the plots it shows (name-1.svg, ...) and name.html, which needs none of the others."""
    count = 0

    def write_plot(plot: Plot) -> str:
        nonlocal count
        count += 1
        files.write_bytes(folder / f"{name}-{count}.svg", svg(plot, alone=True).encode())
        return f"{name}-{count}.svg"

    files.write_bytes(folder / f"{name}.md", to_markdown(page, plots=write_plot).encode(errors="replace"))
    files.write_bytes(folder / f"{name}.html", to_html(page).encode())


def to_markdown(page: Page, *, plots: Callable[[Plot], str] | None) -> str:
    """The report as Markdown. `plots` writes a plot and returns the relative name it has; None: tables only."""
    blocks = [f"# {_plain(page.title)}", "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in page.facts)]
    for section in page.sections:
        blocks += [
            f"## {_plain(section.title)}",
            *(_with_code(p, _plain, "`{}`".format) for p in _paragraphs(section.text)),
        ]
        for part in section.parts:
            if isinstance(part, Case):
                blocks += [f"**{_plain(part.caption)}**", _plain(part.facts)]
                for strip, cards in part.strips:
                    listed = [f"- {_plain(card.title)}" + f" ({_plain(card.note)})" * bool(card.note) for card in cards]
                    blocks += [f"{_plain(strip)}:", "\n".join(listed or ["- none"])]
                continue
            table = plot_table(part) if isinstance(part, Plot) else part
            _check(table)
            if isinstance(part, Plot) and plots:
                alt = _plain(part.caption.replace("[", "(").replace("]", ")"))  # an odd bracket would end it
                blocks.append(f"![{alt}]({quote(plots(part))})")
                if len(table.lines) > MOST_LINES:  # of a map: nobody reads them, and the page keeps them folded
                    continue
            rule = ["--:" if side == "n" else ":--" for side in _sides(table)]
            head, *rest = ([_plain(cell) for cell in line] for line in (table.header, *table.lines))
            blocks.append(f"**{_plain(table.caption)}**")
            blocks.append("\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rest)))
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_html(page: Page) -> str:
    """The report as one page: no script, and every style, plot and image within it."""
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in page.facts)
    contents = "".join(
        f'<li><a href="#section-{i}">{escape(section.title)}</a></li>' for i, section in enumerate(page.sections, 1)
    )
    body = ""
    for i, section in enumerate(page.sections, 1):
        body += f'<section id="section-{i}"><h2>{escape(section.title)}</h2>'
        body += "".join(
            f"<p>{_with_code(p, escape, lambda c: f'<code>{escape(c)}</code>')}</p>" for p in _paragraphs(section.text)
        )
        for part in section.parts:
            body += {Table: _table, Plot: _figure, Case: _case}[type(part)](part)  # type: ignore[operator]
        body += "</section>\n"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{STYLE}{PAGE_STYLE}</style></head><body>"
        f"<header><h1>{escape(page.title)}</h1><dl>{facts}</dl></header>"
        f'<nav aria-label="Contents"><strong>Contents</strong><ol>{contents}</ol></nav>\n<main>{body}</main>'
        "</body></html>\n"
    )


def plot_table(plot: Plot) -> Table:
    """The numbers of a plot: a line for each place, a column for each series; as many lines as points share a place."""
    found: dict[tuple[float, int], dict[int, str]] = {}
    for column, series in enumerate(plot.series):
        seen: dict[float, int] = {}
        for point in points(series):
            if point:
                seen[point.x] = nth = seen.get(point.x, -1) + 1
                found.setdefault((point.x, nth), {})[column] = shown(point)
    lines = tuple(
        (plot.x_names[int(x)] if plot.x_names else f"{x:g}", *(by.get(i, "-") for i in range(len(plot.series))))
        for (x, _), by in sorted(found.items())
    )
    caption = f"{plot.caption}: {plot.y_label}" if plot.y_label else plot.caption
    first = "" if plot.x_names else plot.x_label  # names need none, and their axis is that of the numbers
    return Table(caption, (first, *(series.name for series in plot.series)), lines)


def _table(table: Table) -> str:
    _check(table)
    sides = _sides(table)
    head, *rest = (
        [_cell(text, side, row, column) for column, (text, side) in enumerate(zip(line, sides, strict=True))]
        for row, line in enumerate((table.header, *table.lines))
    )
    # It scrolls in a box of its own: focusable, so that the keyboard reaches what is out of sight.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table><caption><span>'
        f"{escape(table.caption)}</span></caption><thead><tr>{''.join(head)}</tr></thead><tbody>"
        + "".join(f"<tr>{''.join(line)}</tr>" for line in rest)
        + "</tbody></table></div>"
    )


def _cell(text: str, side: str, row: int, column: int) -> str:
    name, scope = f' class="{side}"' if side else "", "row" if row else "col"
    if side == "n" and row:  # a number stays with its spread and its interval in one piece
        text = re.sub(r" (?!p )", "\u00a0", text)
    return f"<td{name}>{escape(text)}</td>" if row and column else f'<th scope="{scope}"{name}>{escape(text)}</th>'


def _figure(plot: Plot) -> str:
    return (
        f'<figure><figcaption>{escape(plot.caption)}</figcaption><div class="drawn" tabindex="0">{svg(plot)}</div>'
        f"<details><summary>Numbers of this plot</summary>{_table(plot_table(plot))}</details></figure>"
    )


def _case(case: Case) -> str:
    strips = ""
    for name, cards in case.strips:
        listed = "".join(
            f"<li>{_poster(card)}<b>{escape(card.title)}</b><small>{escape(card.note)}</small></li>" for card in cards
        )
        strips += f"<h4>{escape(name)}</h4>" + (f'<ul class="strip">{listed}</ul>' if cards else "<p>none</p>")
    return f'<section class="case"><h3>{escape(case.caption)}</h3><p>{escape(case.facts)}</p>{strips}</section>'


def _poster(card: ItemCard) -> str:
    """The image within the page; a box that says so where there is none, or none that may be embedded."""
    data = b"" if card.image is None else _picture(card.image)
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    title = escape(card.title)
    if kind is None or len(data) > MOST_BYTES:
        return f'<div class="poster" role="img" aria-label="No image of {title}" title="{title}">no image</div>'
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img class="poster" width="92" height="138" alt="Image of {title}" src="{source}">'


def _picture(path: pathlib.Path) -> bytes:
    """A small image of what an encoder makes of the file; the file itself, or its beginning, where Pillow is missing,
    and nothing where it is none."""
    try:
        if not path.is_file():
            return b""
        try:
            need_pillow()
        except ImportError:
            with open(path, "rb") as file:
                return file.read(MOST_BYTES + 1)
        return thumbnail(path.read_bytes(), side=SIDE)
    except (OSError, BrokenImage):
        return b""


def _check(table: Table) -> None:
    for i, line in enumerate(table.lines):
        if len(line) != len(table.header):
            raise ValueError(
                f"table {table.caption!r}: expected {len(table.header)} cells in each line, as in its header, found "
                f"{len(line)} in line {i}; give an empty cell for a missing one"
            )


def _sides(table: Table) -> list[str]:
    """The class of each column: n for numbers, t for long texts, else nothing. The first holds names."""
    sides = []
    for column in range(len(table.header)):
        cells = [line[column] for line in table.lines if line[column].lower() not in NOTHING]
        numbers = column > 0 and cells and all(NUMBER.match(cell) for cell in cells)
        sides.append("n" if numbers else "t" if any(len(cell) > 30 for cell in cells) else "")
    return sides


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _with_code(text: str, plain: Callable[[str], str], code: Callable[[str], str]) -> str:
    """Text made safe by `plain`, and what stands in backticks by `code`."""
    return "".join((code if i % 2 else plain)(piece) for i, piece in enumerate(re.split(r"`([^`]+)`", text)))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line. What cannot be taken for markup, as [0.1, 0.2], is left alone."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*|~$#]|(?<!\w)_|_(?!\w)|\[(?![-+]?\d)|(?<![\d%])\]|\](?=[(\[:])", r"\\\g<0>", text)
    return re.sub(r"^(\d+(?=[.)])|(?=[-+=]))(.)(?=[\s=-]|$)", r"\1\\\2", text)  # no list and no rule
