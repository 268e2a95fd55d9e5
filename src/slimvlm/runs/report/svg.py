"""Drawings of matplotlib → SVG in the page's colours, whose marks say their values.

A page gets no picture but elements: they follow dark mode and print, need no script, and take the
page's font. Colours become CSS variables, and what a mark stands for is its tooltip.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from typing import Any
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = {
    **{"depth": "#0072b2", "width": "#b54a00", "both": "#8a3d84", "ink": "#1d1d1b"},
    **{"soft": "#5b5b56", "line": "#d9d9d2", "paper": "#fffffe", "heat": "#0b5d8f"},
    "lost": "#b02a1c",
}
"""Colours to draw with, by the CSS variable that stands in the page for each."""
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
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_COORDINATES = ("d", "transform", "x", "y")


@dataclass(frozen=True)
class Marks:
    """What some marks, drawn at once, say.

    Attributes:
        look: CSS classes.
        texts: The values of each mark, for people.
        links: Id of the table row with its numbers, for each; empty for none.
    """

    look: str
    texts: Sequence[str]
    links: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A drawing under construction, then as SVG.

    Attributes:
        title: What it shows.
        figure: Its axes.
        caption: How to read it; may be empty.
        marks: What its marks say, by the id of their group in the figure.
    """

    title: str
    figure: Figure
    caption: str = ""
    marks: dict[str, Marks] = field(default_factory=dict)

    @property
    def axes(self) -> Axes:
        """Its only axes."""
        return self.figure.axes[0]

    @property
    def width(self) -> float:
        """Width in CSS pixels, before the page scales it."""
        return 72 * self.figure.get_figwidth()

    def say(self, artist: Artist, marks: Marks) -> None:
        """Tell what some marks stand for."""
        name = f"marks-{len(self.marks)}"
        artist.set_gid(name)
        self.marks[name] = marks

    def of(self, look: str) -> list[Marks]:
        """The marks of a CSS class."""
        return [marks for marks in self.marks.values() if look in marks.look.split()]

    @cached_property
    def svg(self) -> Markup:
        """The drawing as an element of a page; the same at every call and every run."""
        buffer = StringIO()
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that only the reader's fonts have
            self.figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
        root = fromstring(buffer.getvalue())
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
            element.text, element.tail = (element.text or "").strip(), ""
        _inline_shapes(root)
        groups = [group for group in root.iter("g") if group.get("id") in self.marks]
        for group in groups:
            marks = self.marks[group.attrib["id"]]
            group.set("class", marks.look)
            _explain_(group, marks)
        for element in root.iter():
            element.attrib = _themed(element.attrib)
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": self.about}
        return Markup(tostring(root, encoding="unicode"))

    @property
    def about(self) -> str:
        """What the drawing shows, for those who do not see it."""
        over = f": {self.axes.get_ylabel()} over {self.axes.get_xlabel()}"
        said = [text for marks in self.of("mark") for text in marks.texts]
        return ". ".join([self.title + over * bool(self.axes.get_ylabel()), self.caption, *said])


def _inline_shapes(root: Element) -> None:
    """Shapes where they are used: definitions have ids, which must be unique in a whole page."""
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
    """Attributes with the page's colours and font, and coordinates of one decimal.

    Ids and what refers to them are left out: they would have to be unique in the whole page.
    """
    themed = {}
    for name, value in attributes.items():
        if name == "style":
            value = re.sub(r"font-family:[^;]*; ?", "", value)
            themed[name] = re.sub(r"#[0-9a-f]{6}", _variable, value)
        elif name in _COORDINATES:
            themed[name] = re.sub(r"\d+\.\d+", _short, " ".join(value.split()))
        elif name not in ("id", "clip-path"):
            themed[name] = value
    return themed


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _variable(colour: re.Match[str]) -> str:
    return _VARIABLES.get(colour[0], colour[0])


def blank(title: str, width: float, height: float, caption: str = "") -> Chart:
    """A chart without marks.

    Args:
        title: What it will show.
        width: In CSS pixels, before the page scales it.
        height: Likewise.
        caption: How to read it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    return Chart(title, figure, caption)
