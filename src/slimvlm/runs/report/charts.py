"""Draw the charts of a report: entries, plans, scores and trainings → SVG in the page's colours.

The SVG is part of the page: it follows dark mode and print, needs no script, and takes the page's
font. Colours become CSS variables; each mark's values become its tooltip.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import SubElement, fromstring, tostring

import matplotlib
import pandas as pd
import torch
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from slimvlm.core.tables import read_table
from slimvlm.planning.plan import Plan
from slimvlm.runs.report.record import interval, published
from slimvlm.runs.stages import ORIGINAL
from slimvlm.scoring.unit_scores import Scores

_TABLES = read_table(__file__, "charts.yaml")
COLOURS: Mapping[str, str] = _TABLES["colours"]
STYLES: Mapping[str, Mapping[str, Any]] = _TABLES["styles"]
TRAINED: Mapping[str, tuple[str, str, str]] = _TABLES["trained"]
_LOOK = Path(__file__).with_name("charts.mplstyle")
STYLE: Any = matplotlib.rc_params_from_file(_LOOK, use_default_template=False)
WIDTH, HEIGHT = 400, 270  # size of a chart with axes, in CSS pixels, before the page scales it
_CELL, _GRID_WIDTH, _BELOW, _BAR = 28, 1100, 24, 150
"""Width of a layer's column, of all of them at most, height of their numbers and of bars."""
_LABEL_WIDTH, _LABEL_HEIGHT = 110, 15
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
NEURON_ROWS = 24  # rows of the neurons' heatmap: shares of a layer's neurons, best first
_LABELLED = 5  # marks have their names next to them up to so many
_REMOVED = "removed share of the backbone (%)"
_MANY = 66  # points of a line that are marked at most
Points = Sequence[Sequence[float]]
Limits = tuple[float | None, float | None]


@dataclass(frozen=True)
class Marks:
    """Shapes of one artist, each with a tooltip."""

    artist: Artist
    look: str  # CSS classes
    texts: Sequence[str]  # tooltip of each shape
    link: str  # id of the table row that they lead to; empty for none


@dataclass(frozen=True)
class Chart:
    """A drawing."""

    title: str
    caption: str  # how to read it; may be empty
    figure: Figure
    axes: Axes  # its only ones
    width: float  # in CSS pixels, before the page scales it
    marks: list[Marks] = field(default_factory=list)

    def of(self, look: str) -> list[Marks]:
        """Return the marks of a CSS class."""
        return [marks for marks in self.marks if look in marks.look.split()]

    def mark(self, artist: Artist, look: str, texts: Sequence[str], link: str = "") -> None:
        """Give the shapes of an artist their tooltips."""
        artist.set_gid(f"marks-{len(self.marks)}")
        self.marks.append(Marks(artist, look, texts, link))

    def line(self, points: Points, look: str, name: str, colour: str, **style: Any) -> None:
        """Draw a line, in one of `COLOURS`."""
        style = {"color": COLOURS.get(colour, COLOURS["soft"]), **style}
        self.mark(self.axes.plot(*zip(*points, strict=True), **style)[0], f"line {look}", [name])

    def bars(self, rows: Points, look: str, texts: Sequence[str], style: Mapping[str, Any]) -> None:
        """Draw rectangles: x, y, width and height of each."""
        shapes = [Rectangle((x, y), width, height) for x, y, width, height in rows]
        self.mark(self.axes.add_collection(PatchCollection(shapes, **style)), look, texts)

    def crosses(self, places: Points) -> None:
        """Cross what was removed."""
        if places:
            drawn = self.axes.scatter(*zip(*places, strict=True), **STYLES["gone"])
            self.mark(drawn, "gone", ["removed"] * len(places))

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
        # Put shapes where they are used: ids of definitions must be unique in a whole page.
        shapes = {f"#{path.get('id')}": path for path in root.iter("path") if path.get("id")}
        for use in root.iter("use"):
            shape = shapes[next(v for k, v in use.items() if k.rpartition("}")[2] == "href")]
            style = "; ".join(filter(None, (shape.get("style"), use.get("style"))))
            place = f"translate({use.attrib['x']} {use.attrib['y']})"
            use.tag = "path"
            use.attrib = {"d": shape.attrib["d"], "transform": place, "style": style}
        for parent in list(root.iter()):
            for child in [c for c in parent if c.tag in ("defs", "metadata")]:
                parent.remove(child)
        # Give each shape its tooltip, and its link.
        groups = {group.get("id"): group for group in root.iter("g")}
        for number, marks in enumerate(self.marks):
            group = groups[f"marks-{number}"]
            group.set("class", marks.look)
            for shape, text in zip(list(group.iter("path")), marks.texts, strict=True):
                where, link = shape, {"href": f"#{marks.link}", "tabindex": "-1"}
                if marks.link:
                    shape.tag, shape.attrib, attributes = "a", link, shape.attrib
                    where = SubElement(shape, "path", attributes)
                SubElement(where, "title").text = text
        # Take colours and font of the page, round coordinates, leave out ids: a page has many.
        for element in root.iter():
            kept = {name: v for name, v in element.items() if name not in ("id", "clip-path")}
            if "style" in kept:
                style = re.sub(r"font-family:[^;]*; ?", "", kept["style"])
                kept["style"] = re.sub(r"#[0-9a-f]{6}", lambda c: _VARIABLES.get(c[0], c[0]), style)
            for name in ("d", "transform", "x", "y") & kept.keys():
                shorter = lambda n: f"{float(n[0]):.1f}".removesuffix(".0")  # noqa: E731
                kept[name] = re.sub(r"\d+\.\d+", shorter, " ".join(kept[name].split()))
            element.attrib = kept
        over = f": {self.axes.get_ylabel()} over {self.axes.get_xlabel()}"
        texts = [text for marks in self.of("mark") for text in marks.texts]
        title = self.title + over * bool(self.axes.get_ylabel())
        about = ". ".join([title, self.caption, *texts])  # for those who do not see it
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": about}
        return Markup(tostring(root, encoding="unicode"))


@contextmanager
def drawing(
    title: str,
    labels: tuple[str, str] = ("", ""),
    caption: str = "",
    x_limits: Limits = (None, None),
    y_limits: Limits = (None, None),
    layers: int = 0,
    height: float = HEIGHT,
) -> Iterator[Chart]:
    """Yield a chart to draw on, from the bottom up; a limit of None follows the values.

    ``layers`` is for a column for each of so many layers, without a vertical axis; then ``height``,
    in CSS pixels before the page scales it, is without their numbers.
    """
    with matplotlib.rc_context(STYLE):
        width = min(_CELL * layers, _GRID_WIDTH) if layers else WIDTH
        whole = height + _BELOW if layers else height
        figure = Figure(figsize=(width / 72, whole / 72))
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        yield Chart(title, caption, figure, axes, width)
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
        axes.set(xlim=x_limits, ylim=y_limits)


def labels_apart(places: Points) -> list[float]:
    """Move labels down from these places, from the top one on, so that none covers another."""
    heights: dict[int, float] = {}
    for index in sorted(range(len(places)), key=lambda i: -places[i][1]):
        x, y = places[index]
        near = [h for i, h in heights.items() if abs(places[i][0] - x) < _LABEL_WIDTH]
        heights[index] = min([y, *(height - _LABEL_HEIGHT for height in near)])
    return [heights[index] for index in range(len(places))]


def legend(entries: pd.DataFrame) -> list[tuple[str, str, str]]:
    """List colour, sign and meaning of every kind of mark among measured models."""
    trained = entries.loc[entries["axis"] != ORIGINAL, "train"].unique()
    return [
        *((axis, "●", axis) for axis in entries["axis"].unique()),
        *(("any", TRAINED[train][1], TRAINED[train][2]) for train in trained),
    ]


def trade_offs(entries: pd.DataFrame) -> list[Chart]:
    """Draw AVG-% against parameters and latencies, with the Pareto frontier."""
    shown = entries[entries["avg_percent"].notna()]
    if len(shown) < 2:
        return []
    unit, divisor = ("B", 1e9) if shown["total_params"].iloc[0] >= 2e9 else ("M", 1e6)
    costs = [
        ("Retention by size", f"parameters of the model ({unit})", shown["total_params"] / divisor),
        ("Retention by prefill time", "prefill (ms)", shown["prefill_ms"]),
        ("Retention by decode time", "decode (ms per token)", shown["decode_ms"]),
    ]
    charts = []
    for title, label, cost in costs:
        points = [*zip(cost, shown["avg_percent"], strict=True)]
        words = "no other model retains more at this cost"
        dotted = {"linestyle": (0, (2, 4)), "linewidth": 1.2}
        with drawing(title, (label, "AVG-%")) as chart:
            chart.line(frontier(points), "frontier", words, "soft", **dotted)
            _dots(chart, shown, cost)
        charts.append(chart)
        if len(shown) > _LABELLED:
            continue
        places = chart.axes.transData.transform(points).tolist()
        of_each = zip(shown["name"], points, places, labels_apart(places), strict=True)
        with matplotlib.rc_context(STYLE):
            for name, point, (x, y), lower in of_each:
                text = "".join(c if c.isprintable() else "\ufffd" for c in name)  # for XML
                right, side = (9, "left") if x < WIDTH / 2 else (-9, "right")
                how: Any = {"textcoords": "offset points", "ha": side, "va": "center"}
                chart.axes.annotate(text, point, (right, lower - y), weight="bold", **how)
    return charts


def by_ratio(entries: pd.DataFrame) -> list[Chart]:
    """Draw AVG-% over the ratio: a chart for each recovery, with a line and the papers' by axis."""
    rated = entries[entries["avg_percent"].notna() & (entries["axis"] != ORIGINAL)]
    charts = []
    for (recovery, variant), shown in rated.groupby(["recovery", "variant"], sort=False):
        if shown["achieved_ratio"].round(1).nunique() < 2:
            continue
        way = "untrained" if shown["train"].iloc[0] == "none" else recovery
        title = f"Retention at each ratio: {', '.join(filter(None, (way, variant)))}"
        limits: Any = {
            "x_limits": (0, None),
            "y_limits": (0, 1.08 * max(100, shown["avg_percent_high"].max())),
        }
        with drawing(title, (_REMOVED, "AVG-%"), **limits) as chart:
            for axis, of in shown.groupby("axis", sort=False):
                groups = of.groupby(of["achieved_ratio"].round(2))
                ratios, means = groups["achieved_ratio"].mean(), groups["avg_percent"].mean()
                points = [*zip(100 * ratios, means, strict=True)]
                chart.line(points, axis, f"{axis}, mean over seeds", axis)
                # the papers' mean over their models, at those of the ratios that they have
                found = {ratio: published(of.iloc[0], ratio) for ratio in ratios}
                there = {100 * r: fmean(value for _, value in found[r]) for r in found if found[r]}
                if there:
                    name, dotted = f"{axis}, mean of the paper's models", (0, (1, 2))
                    chart.line([*there.items()], f"{axis} published", name, axis, linestyle=dotted)
            _dots(chart, shown, 100 * shown["achieved_ratio"])
        charts.append(chart)
    return charts


def loss_curves(steps: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Draw a chart for each component of the loss."""
    charts = []
    for name in (name for name in steps[0] if name.startswith("loss")):
        rows = [(row["step"], row[name]) for row in steps if name in row]
        if len(rows) < 2:
            continue
        title = "Sum of the losses" if name == "loss" else name.removeprefix("loss_")
        with drawing(title, ("step", "loss"), y_limits=(0, None)) as chart:
            chart.line(rows, "training", "training samples", "depth")
            if len(rows) <= _MANY:
                texts = [f"step {step:g}: {value:.4g}" for step, value in rows]
                drawn = chart.axes.scatter(*zip(*rows, strict=True), **STYLES["tiny"])
                chart.mark(drawn, "tiny", texts)
        charts.append(chart)
    return charts


def allocation(plan: Plan) -> Chart:
    """Draw the parameters that every layer keeps, attention, MLP and other weights apart."""
    shapes = plan.before.layers
    largest = max(shape.params for shape in shapes)
    bars: dict[str, list[tuple[float, ...]]] = {"mlp": [], "attention": [], "rest": [], "whole": []}
    texts = []
    for index, shape in enumerate(shapes):
        kept = plan.shapes.get(index, shape.with_units(0, 0, 0))
        mlp = kept.intermediate_size * kept.neuron_params
        mlp += kept.num_experts * kept.expert_fixed_params
        attention = kept.num_kv_heads * kept.kv_group_params
        heights = {"mlp": (0, mlp), "attention": (mlp, attention), "whole": (0, shape.params)}
        heights["rest"] = (mlp + attention, kept.fixed_params * (index in plan.layers))
        for look, (bottom, height) in heights.items():
            bars[look].append((index + 0.08, bottom / largest, 0.84, height / largest))
        units = (
            f"{kept.num_kv_heads} of {shape.num_kv_heads} KV groups, "
            f"{kept.intermediate_size} of {shape.intermediate_size} neurons"
        )
        if shape.num_experts:
            units += f", {kept.num_experts} of {shape.num_experts} experts"
        texts.append(f"layer {index}: {units if index in plan.layers else 'removed'}")
    caption = "Height: parameters. Outline: before pruning. Removed layers are crossed."
    size: Any = {"y_limits": (0, 1), "layers": len(shapes), "height": _BAR}
    with drawing("What each layer keeps", caption=caption, **size) as chart:
        for look, rows in bars.items():
            chart.bars(rows, look, texts, STYLES[look])
        gone = [i for i in range(len(shapes)) if i not in plan.layers]
        chart.crosses([(i + 0.5, shapes[i].params / largest / 2) for i in gone])
    return chart


def score_maps(plan: Plan, found: Sequence[Scores]) -> list[Chart]:
    """Draw a heatmap of the scores for each kind of unit; removed units are crossed."""
    maps = []
    for scores in found:
        layers = [] if scores.layer is None else [value.reshape(1) for value in scores.layer]
        stay = [[0] if layer in plan.layers else [] for layer in range(len(layers))]
        kinds: dict[str, tuple[Sequence[Tensor] | None, Sequence[Sequence[int]]]] = {
            "Layers": (layers, stay),
            "KV groups": (scores.kv_group, plan.kv_groups),
            "Neurons": (scores.neuron, plan.neurons),
            "Experts": (scores.expert, plan.experts),
        }
        for kind, (values, kept) in kinds.items():
            if values is not None and any(map(len, values)):
                maps.append(_heatmap(kind, scores.criterion, values, kept))
    return maps


def _heatmap(
    kind: str, criterion: str, values: Sequence[Tensor], kept: Sequence[Sequence[int]]
) -> Chart:
    """Draw a column of cells for each layer; ranks give colours, as magnitudes vary."""
    columns, cells, n = list(values), dict[tuple[int, int], str](), NEURON_ROWS
    shares = [len(stay) / max(len(of), 1) for stay, of in zip(kept, values, strict=True)]
    name = {"KV groups": ", KV group {}", "Experts": ", expert {}"}.get(kind, "")
    for layer, of in enumerate(values):
        if kind != "Neurons":
            for unit, value in enumerate(of.tolist()):
                told = f"{value:.3g}, {'kept' if unit in kept[layer] else 'removed'}"
                cells[layer, unit] = f"layer {layer}{name.format(unit)}: {told}"
        elif len(of):  # shares of the layer's neurons, best first
            logs = of.clamp(min=1e-30).log10().sort(descending=True).values
            columns[layer] = torch.stack([part.mean() for part in logs.tensor_split(n)])
            for row, value in enumerate(columns[layer].tolist()):
                told = f"about {10**value:.3g}; {shares[layer]:.0%} kept"
                place = f"best {row / n:.0%} to {(row + 1) / n:.0%}"
                cells[layer, row] = f"layer {layer}, {place}: {told}"
    order = torch.cat(columns).argsort().argsort().float()
    strengths = (order / max(len(order) - 1, 1)).tolist()
    colours = [to_rgba(COLOURS["heat"], 0.06 + 0.94 * strength) for strength in strengths]
    style = {"facecolors": colours, "edgecolors": COLOURS["paper"], "linewidths": 1.2}
    height, caption = _CELL, "Crossed: removed."
    if kind == "Neurons":
        height, caption = _CELL // 2, "Each layer's neurons, best on top. Line: number kept."
    caption = f"Strong colour: high score, kept first. {caption}"
    rows = 1 + max(row for _, row in cells)
    size: Any = {"y_limits": (rows, 0), "layers": len(columns), "height": rows * height}
    with drawing(f"{kind} by {criterion}", caption=caption, **size) as chart:
        squares = [(layer, row, 1, 1) for layer, row in cells]
        chart.bars(squares, "heat", list(cells.values()), style)
        if kind == "Neurons":
            cut = [layer for layer, of in enumerate(values) if len(of)]
            ends = ([n * shares[i] for i in cut], cut, [i + 1 for i in cut])
            texts = [f"layer {i}: {shares[i]:.0%} kept" for i in cut]
            chart.mark(chart.axes.hlines(*ends, **STYLES["cut"]), "cut", texts)
        else:
            chart.crosses([(x + 0.5, y + 0.5) for x, y in cells if y not in kept[x]])
    return chart


def frontier(points: Points) -> list[tuple[float, float]]:
    """Return the Pareto frontier of pairs of a cost and a benefit, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, benefit in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or benefit > best[-1][1]:
            best.append((cost, benefit))
    return best


def _dots(chart: Chart, entries: pd.DataFrame, xs: Iterable[float]) -> None:
    """Draw a mark for each model, and a bar for its interval; filled if something was trained."""
    for x, (_, row) in zip(xs, entries.iterrows(), strict=True):
        axis, train, kept = row["axis"], row["train"], row["avg_percent"]
        colour = COLOURS.get("ink" if axis == ORIGINAL else axis, COLOURS["soft"])
        if not math.isnan(row["avg_percent_low"]):
            bar: Any = {"colors": colour, "linewidths": 1.5, "alpha": 0.65}
            chart.axes.vlines(x, row["avg_percent_low"], row["avg_percent_high"], **bar)
        text = (
            f"{row['name']}: AVG-% {interval(row, 'avg_percent')}, {row['achieved_ratio']:.1%} "
            f"removed, {row['total_params'] / 1e6:.1f} M parameters, prefill "
            f"{row['prefill_ms']:.1f} ms, decode {row['decode_ms']:.1f} ms"
        )
        inside = COLOURS["paper"] if train == "none" and axis != ORIGINAL else colour
        style: Any = {"s": 75, "marker": TRAINED[train][0], "linewidth": 2, "zorder": 3}
        drawn = chart.axes.scatter([x], [kept], facecolor=inside, edgecolor=colour, **style)
        chart.mark(drawn, f"mark {axis}", [text], row["link"])
