"""Where the marks of a chart go: values → positions in an SVG that scales with the page.

``templates/charts.html.jinja`` draws them in the page's colours: charts follow dark mode, print,
need no script, and cost a few kilobytes. Every mark has its values as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 42
CELL = 12
"""Width of a heatmap's cell before the page scales it."""
_LABEL_WIDTH, _LABEL_HEIGHT = 110, 15


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        label: What it shows, with the unit.
        ticks: Position and text of each tick.
        place: From a value to its position.
    """

    label: str
    ticks: tuple[tuple[float, str], ...]
    place: Callable[[float], float]


@dataclass(frozen=True)
class Mark:
    """A point of a chart.

    Attributes:
        x: Position from the left.
        y: Position from the top.
        text: Its values, for people.
        look: CSS classes.
        shape: ``circle``, ``square``, ``diamond`` or ``cross``.
        low: Position of the lower end of an interval, None without one.
        high: Of the upper end.
        label: Text beside it; empty for none.
        anchor: Which end of the label stands at the mark.
        label_y: Position of the label from the top.
        link: Id of the table row with its numbers; empty for none.
    """

    x: float
    y: float
    text: str
    look: str = ""
    shape: str = "circle"
    low: float | None = None
    high: float | None = None
    label: str = ""
    anchor: str = "start"
    label_y: float = 0.0
    link: str = ""


@dataclass(frozen=True)
class Line:
    """A polyline: its positions as SVG reads them, CSS classes, and a name."""

    points: str
    look: str
    name: str


@dataclass(frozen=True)
class Chart:
    """Points and lines over two axes.

    Attributes:
        title: What it shows.
        x: Horizontal axis.
        y: Vertical axis.
        marks: Points.
        lines: Drawn below the points.
    """

    title: str
    x: Scale
    y: Scale
    marks: tuple[Mark, ...] = ()
    lines: tuple[Line, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[int, int, int, int] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


@dataclass(frozen=True)
class Cell:
    """A rectangle of a heatmap or a bar: place, strength in [0, 1], CSS classes, its values."""

    x: float
    y: float
    width: float
    height: float
    strength: float
    look: str
    text: str


@dataclass(frozen=True)
class Grid:
    """Rectangles by layer: a heatmap, or bars.

    Attributes:
        title: What it shows.
        caption: How to read it.
        cells: The rectangles.
        width: Of the drawing.
        height: Of the drawing.
        columns: Position and number of the layers that are named below.
        cuts: Horizontal lines at the budget of a layer: start, end and height.
        label: What the rows are.
    """

    title: str
    caption: str
    cells: tuple[Cell, ...]
    width: float
    height: float
    columns: tuple[tuple[float, str], ...]
    cuts: tuple[tuple[float, float, float], ...] = ()
    label: str = ""
    crosses: tuple[tuple[float, float], ...] = field(default=())


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def scale(
    label: str, values: Iterable[float], start: float, end: float, low: float | None = None
) -> Scale:
    """An axis that holds all values with some air.

    Args:
        label: What it shows.
        values: What must fit.
        start: Position of its low end.
        end: Position of its high end.
        low: The value at the low end; by default a little below the least one.
    """
    numbers = list(values)
    least, most = min(numbers), max(numbers)
    air = 0.08 * ((most - least) or abs(most) or 1.0)
    bottom = low if low is not None else least - air
    top = max(most + air, bottom + 1e-9)

    def place(value: float) -> float:
        return round(start + (end - start) * (value - bottom) / (top - bottom), 1)

    return Scale(label, tuple((place(t), f"{t:g}") for t in ticks(bottom, top)), place)


def axes(
    x_label: str, xs: Iterable[float], y_label: str, ys: Iterable[float], low: float | None = None
) -> tuple[Scale, Scale]:
    """The two axes of a chart of the usual size; ``low`` is where the vertical one begins."""
    x = scale(x_label, xs, LEFT, WIDTH - RIGHT)
    return x, scale(y_label, ys, HEIGHT - BOTTOM, TOP, low)


def polyline(x: Scale, y: Scale, values: Iterable[tuple[float, float]]) -> str:
    """Positions of a line."""
    return " ".join(f"{x.place(a)},{y.place(b)}" for a, b in values)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats: less of the first value with as much of the second.

    Args:
        points: Pairs of a cost and a benefit.

    Returns:
        Those that are on the Pareto frontier, by rising cost.
    """
    best: list[tuple[float, float]] = []
    for cost, benefit in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or benefit > best[-1][1]:
            best.append((cost, benefit))
    return best


def labels_apart(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The same marks with labels that do not stand on each other, in the order of their heights."""
    placed: list[Mark] = []
    for mark in sorted(marks, key=lambda m: m.y):
        near = [m.label_y for m in placed if abs(m.x - mark.x) < _LABEL_WIDTH]
        placed.append(replace(mark, label_y=max([mark.y, *(y + _LABEL_HEIGHT for y in near)])))
    return tuple(placed)


def layer_columns(count: int, width: float) -> tuple[tuple[float, str], ...]:
    """Names of layers below a grid: every fifth, or every tenth of many."""
    step = 5 if count <= 40 else 10
    return tuple(((i + 0.5) * width, str(i)) for i in range(0, count, step))
