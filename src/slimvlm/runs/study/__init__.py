"""Studies: a grid of compressions, each piece of work done once, in one results table."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from slimvlm.core.errors import ConfigError, SlimError, printable
from slimvlm.core.files import explained, held, require_place, write_text
from slimvlm.core.options import PruneConfig, Questions, part_of
from slimvlm.core.progress import Say, duration
from slimvlm.evaluation.lmms import split_names
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import anatomy, device_named, load_config
from slimvlm.runs.cost import speed_of
from slimvlm.runs.request import check_options, check_questions, dry_plan
from slimvlm.runs.study.config import Cell, StudyConfig, expand, read_study
from slimvlm.runs.study.schedule import (
    ENGINES,
    STAGE_KINDS,
    Cache,
    Outcome,
    Schedule,
    Stage,
    forget_files,
    run_local,
    run_ray,
    samples_of,
    stages_of,
)
from slimvlm.runs.study.table import STUDY, write_table

Basis = Literal["measured", "rough"]
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
    shown = Live(progress, console=console, refresh_per_second=2)
    try:
        with shown if console.is_terminal else nullcontext():
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
    clock, missing = Clock(schedule.flops, cache), schedule.missing(cache)
    names = {stage.name for stage in missing}
    done = [s for s in schedule.stages() if s.name not in names and cache.is_done(s)]
    to_do, there = (Counter(stage.kind for stage in of) for of in (missing, done))
    cells = {
        cell.cell.label: tuple(s.kind for s in cell.all()[1:] if s.name in names)
        for cell in schedule.ordered
    }
    stages = {kind: (to_do[kind], there[kind]) for kind in STAGE_KINDS}
    basis = {stage.kind: clock.basis(stage.kind) for stage in missing}
    return Forecast(cells, stages, clock.expected(missing), basis)


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


# Estimates of time, and progress.


class Clock:
    """Estimated seconds of stages, by done ones of their kind, else by their FLOP."""

    def __init__(self, flops: Mapping[str, float], cache: Cache) -> None:
        self.flops = flops  # estimated, by stage name
        self.done = dict.fromkeys(STAGE_KINDS, (0.0, 0.0))  # seconds and FLOP of done stages
        for kind in STAGE_KINDS:
            for record in cache.records(kind):
                self.learn(kind, record.seconds, record.flops)

    def learn(self, kind: str, seconds: float, flops: float) -> None:
        """Count a stage that was done."""
        before = self.done[kind]
        self.done[kind] = before[0] + seconds, before[1] + flops

    def basis(self, kind: str) -> Basis:
        """Return whether expected seconds of a kind are measured or rough."""
        return "measured" if self.done[kind][1] else "rough"

    def expected(self, stages: Iterable[Stage]) -> float:
        """Estimate the seconds of stages, one after another."""
        total = 0.0
        for stage in stages:
            flops, (seconds, done) = self.flops[stage.name], self.done[stage.kind]
            if done:
                total += flops * seconds / done
            else:
                total += flops / speed_of(device_named(stage.request.prune.device), "bfloat16")[0]
        return total


@dataclass(frozen=True)
class Forecast:
    """Stages that a start would do, and their time."""

    cells: Mapping[str, tuple[str, ...]]  # open stages by label of the cell
    stages: Mapping[str, tuple[int, int]]  # numbers of open and done stages by kind
    seconds: float  # of open stages, one after another
    basis: Mapping[str, Basis]  # of each kind: measured if the cache has such stages, else rough


@dataclass
class Progress:
    """Counts of done stages and the time left: a table on a terminal, else lines."""

    missing: Sequence[Stage]
    clock: Clock
    console: Console
    measured: Callable[[], object]  # called after each evaluation
    ended: dict[str, Outcome] = field(default_factory=dict)
    now: Stage | None = None
    announced: set[str] = field(default_factory=set)
    busy: float = 0.0  # seconds of all work done
    start: float = field(default_factory=time.monotonic)

    def started(self, stage: Stage) -> None:
        """Note that a stage begins, or that another worker is doing it."""
        self.now = stage
        if not self.console.is_terminal and stage.name not in self.announced:
            self._print(stage, len(self.ended) + 1)
        self.announced.add(stage.name)

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        """Note that a stage has ended."""
        self.ended[stage.name] = outcome
        self.now = None
        self.busy += outcome.seconds
        if outcome.error:
            self._print(stage, len(self.ended), f": failed ({outcome.error})")
        elif outcome.seconds:
            self.clock.learn(stage.kind, outcome.seconds, self.clock.flops[stage.name])
        if not outcome.error and not self.console.is_terminal:
            took = duration(outcome.seconds) if outcome.seconds else "done by another worker"
            left = duration(self.seconds_left())
            self._print(stage, len(self.ended), f": {took}; about {left} left")
        if stage.kind == "evaluate":
            self.measured()

    def seconds_left(self) -> float:
        """Estimate the wall time of the rest, at as many stages at once as so far."""
        left = [stage for stage in self.missing if stage.name not in self.ended]
        seconds = self.clock.expected(left)
        elapsed = time.monotonic() - self.start
        return seconds / max(self.busy / elapsed, 1.0) if elapsed else seconds

    def __rich__(self) -> Table:
        left = duration(self.seconds_left())
        elapsed = duration(time.monotonic() - self.start)
        table = Table(title=f"{elapsed} gone, about {left} left", title_justify="left")
        for name in ("stage", "to do", "done", "failed", "now"):
            table.add_column(name, justify="left" if name in ("stage", "now") else "right")
        for kind in STAGE_KINDS:
            mine = [stage for stage in self.missing if stage.kind == kind]
            ends = [self.ended[s.name] for s in mine if s.name in self.ended]
            bad = sum(bool(outcome.error) for outcome in ends)
            counts = (len(mine) - len(ends), len(ends) - bad, bad)
            now = self.now.label if self.now is not None and self.now.kind == kind else ""
            table.add_row(kind, *map(str, counts), Text(printable(now)))
        return table

    def _print(self, stage: Stage, number: int, end: str = "") -> None:
        line = f"[{number}/{len(self.missing)}] {stage.kind} {stage.label}{end}"
        self.console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
