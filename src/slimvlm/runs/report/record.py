"""Read a folder of `compress` or of a study as a `Record`; a run is a study of one cell."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from slimvlm.core.documents import read_object, read_yaml
from slimvlm.core.errors import LONGEST, ConfigError, one_line, raised_as, shortened
from slimvlm.core.files import path_of
from slimvlm.core.options import Train
from slimvlm.core.tables import read_table
from slimvlm.data.samples import Task
from slimvlm.evaluation.compare import Comparison, compare
from slimvlm.evaluation.lmms import split_names
from slimvlm.evaluation.metrics import LIKELIHOODS, Estimate
from slimvlm.evaluation.on_data import DataResult
from slimvlm.evaluation.results import KINDS, Result
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.planning.plan import Plan
from slimvlm.runs import compress as runs
from slimvlm.runs import tables
from slimvlm.runs.chart import Curve, expected
from slimvlm.runs.stages import ORIGINAL
from slimvlm.runs.study import DONE, FAILED, STUDY, TABLE
from slimvlm.runs.study.config import percent
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import History

SHOWN_RATIO = 0.3  # answers are of the best model at the measured ratio nearest to this one
_OPTIONS = ("criterion", "allocation", "repair", "options", "fraction", "seed")
"""Columns that a cell's name and the table have only where they differ between cells of an axis."""
_TABLES = read_table(__file__, "tables.yaml")
Card = tuple[str, str, str]  # label, value, explanation
Training = tuple[str, str, Sequence[Mapping[str, float]]]  # title, words, log rows


@dataclass(frozen=True)
class Table:
    """Text cells below a header; those that end with `slimvlm.runs.tables.MARK` are significant."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""  # written below, one list item for each line
    folded: bool = False  # closed at first
    wraps: bool = False  # cells are sentences, which break into lines


@dataclass(frozen=True)
class Record:
    """Everything that a report shows."""

    title: str
    lead: str  # a sentence below the title
    cards: Sequence[Card]  # figures to read first
    command: str  # of the run; empty if not known
    config: Mapping[str, Any]
    entries: pd.DataFrame  # the measured models, originals first, as `_measured` gives them
    prunings: Sequence[tuple[str, Plan, Sequence[Scores]]]  # title, plan, scores that led to it
    trainings: Sequence[Training]
    tables: Sequence[Table]
    comparison: Comparison | None  # the original and one smaller model, answer by answer
    notes: Sequence[str] = ()


def read_record(folder: str | Path, tasks: str | None = None) -> Record:
    """Read a run folder of `compress` or of a study; ``tasks`` are evaluated ones of the user."""
    path = path_of(folder, "run")
    own, _ = split_names(tasks or "demo")  # lmms-eval's: answers without questions
    known = builtin_tasks() | {task.name: task for task in find_tasks(own or "demo")}
    try:
        if (path / runs.RUN_FILE).is_file() and (path / "plan.json").is_file():
            return _read_run(path, known)
        if (path / TABLE).is_file() and (path / "study.json").is_file():
            return _read_study(path, known)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        told = f"{type(error).__name__}: {one_line(error)[:LONGEST]}"
        told = f"a file in it is not as slimvlm wrote it ({told})"
        raise ConfigError(f"report {str(folder)!r}: {told}") from error
    told = f"neither a run folder (run.yaml and plan.json) nor a study ({TABLE} and study.json)"
    raise ConfigError(f"report {str(folder)!r}: {told}")


def _read_run(folder: Path, known: Mapping[str, Task]) -> Record:
    config, command = read_yaml(folder / runs.RUN_FILE, "report:"), ""
    json.dumps(config)  # YAML may hold what JSON cannot: the caller says so
    with suppress(ConfigError):  # options of another version
        model, options = runs.read_config(folder / runs.RUN_FILE)
        command = runs.compress_command(model, options, folder)
    plan, results = Plan.load(folder / "plan.json"), runs.read_results(folder)
    on_data, recover = runs.read_held_out(folder), config.get("recover")
    recover = recover if isinstance(recover, dict) else {}
    figures, rows = tables.result_json(results), []
    for stage, values in figures.items():  # as a row of a study's table
        trained = recover.get("train") if stage == "recovered" else None
        kept = (values.get("retention") or {}) if ORIGINAL in figures else {}
        row = {"name": stage, "axis": plan.axis, "achieved_ratio": plan.ratio} | {
            **{name: values[name] for name in ("total_params", "prefill_ms", "decode_ms")},
            **{"train": trained or "none", "loss": recover.get("loss"), "avg": values["average"]},
            **{"recovery": f"{trained} {recover['loss']}" if trained else "none"},
            **{"fraction": recover.get("fraction", 1.0), "avg_percent": kept.get("percent")},
            **{f"avg_percent_{end}": kept.get(end) for end in ("low", "high")},
        }
        if stage == ORIGINAL:
            row |= {"axis": ORIGINAL, "achieved_ratio": 0.0, "avg_percent": 100.0}
        rows.append(row)
    entries = _measured(pd.DataFrame(rows)).fillna({"variant": "", "model": ""})
    listed = []
    if results:
        listed.append(Table("Scores in percent", *tables.result_rows(results), tables.LEGEND))
    if on_data:
        title, note = "Retained on test samples", "\n".join(tables.held_out_notes(on_data))
        listed.append(Table(title, *tables.held_out_rows(on_data), note))
    comparison = None
    if ORIGINAL in results and len(results) > 1:
        original, *_, smaller = results.values()
        if any(task.metric not in LIKELIHOODS for task in original.tasks.values()):
            comparison = compare(original, smaller, known)
    scores = [Scores.load(path) for path in sorted((folder / "scores").glob("*.safetensors"))]
    learns = f"{recover.get('train')} from {recover.get('loss')}"
    return Record(
        title=f"{Path(config['model']).name} at {plan.ratio:.0%}",
        lead=f"This run {plan.summary()}.",
        cards=[*_cards(folder, plan, figures, on_data)],
        command=command,
        config=config,
        entries=entries,
        prunings=[("", plan, scores)],
        trainings=_training(folder / "history.json", learns),
        tables=listed,
        comparison=comparison,
        notes=tables.training_notes(results, on_data, str(recover.get("loss"))),
    )


def _cards(
    folder: Path,
    plan: Plan,
    figures: Mapping[str, Mapping[str, Any]],
    on_data: Mapping[str, DataResult],
) -> Iterator[Card]:
    """Yield the figures of a run to read first; those of tasks as `result_json` gives them."""
    last: Mapping[str, Any] = list(figures.values())[-1] if ORIGINAL in figures else {}
    named = {"Retained (AVG-%)": last.get("retention")}
    for kind, part in last.get("by_kind", {}).items():
        named[f"Retained of {kind} answers"] = part.get("retention")
    for title, kept in named.items():
        if kept is not None and kept["percent"] is not None:
            bounds = "no bounds"
            if kept["low"] is not None:
                bounds = f"95 % interval {kept['low']:.1f} to {kept['high']:.1f}"
            yield title, f"{kept['percent']:.1f}", f"{bounds}, floor {kept['floor']:.1f}"
    asked = "" if plan.asked_ratio is None else f"requested {plan.asked_ratio:.1%}"
    yield "Backbone removed", f"{plan.ratio:.1%}", asked
    if plan.tower is not None:
        yield "Vision tower removed", f"{plan.tower.ratio:.1%}", ""
    before, after = plan.before.total_params / 1e6, plan.after.total_params / 1e6
    yield "Parameters", f"{after:,.1f} M", f"of {before:,.1f} M"
    if (times := runs.read_times(folder)) is not None:
        timed = {"Prefill time": times.prefill, "Decode time": times.decode}
        if times.text is not None:
            timed["Prefill time without the image"] = times.text
        for title, share in timed.items():
            bounds = f"of the original's, {share.low:.0%} to {share.high:.0%} in all rounds"
            yield title, f"{share.value:.0%}", bounds
    same = list(on_data.values())[-1].figures.agreement if on_data else None
    if same is not None:
        yield "Same next token", f"{same.value:.1f} %", f"on test samples, {same:.1f}"


def _read_study(folder: Path, known: Mapping[str, Task]) -> Record:
    config = read_object(folder / "study.json", "report:")
    with raised_as(ConfigError, (OSError, ValueError), f"report {str(folder)!r}: cannot be read"):
        table = pd.read_parquet(folder / TABLE)
    done = _measured(table[table["status"] == DONE])
    cells, wanted = (rows[rows["axis"] != ORIGINAL] for rows in (done, table))
    of_axis = cells.astype(str).groupby("axis")
    varied = [name for name in _OPTIONS if (of_axis[name].nunique() > 1).any()]
    rows = [row for _, row in done.iterrows()]
    named = [name for name in varied if name != "seed"]
    done["name"] = [_name(row, varied) for row in rows]
    done["variant"] = [", ".join(_options(row, named)) for row in rows]
    cells = done[done["axis"] != ORIGINAL]
    prunings, trainings = [], list[Training]()
    for _, row in cells.drop_duplicates("plan").iterrows():
        scores = [Scores.load(_inside(folder, name)) for name in str(row["scores"]).split()]
        removed = f"{row['axis']} {percent(row['ratio'])}"
        title = f"{Path(row['model']).name} {removed}, {row['criterion']}"
        prunings.append((title, Plan.load(_inside(folder, row["plan"])), scores))
    for _, row in cells[cells["history"].notna()].iterrows():
        trainings += _training(_inside(folder, row["history"]), row["name"])
    failed = int((wanted["status"] == FAILED).sum())
    words = f"{failed} failed, {len(wanted) - len(cells) - failed} open"
    cards = [("Cells", str(len(cells)), words)]
    rated = cells.dropna(subset=["avg_percent"])  # none where the original has nothing right
    best = rated.loc[rated.groupby("ratio")["avg_percent"].idxmax()]  # of each ratio, in order
    for _, row in best.head(5).iterrows():
        how = f"{row['axis']}, {'untrained' if row['train'] == 'none' else row['recovery']}"
        title = f"Best at {percent(row['ratio'])} (AVG-%)"
        cards.append((title, f"{row['avg_percent']:.1f}", how))
    comparison, notes = None, []
    if not best.empty:
        shown = best.loc[(best["ratio"] - SHOWN_RATIO).abs().idxmin()]
        notes = [f"Answers are those of: {shown['name']}."]
        originals = table[(table["axis"] == ORIGINAL) & (table["model"] == shown["model"])]
        original = Result.load(_inside(folder, shown.get("original", originals.iloc[0]["result"])))
        comparison = compare(original, Result.load(_inside(folder, shown["result"])), known)
    models = ", ".join(Path(model).name for model in table["model"].unique())
    axes = " and ".join(wanted["axis"].unique())
    return Record(
        title=f"Study of {models}",
        lead=f"{len(cells)} of {len(wanted)} cells measured, along {axes}.",
        cards=cards,
        command=shlex.join(["slimvlm", "study", str(folder / STUDY), "--out", str(folder)]),
        config=config,
        entries=done,
        prunings=prunings,
        trainings=trainings,
        tables=[*_study_tables(table, done, varied)],
        comparison=comparison,
        notes=notes,
    )


def _study_tables(
    table: pd.DataFrame, done: pd.DataFrame, varied: Sequence[str]
) -> Iterator[Table]:
    from slimvlm_tools.claims import claims_of

    rows = [row for _, row in done.iterrows()]
    clear = (done["avg_percent_low"] > 100) | (done["avg_percent_high"] < 100)
    optional: dict[str, list[str]] = {f"AVG-% {kind}": [] for kind in KINDS}
    optional["reference"] = []
    for row in rows:
        for kind in KINDS:
            text = interval(row, f"{kind}_percent")
            text = text and f"{text}, floor {row[f'{kind}_floor']:.1f}"
            optional[f"AVG-% {kind}"].append(text)
        text = interval(row, "reference")
        optional["reference"].append(text and f"{text} ({row['reference_source']})")
    cells: dict[str, Any] = {
        "model": done["name"],
        "removed": done["achieved_ratio"].map("{:.1%}".format),
        "AVG": done["avg"].map("{:.1f}".format),
        "AVG-% [95 % interval]": [
            interval(row, "avg_percent") + tables.MARK * is_clear
            for row, is_clear in zip(rows, clear, strict=True)
        ],
        **{name: done[name].astype(str).where(done["axis"] != ORIGINAL, "") for name in varied},
        "above floor": [interval(row, "above_floor") for row in rows],
        **{name: texts for name, texts in optional.items() if any(texts)},
        "published": [" / ".join(f"{value:.1f}" for _, value in published(row)) for row in rows],
        "parameters": [f"{params / 1e6:.1f} M" for params in done["total_params"]],
        "prefill ms, image included": done["prefill_ms"].map("{:.1f}".format),
        "decode ms": done["decode_ms"].map("{:.1f}".format),
    }
    texts = [*zip(*cells.values(), strict=True)]
    yield Table(header=list(cells), rows=texts, **_TABLES["cells"])
    claims = [claim for claim in claims_of(table) if claim.verdict != "not measured"]
    if claims:
        lines = [[claim.name, claim.statement, claim.verdict] for claim in claims]
        yield Table(rows=lines, **_TABLES["claims"])
        lines = [[claim.name, line] for claim in claims for line in claim.numbers]
        yield Table(rows=lines, **_TABLES["numbers"])
    names = [name for name in done if name.startswith("score:")]
    lines = [
        [row["name"], *("" if pd.isna(row[name]) else f"{row[name]:.1f}" for name in names)]
        for row in rows
    ]
    header = ["model", *(name.removeprefix("score:") for name in names)]
    yield Table(header=header, rows=lines, **_TABLES["scores"])
    broken = table[table["status"] == FAILED]
    if len(broken):
        lines = [[_name(row), str(row["failed"])] for _, row in broken.iterrows()]
        yield Table(rows=lines, **_TABLES["failed"])


def _name(row: pd.Series, varied: Sequence[str] = ()) -> str:
    short = Path(str(row["model"])).name
    if row["axis"] == ORIGINAL:
        return f"{short} original"
    trained = "untrained" if row["train"] == "none" else str(row["recovery"])
    removed = f"{short} {row['axis']} {percent(row['ratio'])}"
    return ", ".join([removed, trained, *_options(row, varied)])


def _options(row: pd.Series, varied: Sequence[str]) -> list[str]:
    return [f"{name} {row[name]}" for name in varied if row[name] != ""]


def _measured(table: pd.DataFrame) -> pd.DataFrame:
    """Give rows of a study's table all columns of figures, as numbers, and of words."""
    ends = {f"{kind}_{end}": f"{kind}_percent_{end}" for kind in KINDS for end in ("low", "high")}
    figures = ["avg_percent", "above_floor", *(f"{kind}_percent" for kind in KINDS)]
    numbers = [f"{figure}{end}" for figure in figures for end in ("", "_low", "_high")]
    numbers += ["achieved_ratio", "avg", "total_params", "prefill_ms", "decode_ms", "fraction"]
    words = ["name", "model", "axis", "recovery", "train", "loss", "variant", "history"]
    table = table.rename(columns=ends)
    table = table.reindex(columns=[*dict.fromkeys([*table, *numbers, "reference", *words])])
    table = table.astype(dict.fromkeys([*numbers, "reference"], float))
    table["train"] = table["train"].fillna("none")  # of originals
    known = ("none", *get_args(Train))
    for train in {*table["train"]} - {*known}:
        raise ConfigError(f"train {shortened(train)} must be one of: {', '.join(known)}")
    return table


def interval(row: pd.Series, figure: str) -> str:
    """Format a figure of a measured model with its interval; empty if it was not measured."""
    numbers = [row.get(f"{figure}{end}") for end in ("", "_low", "_high")]
    value, low, high = (
        None if number is None or math.isnan(number) else number for number in numbers
    )
    return "" if value is None else f"{Estimate(value, low, high):.1f}"


def published(row: pd.Series, ratio: float | None = None) -> list[tuple[Curve, float]]:
    """Find AVG-% of the papers' models for a row's axis and training, with all of the data."""
    if row["axis"] == ORIGINAL or row["fraction"] != 1:
        return []
    train = None if row["train"] == "none" else row["train"]
    removed = row["achieved_ratio"] if ratio is None else ratio
    return expected(row["axis"], train, row["loss"], removed, ours=False)


def _training(path: Path, title: str) -> list[Training]:
    if not path.is_file():
        return []
    history = History.load(path)
    about = (
        f"{history.num_samples} samples; {history.trained_params / 1e6:.1f} M parameters "
        f"learned; teacher: {history.teacher}"
    )
    return [(title, about, history.steps)]


def _inside(folder: Path, name: Any) -> Path:
    """Find a file that a table names; refuse one outside of the folder."""
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        told = f"{TABLE} names {shortened(str(name))}, which is outside of it"
        raise ConfigError(f"report {str(folder)!r}: {told}")
    return path
