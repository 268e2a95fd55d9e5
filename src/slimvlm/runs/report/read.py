"""The folder of a run or of a study → `Record`. A run is a study of one cell, with its stages."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from slimvlm.core.documents import read_object
from slimvlm.core.errors import LONGEST, ConfigError, one_line
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.evaluation.compare import Comparison, compare
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.evaluation.timing import PairedTimes
from slimvlm.planning.plan import Plan
from slimvlm.runs.command import compress_command
from slimvlm.runs.compress import STAGES, read_results, read_times
from slimvlm.runs.held_out import read_held_out
from slimvlm.runs.recipes import published
from slimvlm.runs.report.record import Entry, Pruning, Record, Table, Training
from slimvlm.runs.study.table import DONE, FAILED, ORIGINAL, STUDY, TABLE
from slimvlm.runs.tables import LEGEND, MARK, held_out_notes, held_out_rows, result_rows
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import History

SHOWN_RATIO = 0.3
"""Answers are shown of the best model at the measured ratio that is nearest to this one."""
_OPTIONS = ("criterion", "allocation", "repair", "options", "fraction", "seed")
"""Columns that a cell's name and the table have only where they differ between cells of an axis."""


def read_record(folder: str | Path) -> Record:
    """Read what a run folder of `compress` or the folder of a study has so far.

    Raises:
        ConfigError: If it is neither, or a file in it cannot be read.
    """
    path = Path(folder)
    try:
        if (path / "config.json").is_file() and (path / "plan.json").is_file():
            return _read_run(path)
        if (path / TABLE).is_file() and (path / "study.json").is_file():
            return _read_study(path)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        told = f"{type(error).__name__}: {one_line(error)[:LONGEST]}"
        raise ConfigError(
            f"report {str(folder)!r}: a file in it is not as slimvlm wrote it ({told})"
        ) from error
    raise ConfigError(
        f"report {str(folder)!r}: neither a run folder (config.json and plan.json) nor a study "
        f"({TABLE} and study.json)"
    )


# A run: the stages of one cell.


def _read_run(folder: Path) -> Record:
    config = _read_json(folder / "config.json")
    plan, results = Plan.load(folder / "plan.json"), read_results(folder)
    on_data = read_held_out(folder, STAGES)
    recover = config.get("recover") or {}
    entries = [_entry(row, str(row["stage"])) for row in _stages(results, plan, recover)]
    scores = [Scores.load(path) for path in sorted((folder / "scores").glob("*.safetensors"))]
    learns = f"{recover.get('train')} from {recover.get('loss')}"
    comparison = None
    if "original" in results and len(results) > 1:
        comparison = _compared(results["original"], list(results.values())[-1], config)
    return Record(
        title=f"{Path(config['model']).name} at {plan.ratio:.0%}",
        lead=f"This run {plan.summary()}.",
        cards=[
            *_run_cards(plan, entries),
            *_time_cards(entries, read_times(folder)),
            *_held_out_cards(on_data),
        ],
        command=_run_command(config, folder),
        config=config,
        entries=entries,
        prunings=[Pruning("", plan, scores)],
        trainings=_training(folder / "history.json", learns),
        tables=[
            *_score_table(results),
            *_held_out_table(on_data),
            *_walk_tables(folder),
            *_beside_the_study(entries),
        ],
        comparison=comparison,
    )


def _stages(
    results: Mapping[str, Result], plan: Plan, recover: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each stage of a run, with the columns that a study's table has for its cells."""
    rows = []
    for stage, result in results.items():
        original = results.get("original", result)
        trained = recover.get("train") if stage == "recovered" else None
        row = {
            **{"stage": stage, "axis": plan.axis, "achieved_ratio": plan.ratio},
            **{"train": trained or "none", "loss": recover.get("loss", "")},
            "recovery": f"{trained} {recover['loss']}" if trained else "none",
            **{"avg": result.average, "total_params": result.total_params},
            **{"prefill_ms": result.prefill_ms, "decode_ms": result.decode_ms},
        }
        if stage == ORIGINAL:
            row |= {"axis": ORIGINAL, "achieved_ratio": 0.0, "avg_percent": 100.0}
        elif not math.isnan(original.average):
            kept = result.retention(original)
            row |= {"avg_percent": kept.percent}
            row |= {"avg_percent_low": kept.low, "avg_percent_high": kept.high}
        rows.append(row)
    return rows


def _run_cards(plan: Plan, entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    asked = "" if plan.asked_ratio is None else f"asked for {plan.asked_ratio:.1%}"
    before, after = plan.before.total_params / 1e6, plan.after.total_params / 1e6
    cards = [
        ("Backbone removed", f"{plan.ratio:.1%}", asked),
        ("Parameters", f"{after:,.1f} M", f"of {before:,.1f} M"),
    ]
    if len(entries) > 1 and entries[0].is_original:
        last = entries[-1]
        if last.percent is not None:
            interval = f"95 % interval {last.low:.1f} to {last.high:.1f}"
            cards.insert(0, ("Kept (AVG-%)", f"{last.percent:.1f}", interval))
    return cards


def _time_cards(entries: Sequence[Entry], times: PairedTimes | None) -> list[tuple[str, str, str]]:
    """Times beside the original's, in turn; by themselves where there was no room for both."""
    if times is not None:
        shares = ("Time to read", times.prefill), ("Time to write", times.decode)
        return [
            (
                title,
                f"{s.value:.0%}",
                f"of the original's, {s.low:.0%} to {s.high:.0%} in all rounds",
            )
            for title, s in shares
        ]
    if len(entries) < 2 or not entries[0].is_original:
        return []
    first, last = entries[0], entries[-1]
    return [
        ("Prefill", f"{last.prefill_ms:.1f} ms", f"of {first.prefill_ms:.1f} ms"),
        ("Decode", f"{last.decode_ms:.1f} ms", f"a token, of {first.decode_ms:.1f} ms"),
    ]


def _score_table(results: Mapping[str, Result]) -> list[Table]:
    return [Table("Scores in percent", *result_rows(results), LEGEND)] if results else []


def _held_out_table(results: Mapping[str, DataResult]) -> list[Table]:
    if not results:
        return []
    title, note = "What was kept on unseen samples", "\n".join(held_out_notes(results))
    return [Table(title, *held_out_rows(results), note)]


def _held_out_cards(results: Mapping[str, DataResult]) -> list[tuple[str, str, str]]:
    """How often the last model says the same next token as the original."""
    same = list(results.values())[-1].figures.agreement if results else None
    if same is None or same.low is None or same.high is None:
        return []
    interval = f"on unseen samples, 95 % interval {same.low:.1f} to {same.high:.1f}"
    return [("Same next token", f"{same.value:.1f} %", interval)]


def _walk_tables(folder: Path) -> list[Table]:
    """What the walk did to each matrix and layer."""
    path = folder / "walk.json"
    report = _read_json(path) if path.is_file() else {"layers": []}
    refits = [
        [f"{layer['index']}.{name}", f"{row['sliced']:.2%}", f"{row['repaired']:.2%}"]
        for layer in report["layers"]
        for name, row in layer["refits"].items()
    ]
    distilled = [
        [str(layer["index"]), *(f"{error:.2%}" for error in layer["distilled"])]
        for layer in report["layers"]
        if layer["distilled"] is not None
    ]
    note = "; ".join(report.get("notes", ()))
    tables = [
        Table(
            "Closed-form repair, squared output error",
            ["matrix", "error when sliced", "error when repaired"],
            refits,
            note,
            folded=True,
        ),
        Table(
            "Local distillation, error of the layer's output on held-out tokens",
            ["layer", "before", "after"],
            distilled,
            folded=True,
        ),
    ]
    return [table for table in tables if table.rows]


def _beside_the_study(entries: Sequence[Entry]) -> list[Table]:
    """What was published for the same axis, recovery and ratio, beside our numbers."""
    rows = [
        [entry.name, entry.interval, row.model, f"{value:.1f}", row.source]
        for entry in entries
        if not entry.is_original and entry.percent is not None
        for row, value in published(entry.axis, entry.train, entry.loss, entry.ratio)
    ]
    header = ["model", "AVG-% here", "the study's model", "AVG-% there", "source"]
    note = (
        "Other models and tasks: read the trend, not the digits. Values between two published"
        " ratios lie on a straight line; full training stands beside the study's LoRA."
    )
    return [Table("Beside the published numbers", header, rows, note)] if rows else []


def _run_command(config: Mapping[str, Any], folder: Path) -> str:
    """The command for a run; nothing if its options are of another version."""
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    options.pop("made_from", None)
    model, recover = str(options.pop("model")), options.pop("recover", None)
    try:
        trained = RecoverConfig(**recover) if recover else None
        return compress_command(model, CompressConfig(**options, recover=trained), folder)
    except (TypeError, ConfigError):
        return ""


# A study: many cells.


def _read_study(folder: Path) -> Record:
    config = _read_json(folder / "study.json")
    try:
        table = pd.read_parquet(folder / TABLE)
    except (OSError, ValueError) as error:
        raise ConfigError(f"report {str(folder)!r}: cannot be read ({error})") from error
    done = table[table["status"] == DONE]
    cells, wanted = (rows[rows["axis"] != ORIGINAL] for rows in (done, table))
    of_axis = cells.astype(str).groupby("axis")
    varied = [name for name in _OPTIONS if (of_axis[name].nunique() > 1).any()]
    entries = [_cell(row, varied, index) for index, row in done.iterrows()]
    models = ", ".join(Path(model).name for model in table["model"].unique())
    best = _best(cells, SHOWN_RATIO)
    comparison = None
    if best is not None:
        originals = table[(table["axis"] == ORIGINAL) & (table["model"] == best["model"])]
        original = Result.load(folder / originals.iloc[0]["result"])
        comparison = _compared(original, Result.load(folder / best["result"]), config)
    return Record(
        title=f"Study of {models}",
        lead=f"{len(cells)} of {len(wanted)} cells measured, along "
        f"{' and '.join(wanted['axis'].unique())}.",
        cards=_study_cards(wanted, cells, entries),
        command=shlex.join(["slimvlm", "study", str(folder / STUDY), "--out", str(folder)]),
        config=config,
        entries=entries,
        prunings=_prunings(folder, cells),
        trainings=[
            training
            for _, row in cells.iterrows()
            if not pd.isna(row["history"])
            for training in _training(folder / row["history"], _name(row, varied))
        ],
        tables=[
            _cell_table(entries),
            *_claim_tables(table),
            _task_table(done, entries),
            *_failures(table),
        ],
        comparison=comparison,
        notes=[] if best is None else [f"Answers are those of: {_name(best, varied)}."],
    )


def _cell(row: pd.Series, varied: Sequence[str], index: Any) -> Entry:
    """A cell with what the table has of it beside the figures that every entry has."""
    original = row["axis"] == ORIGINAL
    columns = {name: "" if original else str(row[name]) for name in varied}
    above = _number(row.get("above_floor"))
    low, high = (_number(row.get(f"above_floor_{end}")) for end in ("low", "high"))
    bounds = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    columns["above floor"] = "" if above is None else f"{above:.1f}{bounds}"
    reference = _number(row.get("reference"))
    if reference is not None:
        columns["reference"] = f"{reference:.1f} ({row['reference_source']})"
    return _entry(
        row,
        _name(row, varied),
        model=str(row["model"]),
        fraction=float(row["fraction"]),
        variant="" if original else ", ".join(_chosen(row, [v for v in varied if v != "seed"])),
        link=f"cell-{index}",
        columns=columns,
    )


def _name(row: pd.Series, varied: Iterable[str]) -> str:
    """What a cell asks for, in a few words."""
    short = Path(str(row["model"])).name
    if row["axis"] == ORIGINAL:
        return f"{short} original"
    trained = "untrained" if row["train"] == "none" else str(row["recovery"])
    return ", ".join([f"{short} {row['axis']} {row['ratio']:.0%}", trained, *_chosen(row, varied)])


def _chosen(row: pd.Series, names: Iterable[str]) -> list[str]:
    return [f"{name} {row[name]}" for name in names if row[name] != ""]


def _best(cells: pd.DataFrame, ratio: float) -> pd.Series | None:
    """The cell that keeps most at the measured ratio nearest to one; None if nothing is done."""
    if cells.empty:
        return None
    nearest = min(cells["ratio"].unique(), key=lambda measured: abs(measured - ratio))
    at_ratio = cells[cells["ratio"] == nearest]
    return at_ratio.loc[at_ratio["avg_percent"].idxmax()]


def _study_cards(
    wanted: pd.DataFrame, cells: pd.DataFrame, entries: Sequence[Entry]
) -> list[tuple[str, str, str]]:
    failed = int((wanted["status"] == FAILED).sum())
    rest = len(wanted) - len(cells) - failed
    cards = [("Cells", str(len(cells)), f"{failed} failed, {rest} open")]
    named = {entry.link: entry for entry in entries}
    for ratio in sorted(cells["ratio"].unique())[:5]:
        best = _best(cells, ratio)
        assert best is not None
        entry = named[f"cell-{best.name}"]
        how = f"{entry.axis}, {entry.recovery if entry.train else 'untrained'}"
        cards.append((f"Best at {ratio:.0%} (AVG-%)", f"{entry.percent:.1f}", how))
    return cards


def _cell_table(entries: Sequence[Entry]) -> Table:
    extra = list(dict.fromkeys(name for entry in entries for name in entry.columns))
    header = ["model", "removed", "AVG", "AVG-% [95 % interval]", *extra]
    header += ["the study", "parameters", "prefill ms", "decode ms"]
    rows = [
        [
            entry.name,
            f"{entry.ratio:.1%}",
            f"{entry.average:.1f}",
            f"{entry.interval}{MARK if entry.differs else ''}",
            *(entry.columns.get(name, "") for name in extra),
            _published(entry),
            f"{entry.total_params / 1e6:.1f} M",
            f"{entry.prefill_ms:.1f}",
            f"{entry.decode_ms:.1f}",
        ]
        for entry in entries
    ]
    note = (
        "* The 95 % interval (paired bootstrap over questions) excludes 100. The study: AVG-% of "
        "LLaVA-1.5-7B, Mini-InternVL-4B and Bunny-3B for the same axis, recovery and ratio "
        "(arXiv:2604.24380), with all of its data, LoRA beside full training; other models and "
        "tasks, so read the trend."
    )
    return Table("All cells", header, rows, note, ids=[entry.link for entry in entries])


def _published(entry: Entry) -> str:
    if entry.is_original or entry.fraction < 1:
        return ""
    found = published(entry.axis, entry.train, entry.loss, entry.ratio)
    return " / ".join(f"{value:.1f}" for _, value in found)


def _claim_tables(table: pd.DataFrame) -> list[Table]:
    from slimvlm_tools.claims import claims_of

    claims = [claim for claim in claims_of(table) if claim.verdict != "not measured"]
    if not claims:
        return []
    rows = [[claim.name, claim.statement, claim.verdict] for claim in claims]
    numbers = [[claim.name, line] for claim in claims for line in claim.numbers]
    return [
        Table("What this says on the study's claims", ["claim", "says", "here"], rows, wraps=True),
        Table("The numbers behind", ["claim", "comparison"], numbers, folded=True, wraps=True),
    ]


def _task_table(done: pd.DataFrame, entries: Sequence[Entry]) -> Table:
    names = [name for name in done.columns if name.startswith("score:")]
    rows = [
        [entry.name, *("" if pd.isna(row[name]) else f"{row[name]:.1f}" for name in names)]
        for entry, (_, row) in zip(entries, done.iterrows(), strict=True)
    ]
    header = ["model", *(name.removeprefix("score:") for name in names)]
    return Table("Scores by task", header, rows, "In percent; perplexity as it is.", folded=True)


def _failures(table: pd.DataFrame) -> list[Table]:
    failed = table[table["status"] == FAILED]
    rows = [[_name(row, ()), str(row["failed"])] for _, row in failed.iterrows()]
    return [Table("Failed cells", ["cell", "error"], rows, wraps=True)] if rows else []


def _prunings(folder: Path, cells: pd.DataFrame) -> list[Pruning]:
    """Every plan once."""
    found = []
    for _, row in [] if cells.empty else cells.drop_duplicates("plan").iterrows():
        scores = [Scores.load(folder / name) for name in str(row["scores"]).split()]
        title = f"{Path(row['model']).name} {row['axis']} {row['ratio']:.0%}, {row['criterion']}"
        found.append(Pruning(title, Plan.load(folder / str(row["plan"])), scores))
    return found


# What both have.


def _entry(row: Mapping[str, Any] | pd.Series, name: str, **more: Any) -> Entry:
    """A measured model, from a row of a study's table or what `_stages` says of a run."""
    original = row["axis"] == ORIGINAL
    train = None if original or row["train"] == "none" else str(row["train"])
    return Entry(
        name=name,
        axis="" if original else str(row["axis"]),
        ratio=float(row["achieved_ratio"]),
        recovery="" if original else str(row["recovery"]),
        average=float(row["avg"]),
        percent=_number(row.get("avg_percent")),
        low=_number(row.get("avg_percent_low")),
        high=_number(row.get("avg_percent_high")),
        total_params=int(row["total_params"]),
        prefill_ms=float(row["prefill_ms"]),
        decode_ms=float(row["decode_ms"]),
        train=train,
        loss="" if train is None else str(row["loss"]),
        **more,
    )


def _training(path: Path, title: str) -> list[Training]:
    """The history of a recovery, if it has one."""
    if not path.is_file():
        return []
    history = History.load(path)
    millions = history.trained_params / 1e6
    about = (
        f"{history.num_samples} conversations; {millions:.1f} M parameters learned; "
        f"teacher: {history.teacher}"
    )
    return [Training(title, history.steps, about)]


def _compared(original: Result, other: Result, config: Mapping[str, Any]) -> Comparison:
    """The original and another model, answer by answer."""
    known = builtin_tasks()
    with suppress(ConfigError):  # a file that has gone, or lmms-eval's: answers without questions
        known |= {task.name: task for task in find_tasks(config["tasks"])}
    return compare(original, other, known)


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, "report:")
