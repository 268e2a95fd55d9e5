"""One chart function: rows of lines, points, bars and spans → SVG in the page's colours.

The SVG is part of the page: it follows dark mode and print, needs no script, and takes the page's
font. Colours become CSS variables; each mark's values become its tooltip.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from typing import Any, Literal
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLOURS: Mapping[str, str] = {
    **{"depth": "#0072b2", "width": "#b54a00", "both": "#8a3d84", "ink": "#1d1d1b"},
    **{"soft": "#5b5b56", "line": "#d9d9d2", "paper": "#fffffe", "heat": "#0b5d8f"},
    "lost": "#b02a1c",
}
"""Colours to draw with, by the CSS variable that replaces each in the page."""
STYLE: Any = {
    **{"figure.dpi": 72, "font.size": 12, "text.parse_math": False, "text.color": COLOURS["ink"]},
    **{"axes.labelcolor": COLOURS["soft"], "axes.edgecolor": COLOURS["soft"]},
    **{"xtick.color": COLOURS["soft"], "ytick.color": COLOURS["soft"], "ytick.major.size": 0},
    **{"axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": COLOURS["line"]},
    **{"axes.axisbelow": True, "axes.formatter.useoffset": False, "lines.linewidth": 1.8},
    **{"svg.fonttype": "none", "svg.hashsalt": "slimvlm"},
}
"""How all drawings look. Labels are data from outside: they hold no formulas, and stay text."""
WIDTH, HEIGHT = 400, 270
"""Size of a chart with axes, in CSS pixels, before the page scales it."""
_CELL, _GRID_WIDTH, _BELOW = 28, 1100, 24
"""Width of a layer's column, of all of them at most, and height of their numbers."""
_LABEL_WIDTH, _LABEL_HEIGHT = 110, 15
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}


@dataclass(frozen=True)
class Marks:
    """Shapes of one kind."""

    kind: Literal["line", "points", "bars", "spans"]
    # points, or points of one line: x, y; bars: x, y, width, height; spans: both ends
    rows: Sequence[Sequence[float]]
    look: str = ""  # CSS classes
    texts: Sequence[str] = ()  # tooltip of each shape
    links: Sequence[str] = ()  # id of a table row for each shape; empty for none
    names: Sequence[str] = ()  # labels next to the points
    style: Mapping[str, Any] = field(default_factory=dict)  # options of matplotlib


@dataclass(frozen=True)
class Chart:
    """A drawing."""

    title: str
    caption: str
    """How to read it; may be empty."""
    figure: Figure
    marks: Sequence[Marks]

    @property
    def axes(self) -> Axes:
        """Its only axes."""
        return self.figure.axes[0]

    @property
    def width(self) -> float:
        """Width in CSS pixels, before the page scales it."""
        return 72 * self.figure.get_figwidth()

    def of(self, look: str) -> list[Marks]:
        """Return the marks of a CSS class."""
        return [marks for marks in self.marks if look in marks.look.split()]

    @cached_property
    def svg(self) -> Markup:
        """The drawing as an element of a page; the same at every call and every run."""
        buffer = StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that only the reader's fonts have
            self.figure.savefig(buffer, format="svg", metadata=no_metadata)
        root = fromstring(buffer.getvalue())
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
            element.text, element.tail = (element.text or "").strip(), ""
        _inline_shapes(root)
        groups = {group.get("id"): group for group in root.iter("g")}
        for number, marks in enumerate(self.marks):
            if marks.texts:
                _explain_(groups[f"marks-{number}"], marks)
        for element in root.iter():
            element.attrib = _themed(element.attrib)
        over = f": {self.axes.get_ylabel()} over {self.axes.get_xlabel()}"
        texts = [text for marks in self.of("mark") for text in marks.texts]
        title = self.title + over * bool(self.axes.get_ylabel())
        about = ". ".join([title, self.caption, *texts])  # for those who do not see it
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": about}
        return Markup(tostring(root, encoding="unicode"))


def draw(
    title: str,
    marks: Sequence[Marks],
    labels: tuple[str, str] = ("", ""),
    caption: str = "",
    x_limits: tuple[float | None, float | None] | None = None,
    y_limits: tuple[float | None, float | None] | None = None,
    layers: int = 0,
    height: float = HEIGHT,
) -> Chart:
    """Draw marks, the first ones at the bottom; heights are CSS pixels before the page scales them.

    ``layers`` draws a column for each of so many layers, without a vertical axis; then ``height``
    is without their numbers. A limit of None follows the values.
    """
    with matplotlib.rc_context(STYLE):
        width = min(_CELL * layers, _GRID_WIDTH) if layers else WIDTH
        whole = height + _BELOW if layers else height
        figure = Figure(figsize=(width / 72, whole / 72))
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for number, each in enumerate(marks):
            artist = _artist(axes, each)
            if each.texts:
                artist.set_gid(f"marks-{number}")
        if layers:
            figure.subplots_adjust(left=0, right=1, top=1, bottom=_BELOW / whole)
            named = range(0, layers, 5 if layers <= 40 else 10)
            axes.set_xticks([index + 0.5 for index in named], list(map(str, named)))
            axes.yaxis.set_visible(False)
            axes.spines["bottom"].set_visible(False)
            x_limits = (0, layers)
        else:
            figure.subplots_adjust(left=0.13, right=0.97, top=0.96, bottom=0.17)
            axes.set(xlabel=labels[0], ylabel=labels[1])
            axes.margins(0.08)
            axes.locator_params(nbins=6)
            axes.autoscale_view()
        if x_limits is not None:
            axes.set_xlim(*x_limits)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        _write_names(axes, marks)
    return Chart(title, caption, figure, marks)


def _artist(axes: Axes, marks: Marks) -> Artist:
    match marks.kind:
        case "line":
            return axes.plot(*zip(*marks.rows, strict=True), **marks.style)[0]
        case "points":
            return axes.scatter(*zip(*marks.rows, strict=True), **marks.style)
        case "bars":
            bars = [Rectangle((x, y), width, height) for x, y, width, height in marks.rows]
            return axes.add_collection(PatchCollection(bars, **marks.style))
        case "spans":
            ends = [[(x0, y0), (x1, y1)] for x0, y0, x1, y1 in marks.rows]
            return axes.add_collection(LineCollection(ends, **marks.style))


def _write_names(axes: Axes, marks: Sequence[Marks]) -> None:
    """Write the names of points next to them."""
    named = [pair for each in marks for pair in zip(each.rows, each.names, strict=False)]
    if not named:
        return
    points = [(row[0], row[1]) for row, _ in named]
    places = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    for (_, name), point, (left, y), height in zip(
        named, points, places, labels_apart(places), strict=True
    ):
        is_left = left < WIDTH / 2
        axes.annotate(  # without characters that XML cannot hold
            "".join(letter if letter.isprintable() else "\ufffd" for letter in name),
            point,
            (9 if is_left else -9, height - y),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="center",
            weight="bold",
        )


def labels_apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """Move labels down from these places, from the top one on, so that none covers another."""
    heights: dict[int, float] = {}
    for index in sorted(range(len(places)), key=lambda i: -places[i][1]):
        x, y = places[index]
        near = [h for i, h in heights.items() if abs(places[i][0] - x) < _LABEL_WIDTH]
        heights[index] = min([y, *(height - _LABEL_HEIGHT for height in near)])
    return [heights[index] for index in range(len(places))]


def _inline_shapes(root: Element) -> None:
    """Put shapes where they are used, since ids of definitions must be unique in a whole page."""
    shapes = {f"#{path.get('id')}": path for path in root.iter("path") if path.get("id")}
    for use in root.iter("use"):
        shape = shapes[next(v for k, v in use.items() if k.rpartition("}")[2] == "href")]
        style = "; ".join(filter(None, (shape.get("style"), use.get("style"))))
        place = f"translate({use.attrib['x']} {use.attrib['y']})"
        use.tag, use.attrib = "path", {"d": shape.attrib["d"], "transform": place, "style": style}
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in ("defs", "metadata")]:
            parent.remove(child)


def _explain_(group: Element, marks: Marks) -> None:
    """Give each shape of a group its tooltip, and its link."""
    group.set("class", marks.look)
    shapes = list(group.iter("path"))
    links = marks.links or [""] * len(shapes)
    for shape, text, link in zip(shapes, marks.texts, links, strict=True):
        where = shape
        if link:
            attributes, shape.attrib = shape.attrib, {"href": f"#{link}", "tabindex": "-1"}
            shape.tag = "a"
            where = SubElement(shape, "path", attributes)
        SubElement(where, "title").text = text


def _themed(attributes: Mapping[str, str]) -> dict[str, str]:
    """Replace colours and font by the page's, and round coordinates to one decimal.

    Ids and references to them are left out: they would have to be unique in the whole page.
    """
    themed = {}
    for name, value in attributes.items():
        if name == "style":
            value = re.sub(r"font-family:[^;]*; ?", "", value)
            themed[name] = re.sub(
                r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), value
            )
        elif name in ("d", "transform", "x", "y"):
            value = " ".join(value.split())
            themed[name] = re.sub(
                r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value
            )
        elif name not in ("id", "clip-path"):
            themed[name] = value
    return themed
