"""Draw the charts of a report with matplotlib: models, plans, scores and losses → SVG images."""

import warnings
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from slimvlm.core.errors import printable
from slimvlm.core.tables import read_table
from slimvlm.planning.plan import Plan
from slimvlm.runs.report.record import published
from slimvlm.runs.stages import ORIGINAL
from slimvlm.scoring.unit_scores import Scores

_TABLES = read_table(__file__, "charts.yaml")
COLOURS: Mapping[str, str] = _TABLES["colours"]
TRAINED: Mapping[str, tuple[str, str]] = _TABLES["trained"]  # marker and words
STYLE: Any = matplotlib.rc_params_from_file(
    Path(__file__).with_name("charts.mplstyle"), use_default_template=False
)
_COLUMN, _WIDEST, _BAR, _ROW = 28, 1100, 170, 28  # CSS pixels: a layer's column, all, a bar, a row
NEURON_ROWS = 24  # rows of the neurons' heatmap: shares of a layer's neurons, best first


@dataclass(frozen=True)
class Chart:
    """A drawing."""

    title: str
    caption: str  # how to read it; may be empty
    axes: Axes  # its only ones
    uri: str  # the image
    width: int  # in CSS pixels


@contextmanager
def drawing(
    charts: list[Chart],
    title: str,
    caption: str = "",
    size: tuple[int, int] = (400, 270),
    right: int = 12,
) -> Iterator[Axes]:
    """Yield axes to draw on, and append the chart; size and right margin are in CSS pixels."""
    buffer, no_metadata = StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that only the reader's fonts have
        width, height = size
        figure = Figure(figsize=(width / 72, height / 72))
        figure.patch.set_visible(False)
        inside = (width - 54 - right) / width, (height - 54) / height
        axes = figure.add_axes((54 / width, 46 / height, *inside))
        axes.patch.set_visible(False)
        yield axes
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    image = b64encode(buffer.getvalue().encode()).decode()
    charts.append(Chart(title, caption, axes, f"data:image/svg+xml;base64,{image}", size[0]))


def _draw_models(axes: Axes, entries: pd.DataFrame, xs: Iterable[float]) -> None:
    """Mark models with their intervals; colours are axes, shapes are what was trained."""
    for (axis, train), of in entries.assign(x=xs).groupby(["axis", "train"], sort=False):
        name = axis if axis == ORIGINAL else f"{axis}, {TRAINED[train][1]}"
        reach = abs(of[["avg_percent_low", "avg_percent_high"]].T - of["avg_percent"])
        colour = COLOURS.get(axis, COLOURS["soft"])
        style: Any = {"fmt": TRAINED[train][0], "color": colour, "label": printable(name)}
        inside = "none" if train == "none" and axis != ORIGINAL else colour
        axes.errorbar(of["x"], of["avg_percent"], yerr=reach, markerfacecolor=inside, **style)


def trade_offs(entries: pd.DataFrame) -> list[Chart]:
    """Draw AVG-% against parameters and latencies, with the Pareto frontier."""
    shown = entries[entries["avg_percent"].notna()]
    charts: list[Chart] = []
    if len(shown) < 2:
        return charts
    costs = [
        ("Retention by size", "parameters of the model (millions)", shown["total_params"] / 1e6),
        ("Retention by prefill time", "prefill, image included (ms)", shown["prefill_ms"]),
        ("Retention by decode time", "decode (ms per token)", shown["decode_ms"]),
    ]
    for title, label, cost in costs:
        points = pd.DataFrame({"cost": cost, "kept": shown["avg_percent"]})
        points = points.sort_values(["cost", "kept"], ascending=[True, False])
        best = points[points["kept"] > points["kept"].cummax().shift(fill_value=-np.inf)]
        with drawing(charts, title, "Dotted: no other model retains more at this cost.") as axes:
            axes.plot(best["cost"], best["kept"], ":", color=COLOURS["soft"])
            _draw_models(axes, shown, cost)
            axes.set(xlabel=label, ylabel="AVG-%")
            axes.locator_params(nbins=6)
            axes.legend()
    return charts


def by_ratio(entries: pd.DataFrame) -> list[Chart]:
    """Draw AVG-% over the ratio: a chart for each recovery, with a line and the papers' by axis."""
    rated = entries[entries["avg_percent"].notna() & (entries["axis"] != ORIGINAL)]
    charts: list[Chart] = []
    caption = "Lines: means over seeds. Dotted: means of the papers' models."
    for (recovery, variant), shown in rated.groupby(["recovery", "variant"], sort=False):
        if shown["achieved_ratio"].round(1).nunique() < 2:
            continue
        way = "untrained" if shown["train"].iloc[0] == "none" else recovery
        title = f"Retention at each ratio: {', '.join(filter(None, (way, variant)))}"
        with drawing(charts, title, caption) as axes:
            for axis, of in shown.groupby("axis", sort=False):
                colour = COLOURS.get(axis, COLOURS["soft"])
                groups = of.groupby(of["achieved_ratio"].round(2))
                ratios, means = groups["achieved_ratio"].mean(), groups["avg_percent"].mean()
                axes.plot(100 * ratios, means, color=colour)
                # the papers' mean over their models, at those of the ratios that they have
                found = {ratio: published(of.iloc[0], ratio) for ratio in ratios}
                there = {100 * r: fmean(value for _, value in found[r]) for r in found if found[r]}
                if there:
                    axes.plot(list(there), list(there.values()), ":", color=colour)
            _draw_models(axes, shown, 100 * shown["achieved_ratio"])
            axes.set(xlabel="removed share of the backbone (%)", ylabel="AVG-%")
            axes.set(xlim=(0, None), ylim=(0, 1.08 * max(100, shown["avg_percent_high"].max())))
            axes.legend()
    return charts


def loss_curves(steps: Sequence[Mapping[str, float]]) -> list[Chart]:
    """Draw a chart for each component of the loss on training samples."""
    charts: list[Chart] = []
    rows = pd.DataFrame(steps).set_index("step")
    for name in (name for name in rows if str(name).startswith("loss")):
        values = rows[name].dropna()
        if len(values) < 2:
            continue
        title = "Sum of the losses" if name == "loss" else str(name).removeprefix("loss_")
        with drawing(charts, title) as axes:
            axes.plot(values, color=COLOURS["depth"])
            axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    return charts


def allocation(plan: Plan) -> list[Chart]:
    """Draw the parameters that every layer keeps, attention, MLP and other weights apart."""
    charts: list[Chart] = []
    shapes, rows = plan.before.layers, []
    for index, shape in enumerate(shapes):
        kept = plan.shapes.get(index, shape.with_units(0, 0, 0))
        mlp = kept.intermediate_size * kept.neuron_params
        mlp += kept.num_experts * kept.expert_fixed_params
        fixed = kept.fixed_params * (index in plan.layers)
        rows.append([mlp, kept.num_kv_heads * kept.kv_group_params, fixed])
    parts = np.array(rows, float).T / 1e6
    caption = "Millions of parameters. Outline: before pruning. Removed layers are crossed."
    size = min(_COLUMN * len(shapes) + 234, _WIDEST), _BAR
    with drawing(charts, "What each layer keeps", caption, size, right=180) as axes:
        looks = (("MLP", "depth"), ("attention", "width"), ("weights without units", "soft"))
        for i, (name, colour) in enumerate(looks):
            below = parts[:i].sum(0)
            axes.bar(range(len(shapes)), parts[i], bottom=below, color=COLOURS[colour], label=name)
        whole = [shape.params / 1e6 for shape in shapes]
        axes.bar(range(len(shapes)), whole, fill=False, edgecolor=COLOURS["soft"])
        gone = [i for i in range(len(shapes)) if i not in plan.layers]
        axes.plot(gone, [whole[i] / 2 for i in gone], "x", color=COLOURS["lost"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return charts


def score_maps(plan: Plan, found: Iterable[Scores]) -> list[Chart]:
    """Draw a heatmap of the scores for each kind of unit; removed units are crossed."""
    charts: list[Chart] = []
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
                _draw_scores(charts, f"{kind} by {scores.criterion}", values, kept)
    return charts


def _draw_scores(
    charts: list[Chart], title: str, values: Sequence[Tensor], kept: Sequence[Sequence[int]]
) -> None:
    """Draw a column of cells for each layer; ranks give colours, as magnitudes vary."""
    is_neurons, columns, row = title.startswith("Neurons"), list(values), _ROW
    caption = "Strong colour: high score, kept first. Crossed: removed."
    if is_neurons:
        caption = "Each layer's neurons, best on top, in equal shares. Line: number kept."
        row = _ROW // 3
        for layer, of in enumerate(values):
            best = of.clamp(min=1e-30).log10().sort(descending=True).values
            parts = best.tensor_split(min(NEURON_ROWS, max(len(of), 1)))
            columns[layer] = of.new_tensor([float(part.mean()) for part in parts if len(part)])
    table = pd.DataFrame([column.tolist() for column in columns])
    ranks = pd.Series(table.to_numpy(float).ravel()).rank(pct=True).to_numpy().reshape(table.shape)
    size = min(_COLUMN * len(columns) + 66, _WIDEST), table.shape[1] * row + 54
    with drawing(charts, title, caption, size) as axes:
        shown: Any = {"cmap": "Blues", "vmin": 0, "vmax": 1, "interpolation": "none"}
        axes.imshow(ranks.T, aspect="auto", **shown)
        cells = [(x, y) for x, of in enumerate(columns) for y in range(len(of))]
        if is_neurons:
            xs = np.array([x for x, of in enumerate(values) if len(of)])
            ends = [len(columns[x]) * len(kept[x]) / len(values[x]) - 0.5 for x in xs]
            axes.hlines(ends, xs - 0.5, xs + 0.5, colors=COLOURS["lost"], linewidths=2.5)
        elif gone := [(x, y) for x, y in cells if y not in kept[x]]:
            axes.plot(*zip(*gone, strict=True), "x", color=COLOURS["lost"])
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_visible(False)
