"""Studies: a grid of compressions, each piece of work done once, in one results table."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from slimvlm.core.checked import part_of
from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.files import explained, held, require_place, write_text
from slimvlm.core.options import PruneConfig, Questions
from slimvlm.core.progress import Say
from slimvlm.evaluation.lmms import split_names
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import anatomy, load_config
from slimvlm.runs.request import check_options, check_questions, rehearse
from slimvlm.runs.study.cache import Cache
from slimvlm.runs.study.cells import Cell, expand
from slimvlm.runs.study.config import StudyConfig, read_study
from slimvlm.runs.study.display import Clock, Forecast, Progress, forecast_of, shown
from slimvlm.runs.study.engines import ENGINES, run_local, run_ray
from slimvlm.runs.study.graph import forget_files, stages_of
from slimvlm.runs.study.schedule import Schedule
from slimvlm.runs.study.table import STUDY, results_table, write_table
from slimvlm.runs.study.work import notes_on, samples_of

_PATIENCE = 600.0
"""Seconds to wait for another worker that writes the table."""


def run_study(
    study: StudyConfig | str | Path,
    out: str | Path,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    console: Console | None = None,
    device: str | None = None,
) -> pd.DataFrame:
    """Measure every cell of a study.

    The folder can be given again, with the same study or a larger one: only what is new is done. A
    stopped start loses at most the stages that were running. Several processes may work on one
    folder with the same file at the same time. What fails is written down and tried again at the
    next start.

    Args:
        study: A study, or its YAML file.
        out: The folder: ``results.parquet``, ``results.csv``, ``claims.md``, ``cache/``.
        engine: ``local``, one stage after another in this process, or ``ray``.
        workers: Stages at once, for a Ray that is started here.
        address: A running Ray cluster.
        console: Where progress is shown; by default stderr.
        device: Where models run; by default the accelerator if there is one, else the CPU.

    Returns:
        The results table; see `slimvlm.runs.study.table.results_table`.

    Raises:
        SlimError: For anything that the user can mend; found before any work is done.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine {engine!r} must be one of: {', '.join(ENGINES)}")
    if workers is not None and (engine != "ray" or workers < 1):
        raise ConfigError(f"workers {workers} needs engine 'ray' and must be at least 1")
    if address is not None and engine != "ray":
        raise ConfigError(f"address {address!r} needs engine 'ray'")
    console = console or Console(stderr=True)
    require_place(Path(out))
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"output {str(out)!r} is a file, and a study needs a folder")
    say = partial(console.print, markup=False, highlight=False)
    if engine == "ray" and device not in (None, "cpu"):  # which card a stage gets is ray's choice
        raise ConfigError(
            f"device {device!r}: with engine 'ray' it must be cpu or left out; resources in the "
            "study's file say how many gpus a stage takes"
        )
    config, schedule = prepared(study, say, device)
    cache = Cache(out)
    with held(cache.root, _PATIENCE), explained(out):
        cache.root.mkdir(parents=True, exist_ok=True)
        write_text(cache.root / "study.json", json.dumps(asdict(config), indent=1) + "\n")
        if isinstance(study, str | Path):
            write_text(cache.root / STUDY, Path(study).read_text(encoding="utf-8"))
    cache.sweep(schedule.stages())
    missing = schedule.missing(cache)
    write = partial(_written_table, config, schedule, cache)
    progress = Progress(missing, Clock.from_cache(schedule.flops, cache), console, write)
    try:
        with shown(progress):
            if engine == "local":
                run_local(schedule, missing, cache, progress)
            else:
                run_ray(schedule, missing, cache, progress, config.resources, workers, address)
    finally:
        table = write()
    return table


def _written_table(config: StudyConfig, schedule: Schedule, cache: Cache) -> pd.DataFrame:
    """What is measured so far, and what it says on the claims, as files too."""
    from slimvlm_tools.claims import claims_of, claims_text

    with held(cache.root, _PATIENCE):
        table = results_table(config, schedule, cache)
        write_table(table, cache.root)
        write_text(cache.root / "claims.md", claims_text(claims_of(table)))
    return table


def forecast(study: StudyConfig | str | Path, out: str | Path) -> Forecast:
    """Find out what `run_study` would do, and how long it would take.

    Raises:
        SlimError: As `run_study`.
    """
    _, schedule = prepared(study, partial(print, file=sys.stderr))
    return forecast_of(schedule, Cache(out))


def prepared(
    study: StudyConfig | str | Path, say: Say, device: str | None = None
) -> tuple[StudyConfig, Schedule]:
    """A study and its schedule, after everything that can be checked without weights was."""
    config = study if isinstance(study, StudyConfig) else read_study(study)
    cells = [replace(c, prune=replace(c.prune, device=device)) for c in expand(config)]
    _check_tasks(config)
    for model in dict.fromkeys(cell.model for cell in cells):
        _check_model(model, [cell for cell in cells if cell.model == model])
    forget_files()
    schedule = Schedule([stages_of(config, cell) for cell in cells], config.keep_checkpoints)
    if config.data is not None:
        request = schedule.cells[0].prune.request
        for line in notes_on(request):
            say(line)
        found = len(samples_of(request))
        wanted = max(cell.prune.samples for cell in cells)
        if found <= wanted:
            say(f"data {config.data!r} has {found} samples: training sees those of calibration")
    return config, schedule


def _check_tasks(study: StudyConfig) -> None:
    check_questions(replace(part_of(study, Questions), floors=False))  # floors where possible
    own, theirs = split_names(study.tasks)
    if not theirs and not any(task.in_average for task in find_tasks(own)):
        raise ConfigError(f"tasks {study.tasks!r}: none counts in AVG, which a study compares")


def _check_model(model: str, cells: list[Cell]) -> None:
    """Rehearse every plan of a model; its configuration is read once."""
    load_config(model, cells[0].prune.trust_remote_code)
    shape = anatomy(model)
    checked: set[PruneConfig] = set()
    for cell in cells:
        if cell.prune in checked:
            continue
        checked.add(cell.prune)
        try:
            check_options(cell.prune)
            rehearse(cell.prune, shape)
        except SlimError as error:
            raise ConfigError(f"cell ({cell.label}): {error}") from error


def as_json(table: pd.DataFrame) -> dict[str, Any]:
    """The table and what it says on the study's claims, as plain values."""
    from slimvlm_tools.claims import claims_of

    rows = json.loads(table.to_json(orient="records"))
    return {"rows": rows, "claims": [asdict(claim) for claim in claims_of(table)]}
