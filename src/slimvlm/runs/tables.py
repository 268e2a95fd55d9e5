"""Results as tables: for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from slimvlm.evaluation.metrics import Retention, paired_difference
from slimvlm.evaluation.results import PERPLEXITY, Result, TaskResult
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import BYTES, kv_cache_bytes_per_token, weight_bytes

GIB = 1024**3
MIB = 1024**2
MARK = " *"
LEGEND = "* The 95 % interval of the difference excludes 0 (paired bootstrap over questions)."
"""What `as_table` and `as_markdown` write below a table with a marked cell."""


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def result_rows(results: Mapping[str, Result]) -> tuple[list[str], list[list[str]]]:
    """A row for each task and figure, a column for each model; the first one is the baseline.

    Columns of floors: luck, the best constant answer (majority), the baseline without its pictures
    (blind; only where it was measured). `MARK` follows a score that differs from the baseline's.
    """
    names, models = list(results), list(results.values())
    baseline = models[0]
    tasks = list(dict.fromkeys(task for result in models for task in result.tasks))
    floors = {task: _floor_cells(task, results) for task in tasks}
    shown = [0, *(i for i in (1, 2) if any(cells[i] for cells in floors.values()))]
    pad = [""] * len(shown)
    rows = []
    for task in tasks:
        metric = next(r.tasks[task].metric for r in models if task in r.tasks)
        label = f"{task} (lower is better)" if metric == PERPLEXITY else task
        scores = [_score(task, result, baseline) for result in models]
        rows.append([label, *(floors[task][i] for i in shown), *scores])
    rows.append(["AVG", *pad, *(_average(result, baseline) for result in models)])
    if len(models) > 1 and not math.isnan(baseline.average):
        kept = [result.retention(baseline) for result in models[1:]]
        whole = [*pad, "100.0"]
        intervals = [f"{k.percent:.1f} [{k.low:.1f}, {k.high:.1f}]" for k in kept]
        rows.append(["AVG-% [95 % interval]", *whole, *intervals])
        rows.append(["AVG-% above chance", *whole, *(f"{k.above_chance:.1f}" for k in kept)])
        if len(shown) > 1:
            above = [_above_floor(k) for k in kept]
            rows.append(["AVG-% above floor [95 % interval]", *whole, *above])
    costs = {
        "backbone parameters": [f"{r.backbone_params / 1e6:.1f} M" for r in models],
        "all parameters": [f"{r.total_params / 1e6:.1f} M" for r in models],
        "weights MiB": [_mebibytes(r.weight_bytes) for r in models],
        "prefill ms (batch 1)": [f"{r.prefill_ms:.1f}" for r in models],
        "decode ms a token": [f"{r.decode_ms:.1f}" for r in models],
    }
    rows += [[label, *pad, *cells] for label, cells in costs.items()]
    header = [("chance", "majority", "blind")[i] for i in shown]
    return ["task", *header, *names], rows


def anatomy_rows(anatomy: Anatomy) -> list[list[str]]:
    """What `inspect` prints."""
    shape = anatomy.layers[0]
    legal = anatomy.legal_kv_heads()
    retyped = [
        n
        for n in legal
        if anatomy.retypable and anatomy.hidden_size % (n * shape.queries_per_group)
    ]
    rows = [
        ["model type", f"{anatomy.model_type} ({anatomy.text_type} backbone)"],
        ["all parameters", f"{anatomy.total_params:,}"],
        ["  vision tower", f"{anatomy.vision_params:,}"],
        ["  projector", f"{anatomy.projector_params:,}"],
        ["  backbone", f"{anatomy.backbone_params:,}"],
        ["    embeddings and head", f"{anatomy.embedding_params + anatomy.head_params:,}"],
        ["    one layer", f"{shape.params:,}"],
        ["    one KV group", f"{shape.kv_group_params:,}"],
        ["    one neuron", f"{shape.neuron_params:,}"],
        ["layers", f"{anatomy.num_layers}" + _pinned(anatomy)],
        [
            "KV groups in a layer",
            f"{shape.num_kv_heads} ({shape.queries_per_group} query heads each, "
            f"head_dim {shape.head_dim})",
        ],
        ["neurons in a layer", f"{shape.intermediate_size}"],
        ["legal KV groups", ", ".join(map(str, legal))],
        ["legal neurons", f"1 to {shape.intermediate_size}"],
        ["hidden size", f"{anatomy.hidden_size}"],
    ]
    if retyped:
        rows.insert(13, ["  as " + str(anatomy.backbone.retype), ", ".join(map(str, retyped))])
    for dtype in BYTES:
        memory = size(weight_bytes(anatomy, dtype))
        cache = size(1024 * kv_cache_bytes_per_token(anatomy, dtype))
        rows.append([f"memory in {dtype}", f"{memory} weights, {cache} cache for 1024 tokens"])
    return rows


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table for the terminal."""
    table = Table(title=title or None, caption=LEGEND if _is_marked(rows) else None)
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
    if _is_marked(rows):
        lines += ["", LEGEND.replace("*", r"\*", 1)]
    return "\n".join(lines) + "\n"


def result_json(results: Mapping[str, Result]) -> dict[str, Any]:
    """The figures of `result_rows` as plain values."""
    names = list(results)
    baseline = results[names[0]]
    values: dict[str, Any] = {}
    for name, result in results.items():
        tasks = {
            task: {
                **{"score": r.score, "n": len(r.ids), "metric": r.metric},
                **{"chance": r.chance, "majority": r.majority, "blind": r.blind},
                **r.details,
                **_difference_json(task, result, baseline),
            }
            for task, r in result.tasks.items()
        }
        values[name] = {
            "model": result.model,
            "tasks": tasks,
            "average": None if math.isnan(result.average) else result.average,
            "total_params": result.total_params,
            "backbone_params": result.backbone_params,
            "weight_bytes": result.weight_bytes,
            "prefill_ms": result.prefill_ms,
            "decode_ms": result.decode_ms,
            "blind": result.blind,
            "limit": result.limit,
            "batch_size": result.batch_size,
            "dtype": result.dtype,
        }
        if name != names[0] and not math.isnan(baseline.average):
            kept = vars(result.retention(baseline))
            values[name]["retention"] = {k: None if math.isnan(v) else v for k, v in kept.items()}
            difference = result.difference(baseline)
            values[name]["average_difference"] = vars(difference)
            values[name]["average_significant"] = difference.significant
    return values


def _floor_cells(task: str, results: Mapping[str, Result]) -> tuple[str, str, str]:
    """Chance, majority and blind floor of a task; empty where there is none."""
    found = [result.tasks[task] for result in results.values() if task in result.tasks]
    if found[0].metric == PERPLEXITY:
        return "", "", ""
    majority = next((t.majority for t in found if t.majority is not None), None)
    first = next(iter(results.values())).tasks.get(task)
    return (
        f"{found[0].chance:.0f}",
        "" if majority is None else f"{majority:.1f}",
        "" if first is None or first.blind is None else f"{first.blind:.1f}",
    )


def _pair(task: str, result: Result, baseline: Result) -> tuple[TaskResult, TaskResult] | None:
    """A task's results of the baseline and of another model, if both answered the same."""
    ours, theirs = result.tasks.get(task), baseline.tasks.get(task)
    if ours is None or theirs is None or result is baseline or ours.ids != theirs.ids:
        return None
    return theirs, ours


def _score(task: str, result: Result, baseline: Result) -> str:
    if task not in result.tasks:
        return "-"
    pair = _pair(task, result, baseline)
    differs = pair and paired_difference(pair[0].scores, pair[1].scores).significant
    return f"{result.tasks[task].score:.1f}{MARK if differs else ''}"


def _average(result: Result, baseline: Result) -> str:
    has_both = not math.isnan(result.average) and not math.isnan(baseline.average)
    differs = result is not baseline and has_both and result.difference(baseline).significant
    return _number(result.average) + (MARK if differs else "")


def _above_floor(kept: Retention) -> str:
    if math.isnan(kept.above_floor):
        return "-"
    low, high = kept.above_floor_low, kept.above_floor_high
    bounds = "no bounds" if math.isnan(low) else f"{low:.1f}, {high:.1f}"
    return f"{kept.above_floor:.1f} [{bounds}]"


def _difference_json(task: str, result: Result, baseline: Result) -> dict[str, Any]:
    """How far a task is from the baseline, in points; not for perplexity, which has no points."""
    pair = _pair(task, result, baseline)
    if pair is None or pair[0].metric == PERPLEXITY:
        return {}
    found = paired_difference(pair[0].scores, pair[1].scores)
    return {"difference": vars(found), "significant": found.significant}


def _is_marked(rows: Sequence[Sequence[str]]) -> bool:
    return any(cell.endswith(MARK) for row in rows for cell in row)


def _pinned(anatomy: Anatomy) -> str:
    pinned = ", ".join(map(str, anatomy.pinned_layers))
    return f" ({pinned} must stay)" if pinned else ""


def _mebibytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MIB:.1f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
