"""Make tables of results: for the terminal, as Markdown, and as plain values for JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from slimvlm.core.errors import printable
from slimvlm.core.tables import read_table
from slimvlm.evaluation.bench import PairedTimes
from slimvlm.evaluation.metrics import LIKELIHOODS, Estimate, kept_text
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import (
    KINDS,
    TIMES,
    Result,
    average_of,
    comparable,
    kind_of,
    require_same_task,
    task_difference,
)
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import BYTES, Picture, kv_cache_bytes, question_flops, weight_bytes
from slimvlm.models.pictures import PictureBudget

GIB = 1024**3
MIB = 1024**2
MARK = " *"
LEGEND = "* The 95 % interval of the paired difference excludes 0."  # below a marked cell
FLOORS = ("chance", "majority", "blind")  # guessing, the best constant answer, other images
INTERVALS = "In brackets: 95 % intervals over samples; those of one image count as one."
UNSEEN = "On samples used for neither calibration nor training."
_OF_A_MODEL = (
    *("total_params", "backbone_params", "weight_bytes", *TIMES),
    *("limit", "batch_size", "dtype"),
)
_WORDS = read_table(__file__, "tables.yaml")


def size(num_bytes: float) -> str:
    """Format bytes."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def millions(params: int) -> str:
    """Format a number of parameters."""
    return f"{params / 1e6:,.1f} M"


def result_json(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    """Return the figures of models as plain values; the first one is the baseline of the others.

    Differences of tasks are of the same questions; AVG-% needs a baseline with an average.
    """
    found: dict[str, dict[str, Any]] = {}
    first = next(iter(results.values()), None)
    for name, result in results.items():
        tasks: dict[str, dict[str, Any]] = {}
        for task, each in result.tasks.items():
            row = tasks[task] = {
                **{"score": each.score, "n": len(each.ids), "metric": each.metric, "cut": each.cut},
                "kind": kind_of(task, each),
                **{"chance": each.chance, "majority": each.majority, "blind": each.blind},
                **each.details,
            }
            theirs = first.tasks.get(task) if first is not None and found else None
            if theirs is not None:
                require_same_task(task, each, theirs)
                apart = task_difference(task, each, theirs)
                if each.metric not in LIKELIHOODS:
                    row["difference"] = apart.as_points()
                row["significant"] = apart.significant
        values: dict[str, Any] = {
            **{"model": result.model, "tasks": tasks},
            "average": None if math.isnan(result.average) else result.average,
            "by_kind": {k: {"average": part.average} for k, part in result.by_kind().items()},
            **{name: getattr(result, name) for name in _OF_A_MODEL},
        }
        if first is not None and found and not math.isnan(first.average):
            change = average_of(result.tasks, first.tasks, comparable(result, first))
            values["retention"] = result.retention(first).as_json()
            values["average_difference"] = change.as_points()
            values["average_significant"] = change.significant
            for kind, kept in result.retention_by_kind(first).items():
                values["by_kind"][kind]["retention"] = kept.as_json()
        found[name] = values
    return found


def result_rows(results: Mapping[str, Result]) -> tuple[list[str], list[list[str]]]:
    """Make a row for each task and figure, a column for each model; the first is the baseline.

    Columns of `FLOORS` are those that were measured. `MARK` follows a score that differs from the
    baseline's.
    """
    models, rows, cut = list(result_json(results).values()), [], []
    for task in dict.fromkeys(task for model in models for task in model["tasks"]):
        asked = [model["tasks"].get(task) for model in models]
        given = [each for each in asked if each]
        label, digits = task, 3 if given[0]["metric"] == "loss" else 1
        majorities = [each["majority"] for each in given if each["majority"] is not None]
        levels = [*majorities[:1], None][0], asked[0] and asked[0]["blind"]
        floors = [f"{given[0]['chance']:.0f}", *(_number(level, nothing="") for level in levels)]
        if given[0]["metric"] in LIKELIHOODS:
            label, floors = f"{task} (lower is better)", [""] * len(FLOORS)
        cells = [_number(e["score"], digits, e.get("significant")) if e else "-" for e in asked]
        rows.append([label, *floors, *cells])
        if any(each["cut"] for each in given):
            cells = [f"{each['cut']} of {each['n']}" if each else "-" for each in asked]
            cut.append([f"{task}: replies cut off at max_new_tokens", *cells])

    averages = [_number(m["average"], marked=m.get("average_significant")) for m in models]
    figures = [["AVG", *averages]]
    if kept := [model["retention"] for model in models if "retention" in model]:
        figures.append(["AVG-% [95 % interval]", "100.0", *map(_kept, kept)])
        figures.append(["AVG-% above chance", "100.0", *(_number(k["above_chance"]) for k in kept)])
        if any(row[2] or row[3] for row in rows):
            cells = [_kept(each, "above_floor", "above_floor_") for each in kept]
            figures.append(["AVG-% above floor [95 % interval]", "100.0", *cells])
    for kind in KINDS:
        parts = [model["by_kind"].get(kind, {}).get("retention") for model in models[1:]]
        if some := [*filter(None, parts)]:
            label = f"AVG-% {kind}, floor {some[0]['floor']:.1f} [95 % interval]"
            figures.append([label, "100.0", *(_kept(p) if p else "-" for p in parts)])
    figures += [
        ["backbone parameters", *(millions(m["backbone_params"]) for m in models)],
        ["all parameters", *(millions(m["total_params"]) for m in models)],
        ["weights MiB", *(_number(m["weight_bytes"] and m["weight_bytes"] / MIB) for m in models)],
        *cut,
    ]
    for label, name in (("prefill ms, with image", "prefill"), ("decode ms per token", "decode")):
        times = [(m[f"{name}_ms"], m[f"{name}_range_ms"]) for m in models]
        figures.append([label, *(f"{Estimate(middle, *ends or ()):.1f}" for middle, ends in times)])
    rows += [[label, *[""] * len(FLOORS), *cells] for label, *cells in figures]
    header = ["task", *FLOORS, *results]
    shown = [i for i in range(len(header)) if i not in (2, 3) or any(row[i] for row in rows)]
    return [header[i] for i in shown], [[row[i] for i in shown] for row in rows]


def _kept(values: Mapping[str, Any], name: str = "percent", ends: str = "") -> str:
    return kept_text(values[name], values[f"{ends}low"], values[f"{ends}high"])


def held_out_json(results: Mapping[str, DataResult]) -> dict[str, dict[str, Any]]:
    """Return the figures of each stage as plain values."""
    return {
        stage: {
            "samples": len(result.samples),
            "tokens": result.tokens,
            **{k: None if v is None else vars(v) for k, v in vars(result.figures).items()},
            "notes": list(result.notes),
        }
        for stage, result in results.items()
    }


def held_out_rows(results: Mapping[str, DataResult]) -> tuple[list[str], list[list[str]]]:
    """Make a row for each figure of test samples, a column for each stage."""
    rows, first = [], next(iter(results.values()))
    for name, (label, digits) in _WORDS["held_out"].items():
        figures = [getattr(result.figures, name) for result in results.values()]
        cells = ["" if figure is None else f"{figure:.{digits}f}" for figure in figures]
        if any(cells):
            rows.append([label, *cells])
    return [f"{len(first.samples)} samples, {first.tokens:,} answer tokens", *results], rows


def held_out_text(results: Mapping[str, DataResult], times: PairedTimes | None = None) -> str:
    """Format `held_out_rows` with notes, and times, as Markdown, as far as they were measured."""
    text = "" if times is None else f"\nThe smaller model {times}.\n"
    if not results:
        return text
    notes = "\n".join(f"- {note}" for note in (UNSEEN, *held_out_notes(results)))
    return f"{as_markdown(*held_out_rows(results))}\n{notes}\n{text}"


def training_notes(
    results: Mapping[str, Result], on_data: Mapping[str, DataResult], loss: str
) -> list[str]:
    """Say what training did besides restoring the original, and whether it did harm."""
    found = []
    if len(results or on_data) == 3 and "sft" in loss:
        found.append(_WORDS["learnt"].format(loss))
    moved = [each.figures.divergence for each in on_data.values()][1:]
    if len(moved) == 2 and moved[0] and moved[1] and moved[1].value > moved[0].value:
        found.append(_WORDS["moved"].format(moved[0].value, moved[1].value))
    averages = [each.average for each in results.values()][1:]
    if len(averages) == 2 and averages[0] > averages[1]:
        found.append(_WORDS["harmed"].format(*averages))
    return found


def held_out_notes(results: Mapping[str, DataResult]) -> list[str]:
    """List why some samples are not compared, and how intervals are computed."""
    stages: dict[str, list[str]] = {}
    for stage, each in results.items():
        for note in each.notes:
            stages.setdefault(note, []).append(stage)
    return [*(f"{', '.join(names)}: {note}" for note, names in stages.items()), INTERVALS]


@dataclass(frozen=True)
class AtBudget(PictureBudget):
    """A model with an image-token budget, compared with itself with all image tokens."""

    kv_cache_bytes: int  # per image
    times: PairedTimes | None
    held_out: Mapping[str, DataResult]  # of the data, and of the first answers of each task


def image_rows(found: Sequence[AtBudget]) -> tuple[list[str], list[list[str]]]:
    """Make a row for each figure, and a column for each budget."""
    rows = [
        ["tokens of a picture", *(f"{each.tokens:.1f}" for each in found)],
        ["KV cache of a picture", *(size(each.kv_cache_bytes) for each in found)],
        ["time to the first token", *(f"{e.times.prefill}" if e.times else "1" for e in found)],
    ]
    for name in found[0].held_out:
        results = {str(each.share): each.held_out[name] for each in found}
        (title, *_), figures = held_out_rows(results)
        rows += [[f"{name}: {title}", *("" for _ in found)], *figures]
    return ["image-token budget", *(str(each.share) for each in found)], rows


def anatomy_rows(anatomy: Anatomy, picture: Picture | None = None) -> list[list[str]]:
    """Make the rows that `inspect` prints: a name and a value in each.

    Layers that differ (attention and convolution, experts and a dense MLP) have rows of their own.
    """
    pinned = ", ".join(map(str, anatomy.pinned_layers))
    token = f"all are kept: {anatomy.why_tokens_stay}"
    if anatomy.why_tokens_stay is None:
        share = anatomy.vocab_size * anatomy.token_params / anatomy.backbone_params
        these = f"all {anatomy.vocab_size:,} are {share:.0%} of the backbone"
        token = f"{anatomy.token_params:,}; {these} (compress --vocab-size)"
    rows = [
        ["model type", f"{anatomy.model_type} ({anatomy.text_type} backbone)"],
        ["all parameters", f"{anatomy.total_params:,}"],
        ["  vision tower", f"{anatomy.vision_params:,}"],
        ["  projector", f"{anatomy.projector_params:,}"],
        ["  backbone", f"{anatomy.backbone_params:,}"],
        ["    embeddings and head", f"{anatomy.embedding_params + anatomy.head_params:,}"],
        ["    one token", token],
        ["hidden size", f"{anatomy.hidden_size}"],
        ["layers", f"{anatomy.num_layers}" + (f" ({pinned} must stay)" if pinned else "")],
        *_layer_rows(anatomy),
    ]
    if anatomy.expert_counts:
        taken, most = anatomy.experts_per_token, anatomy.expert_counts[-1]
        share_of_all = f"{anatomy.expert_share:.0%} of the backbone (compress --experts)"
        rows.append(["all experts", share_of_all])
        rows.append(["legal experts", f"{taken} to {most}: each token takes {taken}"])
    heads = anatomy.legal_kv_heads()
    rows.append(["legal KV groups", ", ".join(map(str, heads)) or "none"])
    if anatomy.retypable and heads:
        queries = anatomy.attention_shapes[-1][1]
        if retyped := [n for n in heads if anatomy.hidden_size % (n * queries)]:
            rows.append([f"  as {anatomy.backbone.retype}", ", ".join(map(str, retyped))])
    counts, step = anatomy.legal_neurons(), anatomy.backbone.neuron_multiple
    widths = ", ".join(map(str, counts)) or "none"
    if len(counts) > 3:  # at equal steps; the last, the current width, may be no multiple
        regular = [width for width in counts if width % step == 0]
        widths = f"{regular[0]} to {regular[-1]}" + (f" in steps of {step}" if step > 1 else "")
        widths += "" if regular[-1] == counts[-1] else f", and {counts[-1]}"
    rows.append(["legal neurons", widths])
    for dtype in BYTES:
        memory = size(weight_bytes(anatomy, dtype))
        cache = size(kv_cache_bytes(anatomy, 1024, dtype))
        rows.append([f"memory in {dtype}", f"{memory} weights, {cache} cache for 1024 tokens"])
    return [*rows, *_work_rows(anatomy, picture or Picture())]


def _work_rows(anatomy: Anatomy, picture: Picture) -> list[list[str]]:
    """Make the rows of the work of a question about an image, and of layers that nobody reads."""
    rows, tower = list[list[str]](), anatomy.tower
    if picture.patches:
        work = question_flops(anatomy, picture)
        parts = zip(("vision tower", "projector", "backbone"), work, strict=True)
        shares = ", ".join(f"{name} {flops / sum(work):.1%}" for name, flops in parts)
        shares += " (a bound, as the tower's layers are not known)" * (tower is None)
        rows.append(["question with an image", f"{sum(work) / 1e9:,.1f} GFLOP: {shares}"])
        rows.append(["  image", f"{picture.patches:,} patches, {picture.tokens:,} tokens"])
    if tower is not None and tower.unread:
        what = "the last layer" if tower.unread == 1 else f"the last {tower.unread} layers"
        cure = f"nobody reads {what} (compress --tower-ratio removes it first, without a change)"
        rows.append(["unread in the vision tower", cure])
    return rows


def _layer_rows(anatomy: Anatomy) -> list[list[str]]:
    """Make the rows of a layer's parameters and units, for each kind of layers."""
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index, s in enumerate(anatomy.layers):
        groups, neurons, experts = "none", "none that can be removed", ""
        if s.num_kv_heads:
            groups = f"{s.num_kv_heads} of {s.kv_group_params:,} parameters "
            groups += f"({s.queries_per_group} query heads each, head_dim {s.head_dim})"
        if s.intermediate_size:
            where = " in every expert" * (s.expert_neuron_params > 0)
            neurons = f"{s.intermediate_size}{where} of {s.neuron_params:,} parameters"
        if anatomy.expert_counts:
            experts = f"{s.num_experts} of {s.expert_params:,} parameters"
            experts = experts if s.num_experts else "none"
        kinds.setdefault((f"{s.params:,}", groups, neurons, experts), []).append(index)
    rows: list[list[str]] = []
    for values, found in kinds.items():
        if len(kinds) > 1:
            places = groupby(enumerate(found), lambda pair: pair[1] - pair[0])
            runs = [[index for _, index in group] for _, group in places]  # of neighbours
            words = [f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
            rows.append([f"layer{'s' * (len(found) > 1)} {', '.join(words)}", ""])
        names = ("parameters of a layer", "KV groups", "neurons", "experts")
        rows += [[f"  {n}", value] for n, value in zip(names, values, strict=True) if value]
    return rows


def as_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """Make a table for the terminal, plain without a header; markup in the text has no effect."""
    caption = LEGEND if any(cell.endswith(MARK) for row in rows for cell in row) else None
    table = Table(title=Text(printable(title)) if title else None, caption=caption)
    if not header:
        table = Table.grid(padding=(0, 2))
    for position, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    plain = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in rows]
    lines += ["| " + " | ".join(row) + " |" for row in plain]
    if any(cell.endswith(MARK) for row in rows for cell in row):
        lines += ["", LEGEND.replace("*", r"\*", 1)]
    return "\n".join(lines) + "\n"


def _number(
    value: float | None, digits: int = 1, marked: bool | None = False, nothing: str = "-"
) -> str:
    return nothing if value is None else f"{value:.{digits}f}{MARK * bool(marked)}"
