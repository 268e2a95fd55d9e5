"""The results table: one row for each cell, with published numbers where the study names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from slimvlm.core.files import held, new_file, write_text
from slimvlm.evaluation.lmms import LMMS_TASKS, split_names
from slimvlm.evaluation.metrics import average
from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.planning.plan import Plan
from slimvlm.runs.study.config import StudyConfig
from slimvlm.runs.study.schedule import (
    HISTORY,
    PLAN,
    RESULT,
    SCORES,
    STAGE_KINDS,
    Cache,
    CellStages,
    Schedule,
    Stage,
)
from slimvlm.training.recover import History

CHOICE_METRICS = ("letter", "yes_no")
"""Metrics of answers that are chosen from a few; all others are of free answers."""
CHOICE_BENCHMARKS = (
    *("pope", "scienceqa_img", "mmmu_val", "ai2d", "mme_cognition", "mme_perception"),
)
"""Published benchmarks whose answers are chosen from a few (arXiv:2604.24380, Fig. 2)."""
TABLE, STUDY = "results.parquet", "study.yaml"
"""Files of a study's folder: its measurements and its questions."""
_MEASURED = (
    *("avg", "avg_free", "avg_choice", "avg_pictures", "avg_text", "perplexity"),
    *("avg_percent", "avg_percent_low", "avg_percent_high"),
    *("above_floor", "above_floor_low", "above_floor_high"),
    *("backbone_params", "total_params", "prefill_ms", "decode_ms"),
    *("result", "plan", "scores", "history"),
)
"""Columns that a table has even where no cell is done."""
OPEN, DONE, FAILED = "open", "done", "failed"
ORIGINAL = "original"


def write_table(
    study: StudyConfig, schedule: Schedule, cache: Cache, patience: float
) -> pd.DataFrame:
    """Write the table and its claims, each file whole, after others who write them."""
    from slimvlm_tools.claims import claims_of, claims_text

    with held(cache.root, patience):
        table = results_table(study, schedule, cache)
        write_text(cache.root / "results.csv", table.to_csv(index=False))
        with new_file(cache.root / TABLE) as partial:
            table.to_parquet(partial, index=False)
        write_text(cache.root / "claims.md", claims_text(claims_of(table)))
    return table


def results_table(study: StudyConfig, schedule: Schedule, cache: Cache) -> pd.DataFrame:
    """Collect all measurements of a study so far.

    A row for the original of each model (``axis`` and ``recovery`` say original), then one for
    each cell: its options, the achieved ratio, AVG, AVG-% with its interval, the floor-corrected
    retention with its interval, a column ``score:TASK`` for each task, averages over groups of
    tasks (``avg_free``, ``avg_choice``, ``avg_pictures``, ``avg_text``), perplexity, parameters,
    latency, paths of the files behind it, seconds by stage, status (done, failed, open) and the
    error. Models of one shape take equally long: each gets the median of their times.
    """
    sighted = _tasks_with_pictures(study.tasks)
    originals = {cell.original.name: cell for cell in schedule.cells}.values()
    rows = [_original_row(cell, cache, sighted) for cell in originals]
    rows += [_row(study, cell, cache, sighted) for cell in schedule.cells]
    table = pd.DataFrame(rows)
    table = table.assign(**{name: None for name in _MEASURED if name not in table})
    shape, times = ["model", "total_params", "backbone_params"], ["prefill_ms", "decode_ms"]
    shared = table.assign(**table[times].astype(float)).groupby(shape, dropna=False)[times]
    return table.assign(**shared.transform("median"))


def _original_row(cell: CellStages, cache: Cache, sighted: frozenset[str]) -> dict[str, Any]:
    row = {
        **dict.fromkeys(cell.cell.values(), None),
        **{"model": cell.cell.model, "axis": ORIGINAL, "recovery": ORIGINAL},
        **{"ratio": 0.0, "achieved_ratio": 0.0, "fraction": 1.0, "seed": 0},
        **_state([cell.original], cache),
    }
    if row["status"] == DONE:
        row |= {"avg_percent": 100.0, **_scores(cache.path(cell.original, RESULT), sighted)}
        row["result"] = str(cache.path(cell.original, RESULT).relative_to(cache.root))
    return row | _seconds([cell.original], cache)


def _row(
    study: StudyConfig, cell: CellStages, cache: Cache, sighted: frozenset[str]
) -> dict[str, Any]:
    def place(stage: Stage, name: str) -> str:
        """Return a file's path relative to the study's folder."""
        return str(cache.path(stage, name).relative_to(cache.root))

    stages, options = cell.all(), cell.cell.values()
    row = {**options, "achieved_ratio": None, "steps": 0, **_state(stages, cache)}
    if cache.is_done(cell.prune):
        row["achieved_ratio"] = _ratio(cache.path(cell.prune, PLAN))
    if cell.recover and cache.is_done(cell.recover):
        row["steps"] = History.load(cache.path(cell.recover, HISTORY)).steps[-1]["step"]
    if row["status"] == DONE:
        result, original = (cache.path(s, RESULT) for s in (cell.evaluate, cell.original))
        made = (*cell.calibrations, cell.prune)
        scored = [stage for stage in made if cache.path(stage, f"{SCORES}.json").exists()]
        row |= {**_retention(result, original), **_scores(result, sighted)}
        row |= {"result": place(cell.evaluate, RESULT), "plan": place(cell.prune, PLAN)}
        row["scores"] = " ".join(place(stage, SCORES) for stage in scored)
        row["history"] = None if cell.recover is None else place(cell.recover, HISTORY)
    if study.reference is not None:
        found = study.reference.row_for(options)
        sources = (study.reference.source, found.source) if found else ()
        row["reference"] = found.retention if found else None
        row["reference_source"] = ", ".join(filter(None, sources)) or None
    return row | _seconds(stages[1:], cache)


@lru_cache(maxsize=4096)
def _ratio(plan: Path) -> float:
    return Plan.load(plan).ratio


def _state(stages: list[Stage], cache: Cache) -> dict[str, Any]:
    """Return the status, and the first error in the order of the work."""
    if cache.is_done(stages[0]) and cache.is_done(stages[-1]):
        return {"status": DONE, "failed": None}
    errors = [f"{s.kind}: {e}" for s in stages if (e := cache.error_of(s))]
    return {"status": FAILED if errors else OPEN, "failed": errors[0] if errors else None}


def _seconds(stages: list[Stage], cache: Cache) -> dict[str, float]:
    """Sum seconds by kind of stage; shared stages count in each of their cells."""
    spent = dict.fromkeys((f"seconds_{kind}" for kind in STAGE_KINDS), 0.0)
    for stage in stages:
        for record in cache.records(stage.kind, stage.name):
            spent[f"seconds_{stage.kind}"] += record.seconds
    return spent


@lru_cache(maxsize=4096)
def _retention(result: Path, original: Path) -> Mapping[str, float]:
    """Compute the retention of two result files; cached, because bootstraps take long."""
    kept = vars(Result.load(result).retention(Result.load(original)))
    named = {"percent": "avg_percent", "low": "avg_percent_low", "high": "avg_percent_high"}
    return {named.get(name, name): kept[name] for name in kept if name != "above_chance"}


@lru_cache(maxsize=4096)
def _scores(path: Path, sighted: frozenset[str]) -> Mapping[str, Any]:
    """Read columns from a result file."""
    result = Result.load(path)
    scores = {name: task.score for name, task in result.tasks.items() if task.in_average}
    chosen = {name for name, task in result.tasks.items() if task.metric in CHOICE_METRICS}
    chosen |= {*CHOICE_BENCHMARKS}
    groups = {
        "avg_free": [name for name in scores if name not in chosen],
        "avg_choice": [name for name in scores if name in chosen],
        "avg_pictures": [name for name in scores if name in sighted],
        "avg_text": [name for name in scores if name not in sighted],
    }
    perplexities = [t.score for t in result.tasks.values() if t.metric == "perplexity"]
    row: dict[str, Any] = {"avg": None if math.isnan(result.average) else result.average}
    for group, names in groups.items():
        row[group] = average({name: scores[name] for name in names}) if names else None
    row |= {f"score:{name}": task.score for name, task in result.tasks.items()}
    row["perplexity"] = perplexities[0] if perplexities else None
    costs = ("backbone_params", "total_params", "prefill_ms", "decode_ms")
    return row | {name: getattr(result, name) for name in costs}


@lru_cache(maxsize=64)
def _tasks_with_pictures(tasks: str) -> frozenset[str]:
    """Name the tasks whose questions show pictures; all of lmms-eval's do."""
    own, _ = split_names(tasks)
    seeing = {t.name for t in (find_tasks(own) if own else []) if t.load(1)[0].images}
    return frozenset(seeing | set(LMMS_TASKS))
