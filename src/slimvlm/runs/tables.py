"""Results as tables: for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from slimvlm.core.errors import printable
from slimvlm.evaluation.metrics import LIKELIHOODS, Difference, Retention, paired_difference
from slimvlm.evaluation.on_data import DataResult, Estimate
from slimvlm.evaluation.results import TIMES, Result
from slimvlm.models.anatomy import Anatomy, LayerShape
from slimvlm.models.cost import BYTES, kv_cache_bytes_per_token, weight_bytes

GIB = 1024**3
MIB = 1024**2
MARK = " *"
LEGEND = "* The 95 % interval of the difference excludes 0 (paired bootstrap over questions)."
"""What `as_table` and `as_markdown` write below a table with a marked cell."""
FLOORS = ("chance", "majority", "blind")
"""What a model reaches without doing a task: luck, the best constant answer, other pictures."""
INTERVALS = "In brackets: 95 % intervals (bootstrap over samples)."
UNSEEN = "On samples of the data that neither calibrated nor trained."
_HELD_OUT = {
    "loss": ("loss of an answer token (nats)", 3),
    "perplexity": ("perplexity", 2),
    "increase": ("loss above the original's", 3),
    "agreement": ("same next token as the original (%)", 1),
    "divergence": ("KL divergence from the original (nats)", 3),
}
_PLAIN = (
    *("total_params", "backbone_params", "weight_bytes", *TIMES),
    *("blind", "limit", "batch_size", "dtype"),
)
"""Figures of a result that `result_json` repeats as they are."""


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def millions(params: int) -> str:
    """Parameters for people."""
    return f"{params / 1e6:,.1f} M"


def result_rows(results: Mapping[str, Result]) -> tuple[list[str], list[list[str]]]:
    """A row for each task and figure, a column for each model; the first one is the baseline.

    Columns of floors: luck, the best constant answer (majority), the baseline without its pictures
    (blind; only where it was measured). `MARK` follows a score that differs from the baseline's.
    """
    models = _beside_the_first(results)
    tasks = list(dict.fromkeys(task for model in models for task in model.result.tasks))
    floors = {task: _floor_cells(task, models) for task in tasks}
    shown = [f for f in FLOORS if f == "chance" or any(cells[f] for cells in floors.values())]
    rows = [
        [
            _task_label(task, models),
            *(floors[task][floor] for floor in shown),
            *(_score_cell(task, model) for model in models),
        ]
        for task in tasks
    ]
    figures = [
        ["AVG", *map(_average_cell, models)],
        *_retention_rows(models, above_floor=len(shown) > 1),
        *_cost_rows(models),
    ]
    rows += [[label, *[""] * len(shown), *cells] for label, *cells in figures]
    return ["task", *shown, *results], rows


def held_out_rows(results: Mapping[str, DataResult]) -> tuple[list[str], list[list[str]]]:
    """A row for each figure of held-out samples, a column for each stage; the original first."""
    first = next(iter(results.values()))
    figures = [vars(result.figures) for result in results.values()]
    rows = [
        [label, *(_estimate_cell(each[name], digits) for each in figures)]
        for name, (label, digits) in _HELD_OUT.items()
        if any(each[name] is not None for each in figures)
    ]
    return [f"{len(first.samples)} samples, {first.tokens:,} answer tokens", *results], rows


def held_out_text(results: Mapping[str, DataResult]) -> str:
    """The same as Markdown, with its notes; nothing if nothing was measured."""
    if not results:
        return ""
    notes = "\n".join(f"- {note}" for note in (UNSEEN, *held_out_notes(results)))
    return f"{as_markdown(*held_out_rows(results))}\n{notes}\n"


def held_out_notes(results: Mapping[str, DataResult]) -> list[str]:
    """What could not be compared, and what intervals are."""
    stages: dict[str, list[str]] = {}
    for stage, each in results.items():
        for note in each.notes:
            stages.setdefault(note, []).append(stage)
    return [*(f"{', '.join(names)}: {note}" for note, names in stages.items()), INTERVALS]


def result_json(results: Mapping[str, Result]) -> dict[str, Any]:
    """The figures of `result_rows` as plain values."""
    models = _beside_the_first(results)
    return {name: _model_json(model) for name, model in zip(results, models, strict=True)}


def anatomy_rows(anatomy: Anatomy) -> list[list[str]]:
    """What `inspect` prints: a name and a value in each row.

    Where layers differ (attention beside convolution, experts beside a dense MLP), a fact has a row
    for each value, which names the layers that it holds for.
    """
    layers = anatomy.layers
    rows = [
        ["model type", f"{anatomy.model_type} ({anatomy.text_type} backbone)"],
        ["all parameters", f"{anatomy.total_params:,}"],
        ["  vision tower", f"{anatomy.vision_params:,}"],
        ["  projector", f"{anatomy.projector_params:,}"],
        ["  backbone", f"{anatomy.backbone_params:,}"],
        ["    embeddings and head", f"{anatomy.embedding_params + anatomy.head_params:,}"],
        ["    one token", _token(anatomy)],
        *_by_layer("    one layer", [f"{shape.params:,}" for shape in layers]),
        *_by_layer(
            "    one KV group",
            [f"{s.kv_group_params:,}" if s.num_kv_heads else "none" for s in layers],
        ),
        *_by_layer(
            "    one neuron",
            [f"{s.neuron_params:,}" if s.intermediate_size else "none" for s in layers],
        ),
        *_one_expert(anatomy),
        ["layers", f"{anatomy.num_layers}" + _pinned(anatomy)],
        *_by_layer("KV groups in a layer", list(map(_heads, layers))),
        *_by_layer("neurons in a layer", [_neurons(anatomy, shape) for shape in layers]),
        *_experts(anatomy),
        *_legal_rows(anatomy),
        ["hidden size", f"{anatomy.hidden_size}"],
    ]
    for dtype in BYTES:
        memory = size(weight_bytes(anatomy, dtype))
        cache = size(1024 * kv_cache_bytes_per_token(anatomy, dtype))
        rows.append([f"memory in {dtype}", f"{memory} weights, {cache} cache for 1024 tokens"])
    return rows


def _token(anatomy: Anatomy) -> str:
    """What a token weighs, or why none can go."""
    if anatomy.why_tokens_stay is not None:
        return f"all stay: {anatomy.why_tokens_stay}"
    share = anatomy.vocab_size * anatomy.token_params / anatomy.backbone_params
    return (
        f"{anatomy.token_params:,}; all {anatomy.vocab_size:,} are {share:.0%} of the backbone "
        "(--vocab-size)"
    )


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table for the terminal: text as it is, no markup and no control sequence in it obeyed."""
    caption = LEGEND if _is_marked(rows) else None
    table = Table(title=Text(printable(title)) if title else None, caption=caption)
    for position, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
    if _is_marked(rows):
        lines += ["", LEGEND.replace("*", r"\*", 1)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Beside:
    """A model's result beside that of the first model, which is beside nothing.

    Attributes:
        result: The model's own.
        differences: How far each task is from the first model's, where both had the same questions.
        retention: What it kept of the first model's average; None if there is none to keep.
        average_difference: How far its average is from the first one's, likewise.
    """

    result: Result
    differences: Mapping[str, Difference] = field(default_factory=dict)
    retention: Retention | None = None
    average_difference: Difference | None = None


def _beside_the_first(results: Mapping[str, Result]) -> list[_Beside]:
    baseline, *others = results.values()
    return [_Beside(baseline), *(_beside(result, baseline) for result in others)]


def _beside(result: Result, baseline: Result) -> _Beside:
    pairs = [(task, baseline.tasks.get(task), ours) for task, ours in result.tasks.items()]
    differences = {
        task: paired_difference(theirs.scores, ours.scores)
        for task, theirs, ours in pairs
        if theirs is not None and theirs.ids == ours.ids
    }
    if math.isnan(baseline.average):
        return _Beside(result, differences)
    return _Beside(result, differences, result.retention(baseline), result.difference(baseline))


def _task_label(task: str, models: Sequence[_Beside]) -> str:
    metric = next(m.result.tasks[task].metric for m in models if task in m.result.tasks)
    return f"{task} (lower is better)" if metric in LIKELIHOODS else task


def _floor_cells(task: str, models: Sequence[_Beside]) -> dict[str, str]:
    """Each of `FLOORS` for a task; empty where there is none."""
    found = [model.result.tasks[task] for model in models if task in model.result.tasks]
    if found[0].metric in LIKELIHOODS:
        return dict.fromkeys(FLOORS, "")
    majority = next((t.majority for t in found if t.majority is not None), None)
    first = models[0].result.tasks.get(task)
    blind = None if first is None else first.blind
    values = (f"{found[0].chance:.0f}", _number(majority, ""), _number(blind, ""))
    return dict(zip(FLOORS, values, strict=True))


def _score_cell(task: str, model: _Beside) -> str:
    if task not in model.result.tasks:
        return "-"
    found = model.result.tasks[task]
    digits = 3 if found.metric == "loss" else 1
    return _marked(f"{found.score:.{digits}f}", model.differences.get(task))


def _average_cell(model: _Beside) -> str:
    return _marked(_number(model.result.average), model.average_difference)


def _retention_rows(models: Sequence[_Beside], above_floor: bool) -> list[list[str]]:
    """AVG-% and what is left of it above the floors; no rows if there is nothing to keep."""
    kept = [model.retention for model in models if model.retention is not None]
    if not kept:
        return []
    rows = [
        ["AVG-% [95 % interval]", *(f"{k.percent:.1f} [{k.low:.1f}, {k.high:.1f}]" for k in kept)],
        ["AVG-% above chance", *(_number(k.above_chance) for k in kept)],
    ]
    if above_floor:
        rows.append(["AVG-% above floor [95 % interval]", *map(_above_floor, kept)])
    return [[label, "100.0", *cells] for label, *cells in rows]


def _cost_rows(models: Sequence[_Beside]) -> list[list[str]]:
    results = [model.result for model in models]
    mebibytes = [None if r.weight_bytes is None else r.weight_bytes / MIB for r in results]
    return [
        ["backbone parameters", *(millions(r.backbone_params) for r in results)],
        ["all parameters", *(millions(r.total_params) for r in results)],
        ["weights MiB", *map(_number, mebibytes)],
        ["prefill ms (batch 1)", *(_time(r.prefill_ms, r.prefill_range_ms) for r in results)],
        ["decode ms a token", *(_time(r.decode_ms, r.decode_range_ms) for r in results)],
    ]


def _time(middle: float, between: tuple[float, float] | None) -> str:
    """A median and the runs that it lies between."""
    return f"{middle:.1f}" + ("" if between is None else f" [{between[0]:.1f}, {between[1]:.1f}]")


def _model_json(model: _Beside) -> dict[str, Any]:
    result = model.result
    values = {
        "model": result.model,
        "tasks": {task: _task_json(task, model) for task in result.tasks},
        "average": _or_none(result.average),
        **{name: getattr(result, name) for name in _PLAIN},
    }
    if model.retention is not None:
        values["retention"] = {k: _or_none(v) for k, v in vars(model.retention).items()}
    if model.average_difference is not None:
        values["average_difference"] = vars(model.average_difference)
        values["average_significant"] = model.average_difference.significant
    return values


def _task_json(task: str, model: _Beside) -> dict[str, Any]:
    """A task's figures; likelihoods have no points to differ by."""
    found = model.result.tasks[task]
    values = {
        **{"score": found.score, "n": len(found.ids), "metric": found.metric},
        **{"chance": found.chance, "majority": found.majority, "blind": found.blind},
        **found.details,
    }
    difference = model.differences.get(task)
    if difference is not None and found.metric not in LIKELIHOODS:
        values |= {"difference": vars(difference), "significant": difference.significant}
    return values


def _estimate_cell(figure: Estimate | None, digits: int) -> str:
    if figure is None:
        return ""
    bounds = "" if figure.low is None else f" [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
    return f"{figure.value:.{digits}f}{bounds}"


def _above_floor(kept: Retention) -> str:
    if math.isnan(kept.above_floor):
        return "-"
    low, high = kept.above_floor_low, kept.above_floor_high
    bounds = "no bounds" if math.isnan(low) else f"{low:.1f}, {high:.1f}"
    return f"{kept.above_floor:.1f} [{bounds}]"


def _marked(cell: str, difference: Difference | None) -> str:
    return cell + (MARK if difference is not None and difference.significant else "")


def _is_marked(rows: Sequence[Sequence[str]]) -> bool:
    return any(cell.endswith(MARK) for row in rows for cell in row)


def _by_layer(label: str, texts: Sequence[str]) -> list[list[str]]:
    """One row if every layer says the same, else one for each text, with its layers."""
    if len(set(texts)) == 1:
        return [[label, texts[0]]]
    rows: list[list[str]] = []
    for text in dict.fromkeys(texts):
        where = [index for index, said in enumerate(texts) if said == text]
        rows.append(["" if rows else label, f"{_layers(where)}: {text}"])
    return rows


def _layers(indices: Sequence[int]) -> str:
    """``layers 0, 1, 3 to 9``: neighbours from three on become a range."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = [f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(words)}"


def _heads(shape: LayerShape) -> str:
    if not shape.num_kv_heads:
        return "none"
    return (
        f"{shape.num_kv_heads} ({shape.queries_per_group} query heads each, "
        f"head_dim {shape.head_dim})"
    )


def _neurons(anatomy: Anatomy, shape: LayerShape) -> str:
    """How many; a neuron of experts is a channel of every one of them."""
    if not shape.intermediate_size:
        return "none that can go"
    has_experts = shape.expert_neuron_params > 0
    return f"{shape.intermediate_size}" + (" in every expert" if has_experts else "")


def _one_expert(anatomy: Anatomy) -> list[list[str]]:
    """What an expert weighs; no row where there are none."""
    if not anatomy.expert_counts:
        return []
    weights = [f"{s.expert_params:,}" if s.num_experts else "none" for s in anatomy.layers]
    rows = _by_layer("    one expert", weights)
    return [*rows, ["    all experts", f"{anatomy.expert_share:.0%} of the backbone (--experts)"]]


def _experts(anatomy: Anatomy) -> list[list[str]]:
    """How many a layer has, and how many of them must stay; no row where there are none."""
    taken = anatomy.experts_per_token
    words = [f"{s.num_experts}" if s.num_experts else "none" for s in anatomy.layers]
    if not anatomy.expert_counts:
        return []
    legal = f"{taken} to {anatomy.expert_counts[-1]}: each token takes {taken}"
    return [*_by_layer("experts in a layer", words), ["legal experts", legal]]


def _legal_rows(anatomy: Anatomy) -> list[list[str]]:
    """The widths that a configuration can write down; apart, those that take a freer type."""
    heads, neurons = anatomy.legal_kv_heads(), anatomy.legal_neurons()
    rows = [["legal KV groups", ", ".join(map(str, heads)) or "none"]]
    if anatomy.retypable and heads:
        queries = anatomy.attention_shapes[-1][1]
        retyped = [n for n in heads if anatomy.hidden_size % (n * queries)]
        if retyped:
            rows.append([f"  as {anatomy.backbone.retype}", ", ".join(map(str, retyped))])
    return [*rows, ["legal neurons", _widths(neurons, anatomy.backbone.neuron_multiple)]]


def _widths(legal: Sequence[int], step: int) -> str:
    """Widths at equal steps in words; the last one, today's, may stand apart from the others."""
    if len(legal) < 4:
        return ", ".join(map(str, legal)) or "none"
    regular = [width for width in legal if width % step == 0]
    words = f"{regular[0]} to {regular[-1]}" + (f" in steps of {step}" if step > 1 else "")
    return words + ("" if regular[-1] == legal[-1] else f", and {legal[-1]}")


def _pinned(anatomy: Anatomy) -> str:
    pinned = ", ".join(map(str, anatomy.pinned_layers))
    return f" ({pinned} must stay)" if pinned else ""


def _number(value: float | None, nothing: str = "-") -> str:
    return nothing if value is None or math.isnan(value) else f"{value:.1f}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
