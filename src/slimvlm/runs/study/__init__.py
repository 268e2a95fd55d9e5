"""Studies: a grid of compressions, each piece of work done once, in one results table."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.live import Live

from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.files import explained, held, require_place, write_text
from slimvlm.core.options import PruneConfig, Questions, part_of
from slimvlm.core.progress import Say
from slimvlm.evaluation.lmms import split_names
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import anatomy, load_config
from slimvlm.runs.request import check_options, check_questions, dry_plan
from slimvlm.runs.study.cache import Cache
from slimvlm.runs.study.config import Cell, StudyConfig, expand, read_study
from slimvlm.runs.study.display import Clock, Forecast, Progress
from slimvlm.runs.study.schedule import (
    ENGINES,
    STAGE_KINDS,
    Schedule,
    forget_files,
    run_local,
    run_ray,
    samples_of,
    stages_of,
)
from slimvlm.runs.study.table import STUDY, write_table

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
    folder with the same file at the same time. What fails is recorded and tried again at the next
    start.

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
    if engine == "ray" and device not in (None, "cpu"):  # which card a stage gets is ray's choice
        raise ConfigError(
            f"device {device!r}: with engine 'ray' it must be cpu or left out; resources in the "
            "study's file say how many gpus a stage takes"
        )
    require_place(Path(out))
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"output {str(out)!r} is a file, and a study needs a folder")
    console = console or Console(stderr=True)
    config, schedule = prepared(
        study, partial(console.print, markup=False, highlight=False), device
    )
    cache = Cache(out)
    with held(cache.root, _PATIENCE), explained(out):
        cache.root.mkdir(parents=True, exist_ok=True)
        write_text(cache.root / "study.json", json.dumps(asdict(config), indent=1) + "\n")
        if isinstance(study, str | Path):
            write_text(cache.root / STUDY, Path(study).read_text(encoding="utf-8"))
    cache.sweep(schedule.stages())
    missing = schedule.missing(cache)
    write = partial(write_table, config, schedule, cache, _PATIENCE)
    progress = Progress(missing, Clock(schedule.flops, cache), console, write)
    watched = Live(progress, console=console, refresh_per_second=2)
    try:
        with watched if console.is_terminal else nullcontext():
            if engine == "local":
                run_local(schedule, missing, cache, progress.started, progress.finished)
            else:
                ended, needs = progress.finished, config.resources
                run_ray(schedule, missing, cache, ended, needs, workers, address)
    finally:
        table = write()
    return table


def forecast(study: StudyConfig | str | Path, out: str | Path) -> Forecast:
    """Estimate the stages and the time of a `run_study`."""
    _, schedule = prepared(study, partial(print, file=sys.stderr))
    cache = Cache(out)
    missing = schedule.missing(cache)
    names = {stage.name for stage in missing}
    clock = Clock(schedule.flops, cache)
    done = [s for s in schedule.stages() if s.name not in names and cache.is_done(s)]
    return Forecast(
        cells={
            cell.cell.label: tuple(s.kind for s in list(cell.all())[1:] if s.name in names)
            for cell in schedule.ordered
        },
        stages={
            kind: (sum(s.kind == kind for s in missing), sum(s.kind == kind for s in done))
            for kind in STAGE_KINDS
        },
        seconds=clock.expected(missing),
        basis={stage.kind: clock.basis(stage.kind) for stage in missing},
    )


def prepared(
    study: StudyConfig | str | Path, say: Say, device: str | None = None
) -> tuple[StudyConfig, Schedule]:
    """Read a study and plan its stages, after every check that needs no weights."""
    config = study if isinstance(study, StudyConfig) else read_study(study)
    cells = [replace(c, prune=replace(c.prune, device=device)) for c in expand(config)]
    check_questions(replace(part_of(config, Questions), floors=False))  # floors where possible
    own, theirs = split_names(config.tasks)
    if not theirs and not any(task.in_average for task in find_tasks(own)):
        raise ConfigError(f"tasks {config.tasks!r}: none counts in AVG, which a study compares")
    for model in dict.fromkeys(cell.model for cell in cells):
        ours: dict[PruneConfig, Cell] = {}  # the first cell of each pruning
        for cell in cells:
            if cell.model == model:
                ours.setdefault(cell.prune, cell)
        load_config(model, next(iter(ours)).trust_remote_code)
        shape = anatomy(model)
        for prune, cell in ours.items():
            try:
                check_options(prune)
                dry_plan(prune, shape)
            except SlimError as error:
                raise ConfigError(f"cell ({cell.label}): {error}") from error
    forget_files()
    schedule = Schedule([stages_of(config, cell) for cell in cells], config.keep_checkpoints)
    if config.data is not None:
        samples, notes = samples_of(schedule.cells[0].prune.request)
        for line in notes:
            say(line)
        if len(samples) <= max(cell.prune.samples for cell in cells):
            found = f"data {config.data!r} has {len(samples)} samples"
            say(f"{found}: training sees those of calibration")
    return config, schedule


def as_json(table: pd.DataFrame) -> dict[str, Any]:
    """Return the table and its verdicts on the claims as plain values."""
    from slimvlm_tools.claims import claims_of

    rows = json.loads(table.to_json(orient="records"))
    return {"rows": rows, "claims": [asdict(claim) for claim in claims_of(table)]}
