"""The folder of a study as a `Record`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from slimvlm.core.errors import ConfigError
from slimvlm.evaluation.compare import Comparison, compare
from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.planning.plan import Plan
from slimvlm.runs.recipes import published
from slimvlm.runs.report.record import Entry, Pruning, Record, Table, Training
from slimvlm.runs.report.run import read_training
from slimvlm.runs.study.table import DONE, FAILED, ORIGINAL, STUDY, TABLE
from slimvlm.runs.tables import MARK
from slimvlm.scoring.unit_scores import Scores

SHOWN_RATIO = 0.3
"""Answers are shown of the best model at the measured ratio that is nearest to this one."""
_OPTIONS = ("criterion", "allocation", "repair", "options", "fraction", "seed")
"""Columns that a cell's name and the table have only where they differ between cells of an axis."""


def is_study(folder: Path) -> bool:
    """Whether a folder is one that `slimvlm study` fills."""
    return (folder / TABLE).is_file() and (folder / "study.json").is_file()


def read_study_folder(folder: Path) -> Record:
    """Read what a study has measured so far.

    Raises:
        ConfigError: If a file cannot be read.
    """
    table, config = _read(folder)
    done = table[table["status"] == DONE]
    cells = done[done["axis"] != ORIGINAL]
    of_axis = cells.astype(str).groupby("axis")
    varied = [name for name in _OPTIONS if (of_axis[name].nunique() > 1).any()]
    entries = [_entry(row, varied, index) for index, row in done.iterrows()]
    models = ", ".join(Path(model).name for model in table["model"].unique())
    wanted = table[table["axis"] != ORIGINAL]
    best = _best(cells, SHOWN_RATIO)
    return Record(
        title=f"Study of {models}",
        lead=f"{len(cells)} of {len(wanted)} cells measured, along "
        f"{' and '.join(wanted['axis'].unique())}.",
        cards=_cards(wanted, cells, entries),
        command=shlex.join(["slimvlm", "study", str(folder / STUDY), "--out", str(folder)]),
        config=config,
        entries=entries,
        prunings=_prunings(folder, cells),
        trainings=_trainings(folder, cells, varied),
        tables=[
            _cell_table(entries),
            *_claim_tables(table),
            _task_table(done, entries),
            *_failures(table),
        ],
        comparison=None if best is None else _comparison(folder, table, best, config),
        notes=[] if best is None else [f"Answers are those of: {_name(best, varied)}."],
    )


def _read(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    try:
        config: dict[str, Any] = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        return pd.read_parquet(folder / TABLE), config
    except (OSError, ValueError) as error:
        raise ConfigError(f"report {str(folder)!r}: cannot be read ({error})") from error


def _entry(row: pd.Series, varied: Sequence[str], index: Any) -> Entry:
    original = row["axis"] == ORIGINAL
    train = None if original or row["train"] == "none" else str(row["train"])
    low, high = (_number(row.get(f"avg_percent_{end}")) for end in ("low", "high"))
    return Entry(
        name=_name(row, varied),
        axis="" if original else str(row["axis"]),
        ratio=float(row["achieved_ratio"]),
        recovery="" if original else str(row["recovery"]),
        average=float(row["avg"]),
        percent=_number(row["avg_percent"]),
        low=low,
        high=high,
        differs=low is not None and high is not None and not low <= 100 <= high,
        total_params=int(row["total_params"]),
        backbone_params=int(row["backbone_params"]),
        prefill_ms=float(row["prefill_ms"]),
        decode_ms=float(row["decode_ms"]),
        train=train,
        loss="" if train is None else str(row["loss"]),
        link=f"cell-{index}",
        model=str(row["model"]),
        fraction=float(row["fraction"]),
        variant="" if original else _variant(row, varied),
        columns=_columns(row, varied, original),
    )


def _columns(row: pd.Series, varied: Sequence[str], original: bool) -> dict[str, str]:
    """What stands in the table beside the figures that every entry has."""
    columns = {name: "" if original else str(row[name]) for name in varied}
    above = _number(row.get("above_floor"))
    low, high = (_number(row.get(f"above_floor_{end}")) for end in ("low", "high"))
    bounds = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    columns["above floor"] = "" if above is None else f"{above:.1f}{bounds}"
    reference = _number(row.get("reference"))
    if reference is not None:
        columns["reference"] = f"{reference:.1f} ({row['reference_source']})"
    return columns


def _name(row: pd.Series, varied: Iterable[str]) -> str:
    """What a cell asks for, in a few words."""
    short = Path(str(row["model"])).name
    if row["axis"] == ORIGINAL:
        return f"{short} original"
    trained = "untrained" if row["train"] == "none" else str(row["recovery"])
    return ", ".join([f"{short} {row['axis']} {row['ratio']:.0%}", trained, *_options(row, varied)])


def _variant(row: pd.Series, varied: Iterable[str]) -> str:
    """What sets a cell apart from others of its axis, ratio and recovery, but for the seed."""
    return ", ".join(_options(row, (name for name in varied if name != "seed")))


def _options(row: pd.Series, names: Iterable[str]) -> list[str]:
    return [f"{name} {row[name]}" for name in names if row[name] != ""]


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _best(cells: pd.DataFrame, ratio: float) -> pd.Series | None:
    """The cell that keeps most at the measured ratio nearest to one; None if nothing is done."""
    if cells.empty:
        return None
    nearest = min(cells["ratio"].unique(), key=lambda measured: abs(measured - ratio))
    at_ratio = cells[cells["ratio"] == nearest]
    return at_ratio.loc[at_ratio["avg_percent"].idxmax()]


def _cards(
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
            published_beside(entry),
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


def published_beside(entry: Entry) -> str:
    """The paper's numbers for a cell; none for one that learned from a part of the data."""
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
    if failed.empty:
        return []
    rows = [[_name(row, ()), str(row["failed"])] for _, row in failed.iterrows()]
    return [Table("Failed cells", ["cell", "error"], rows, wraps=True)]


def _prunings(folder: Path, cells: pd.DataFrame) -> list[Pruning]:
    """Every plan once."""
    found: list[Pruning] = []
    if cells.empty:
        return found
    for path, rows in cells.groupby("plan", sort=False):
        row = rows.iloc[0]
        scores = [Scores.load(folder / name) for name in str(row["scores"]).split()]
        title = f"{Path(row['model']).name} {row['axis']} {row['ratio']:.0%}, {row['criterion']}"
        found.append(Pruning(title, Plan.load(folder / str(path)), scores))
    return found


def _trainings(folder: Path, cells: pd.DataFrame, varied: Sequence[str]) -> list[Training]:
    found = []
    for _, row in cells.iterrows():
        if not pd.isna(row["history"]):
            found += read_training(folder / row["history"], _name(row, varied))
    return found


def _comparison(
    folder: Path, table: pd.DataFrame, best: pd.Series, config: Mapping[str, Any]
) -> Comparison | None:
    """The original and one cell, answer by answer."""
    originals = table[(table["axis"] == ORIGINAL) & (table["model"] == best["model"])]
    known = builtin_tasks()
    with suppress(ConfigError):  # benchmarks of lmms-eval: their questions are not at hand
        known |= {task.name: task for task in find_tasks(config["tasks"])}
    original = Result.load(folder / originals.iloc[0]["result"])
    return compare(original, Result.load(folder / best["result"]), known)
