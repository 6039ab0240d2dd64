"""The report: everything is text, nothing is loaded, and a browser shows it."""

import base64
import html
import html.parser
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from marsjax.evaluation import page as pages
from marsjax.evaluation.page import Case, ItemCard, Page, Section, Table, to_html, to_markdown, write_page
from marsjax.evaluation.plots import Plot, Series

HOSTILE = "<script>alert(\"1\")</script> & 'B' | *c* [d](http://e.f) \n\n# g"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def png(rgb=(200, 30, 30), size=(4, 6)):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = size
    lines = (b"\0" + bytes(rgb) * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def sample(text="a name", image=None):
    """A page with `text` wherever a text may stand."""
    table = Table(text, ("method", text, "auc"), ((text, text, "0.71 ± 0.01"), ("base", "", "-")))
    lines = Plot(text, "lines", text, text, (Series(text, (1, 2), (0.1, 0.2), (0.0, 0.1), (0.2, 0.3)),))
    bars = Plot(
        text, "bars", text, text, (Series(text, (0, 1), (0.123456, None)), Series("b", (1,), (2,))), (text, "z")
    )
    case = Case(text, text, ((text, (ItemCard(text, text, image), ItemCard(text, "", None))), ("rejected", ())))
    return Page(text, ((text, text),), (Section(text, text, (table, lines)), Section(text, "", (bars, case))))


class Found(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag  # every element is closed where it should be

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "1.png"
    path.write_bytes(png())
    return path


@pytest.mark.parametrize("text", ["a name", HOSTILE])
def test_html_is_closed_and_everything_in_it_is_text(text, image):
    found = Found(to_html(sample(text, image)))
    assert found.open == []
    known = Found(to_html(sample("a name", image)))
    tags, expected = ([tag for tag, _ in tags if tag not in ("p", "title")] for tags in (found.tags, known.tags))
    assert tags == expected  # the text adds none but a paragraph by its blank line, and a tooltip where it is cut
    assert not any(key.startswith("on") or key == "style" for _, attributes in found.tags for key in attributes)
    for key in ("alt", "title", "aria-label"):
        values, expected = (
            [attributes[key] for _, attributes in one.tags if key in attributes] for one in (found, known)
        )
        assert values == [value.replace("a name", text) for value in expected] != []
    assert found.text.count(text[:9]) >= known.text.count("a name") > 20


def test_html_loads_nothing(image):
    text = to_html(sample(HOSTILE, image))
    assert text.count(' src="data:image/png;base64,') == 1
    for tag, attributes in Found(text).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert "srcset" not in attributes
        assert "http-equiv" not in attributes or attributes["content"].startswith("default-src 'none'")
    assert not re.search(r"url\(|@import|@font-face", pages.STYLE + pages.PAGE_STYLE)
    assert not re.search(r"https?://|<link|<script", to_html(sample("a name", image)))


def test_contents_lead_to_the_sections():
    found = Found(to_html(sample()))
    targets = [attributes["href"][1:] for tag, attributes in found.tags if tag == "a"]
    assert targets == [attributes["id"] for tag, attributes in found.tags if "id" in attributes]
    assert len(targets) == 2


def cards(*images):
    case = Case("c", "f", (("own", tuple(ItemCard(f"t<{i}>", "", image) for i, image in enumerate(images))),))
    tags = Found(to_html(Page("p", (), (Section("s", "", (case,)),)))).tags
    return [(tag, attributes) for tag, attributes in tags if attributes.get("class") == "poster"]


def embedded(path):
    """The image of a card as Pillow reads it from the page."""
    ((tag, attributes),) = cards(path)
    head, _, body = attributes["src"].partition(",")
    assert (tag, head) in {("img", "data:image/png;base64"), ("img", "data:image/jpeg;base64")}
    return pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(body)))


def near(image, other):
    return np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean() < 6


def test_images_are_embedded_as_encoders_see_them_and_small(tmp_path):
    """Of any kind and size; of animations the first frame, and upright, whatever a browser would do."""
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    blocks = Image.fromarray(rng.integers(0, 256, (6, 4, 3), np.uint8)).resize((1200, 1800), 0)
    noisy = np.clip(np.asarray(blocks, int) + rng.integers(-20, 20, (1800, 1200, 1)), 0, 255).astype(np.uint8)
    large, other = Image.fromarray(noisy), Image.new("RGB", (120, 180), "white")
    paths = {name: tmp_path / name for name in ("large.jpg", "a.bmp", "a.tif", "a.gif", "cmyk.jpg", "turned.jpg")}
    large.save(paths["large.jpg"], quality=95)
    assert paths["large.jpg"].stat().st_size > pages.MOST_BYTES
    few = blocks.resize((120, 180))
    few.save(paths["a.bmp"])
    few.save(paths["a.tif"])
    few.save(paths["a.gif"], save_all=True, append_images=[other], disposal=1, loop=0)
    few.convert("CMYK").save(paths["cmyk.jpg"])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to be upright
    few.transpose(Image.Transpose.ROTATE_90).save(paths["turned.jpg"], exif=exif, quality=95, comment="a secret")
    for path in paths.values():
        image = embedded(path)
        assert image.size == ((133, 200) if path.name == "large.jpg" else (120, 180))
        assert getattr(image, "n_frames", 1) == 1
        assert not image.getexif()
        assert "comment" not in image.info
        assert near(image, few.resize(image.size)), path
    assert max(len(path.read_bytes()) for path in paths.values()) > 20 * len(cards(paths["large.jpg"])[0][1]["src"])


def test_a_page_shows_the_whole_of_an_image():
    assert "object-fit:contain" in pages.PAGE_STYLE


def test_a_small_drawing_keeps_every_pixel(tmp_path):
    (tmp_path / "image").write_bytes(png())
    image = embedded(tmp_path / "image")
    assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (4, 6), (200, 30, 30))


def test_images_are_embedded_as_they_are_where_nothing_can_read_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # to import it is an ImportError
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    kinds = {"png": png(), "jpeg": b"\xff\xd8\xff\xe0" + bytes(pages.MOST_BYTES - 4), "gif": b"GIF89a", "webp": b"RIFF"}
    for kind, data in kinds.items():
        (tmp_path / "image").write_bytes(data)  # the content counts, not the name
        ((tag, attributes),) = cards(tmp_path / "image")
        head, _, body = attributes["src"].partition(",")
        assert (tag, head, attributes["alt"]) == ("img", f"data:image/{kind};base64", "Image of t<0>")
        assert base64.b64decode(body) == data


@pytest.mark.parametrize("pillow", [True, False])
def test_what_is_no_image_is_a_box_with_the_title(tmp_path, monkeypatch, pillow):
    if not pillow:
        monkeypatch.setitem(sys.modules, "PIL", None)
        monkeypatch.setitem(sys.modules, "PIL.Image", None)
    (tmp_path / "large").write_bytes(b"\xff\xd8\xff" + bytes(pages.MOST_BYTES - 2))
    (tmp_path / "svg").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>")
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    paths = [
        None,
        tmp_path / "missing",
        tmp_path,
        tmp_path / ("x" * 5000),
        *(tmp_path / name for name in ("large", "svg", "empty", "pipe", "loop")),
    ]
    found = cards(*paths)
    assert [tag for tag, _ in found] == ["div"] * len(paths)
    assert [attributes["title"] for _, attributes in found] == [f"t<{i}>" for i in range(len(paths))]


def test_numbers_stand_to_the_right():
    line = (
        "10",
        "+0.0131 [+0.0049, +0.0224], p 0.006, t 0.063",
        "-",
        "0.7 ± 0.1",
        "1,234",
        "2e-5",
        "12%",
        "2nd",
        "3-5",
        "",
    )
    table = Table("t", tuple("abcdefghij"), (line, ("2", "", "0.5", "nan", "1", ".5", "-3%", "1", "1", "")))
    found = Found(to_html(Page("p", (), (Section("s", "", (table,)),))))
    for tag, rows in (("td", 2), ("th", 1)):
        classes = [attributes.get("class") for name, attributes in found.tags if name == tag]
        right = [name == "n" for name in classes]
        expected = [False] + [True] * 6 + [False] * 3  # the first column holds names, whatever they look like
        assert right == (expected[1:] * rows if tag == "td" else [*expected, False, False])
    assert "0.0131\u00a0[+0.0049,\u00a0+0.0224], p\u00a00.006" in found.text.replace("+0.0131", "0.0131")


def table_lines(markdown):
    """Cells of each table of a Markdown text, as a reader of Markdown takes them apart."""
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in tables]


@pytest.mark.parametrize("text", ["a name", HOSTILE])
def test_markdown_tables_are_even(text):
    found = table_lines(to_markdown(sample(text), plots=None))
    assert [np.shape(table) for table in found] == [(4, 3), (4, 2), (4, 3)]
    assert found[0][1] == [" :-- ", " :-- ", " --: "]
    assert [[plain(cell).strip() for cell in line] for line in found[0][2:]] == [
        [" ".join(text.split()), " ".join(text.split()), "0.71 ± 0.01"], ["base", "", "-"]]  # fmt: skip


def plain(markdown):
    """What a reader of Markdown sees."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))


@pytest.mark.parametrize(
    "text",
    ["a_b", "_a_ *b*", "1. a", "12) a", "- a", "+ a", "---", "===", "# a", "> a", "a & b &amp; c", "<b>", "[a](b)",
     "[a]: b", "`a", "\\*", "![a](b)", "~~a~~", "$a$", "[1](b)", "[1]: b", "5.1", "-0.5", "a|b", HOSTILE],
)  # fmt: skip
def test_markdown_shows_text_as_it_is(text):
    written = to_markdown(Page("p", (), (Section("s", text, ()),)), plots=None).split("\n\n", 2)[2].rstrip("\n")
    assert plain(written) == "\n\n".join(pages._paragraphs(text))
    bare = re.sub(r"\\.|&\w+;", "x", written)  # what could be markup
    assert not re.search(r"[*`<>|~$#]|\]\(|\]:|!\[|\b_|_\b", bare)
    assert not re.match(r"(\d+[.)]|[-+])\s|[-=]+$", bare)


def test_markdown_leaves_numbers_alone():
    table = Table("t", ("m", "auc"), (("mars", "+0.0131 [+0.0049, +0.0224], p 0.006"),))
    assert "| mars | +0.0131 [+0.0049, +0.0224], p 0.006 |" in to_markdown(Page("p", (), (Section("s", "", (table,)),)),
                                                                         plots=None)  # fmt: skip


def test_code_in_text():
    page = Page("p", (), (Section("s", "use `a_b <c>` and\nnot *d*.\n \n`e", ()),))
    assert to_markdown(page, plots=None).endswith("use `a_b <c>` and not \\*d\\*.\n\n\\`e\n")
    assert "<p>use <code>a_b &lt;c&gt;</code> and not *d*.</p><p>`e</p>" in to_html(page)


def test_every_number_of_a_plot_is_in_its_table():
    nan = float("nan")
    one = Series("a", (2, 1, None, 3), (0.1234567, 2e-9, 1, nan), (0.1, None, 0, 0), (0.2, 1, 1, 1))
    plot = Plot("c", "points", "x", "y", (one, Series("b", (2, 2), (5.0, 6.0))))
    assert pages.plot_table(plot) == Table(
        "c: y", ("x", "a", "b"), (("1", "2e-09", "-"), ("2", "0.123457 [0.1, 0.2]", "5"), ("2", "-", "6"))
    )
    named = Plot("c", "bars", "x", "y", (Series("a", (1,), (0.5,)),), ("p", "q"))
    assert pages.plot_table(named) == Table("c: y", ("", "a"), (("q", "0.5"),))


def test_markdown_names_the_files_of_plots_in_their_order():
    asked = []
    text = to_markdown(sample("x [y"), plots=lambda plot: asked.append(plot.kind) or f"a plot {len(asked)}.svg")
    assert asked == ["lines", "bars"]
    assert re.findall(r"^!\[(.*)\]\((.*)\)$", text, re.MULTILINE) == [
        ("x (y", "a%20plot%201.svg"), ("x (y", "a%20plot%202.svg")]  # fmt: skip


def test_markdown_leaves_out_the_numbers_of_a_map():
    def shown(count):
        plot = Plot("c", "points", "x", "y", (Series("a", tuple(range(count)), tuple(range(count))),))
        return to_markdown(Page("p", (), (Section("s", "", (plot,)),)), plots=lambda _: "p.svg")

    assert "| 99 | 99 |" in shown(100)
    assert "|" not in shown(101)
    assert "](p.svg)" in shown(101)


def test_written_files(tmp_path, image):
    write_page(sample(HOSTILE, image), tmp_path / "out", name="r")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["r-1.svg", "r-2.svg", "r.html", "r.md"]
    for name in re.findall(r"\]\((r-.*)\)", (out / "r.md").read_text()):
        assert ElementTree.parse(out / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (out / "r.html").read_text() == to_html(sample(HOSTILE, image))
    write_page(sample("a file's name \udcff, not UTF-8"), out)
    assert "a file's name ?" in (out / "report.md").read_text()
    assert "a file&#x27;s name \ufffd" in (out / "report.html").read_text()


@pytest.mark.parametrize("write", [to_html, lambda page: to_markdown(page, plots=None)])
def test_a_ragged_table_is_refused(write):
    table = Table("t", ("a", "b"), (("1", "2"), ("1",)))
    with pytest.raises(ValueError, match="expected 2 cells in each line, as in its header, found 1 in line 1"):
        write(Page("p", (), (Section("s", "", (table,)),)))


def full(image):
    """A page as long reports have it: wide tables, long names, many lines, a case of many items."""
    rng = np.random.default_rng(0)
    long = "a method whose name is much longer than what a plot has room for"
    names = ("base", "mars", "random_donor", "WWWWWWWWWWWWWWWWWWWWWWWWWWWW", "映画を推薦する方法", long)
    cell = "+0.0131 [+0.0049, +0.0224], p 0.006, t 0.063"
    table = Table(f"T & {long}", ("method", *(f"metric {i}" for i in range(8))), tuple((n, *[cell] * 8) for n in names))

    def series(name, x):
        y = rng.normal(0.7, 0.01, len(x)).tolist()
        return Series(name, tuple(x), tuple(y), tuple(v - 0.01 for v in y), tuple(v + 0.01 for v in y))

    plots = (
        Plot("Sparse", "lines", "events", "AUC", tuple(series(n, (3, 5, 10, 20)) for n in names)),
        Plot("Sweep", "lines", "weight", "AUC", tuple(series(n, (1e-3, 0.01, 0.1, 1)) for n in names), log_x=True),
        Plot("Bars", "bars", "strategy", "AUC", tuple(series(n, range(6)) for n in names), names),
        Plot("Points", "points", "method", "AUC", (series("a", range(6)),), names, zero_line=True),
        Plot("Scatter", "points", "keep rate", "AUC", tuple(series(n, range(9)) for n in names * 2)),
        Plot("Large", "lines", "n", "seconds", (Series("a", (1, 2), (-2e12, 3e12)), Series("b", (1, 2), (0, 1e12)))),
        Plot("Nothing", "lines", "n", "AUC", ()),
    )
    card = ItemCard("<script>document.title = 'no'</script> & Co (1999)", "similarity 0.42, rated 4+", image)
    case = Case("A user", "3 events", (("own history", (card,) * 3), ("kept", (card._replace(image=None),) * 20)))
    return Page("Report & <b>", (("command", "marsjax reproduce " + "--flag=" + "v" * 300),), (
        Section("Does borrowing help?", "Text with `code`.\n\nMore.", (table,)), Section("Plots & <i>", "", plots),
        Section("Cases", "", (case,))))  # fmt: skip


def browse(path, tmp_path, *arguments):
    """The page after it was shown, and what the browser had to say. Ends it, and its children, where it hangs."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
               "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", *arguments,
               path.as_uri()]  # fmt: skip
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, encoding="utf-8", start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


@needs_browser
@pytest.mark.parametrize("scheme", ["0", "1"])  # dark, light
def test_a_browser_shows_it(scheme, tmp_path, image):
    path, shot = tmp_path / "page.html", tmp_path / "shot.png"
    page = full(image)
    path.write_text(to_html(page), encoding="utf-8")
    dom, said = browse(path, tmp_path, "--window-size=1280,2400", f"--screenshot={shot}", "--dump-dom",
                       f"--blink-settings=preferredColorScheme={scheme}")  # fmt: skip
    assert "CONSOLE" not in said  # a refused resource or a failed script would be here
    assert f"<title>{html.escape(page.title)}</title>" in dom
    for section in page.sections:
        assert f"<h2>{html.escape(section.title, quote=False)}</h2>" in dom
    width, height, lightness, shades = read_shot(shot)
    assert (width, height) == (1280, 2400)
    assert shades > 64  # a page of one colour has a handful
    assert lightness < 60 if scheme == "0" else lightness > 200


def read_shot(path):
    """Width, height, the value of the first pixel, and how many different bytes the filtered lines have."""
    data, position, body = path.read_bytes(), 8, b""
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body += data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
    pixels = zlib.decompress(body)
    return *struct.unpack(">II", data[16:24]), pixels[1], len(set(pixels))


MEASURE = """<script>
const outside = [], over = [];
for (const svg of document.querySelectorAll('svg')) {
  const box = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.firstChild.data, t.getBoundingClientRect()]);
  for (const [text, b] of boxes)
    if (b.left < box.left || b.right > box.right || b.top < box.top || b.bottom > box.bottom) outside.push(text);
  boxes.forEach(([s, a], i) => boxes.slice(i + 1).forEach(([t, b]) => {
    if (a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom) over.push(s + ' / ' + t);
  }));
}
const images = [...document.images].map(i => i.naturalWidth + 'x' + i.naturalHeight + ' in ' + i.width);
document.title = JSON.stringify([document.documentElement.scrollWidth - innerWidth, outside, over, images]);
</script></body>"""


@needs_browser
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_sticks_out_and_no_text_of_a_plot_covers_another(width, tmp_path, image):
    path = tmp_path / "page.html"
    text = to_html(full(image)).replace(pages.POLICY, "default-src 'unsafe-inline' data:").replace("</body>", MEASURE)
    path.write_text(text, encoding="utf-8")
    dom, _ = browse(path, tmp_path, f"--window-size={width},2400", "--dump-dom")
    wider, outside, over, images = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    assert wider <= 0
    assert outside == []
    assert over == []
    assert images == ["4x6 in 92"] * 3


@needs_browser
def test_the_page_may_load_nothing_whatever_is_written_into_it(tmp_path):
    """That the console is where a refusal is said, on which a test above relies."""
    path = tmp_path / "page.html"
    path.write_text(to_html(sample()).replace("</main>", '<script>document.title = "run"</script></main>'))
    dom, said = browse(path, tmp_path, "--dump-dom")
    assert "CONSOLE" in said
    assert "<title>run</title>" not in dom
