"""The charts of a report: entries, plans, scores and trainings → drawings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from torch import Tensor

from slimvlm.planning.plan import Plan
from slimvlm.runs.recipes import published
from slimvlm.runs.report.record import Entry, Pruning, Training
from slimvlm.runs.report.svg import COLOURS, STYLE, Chart, Marks, blank

TRAINED = {
    None: ("o", "○", "not trained"),
    "projector": ("^", "▲", "projector trained"),
    "lora": ("s", "■", "LoRA trained"),
    "full": ("D", "◆", "all trained"),
}
"""How a mark shows what was trained: in a chart, in its legend, and in words."""
NEURON_ROWS = 24
"""Rows of the neurons' heatmap: shares of a layer's neurons, best first."""
WIDTH, HEIGHT = 400, 270
_LABELLED = 5
"""Marks have their names beside them up to so many."""
_LABEL_WIDTH, _LABEL_HEIGHT = 110, 15
_MANY = 66
"""Points of a line that are marked at most."""
_CELL, _GRID_WIDTH = 28, 1100
_BAR = 150


def legend(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """Colour, sign and meaning of every kind of mark among the entries."""
    axes = dict.fromkeys(entry.axis or "original" for entry in entries)
    trained = dict.fromkeys(entry.train for entry in entries if not entry.is_original)
    return [
        *((axis, "●", axis) for axis in axes),
        *(("any", TRAINED[train][1], TRAINED[train][2]) for train in trained),
    ]


def overview(entries: Sequence[Entry]) -> list[Chart]:
    """All charts of the entries, model by model: over the ratio, and trade-offs."""
    charts: list[Chart] = []
    for model in dict.fromkeys(entry.model for entry in entries):
        ours = [entry for entry in entries if entry.model == model]
        charts += [*by_ratio(ours), *trade_offs(ours)]
    return charts


@rc_context(STYLE)
def trade_offs(entries: Sequence[Entry]) -> list[Chart]:
    """AVG-% against parameters and latencies, with the frontier that no other model beats."""
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
        chart = _chart(title, label, "AVG-%")
        xs = [cost(entry) for entry in shown]
        best = frontier([(x, entry.percent or 0.0) for x, entry in zip(xs, shown, strict=True)])
        name = "no other model keeps more at this cost"
        _line(chart, best, "frontier", name, "soft", linestyle=(0, (2, 4)), linewidth=1.2)
        _dots(chart, shown, xs)
        if len(shown) <= _LABELLED:
            _name(chart, shown, xs)
        charts.append(chart)
    return charts


@rc_context(STYLE)
def by_ratio(entries: Sequence[Entry]) -> list[Chart]:
    """AVG-% over the ratio: a chart for each way, a line for each axis and for the study's."""
    ways: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.percent is not None and not entry.is_original:
            ways.setdefault((entry.recovery, entry.variant), []).append(entry)
    several = [way for way in ways.values() if len({round(entry.ratio, 1) for entry in way}) > 1]
    return [_ratio_chart(alike) for alike in several]


def _ratio_chart(shown: Sequence[Entry]) -> Chart:
    first = shown[0]
    way = filter(None, (first.recovery if first.train else "untrained", first.variant))
    chart = _chart(
        f"Kept at each ratio: {', '.join(way)}", "removed share of the backbone (%)", "AVG-%"
    )
    for axis in dict.fromkeys(entry.axis for entry in shown):
        means = _means_by_ratio([entry for entry in shown if entry.axis == axis])
        _line(chart, means, axis, f"{axis}, mean over seeds", axis)
        there = _published_means(first, axis, [ratio / 100 for ratio, _ in means])
        if there:
            name = f"{axis}, mean of the study's models"
            _line(chart, there, f"{axis} published", name, axis, linestyle=(0, (1, 2)))
    _dots(chart, shown, [100 * entry.ratio for entry in shown])
    chart.axes.set_xlim(left=0)
    highest = max(100.0, *(entry.high or 0.0 for entry in shown))
    chart.axes.set_ylim(0, 1.08 * highest)
    return chart


@rc_context(STYLE)
def loss_curves(training: Training) -> list[Chart]:
    """Draw a chart for each component of the loss."""
    names = [name for name in training.steps[0] if name.startswith("loss")]
    return [chart for name in names if (chart := _loss_curve(training, name)) is not None]


def _loss_curve(training: Training, name: str) -> Chart | None:
    rows = [(row["step"], row[name]) for row in training.steps if name in row]
    if len(rows) < 2:
        return None
    title = "Sum of the losses" if name == "loss" else name.removeprefix("loss_")
    chart = _chart(title, "step", "loss")
    _line(chart, rows, "training", "training samples", "depth")
    if len(rows) <= _MANY:
        texts = [f"step {step:g}: {value:.4g}" for step, value in rows]
        xs, ys = zip(*rows, strict=True)
        dots = chart.axes.scatter(xs, ys, s=12, color=COLOURS["ink"])
        chart.say(dots, Marks("tiny", texts))
    chart.axes.set_ylim(bottom=0)
    return chart


@rc_context(STYLE)
def allocation(plan: Plan) -> Chart:
    """What every layer keeps of its parameters, attention and MLP apart."""
    shapes = plan.before.layers
    largest = max(shape.params for shape in shapes)
    caption = "Height: parameters. Outline: before pruning. Layers that are gone are crossed."
    chart = _by_layer("What each layer keeps", caption, len(shapes), 1.0, _BAR)
    chart.axes.set_ylim(0, 1)
    for index, shape in enumerate(shapes):
        kept = plan.shapes.get(index, shape.with_units(0, 0, 0))
        mlp = kept.intermediate_size * kept.neuron_params
        mlp += kept.num_experts * kept.expert_fixed_params
        attention = kept.num_kv_heads * kept.kv_group_params
        units = (
            f"{kept.num_kv_heads} of {shape.num_kv_heads} KV groups, "
            f"{kept.intermediate_size} of {shape.intermediate_size} neurons"
        )
        if shape.num_experts:
            units += f", {kept.num_experts} of {shape.num_experts} experts"
        text = f"layer {index}: {units if index in plan.layers else 'removed'}"
        bars: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
            ("mlp", 0, mlp, {"facecolor": COLOURS["depth"]}),
            ("attention", mlp, attention, {"facecolor": COLOURS["width"]}),
            ("whole", 0, shape.params, {"fill": False, "edgecolor": COLOURS["soft"]}),
        )
        for look, bottom, height, colours in bars:
            place = (index + 0.08, bottom / largest)
            bar = Rectangle(place, 0.84, height / largest, **colours)
            chart.say(chart.axes.add_patch(bar), Marks(look, [text]))
    gone = [i for i in range(len(shapes)) if i not in plan.layers]
    return _crossed(chart, [(i + 0.5, shapes[i].params / largest / 2) for i in gone])


@rc_context(STYLE)
def score_maps(pruning: Pruning) -> list[Chart]:
    """Heatmaps of the scores, one for each kind of unit, with what was kept."""
    maps = []
    for scores in pruning.scores:
        if scores.layer is not None:
            units = [values.reshape(1) for values in scores.layer]
            stay = [[0] if layer in pruning.plan.layers else [] for layer in range(len(units))]
            maps.append(_unit_map(f"Layers by {scores.criterion}", "", units, stay))
        if scores.kv_group is not None:
            title, kept = f"KV groups by {scores.criterion}", pruning.plan.kv_groups
            maps.append(_unit_map(title, ", KV group {}", scores.kv_group, kept))
        if scores.neuron is not None:
            title = f"Neurons by {scores.criterion}"
            maps.append(_neuron_map(title, scores.neuron, pruning.plan))
        if scores.expert is not None and any(map(len, scores.expert)):
            title, kept = f"Experts by {scores.criterion}", pruning.plan.experts
            maps.append(_unit_map(title, ", expert {}", scores.expert, kept))
    return maps


def _unit_map(
    title: str, name: str, values: Sequence[Tensor], kept: Sequence[Sequence[int]]
) -> Chart:
    """A cell for each unit; those that are gone are crossed."""
    cells = {
        (layer, unit): f"layer {layer}{name.format(unit)}: {value:.3g}, "
        f"{'kept' if unit in kept[layer] else 'removed'}"
        for layer, of in enumerate(values)
        for unit, value in enumerate(of.tolist())
    }
    strengths = torch.cat(list(values))
    chart = _heatmap(title, len(values), cells, strengths, _CELL, "Crossed: removed.")
    return _crossed(chart, [(x + 0.5, y + 0.5) for x, y in cells if y not in kept[x]])


def _neuron_map(title: str, values: Sequence[Tensor], plan: Plan) -> Chart:
    """Shares of each layer's neurons, best first, and a line at how many were kept."""
    bins = torch.stack([torch.stack(_binned(of)) for of in values])
    shares = [len(kept) / max(len(of), 1) for kept, of in zip(plan.neurons, values, strict=True)]
    cells = {
        (layer, row): f"layer {layer}, best {row / NEURON_ROWS:.0%} to "
        f"{(row + 1) / NEURON_ROWS:.0%}: about {10**value:.3g}; {shares[layer]:.0%} kept"
        for layer, column in enumerate(bins.tolist())
        for row, value in enumerate(column)
    }
    caption = "Each layer's neurons, best on top. Line: so many were kept."
    chart = _heatmap(title, len(values), cells, bins, _CELL / 2, caption)
    heights = [NEURON_ROWS * share for share in shares]
    starts, ends = range(len(values)), range(1, len(values) + 1)
    cuts = chart.axes.hlines(heights, starts, ends, COLOURS["lost"], linewidth=2.5)
    kept = [f"layer {index}: {share:.0%} kept" for index, share in enumerate(shares)]
    chart.say(cuts, Marks("cut", kept))
    return chart


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


def labels_apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """How high labels at these places stand so that none is on another, from the top down."""
    heights: dict[int, float] = {}
    for index in sorted(range(len(places)), key=lambda i: -places[i][1]):
        x, y = places[index]
        near = [h for i, h in heights.items() if abs(places[i][0] - x) < _LABEL_WIDTH]
        heights[index] = min([y, *(height - _LABEL_HEIGHT for height in near)])
    return [heights[index] for index in range(len(places))]


def _chart(title: str, x_label: str, y_label: str) -> Chart:
    chart = blank(title, WIDTH, HEIGHT)
    chart.figure.subplots_adjust(left=0.13, right=0.97, top=0.96, bottom=0.17)
    chart.axes.set(xlabel=x_label, ylabel=y_label)
    chart.axes.margins(0.08)
    chart.axes.locator_params(nbins=6)
    return chart


def _line(
    chart: Chart,
    points: Iterable[tuple[float, float]],
    look: str,
    name: str,
    colour: str,
    **style: Any,
) -> None:
    (line,) = chart.axes.plot(*zip(*points, strict=True), color=_colour(colour), **style)
    chart.say(line, Marks(f"line {look}", [name]))


def _dots(chart: Chart, entries: Sequence[Entry], xs: Sequence[float]) -> None:
    """A mark for each entry, and a bar for its interval; filled if something was trained."""
    for entry, x in zip(entries, xs, strict=True):
        assert entry.percent is not None
        colour = _colour(entry.axis)
        interval = ""
        if entry.low is not None and entry.high is not None:
            chart.axes.vlines(x, entry.low, entry.high, colour, linewidth=1.5, alpha=0.65)
            interval = f" [{entry.low:.1f}, {entry.high:.1f}]"
        text = (
            f"{entry.name}: AVG-% {entry.percent:.1f}{interval}, {entry.ratio:.1%} removed, "
            f"{entry.total_params / 1e6:.1f} M parameters, prefill {entry.prefill_ms:.1f} ms, "
            f"decode {entry.decode_ms:.1f} ms"
        )
        is_filled = entry.train or entry.is_original
        dot = chart.axes.scatter(
            x,
            entry.percent,
            s=75,
            marker=TRAINED[entry.train][0],
            facecolor=colour if is_filled else COLOURS["paper"],
            edgecolor=colour,
            linewidth=2,
            zorder=3,
        )
        chart.say(dot, Marks(f"mark {entry.axis or 'original'}", [text], [entry.link]))


def _name(chart: Chart, entries: Sequence[Entry], xs: Sequence[float]) -> None:
    """The names of entries beside their marks."""
    points = [(x, entry.percent or 0.0) for x, entry in zip(xs, entries, strict=True)]
    places = [(float(x), float(y)) for x, y in chart.axes.transData.transform(points)]
    for entry, point, (left, y), height in zip(
        entries, points, places, labels_apart(places), strict=True
    ):
        is_left = left < WIDTH / 2
        chart.axes.annotate(
            _printable(entry.name),
            point,
            (9 if is_left else -9, height - y),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="center",
            weight="bold",
        )


def _printable(text: str) -> str:
    """The text, without characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _colour(name: str) -> str:
    """The colour of an axis of pruning or of a variable of the page."""
    return COLOURS.get(name or "ink", COLOURS["soft"])


def _by_layer(title: str, caption: str, count: int, rows: float, height: float) -> Chart:
    """A drawing with a column for each layer, the first row on top."""
    width = min(_CELL * count, _GRID_WIDTH)
    below = 24
    chart = blank(title, width, height + below, caption)
    chart.figure.subplots_adjust(left=0, right=1, top=1, bottom=below / (height + below))
    step = 5 if count <= 40 else 10
    named = range(0, count, step)
    chart.axes.set(xlim=(0, count), ylim=(rows, 0))
    chart.axes.yaxis.set_visible(False)
    chart.axes.set_xticks([index + 0.5 for index in named], list(map(str, named)))
    chart.axes.spines["bottom"].set_visible(False)
    return chart


def _heatmap(
    title: str,
    layers: int,
    cells: Mapping[tuple[int, int], str],
    values: Tensor,
    height: float,
    caption: str,
) -> Chart:
    """A cell at each layer and row, with what it says; the higher its value, the stronger."""
    rows = 1 + max(row for _, row in cells)
    whole = f"Strong colour: high score, kept first. {caption}"
    chart = _by_layer(title, whole, layers, rows, rows * height)
    drawn = PatchCollection(
        [Rectangle(place, 1, 1) for place in cells],
        facecolors=[to_rgba(COLOURS["heat"], 0.06 + 0.94 * s) for s in _strengths(values)],
        edgecolors=COLOURS["paper"],
        linewidths=1.2,
    )
    chart.axes.add_collection(drawn)
    chart.say(drawn, Marks("heat", list(cells.values())))
    return chart


def _crossed(chart: Chart, places: Sequence[tuple[float, float]]) -> Chart:
    """Crosses at what is gone."""
    if places:
        xs, ys = zip(*places, strict=True)
        crosses = chart.axes.scatter(xs, ys, s=60, color=COLOURS["lost"], marker="x", zorder=3)
        chart.say(crosses, Marks("gone", ["removed"] * len(places)))
    return chart


def _strengths(values: Tensor) -> list[float]:
    """Scores between 0 and 1 by rank, since their sizes span orders of magnitude."""
    order = values.flatten().argsort().argsort().float()
    return (order / max(len(order) - 1, 1)).tolist()


def _binned(values: Tensor) -> list[Tensor]:
    """Mean logarithm of the scores in each row of the neurons' heatmap, best first."""
    ordered = values.clamp(min=1e-30).log10().sort(descending=True).values
    return [part.mean() for part in ordered.tensor_split(NEURON_ROWS)]


def _means_by_ratio(entries: Sequence[Entry]) -> list[tuple[float, float]]:
    """Mean over seeds at each asked ratio."""
    groups: dict[float, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.ratio):
        groups.setdefault(round(entry.ratio, 2), []).append(entry)
    return [
        (100 * fmean(e.ratio for e in group), fmean(e.percent or 0.0 for e in group))
        for group in groups.values()
    ]


def _published_means(entry: Entry, axis: str, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """The study's AVG-%, a mean over its models, at those of the ratios that it has."""
    if entry.fraction < 1:
        return []
    found = [(r, published(axis, entry.train, entry.loss, r)) for r in ratios]
    return [(100 * r, fmean(value for _, value in rows)) for r, rows in found if rows]
