"""The charts of a report: entries, plans, scores and trainings → drawings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.colors import to_rgba
from torch import Tensor

from slimvlm.planning.plan import Plan
from slimvlm.runs.recipes import published
from slimvlm.runs.report.read import Entry, Pruning, Training
from slimvlm.runs.report.svg import COLOURS, Chart, Marks, draw

TRAINED = {
    None: ("o", "○", "not trained"),
    "projector": ("^", "▲", "projector trained"),
    "lora": ("s", "■", "LoRA trained"),
    "full": ("D", "◆", "all trained"),
}
"""How a mark shows what was trained: in a chart, in its legend, and in words."""
NEURON_ROWS = 24
"""Rows of the neurons' heatmap: shares of a layer's neurons, best first."""
_LABELLED = 5
"""Marks have their names next to them up to so many."""
_MANY = 66
"""Points of a line that are marked at most."""
_CELL, _BAR = 28, 150


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
    several = [way for way in ways.values() if len({round(entry.ratio, 1) for entry in way}) > 1]
    return [_ratio_chart(alike) for alike in several]


def _ratio_chart(shown: Sequence[Entry]) -> Chart:
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
            if found := published(axis, first.train, first.loss, ratio / 100):
                there.append((ratio, fmean(value for _, value in found)))
        if there:
            name = f"{axis}, mean of the study's models"
            lines.append(_line(there, f"{axis} published", name, axis, linestyle=(0, (1, 2))))
    way = filter(None, (first.recovery if first.train else "untrained", first.variant))
    return draw(
        f"Kept at each ratio: {', '.join(way)}",
        [*lines, *_dots(shown, [100 * entry.ratio for entry in shown])],
        ("removed share of the backbone (%)", "AVG-%"),
        x_limits=(0, None),
        y_limits=(0, 1.08 * max(100.0, *(entry.high or 0.0 for entry in shown))),
    )


def loss_curves(training: Training) -> list[Chart]:
    """Draw a chart for each component of the loss."""
    charts = []
    for name in (name for name in training.steps[0] if name.startswith("loss")):
        rows = [(row["step"], row[name]) for row in training.steps if name in row]
        if len(rows) < 2:
            continue
        marks = [_line(rows, "training", "training samples", "depth")]
        if len(rows) <= _MANY:
            texts = [f"step {step:g}: {value:.4g}" for step, value in rows]
            dots = {"s": 12, "color": COLOURS["ink"]}
            marks.append(Marks("points", rows, "tiny", texts, style=dots))
        title = "Sum of the losses" if name == "loss" else name.removeprefix("loss_")
        charts.append(draw(title, marks, ("step", "loss"), y_limits=(0, None)))
    return charts


def allocation(plan: Plan) -> Chart:
    """Draw the parameters that every layer keeps, attention and MLP apart."""
    shapes = plan.before.layers
    largest = max(shape.params for shape in shapes)
    bars: dict[str, list[tuple[float, ...]]] = {"mlp": [], "attention": [], "whole": []}
    texts = []
    for index, shape in enumerate(shapes):
        kept = plan.shapes.get(index, shape.with_units(0, 0, 0))
        mlp = kept.intermediate_size * kept.neuron_params
        mlp += kept.num_experts * kept.expert_fixed_params
        attention = kept.num_kv_heads * kept.kv_group_params
        heights = {"mlp": (0, mlp), "attention": (mlp, attention), "whole": (0, shape.params)}
        for look, (bottom, height) in heights.items():
            bars[look].append((index + 0.08, bottom / largest, 0.84, height / largest))
        units = (
            f"{kept.num_kv_heads} of {shape.num_kv_heads} KV groups, "
            f"{kept.intermediate_size} of {shape.intermediate_size} neurons"
        )
        if shape.num_experts:
            units += f", {kept.num_experts} of {shape.num_experts} experts"
        texts.append(f"layer {index}: {units if index in plan.layers else 'removed'}")
    styles: dict[str, dict[str, Any]] = {
        "mlp": {"facecolors": COLOURS["depth"]},
        "attention": {"facecolors": COLOURS["width"]},
        "whole": {"facecolors": "none", "edgecolors": COLOURS["soft"]},
    }
    marks = [Marks("bars", bars[look], look, texts, style=styles[look]) for look in bars]
    gone = [i for i in range(len(shapes)) if i not in plan.layers]
    marks += _crosses([(i + 0.5, shapes[i].params / largest / 2) for i in gone])
    caption = "Height: parameters. Outline: before pruning. Layers that are gone are crossed."
    return draw(
        "What each layer keeps",
        marks,
        caption=caption,
        y_limits=(0, 1),
        layers=len(shapes),
        height=_BAR,
    )


def score_maps(pruning: Pruning) -> list[Chart]:
    """Draw a heatmap of the scores for each kind of unit; removed units are crossed."""
    maps, plan = [], pruning.plan
    for scores in pruning.scores:
        by = scores.criterion
        if scores.layer is not None:
            units = [values.reshape(1) for values in scores.layer]
            stay = [[0] if layer in plan.layers else [] for layer in range(len(units))]
            maps.append(_unit_map(f"Layers by {by}", "", units, stay))
        if scores.kv_group is not None:
            title = f"KV groups by {by}"
            maps.append(_unit_map(title, ", KV group {}", scores.kv_group, plan.kv_groups))
        if scores.neuron is not None:
            maps.append(_neuron_map(f"Neurons by {by}", scores.neuron, plan))
        if scores.expert is not None and any(map(len, scores.expert)):
            title = f"Experts by {by}"
            maps.append(_unit_map(title, ", expert {}", scores.expert, plan.experts))
    return maps


def _unit_map(
    title: str, name: str, values: Sequence[Tensor], kept: Sequence[Sequence[int]]
) -> Chart:
    """Draw a cell for each unit; removed ones are crossed."""
    cells = {
        (layer, unit): f"layer {layer}{name.format(unit)}: {value:.3g}, "
        f"{'kept' if unit in kept[layer] else 'removed'}"
        for layer, of in enumerate(values)
        for unit, value in enumerate(of.tolist())
    }
    crosses = _crosses([(x + 0.5, y + 0.5) for x, y in cells if y not in kept[x]])
    return _heatmap(title, cells, values, crosses, _CELL, "Crossed: removed.")


def _neuron_map(title: str, values: Sequence[Tensor], plan: Plan) -> Chart:
    """Draw shares of each layer's neurons, best first, and a line at the number kept."""
    bins = []  # mean logarithm of the scores in each row
    for of in values:
        ordered = of.clamp(min=1e-30).log10().sort(descending=True).values
        bins.append(torch.stack([part.mean() for part in ordered.tensor_split(NEURON_ROWS)]))
    shares = [len(kept) / max(len(of), 1) for kept, of in zip(plan.neurons, values, strict=True)]
    cells = {
        (layer, row): f"layer {layer}, best {row / NEURON_ROWS:.0%} to "
        f"{(row + 1) / NEURON_ROWS:.0%}: about {10**value:.3g}; {shares[layer]:.0%} kept"
        for layer, column in enumerate(bins)
        for row, value in enumerate(column.tolist())
    }
    heights = [NEURON_ROWS * share for share in shares]
    cuts = Marks(
        "spans",
        [(layer, height, layer + 1, height) for layer, height in enumerate(heights)],
        "cut",
        [f"layer {layer}: {share:.0%} kept" for layer, share in enumerate(shares)],
        style={"colors": COLOURS["lost"], "linewidths": 2.5},
    )
    caption = "Each layer's neurons, best on top. Line: so many were kept."
    return _heatmap(title, cells, bins, [cuts], _CELL / 2, caption)


def _heatmap(
    title: str,
    cells: Mapping[tuple[int, int], str],
    values: Sequence[Tensor],
    above: Sequence[Marks],
    height: float,
    caption: str,
) -> Chart:
    """Draw a cell at each layer and row, with its text; colour is the rank of its value.

    Ranks, because values span orders of magnitude.
    """
    order = torch.cat(list(values)).argsort().argsort().float()
    strengths = (order / max(len(order) - 1, 1)).tolist()
    rows = 1 + max(row for _, row in cells)
    style = {
        "facecolors": [to_rgba(COLOURS["heat"], 0.06 + 0.94 * s) for s in strengths],
        **{"edgecolors": COLOURS["paper"], "linewidths": 1.2},
    }
    squares = [(layer, row, 1, 1) for layer, row in cells]
    drawn = Marks("bars", squares, "heat", list(cells.values()), style=style)
    return draw(
        title,
        [drawn, *above],
        caption=f"Strong colour: high score, kept first. {caption}",
        y_limits=(rows, 0),
        layers=len(values),
        height=rows * height,
    )


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
    return Marks("line", points, f"line {look}", [name], style={"color": _colour(colour), **style})


def _dots(entries: Sequence[Entry], xs: Sequence[float], are_named: bool = False) -> list[Marks]:
    """Make a mark for each entry, and a bar for its interval; filled if something was trained."""
    marks = []
    for entry, x in zip(entries, xs, strict=True):
        assert entry.percent is not None
        colour = _colour(entry.axis)
        interval = ""
        if entry.low is not None and entry.high is not None:
            bar = {"colors": colour, "linewidths": 1.5, "alpha": 0.65}
            marks.append(Marks("spans", [(x, entry.low, x, entry.high)], style=bar))
            interval = f" [{entry.low:.1f}, {entry.high:.1f}]"
        text = (
            f"{entry.name}: AVG-% {entry.percent:.1f}{interval}, {entry.ratio:.1%} removed, "
            f"{entry.total_params / 1e6:.1f} M parameters, prefill {entry.prefill_ms:.1f} ms, "
            f"decode {entry.decode_ms:.1f} ms"
        )
        is_filled = entry.train or entry.is_original
        style = {
            **{"s": 75, "marker": TRAINED[entry.train][0], "linewidth": 2, "zorder": 3},
            **{"facecolor": colour if is_filled else COLOURS["paper"], "edgecolor": colour},
        }
        look, names = f"mark {entry.axis or 'original'}", [entry.name] if are_named else []
        marks.append(
            Marks("points", [(x, entry.percent)], look, [text], [entry.link], names, style)
        )
    return marks


def _crosses(places: Sequence[tuple[float, float]]) -> list[Marks]:
    """Make crosses at removed units."""
    style = {"s": 60, "color": COLOURS["lost"], "marker": "x", "zorder": 3}
    removed = ["removed"] * len(places)
    return [Marks("points", places, "gone", removed, style=style)] if places else []


def _colour(name: str) -> str:
    """Return the colour of an axis of pruning or of a variable of the page."""
    return COLOURS.get(name or "ink", COLOURS["soft"])
