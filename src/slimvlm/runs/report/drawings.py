"""The charts of a report: entries, plans, scores and trainings → marks and cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from slimvlm.planning.plan import Plan
from slimvlm.runs.recipes import published
from slimvlm.runs.report.charts import (
    CELL,
    WIDTH,
    Cell,
    Chart,
    Grid,
    Line,
    Mark,
    axes,
    frontier,
    labels_apart,
    layer_columns,
    polyline,
)
from slimvlm.runs.report.record import Entry, Pruning, Training
from slimvlm.scoring.scores import Scores

SHAPES = {None: "circle", "projector": "triangle", "lora": "square", "full": "diamond"}
"""How a mark shows what was trained."""
_TRAINED = {
    None: "not trained",
    "projector": "projector trained",
    "lora": "LoRA trained",
    "full": "all trained",
}
NEURON_ROWS = 24
"""Rows of the neurons' heatmap: shares of a layer's neurons, best first."""
_BAR = 60
_LABELLED = 5


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
    return [_trade_off(shown, *cost) for cost in costs]


def legend(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """CSS classes, shape and meaning of every kind of mark among the entries."""
    axes_shown = dict.fromkeys(entry.axis for entry in entries)
    trained = dict.fromkeys(entry.train for entry in entries if not entry.is_original)
    return [
        *((axis or "original", "circle", axis or "original") for axis in axes_shown),
        *(
            (f"any {'trained' if train else 'untrained'}", SHAPES[train], _TRAINED[train])
            for train in trained
        ),
    ]


def overview(entries: Sequence[Entry]) -> list[Chart]:
    """All charts of the entries, model by model: over the ratio, and trade-offs."""
    charts: list[Chart] = []
    for model in dict.fromkeys(entry.model for entry in entries):
        ours = [entry for entry in entries if entry.model == model]
        charts += [*by_ratio(ours), *trade_offs(ours)]
    return charts


def by_ratio(entries: Sequence[Entry]) -> list[Chart]:
    """AVG-% over the ratio: a chart for each way, a line for each axis and for the study's."""
    shown = [entry for entry in entries if entry.percent is not None and not entry.is_original]
    ways: dict[tuple[str, str], list[Entry]] = {}
    for entry in shown:
        ways.setdefault((entry.recovery, entry.variant), []).append(entry)
    several = [way for way in ways.values() if len({round(entry.ratio, 1) for entry in way}) > 1]
    return [_ratio_chart(alike) for alike in several]


def _ratio_chart(shown: Sequence[Entry]) -> Chart:
    xs = [0.0, *(100 * entry.ratio for entry in shown)]
    ys = [0.0, 100.0, *(entry.high or 0.0 for entry in shown)]
    x, y = axes("removed share of the backbone (%)", xs, "AVG-%", ys, 0.0)
    lines = []
    for axis in dict.fromkeys(entry.axis for entry in shown):
        means = _means_by_ratio([entry for entry in shown if entry.axis == axis])
        lines.append(Line(polyline(x, y, means), axis, f"{axis}, mean over seeds"))
        there = _published_means(shown[0], axis, [ratio / 100 for ratio, _ in means])
        if there:
            name = f"{axis}, mean of the study's models"
            lines.append(Line(polyline(x, y, there), f"{axis} published", name))
    marks = tuple(_mark(entry, x.place(100 * entry.ratio), y.place, False) for entry in shown)
    first = shown[0]
    way = filter(None, (first.recovery if first.train else "untrained", first.variant))
    return Chart(f"Kept at each ratio: {', '.join(way)}", x, y, marks, tuple(lines))


def _published_means(entry: Entry, axis: str, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """The study's AVG-%, a mean over its models, at those of the ratios that it has."""
    if entry.fraction < 1:
        return []
    found = [(r, published(axis, entry.train, entry.loss, r)) for r in ratios]
    return [(100 * r, fmean(value for _, value in rows)) for r, rows in found if rows]


def loss_curves(training: Training) -> list[Chart]:
    """A chart for each component of the loss; dashed: on held-out samples."""
    names = [name for name in training.steps[0] if name.startswith("loss")]
    return [chart for name in names if (chart := _loss_curve(training, name)) is not None]


def allocation(plan: Plan) -> Grid:
    """What every layer keeps of its parameters, attention and MLP apart."""
    before = plan.before
    largest = max(shape.params for shape in before.layers)
    cells: list[Cell] = []
    crosses = []
    for index, shape in enumerate(before.layers):
        left, whole = index * CELL, _BAR * shape.params / largest
        groups, neurons = len(plan.kv_groups[index]), len(plan.neurons[index])
        attention = _BAR * groups * shape.kv_group_params / largest
        mlp = _BAR * neurons * shape.neuron_params / largest
        text = (
            f"layer {index}: {groups} of {shape.num_kv_heads} KV groups, "
            f"{neurons} of {shape.intermediate_size} neurons"
            if groups
            else f"layer {index}: removed"
        )
        cells.append(Cell(left + 1, _BAR - whole, CELL - 2, whole, 1, "whole", text))
        if groups:
            cells.append(Cell(left + 1, _BAR - mlp, CELL - 2, mlp, 1, "mlp", text))
            top = _BAR - mlp - attention
            cells.append(Cell(left + 1, top, CELL - 2, attention, 1, "attention", text))
        else:
            crosses.append((left + CELL / 2, _BAR - whole / 2))
    count = before.num_layers
    return Grid(
        title="What each layer keeps",
        caption="Height: parameters. Outline: before pruning. Layers that are gone are crossed.",
        cells=tuple(cells),
        width=count * CELL,
        height=_BAR,
        columns=layer_columns(count, CELL),
        crosses=tuple(crosses),
    )


def score_maps(pruning: Pruning) -> list[Grid]:
    """Heatmaps of the scores, one for each kind of unit, with what was kept."""
    maps = []
    for scores in pruning.scores:
        if scores.layer is not None:
            maps.append(_layer_map(scores, pruning.plan))
        if scores.kv_group is not None:
            maps.append(_group_map(scores, pruning.plan))
        if scores.neuron is not None:
            maps.append(_neuron_map(scores, pruning.plan))
    return maps


def _trade_off(
    shown: Sequence[Entry], title: str, label: str, cost: Callable[[Entry], float]
) -> Chart:
    ys = [value for e in shown for value in (e.percent, e.low, e.high) if value is not None]
    x, y = axes(label, [cost(entry) for entry in shown], "AVG-%", ys)
    best = frontier([(cost(entry), entry.percent or 0.0) for entry in shown])
    line = Line(polyline(x, y, best), "frontier", "no other model keeps more at this cost")
    few = len(shown) <= _LABELLED
    marks = [_mark(entry, x.place(cost(entry)), y.place, label=few) for entry in shown]
    return Chart(title, x, y, labels_apart(marks) if few else tuple(marks), (line,))


def _mark(entry: Entry, at: float, place: Callable[[float], float], label: bool) -> Mark:
    assert entry.percent is not None
    interval = "" if entry.low is None else f" [{entry.low:.1f}, {entry.high:.1f}]"
    return Mark(
        x=at,
        y=place(entry.percent),
        text=f"{entry.name}: AVG-% {entry.percent:.1f}{interval}, {entry.ratio:.1%} removed, "
        f"{entry.total_params / 1e6:.1f} M parameters, prefill {entry.prefill_ms:.1f} ms, "
        f"decode {entry.decode_ms:.1f} ms",
        look=f"{entry.axis or 'original'} {'trained' if entry.train else 'untrained'}",
        shape=SHAPES[entry.train],
        low=None if entry.low is None else place(entry.low),
        high=None if entry.high is None else place(entry.high),
        label=entry.name if label else "",
        link=entry.link,
        anchor="end" if at > WIDTH / 2 else "start",
    )


def _means_by_ratio(entries: Sequence[Entry]) -> list[tuple[float, float]]:
    """Mean over seeds at each asked ratio."""
    groups: dict[float, list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.ratio):
        groups.setdefault(round(entry.ratio, 2), []).append(entry)
    return [
        (
            100 * sum(e.ratio for e in group) / len(group),
            sum(e.percent or 0.0 for e in group) / len(group),
        )
        for group in groups.values()
    ]


def _loss_curve(training: Training, name: str) -> Chart | None:
    rows = [(row["step"], row[name]) for row in training.steps if name in row]
    held_out = [(r["step"], r[f"eval_{name}"]) for r in training.evaluations if f"eval_{name}" in r]
    if len(rows) < 2:
        return None
    everything = rows + held_out
    title = "Sum of the losses" if name == "loss" else name.removeprefix("loss_")
    xs, ys = zip(*everything, strict=True)
    x, y = axes("step", xs, "loss", ys, 0.0)
    lines = [Line(polyline(x, y, rows), "training", "training samples")]
    if held_out:
        lines.append(Line(polyline(x, y, held_out), "held-out", "held-out samples"))
    marks = tuple(
        Mark(x.place(step), y.place(value), f"step {step:g}: {value:.4g}", "tiny")
        for step, value in everything
    )
    return Chart(title, x, y, marks if len(marks) <= 2 * WIDTH / CELL else (), tuple(lines))


def _strengths(values: Tensor) -> Tensor:
    """Scores between 0 and 1 by rank, since their sizes span orders of magnitude."""
    order = values.flatten().argsort().argsort().float()
    return (order / max(len(order) - 1, 1)).reshape(values.shape)


def _layer_map(scores: Scores, plan: Plan) -> Grid:
    assert scores.layer is not None
    strengths = _strengths(scores.layer).tolist()
    kept = set(plan.layers)
    cells = [
        Cell(
            *(index * CELL, 0, CELL, 2 * CELL, strengths[index]),
            "" if index in kept else "gone",
            f"layer {index}: {value:.3g}, {'kept' if index in kept else 'removed'}",
        )
        for index, value in enumerate(scores.layer.tolist())
    ]
    gone = [((i + 0.5) * CELL, CELL) for i in range(len(cells)) if i not in kept]
    return _grid("Layers", scores, cells, len(cells), 2 * CELL, crosses=tuple(gone))


def _group_map(scores: Scores, plan: Plan) -> Grid:
    assert scores.kv_group is not None
    cells, gone = [], []
    ranked = _strengths(torch.cat(list(scores.kv_group)))
    strengths = ranked.split([len(values) for values in scores.kv_group])
    for layer, values in enumerate(scores.kv_group):
        for group, value in enumerate(values.tolist()):
            kept = group in plan.kv_groups[layer]
            word = "kept" if kept else "removed"
            text = f"layer {layer}, KV group {group}: {value:.3g}, {word}"
            place = (layer * CELL, group * CELL, CELL, CELL)
            cells.append(Cell(*place, float(strengths[layer][group]), "", text))
            if not kept:
                gone.append(((layer + 0.5) * CELL, (group + 0.5) * CELL))
    rows = max(len(values) for values in scores.kv_group)
    count = len(scores.kv_group)
    return _grid("KV groups", scores, cells, count, rows * CELL, crosses=tuple(gone))


def _neuron_map(scores: Scores, plan: Plan) -> Grid:
    assert scores.neuron is not None
    height = CELL / 2
    cells, cuts = [], []
    bins = list(map(_binned, scores.neuron))
    strengths = _strengths(torch.stack([torch.stack(column) for column in bins])).tolist()
    for layer, column in enumerate(bins):
        kept = len(plan.neurons[layer]) / len(scores.neuron[layer])
        cuts.append((layer * CELL, (layer + 1) * CELL, kept * NEURON_ROWS * height))
        for row, mean in enumerate(column):
            share = f"{row / NEURON_ROWS:.0%} to {(row + 1) / NEURON_ROWS:.0%}"
            text = f"layer {layer}, best {share}: about {10 ** float(mean):.3g}; {kept:.0%} kept"
            place = (layer * CELL, row * height, CELL, height)
            cells.append(Cell(*place, strengths[layer][row], "", text))
    count = len(scores.neuron)
    caption = "Each layer's neurons, best on top. Line: so many were kept."
    return _grid("Neurons", scores, cells, count, NEURON_ROWS * height, caption, tuple(cuts))


def _binned(values: Tensor) -> list[Tensor]:
    """Mean logarithm of the scores in each row of the neurons' heatmap, best first."""
    ordered = values.clamp(min=1e-30).log10().sort(descending=True).values
    return [part.mean() for part in ordered.tensor_split(NEURON_ROWS)]


def _grid(
    title: str,
    scores: Scores,
    cells: Sequence[Cell],
    count: int,
    height: float,
    caption: str = "Crossed: removed.",
    cuts: tuple[tuple[float, float, float], ...] = (),
    crosses: tuple[tuple[float, float], ...] = (),
) -> Grid:
    return Grid(
        title=f"{title} by {scores.criterion}",
        caption=f"Strong colour: high score, kept first. {caption}",
        cells=tuple(cells),
        width=count * CELL,
        height=height,
        columns=layer_columns(count, CELL),
        cuts=cuts,
        crosses=crosses,
    )
