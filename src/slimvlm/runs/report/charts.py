"""Draw the charts of a report: entries, plans, scores and trainings → SVG in the page's colours.

Every chart is made by `draw` from marks: lines, points, bars and spans. The SVG is part of the
page: it follows dark mode and print, needs no script, and takes the page's font. Colours become CSS
variables; each mark's values become its tooltip.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any, Literal
from xml.etree.ElementTree import SubElement, fromstring, tostring

import matplotlib
import torch
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from slimvlm.core.tables import read_table
from slimvlm.planning.plan import Plan
from slimvlm.runs.recipes import expected
from slimvlm.runs.report import Entry
from slimvlm.scoring.unit_scores import Scores

_TABLES = read_table(__file__, "charts.yaml")
COLOURS: Mapping[str, str] = _TABLES["colours"]
STYLES: Mapping[str, Mapping[str, Any]] = _TABLES["styles"]
TRAINED: Mapping[str | None, tuple[str, str, str]] = _TABLES["trained"]
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
    caption: str  # how to read it; may be empty
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
            if not marks.texts:
                continue
            group = groups[f"marks-{number}"]
            group.set("class", marks.look)
            drawn = list(group.iter("path"))
            links = marks.links or [""] * len(drawn)
            for shape, text, link in zip(drawn, marks.texts, links, strict=True):
                where = shape
                if link:
                    attributes, shape.attrib = shape.attrib, {"href": f"#{link}", "tabindex": "-1"}
                    shape.tag = "a"
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
    """Draw marks, the first ones at the bottom; a limit of None follows the values.

    ``layers`` draws a column for each of so many layers, without a vertical axis; then ``height``,
    in CSS pixels before the page scales it, is without their numbers.
    """
    with matplotlib.rc_context(STYLE):
        width = min(_CELL * layers, _GRID_WIDTH) if layers else WIDTH
        whole = height + _BELOW if layers else height
        figure = Figure(figsize=(width / 72, whole / 72))
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for number, each in enumerate(marks):
            artist: Artist
            match each.kind:
                case "line":
                    artist = axes.plot(*zip(*each.rows, strict=True), **each.style)[0]
                case "points":
                    artist = axes.scatter(*zip(*each.rows, strict=True), **each.style)
                case "bars":
                    bars = [Rectangle((x, y), w, h) for x, y, w, h in each.rows]
                    artist = axes.add_collection(PatchCollection(bars, **each.style))
                case "spans":
                    ends = [[(x0, y0), (x1, y1)] for x0, y0, x1, y1 in each.rows]
                    artist = axes.add_collection(LineCollection(ends, **each.style))
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
        pairs = [pair for each in marks for pair in zip(each.rows, each.names, strict=False)]
        points = [(row[0], row[1]) for row, _ in pairs]
        placed: Any = axes.transData.transform(points) if points else ()
        places = [(float(x), float(y)) for x, y in placed]
        heights = labels_apart(places)
        for (_, name), point, (left, y), lower in zip(pairs, points, places, heights, strict=True):
            is_left = left < WIDTH / 2
            text = "".join(each if each.isprintable() else "\ufffd" for each in name)  # for XML
            beside, side = (9 if is_left else -9, lower - y), "left" if is_left else "right"
            how: Any = {"textcoords": "offset points", "ha": side, "va": "center", "weight": "bold"}
            axes.annotate(text, point, beside, **how)
    return Chart(title, caption, figure, marks)


def labels_apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """Move labels down from these places, from the top one on, so that none covers another."""
    heights: dict[int, float] = {}
    for index in sorted(range(len(places)), key=lambda i: -places[i][1]):
        x, y = places[index]
        near = [h for i, h in heights.items() if abs(places[i][0] - x) < _LABEL_WIDTH]
        heights[index] = min([y, *(height - _LABEL_HEIGHT for height in near)])
    return [heights[index] for index in range(len(places))]


def legend(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """List colour, sign and meaning of every kind of mark among the entries."""
    axes = dict.fromkeys(entry.axis or "original" for entry in entries)
    trained = dict.fromkeys(entry.train for entry in entries if not entry.is_original)
    return [
        *((axis, "●", axis) for axis in axes),
        *(("any", TRAINED[train][1], TRAINED[train][2]) for train in trained),
    ]


def trade_offs(entries: Sequence[Entry]) -> list[Chart]:
    """Draw AVG-% against parameters and latencies, with the Pareto frontier."""
    shown = [entry for entry in entries if entry.percent is not None]
    if len(shown) < 2:
        return []
    unit, divisor = ("B", 1e9) if shown[0].total_params >= 2e9 else ("M", 1e6)
    costs: list[tuple[str, str, Callable[[Entry], float]]] = [
        ("Kept against size", f"parameters of the model ({unit})",
         lambda e: e.total_params / divisor),
        ("Kept against time to read a question", "prefill (ms)", lambda e: e.prefill_ms),
        ("Kept against time to write", "decode (ms a token)", lambda e: e.decode_ms),
    ]  # fmt: skip
    charts = []
    for title, label, cost in costs:
        xs = [cost(entry) for entry in shown]
        best = frontier([(x, entry.percent or 0.0) for x, entry in zip(xs, shown, strict=True)])
        words = "no other model keeps more at this cost"
        edge = _line(best, "frontier", words, "soft", linestyle=(0, (2, 4)), linewidth=1.2)
        dots = _dots(shown, xs, are_named=len(shown) <= _LABELLED)
        charts.append(draw(title, [edge, *dots], (label, "AVG-%")))
    return charts


def by_ratio(entries: Sequence[Entry]) -> list[Chart]:
    """Draw AVG-% over the ratio: a chart per recovery, a line for each axis and the study's."""
    ways: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.percent is not None and not entry.is_original:
            ways.setdefault((entry.recovery, entry.variant), []).append(entry)
    charts = []
    for shown in ways.values():
        if len({round(entry.ratio, 1) for entry in shown}) < 2:
            continue
        first, lines = shown[0], []
        for axis in dict.fromkeys(entry.axis for entry in shown):
            groups: dict[float, list[Entry]] = {}
            for entry in sorted((e for e in shown if e.axis == axis), key=lambda e: e.ratio):
                groups.setdefault(round(entry.ratio, 2), []).append(entry)
            means = [
                (100 * fmean(e.ratio for e in group), fmean(e.percent or 0.0 for e in group))
                for group in groups.values()
            ]
            lines.append(_line(means, axis, f"{axis}, mean over seeds", axis))
            there = []  # the study's mean over its models, at those of the ratios that it has
            for ratio, _ in means if first.fraction == 1 else ():
                if found := expected(axis, first.train, first.loss, ratio / 100, False):
                    there.append((ratio, fmean(value for _, value in found)))
            if there:
                name = f"{axis}, mean of the study's models"
                dotted = _line(there, f"{axis} published", name, axis, linestyle=(0, (1, 2)))
                lines.append(dotted)
        way = filter(None, (first.recovery if first.train else "untrained", first.variant))
        title, labels = f"Kept at each ratio: {', '.join(way)}", (_REMOVED, "AVG-%")
        marks = [*lines, *_dots(shown, [100 * entry.ratio for entry in shown])]
        top = 1.08 * max(100.0, *(entry.high or 0.0 for entry in shown))
        charts.append(draw(title, marks, labels, x_limits=(0, None), y_limits=(0, top)))
    return charts


def loss_curves(steps: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Draw a chart for each component of the loss."""
    charts = []
    for name in (name for name in steps[0] if name.startswith("loss")):
        rows = [(row["step"], row[name]) for row in steps if name in row]
        if len(rows) < 2:
            continue
        marks = [_line(rows, "training", "training samples", "depth")]
        if len(rows) <= _MANY:
            texts = [f"step {step:g}: {value:.4g}" for step, value in rows]
            marks.append(Marks("points", rows, "tiny", texts, style=STYLES["tiny"]))
        title = "Sum of the losses" if name == "loss" else name.removeprefix("loss_")
        charts.append(draw(title, marks, ("step", "loss"), y_limits=(0, None)))
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
    marks = [Marks("bars", bars[look], look, texts, style=STYLES[look]) for look in bars]
    gone = [i for i in range(len(shapes)) if i not in plan.layers]
    marks += _crosses([(i + 0.5, shapes[i].params / largest / 2) for i in gone])
    caption = "Height: parameters. Outline: before pruning. Layers that are gone are crossed."
    columns: Any = {"y_limits": (0, 1), "layers": len(shapes), "height": _BAR}
    return draw("What each layer keeps", marks, caption=caption, **columns)


def score_maps(plan: Plan, found: Sequence[Scores]) -> list[Chart]:
    """Draw a heatmap of the scores for each kind of unit; removed units are crossed."""
    maps, n = [], NEURON_ROWS
    for scores in found:
        layers = [] if scores.layer is None else [value.reshape(1) for value in scores.layer]
        stay = [[0] if layer in plan.layers else [] for layer in range(len(layers))]
        kinds: list[tuple[str, str, Sequence[Tensor] | None, Sequence[Sequence[int]]]] = [
            ("Layers", "", layers, stay),
            ("KV groups", ", KV group {}", scores.kv_group, plan.kv_groups),
            ("Neurons", "", scores.neuron, plan.neurons),
            ("Experts", ", expert {}", scores.expert, plan.experts),
        ]
        for kind, name, values, kept in kinds:
            title = f"{kind} by {scores.criterion}"
            if values is None or not any(map(len, values)):
                continue
            if kind == "Neurons":  # shares of a layer's, best first, and a line at the number kept
                bins = []  # mean logarithm of the scores in each row
                for of in values:
                    logs = of.clamp(min=1e-30).log10().sort(descending=True).values
                    means = [part.mean() for part in logs.tensor_split(n)]
                    bins.append(torch.stack(means) if len(of) else of)  # some layers have none
                shares = [len(s) / max(len(of), 1) for s, of in zip(kept, values, strict=True)]
                cells = {
                    (layer, row): f"layer {layer}, best {row / n:.0%} to {(row + 1) / n:.0%}: "
                    f"about {10**value:.3g}; {shares[layer]:.0%} kept"
                    for layer, column in enumerate(bins)
                    for row, value in enumerate(column.tolist())
                }
                cut = {i: share for i, share in enumerate(shares) if len(values[i])}
                rows = [(i, n * share, i + 1, n * share) for i, share in cut.items()]
                texts = [f"layer {layer}: {share:.0%} kept" for layer, share in cut.items()]
                cuts = Marks("spans", rows, "cut", texts, style=STYLES["cut"])
                caption = "Each layer's neurons, best on top. Line: so many were kept."
                maps.append(_heatmap(title, cells, bins, [cuts], _CELL / 2, caption))
                continue
            cells = {
                (layer, unit): f"layer {layer}{name.format(unit)}: {value:.3g}, "
                f"{'kept' if unit in kept[layer] else 'removed'}"
                for layer, of in enumerate(values)
                for unit, value in enumerate(of.tolist())
            }
            crosses = _crosses([(x + 0.5, y + 0.5) for x, y in cells if y not in kept[x]])
            maps.append(_heatmap(title, cells, values, crosses, _CELL, "Crossed: removed."))
    return maps


def _heatmap(
    title: str,
    cells: Mapping[tuple[int, int], str],
    values: Sequence[Tensor],
    above: Sequence[Marks],
    height: float,
    caption: str,
) -> Chart:
    """Draw a cell at each layer and row, with its text; ranks give colours, as magnitudes vary."""
    order = torch.cat(list(values)).argsort().argsort().float()
    strengths = (order / max(len(order) - 1, 1)).tolist()
    rows = 1 + max(row for _, row in cells)
    style = {
        "facecolors": [to_rgba(COLOURS["heat"], 0.06 + 0.94 * s) for s in strengths],
        **{"edgecolors": COLOURS["paper"], "linewidths": 1.2},
    }
    squares = [(layer, row, 1, 1) for layer, row in cells]
    drawn = Marks("bars", squares, "heat", list(cells.values()), style=style)
    caption = f"Strong colour: high score, kept first. {caption}"
    columns: Any = {"y_limits": (rows, 0), "layers": len(values), "height": rows * height}
    return draw(title, [drawn, *above], caption=caption, **columns)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto frontier of pairs of a cost and a benefit, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, benefit in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or benefit > best[-1][1]:
            best.append((cost, benefit))
    return best


def _line(
    points: Sequence[tuple[float, float]], look: str, name: str, colour: str, **style: Any
) -> Marks:
    style = {"color": COLOURS.get(colour, COLOURS["soft"]), **style}
    return Marks("line", points, f"line {look}", [name], style=style)


def _dots(entries: Sequence[Entry], xs: Sequence[float], are_named: bool = False) -> list[Marks]:
    """Make a mark for each entry, and a bar for its interval; filled if something was trained."""
    marks = []
    for entry, x in zip(entries, xs, strict=True):
        assert entry.percent is not None
        colour = COLOURS.get(entry.axis or "ink", COLOURS["soft"])
        if entry.low is not None and entry.high is not None:
            bar = {"colors": colour, "linewidths": 1.5, "alpha": 0.65}
            marks.append(Marks("spans", [(x, entry.low, x, entry.high)], style=bar))
        text = (
            f"{entry.name}: AVG-% {entry.interval}, {entry.ratio:.1%} removed, "
            f"{entry.total_params / 1e6:.1f} M parameters, prefill {entry.prefill_ms:.1f} ms, "
            f"decode {entry.decode_ms:.1f} ms"
        )
        is_filled = entry.train or entry.is_original
        style = {"s": 75, "marker": TRAINED[entry.train][0], "linewidth": 2, "zorder": 3}
        style |= {"facecolor": colour if is_filled else COLOURS["paper"], "edgecolor": colour}
        look, names = f"mark {entry.axis or 'original'}", [entry.name] if are_named else []
        place = [(x, entry.percent)]
        marks.append(Marks("points", place, look, [text], [entry.link], names, style))
    return marks


def _crosses(places: Sequence[tuple[float, float]]) -> list[Marks]:
    removed = ["removed"] * len(places)
    return [Marks("points", places, "gone", removed, style=STYLES["gone"])] if places else []
