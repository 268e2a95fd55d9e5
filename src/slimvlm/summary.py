"""Results as tables: for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from slimvlm.cost import BYTES, kv_cache_bytes_per_token, weight_bytes
from slimvlm.evaluation import Result
from slimvlm.geometry import Anatomy

GIB = 1024**3
MIB = 1024**2


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def result_rows(results: Mapping[str, Result]) -> tuple[list[str], list[list[str]]]:
    """A row for each task and figure, a column for each model; the first one is the baseline."""
    names = list(results)
    baseline = results[names[0]]
    tasks = list(dict.fromkeys(task for result in results.values() for task in result.tasks))
    rows = []
    for task in tasks:
        marks = {n: r.tasks[task] for n, r in results.items() if task in r.tasks}
        first = next(iter(marks.values()))
        is_perplexity = first.metric == "perplexity"
        label = f"{task} (lower is better)" if is_perplexity else task
        chance = "" if is_perplexity else f"{first.chance:.0f}"
        rows.append(
            [label, chance, *(f"{marks[n].score:.1f}" if n in marks else "-" for n in names)]
        )
    rows.append(["AVG", "", *(_number(results[n].average) for n in names)])
    if len(names) > 1 and not math.isnan(baseline.average):
        kept = [results[n].retention(baseline) for n in names]
        rows.append(
            ["AVG-% [95 % interval]", "", "100.0"]
            + [f"{k.percent:.1f} [{k.low:.1f}, {k.high:.1f}]" for k in kept[1:]]
        )
        rows.append(
            ["AVG-% above chance", "", "100.0", *(f"{k.above_chance:.1f}" for k in kept[1:])]
        )
    rows.append(
        ["backbone parameters", "", *(f"{r.backbone_params / 1e6:.1f} M" for r in results.values())]
    )
    rows.append(
        ["all parameters", "", *(f"{r.total_params / 1e6:.1f} M" for r in results.values())]
    )
    rows.append(["prefill ms (batch 1)", "", *(f"{r.prefill_ms:.1f}" for r in results.values())])
    rows.append(["decode ms a token", "", *(f"{r.decode_ms:.1f}" for r in results.values())])
    return ["task", "chance", *names], rows


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
    table = Table(title=title or None)
    for position, name in enumerate(header):
        table.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def result_json(results: Mapping[str, Result]) -> dict[str, Any]:
    """The figures of `result_rows` as plain values."""
    names = list(results)
    baseline = results[names[0]]
    values: dict[str, Any] = {}
    for name, result in results.items():
        tasks = {
            task: {"score": r.score, "n": len(r.ids), "metric": r.metric, **r.details}
            for task, r in result.tasks.items()
        }
        values[name] = {
            "model": result.model,
            "tasks": tasks,
            "average": None if math.isnan(result.average) else result.average,
            "total_params": result.total_params,
            "backbone_params": result.backbone_params,
            "prefill_ms": result.prefill_ms,
            "decode_ms": result.decode_ms,
        }
        if name != names[0] and not math.isnan(baseline.average):
            values[name]["retention"] = vars(result.retention(baseline))
    return values


def _pinned(anatomy: Anatomy) -> str:
    return f" (the first {anatomy.pinned_layers} must stay)" if anatomy.pinned_layers else ""


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
