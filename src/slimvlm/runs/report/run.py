"""A run folder of `compress` as a `Record`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import CompressConfig, RecoverConfig, compress_command
from slimvlm.evaluation.compare import compare
from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.planning.plan import Plan
from slimvlm.runs.compress import read_results
from slimvlm.runs.recipes import published
from slimvlm.runs.report.record import Entry, Pruning, Record, Table, Training
from slimvlm.runs.tables import LEGEND, result_rows
from slimvlm.scoring.unit_scores import Scores


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `compress` fills."""
    return (folder / "config.json").is_file() and (folder / "plan.json").is_file()


def read_run(folder: Path) -> Record:
    """Read what a run has written so far.

    Raises:
        ConfigError: If a file cannot be read.
    """
    values = _read_json(folder / "config.json")
    plan = Plan.load(folder / "plan.json")
    results = read_results(folder)
    recover = values.get("recover") or {}
    entries = entries_of(results, plan, recover)
    return Record(
        title=f"{Path(values['model']).name} at {plan.ratio:.0%}",
        lead=f"This run {plan.summary()}.",
        cards=_cards(plan, results, entries),
        command=_command(values, folder),
        config=values,
        entries=entries,
        prunings=[Pruning("", plan, read_scores(folder / "scores"))],
        trainings=read_training(
            folder / "history.json", f"{recover.get('train')} from {recover.get('loss')}"
        ),
        tables=[*_result_table(results), *_repair_table(folder), *beside_the_study(entries)],
        comparison=_comparison(values, results),
    )


def read_scores(folder: Path) -> list[Scores]:
    """All scores in a folder."""
    return [Scores.load(path) for path in sorted(folder.glob("*.safetensors"))]


def read_training(path: Path, title: str) -> list[Training]:
    """The history of a recovery, if it has one."""
    if not path.is_file():
        return []
    history = _read_json(path)
    millions = history["trained_params"] / 1e6
    about = (
        f"{history['num_samples']} conversations; {millions:.1f} M parameters learned; "
        f"teacher: {history.get('teacher', 'none')}"
    )
    return [Training(title, history["steps"], history.get("evaluations", ()), about)]


def entries_of(
    results: Mapping[str, Result], plan: Plan, recover: Mapping[str, Any]
) -> list[Entry]:
    """The measured models of a run."""
    if not results:
        return []
    original = results.get("original", next(iter(results.values())))
    return [
        _entry(stage, result, original, plan, recover if stage == "recovered" else {})
        for stage, result in results.items()
    ]


def beside_the_study(entries: Sequence[Entry]) -> list[Table]:
    """What was published for the same axis, recovery and ratio, beside our numbers."""
    rows = []
    for entry in entries:
        if entry.is_original or entry.percent is None:
            continue
        found = published(entry.axis, entry.train, entry.loss, entry.ratio)
        rows += [
            [entry.name, entry.interval, row.model, f"{value:.1f}", row.source]
            for row, value in found
        ]
    if not rows:
        return []
    header = ["model", "AVG-% here", "the study's model", "AVG-% there", "source"]
    note = (
        "Other models and tasks: read the trend, not the digits. Values between two published"
        " ratios lie on a straight line; full training stands beside the study's LoRA."
    )
    return [Table("Beside the published numbers", header, rows, note)]


def _entry(
    name: str, result: Result, original: Result, plan: Plan, recover: Mapping[str, Any]
) -> Entry:
    is_original = name == "original"
    measured = not is_original and not math.isnan(original.average)
    kept = result.retention(original) if measured else None
    train = recover.get("train")
    return Entry(
        name=name,
        axis="" if is_original else plan.axis,
        ratio=0.0 if is_original else plan.ratio,
        recovery="" if is_original else f"{train} {recover['loss']}" if train else "none",
        average=result.average,
        percent=kept.percent if kept else 100.0 if is_original else None,
        low=kept.low if kept else None,
        high=kept.high if kept else None,
        differs=bool(measured and result.difference(original).significant),
        total_params=result.total_params,
        backbone_params=result.backbone_params,
        prefill_ms=result.prefill_ms,
        decode_ms=result.decode_ms,
        train=train,
        loss=recover.get("loss", ""),
    )


def _cards(
    plan: Plan, results: Mapping[str, Result], entries: Sequence[Entry]
) -> list[tuple[str, str, str]]:
    asked = "" if plan.asked_ratio is None else f"asked for {plan.asked_ratio:.1%}"
    before, after = plan.before.total_params / 1e6, plan.after.total_params / 1e6
    cards = [
        ("Backbone removed", f"{plan.ratio:.1%}", asked),
        ("Parameters", f"{after:,.1f} M", f"of {before:,.1f} M"),
    ]
    if "original" in results and len(entries) > 1:
        last, first = entries[-1], entries[0]
        if last.percent is not None:
            interval = f"95 % interval {last.low:.1f} to {last.high:.1f}"
            cards.insert(0, ("Kept (AVG-%)", f"{last.percent:.1f}", interval))
        cards += [
            ("Prefill", f"{last.prefill_ms:.1f} ms", f"of {first.prefill_ms:.1f} ms"),
            ("Decode", f"{last.decode_ms:.1f} ms", f"a token, of {first.decode_ms:.1f} ms"),
        ]
    return cards


def _result_table(results: Mapping[str, Result]) -> list[Table]:
    if not results:
        return []
    return [Table("Scores in percent", *result_rows(results), LEGEND)]


def _repair_table(folder: Path) -> list[Table]:
    path = folder / "repair.json"
    if not path.is_file():
        return []
    report = _read_json(path)
    rows = [
        [name, f"{sliced:.2%}", f"{repaired:.2%}"]
        for name, (sliced, repaired) in report["errors"].items()
    ]
    header = ["matrix", "error when sliced", "error when repaired"]
    kept = ", ".join(f"{kind} {share:g}" for kind, share in report["kept"].items()) or "nothing"
    note = "; ".join([f"{report['form']}; kept: {kept}", *report["notes"]])
    if not rows:
        return []
    return [Table("Closed-form repair, squared output error", header, rows, note, folded=True)]


def _comparison(values: Mapping[str, Any], results: Mapping[str, Result]) -> Any:
    if len(results) < 2 or "original" not in results:
        return None
    known = builtin_tasks()
    with suppress(ConfigError):  # a task file that has gone: answers without questions
        known |= {task.name: task for task in find_tasks(values["tasks"])}
    last = list(results)[-1]
    return compare(results["original"], results[last], known)


def _command(values: Mapping[str, Any], folder: Path) -> str:
    """The command for a run; nothing if its options are of another version."""
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    options.pop("made_from", None)
    model, recover = str(options.pop("model")), options.pop("recover", None)
    try:
        trained = RecoverConfig(**recover) if recover else None
        return compress_command(model, CompressConfig(**options, recover=trained), folder)
    except (TypeError, ConfigError):
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"report: {str(path)!r} cannot be read ({error})") from error
    return values
