"""Studies: a grid of compressions, each piece of work done once, in one results table."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from slimvlm.core.errors import ConfigError, SlimError, printable, raised_as
from slimvlm.core.files import explained, held, new_file, require_place, write_text
from slimvlm.core.options import Questions
from slimvlm.core.progress import Say, duration
from slimvlm.core.tables import read_table
from slimvlm.evaluation.lmms import LMMS_TASKS, split_names
from slimvlm.evaluation.metrics import average
from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.devices import device_named
from slimvlm.models.load import anatomy, load_config
from slimvlm.planning.plan import Plan
from slimvlm.runs.cost import speed_of
from slimvlm.runs.recipe import Recipe, check_questions, check_recipe, decide, dry_plan
from slimvlm.runs.stages import ORIGINAL
from slimvlm.runs.study import schedule as scheduling
from slimvlm.runs.study.config import Cell, StudyConfig, expand, read_study
from slimvlm.runs.study.schedule import STAGE_KINDS, Cache, Outcome, Schedule, Stage
from slimvlm.training.recover import History

_PATIENCE = 600.0  # seconds to wait for another worker that writes the table
OF_A_KIND = ("percent", "low", "high", "floor")  # columns of AVG-% of one kind of answers
TABLE, STUDY = "results.parquet", "study.yaml"  # a study's measurements and its questions
COLUMNS = read_table(__file__, "columns.yaml")  # those even where no cell is done
OPEN, DONE, FAILED = "open", "done", "failed"


def run_study(
    study: StudyConfig | str | Path,
    out: str | Path,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    console: Console | None = None,
    device: str | None = None,
) -> pd.DataFrame:
    """Measure every cell of a study; return the table of `results_table`.

    The folder can be given again, with the same study or a larger one: only what is new is done. A
    stopped start loses at most the stages that were running. Several processes may work on one
    folder with the same file at the same time. What fails is recorded and tried again at the next
    start. Mistakes are found before any work is done. ``engine``, ``workers`` (of a Ray that is
    started here), ``address`` (of one that runs) and ``device`` are those of ``slimvlm study``.
    """
    if engine not in scheduling.ENGINES:
        raise ConfigError(f"engine {engine!r} must be one of: {', '.join(scheduling.ENGINES)}")
    if workers is not None and (engine != "ray" or workers < 1):
        raise ConfigError(f"workers {workers} needs engine 'ray' and must be at least 1")
    if address is not None and engine != "ray":
        raise ConfigError(f"address {address!r} needs engine 'ray'")
    if engine == "ray" and device not in (None, "cpu"):  # which card a stage gets is ray's choice
        told = "with engine 'ray' it must be cpu or left out; resources in the study's file say"
        raise ConfigError(f"device {device!r}: {told} how many gpus a stage takes")
    require_place(Path(out))
    if Path(out).exists() and not Path(out).is_dir():
        raise ConfigError(f"output {str(out)!r} is a file, and a study needs a folder")
    console = console or Console(stderr=True)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    config, schedule = prepared(study, say, device)
    cache = Cache(out)
    with held(cache.root, _PATIENCE), explained(out):
        cache.root.mkdir(parents=True, exist_ok=True)
        write_text(cache.root / "study.json", json.dumps(asdict(config), indent=1) + "\n")
        if isinstance(study, str | Path):
            write_text(cache.root / STUDY, Path(study).read_text(encoding="utf-8"))
    cache.sweep(schedule.stages())
    missing = schedule.missing(cache)
    write = partial(write_table, config, schedule, cache)
    shown = Progress(missing, Clock(schedule.flops, cache), say, write)
    try:
        if engine == "local":
            scheduling.run_local(schedule, missing, cache, shown.started, shown.finished)
        else:
            how = (config.resources, workers, address)
            scheduling.run_ray(schedule, missing, cache, shown.finished, *how)
    finally:
        table = write()
    return table


def forecast(study: StudyConfig | str | Path, out: str | Path) -> "Forecast":
    """Estimate the stages and the time of a `run_study`."""
    _, schedule = prepared(study, partial(print, file=sys.stderr))
    cache = Cache(out)
    clock, missing = Clock(schedule.flops, cache), schedule.missing(cache)
    names = {stage.name for stage in missing}
    done = [s for s in schedule.stages() if s.name not in names and cache.is_done(s)]
    to_do, there = (Counter(stage.kind for stage in of) for of in (missing, done))
    cells: dict[str, tuple[str, ...]] = {}
    for cell in schedule.ordered:
        label, number = cell.cell.label, len(cells) + 1
        label += f" ({number})" if label in cells else ""  # such as of two models of one name
        cells[label] = tuple(s.kind for s in cell.all()[1:] if s.name in names)
    stages = {kind: (to_do[kind], there[kind]) for kind in STAGE_KINDS}
    basis = {s.kind: "measured" if clock.done[s.kind][1] else "rough" for s in missing}
    return Forecast(cells, stages, clock.expected(missing), basis)


def prepared(
    study: StudyConfig | str | Path, say: Say, device: str | None = None
) -> tuple[StudyConfig, Schedule]:
    """Read a study and plan its stages, after every check that needs no weights."""
    config = study if isinstance(study, StudyConfig) else read_study(study)
    cells = [replace(c, options=replace(c.options, device=device)) for c in expand(config)]
    check_questions(replace(config.part(Questions), floors=False))  # floors where possible
    own, theirs = split_names(config.tasks)
    if not theirs and not any(task.in_average for task in find_tasks(own)):
        raise ConfigError(f"tasks {config.tasks!r}: none counts in AVG, which a study compares")
    shapes: dict[str, Anatomy] = {}
    told: dict[str, None] = {}
    possible: set[Recipe] = set()
    decided: dict[Cell, Cell] = {}  # cells that come to the same are one
    for cell in cells:
        if cell.model not in shapes:
            load_config(cell.model, cell.options.trust_remote_code)
            shapes[cell.model] = anatomy(cell.model)
        with raised_as(ConfigError, SlimError, f"cell ({cell.label}):"):
            recipe = decide(cell.model, cell.options, shapes[cell.model], told.setdefault)
            check_recipe(recipe)
            if (pruned := replace(recipe, recover=None, training_samples=None)) not in possible:
                dry_plan(recipe, shapes[cell.model])
                possible.add(pruned)
        cell = replace(cell, options=recipe)
        decided.setdefault(replace(cell, words=""), cell)
    for line in told:
        say(line)
    for remembered in scheduling.REMEMBERED:  # another study may find other files in their place
        remembered.cache_clear()
    planned = [scheduling.stages_of(config, cell) for cell in decided.values()]
    schedule = Schedule(planned, config.keep_checkpoints)
    if config.data is not None:
        samples, notes = scheduling.samples_of(schedule.cells[0].prune.recipe)
        for line in notes:
            say(line)
        if len(samples) <= max(cell.options.samples for cell in cells):
            found = f"data {config.data!r} has {len(samples)} samples"
            say(f"{found}: training sees those of calibration")
    return config, schedule


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
        self.done[kind] = self.done[kind][0] + seconds, self.done[kind][1] + flops

    def expected(self, stages: Iterable[Stage]) -> float:
        """Estimate the seconds of stages, one after another."""
        total = 0.0
        for stage in stages:
            seconds, done = self.done[stage.kind]
            if not done:
                device = device_named(stage.recipe.device)
                seconds, done = 1.0, speed_of(device, "bfloat16")[0]
            total += self.flops[stage.name] * seconds / done
        return total


@dataclass(frozen=True)
class Forecast:
    """Stages that a start would do, and their time."""

    cells: Mapping[str, tuple[str, ...]]  # open stages by label of the cell
    stages: Mapping[str, tuple[int, int]]  # numbers of open and done stages by kind
    seconds: float  # of open stages, one after another
    basis: Mapping[str, str]  # of each kind: measured if the cache has such stages, else rough


class Progress:
    """Lines where a stage begins and ends, with the estimated time of the rest."""

    def __init__(
        self, missing: Sequence[Stage], clock: Clock, say: Say, measured: Callable[[], object]
    ) -> None:
        self.left = {stage.name: stage for stage in missing}
        self.total, self.clock, self.say, self.measured = len(missing), clock, say, measured
        self.begun = set[str]()
        self.busy, self.start = 0.0, time.monotonic()  # `busy`: seconds of all work done

    def started(self, stage: Stage) -> None:
        """Say that a stage begins, or that another worker is doing it."""
        if stage.name not in self.begun:
            self._say(stage, self.total - len(self.left) + 1)
        self.begun.add(stage.name)

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        """Say how a stage ended; after an evaluation, call ``measured``."""
        del self.left[stage.name]
        self.busy += outcome.seconds
        end = f": failed ({outcome.error})"
        if not outcome.error:
            if outcome.seconds:
                self.clock.learn(stage.kind, outcome.seconds, self.clock.flops[stage.name])
            took = duration(outcome.seconds) if outcome.seconds else "done by another worker"
            # as many stages at once as so far
            at_once = max(self.busy / max(time.monotonic() - self.start, 1e-9), 1.0)
            rest = duration(self.clock.expected(self.left.values()) / at_once)
            end = f": {took}; about {rest} left"
        self._say(stage, self.total - len(self.left), end)
        if stage.kind == "evaluate":
            self.measured()

    def _say(self, stage: Stage, number: int, end: str = "") -> None:
        self.say(printable(f"[{number}/{self.total}] {stage.kind} {stage.label}{end}"))


def write_table(study: StudyConfig, schedule: Schedule, cache: Cache) -> pd.DataFrame:
    """Write the table and its claims, each file whole, after others who write them."""
    from slimvlm_tools.claims import claims_of, claims_text

    with held(cache.root, _PATIENCE):
        table = results_table(study, schedule, cache)
        write_text(cache.root / "results.csv", table.to_csv(index=False))
        with new_file(cache.root / TABLE) as part:
            table.to_parquet(part, index=False)
        write_text(cache.root / "claims.md", claims_text(claims_of(table)))
    return table


def results_table(study: StudyConfig, schedule: Schedule, cache: Cache) -> pd.DataFrame:
    """Collect all measurements of a study so far.

    A row for the original of each model (``axis`` and ``recovery`` say original), then one for each
    cell. Models of one shape and data type get the median of their times.
    """

    def place(stage: Stage, name: str) -> str:
        return str(cache.path(stage, name).relative_to(cache.root))

    sighted, cells = _tasks_with_pictures(study.tasks), schedule.cells
    originals = {cell.original.name: (cell, [cell.original]) for cell in cells}.values()
    rows, dtypes = [], list[str]()
    for cell, stages in [*originals, *((cell, cell.all()) for cell in cells)]:
        dtypes.append(cell.cell.options.dtype)
        options, is_original = cell.cell.values(), len(stages) == 1
        is_done = cache.is_done(stages[0]) and cache.is_done(stages[-1])
        # the first error in the order of the work
        errors = [f"{s.kind}: {e}" for s in stages if not is_done and (e := cache.error_of(s))]
        state: dict[str, Any] = {"status": DONE if is_done else FAILED if errors else OPEN}
        state["failed"] = errors[0] if errors else None
        spent = dict.fromkeys((f"seconds_{kind}" for kind in STAGE_KINDS), 0.0)
        for stage in stages if is_original else stages[1:]:  # shared ones count in each cell
            for record in cache.records(stage.kind, stage.name):
                spent[f"seconds_{stage.kind}"] += record.seconds
        result, original = (cache.path(s, scheduling.RESULT) for s in (stages[-1], cell.original))
        if is_original:
            named = {"model": cell.cell.model, "axis": ORIGINAL, "recovery": ORIGINAL}
            numbers = {"ratio": 0.0, "achieved_ratio": 0.0, "fraction": 1.0, "seed": 0}
            row = dict.fromkeys(options) | named | numbers | state
            if is_done:
                row |= {"avg_percent": 100.0, **_scores(result, sighted)}
                row["result"] = place(cell.original, scheduling.RESULT)
            rows.append(row | spent)
            continue
        row = {**options, "achieved_ratio": None, "steps": 0, **state}
        if cache.is_done(cell.prune):
            row["achieved_ratio"] = _ratio(cache.path(cell.prune, scheduling.PLAN))
        if cell.recover and cache.is_done(cell.recover):
            history = History.load(cache.path(cell.recover, scheduling.HISTORY))
            row["steps"] = history.steps[-1]["step"]
        if is_done:
            made = (*cell.calibrations, cell.prune)
            scored = [s for s in made if cache.path(s, f"{scheduling.SCORES}.json").exists()]
            row |= {**_retention(result, original), **_scores(result, sighted)}
            row["result"] = place(cell.evaluate, scheduling.RESULT)
            row["original"] = place(cell.original, scheduling.RESULT)
            row["plan"] = place(cell.prune, scheduling.PLAN)
            row["scores"] = " ".join(place(stage, scheduling.SCORES) for stage in scored)
            row["history"] = cell.recover and place(cell.recover, scheduling.HISTORY)
        if study.reference is not None:
            found = next((one for one in study.reference.rows if one.matches(options)), None)
            sources = (study.reference.source, found.source) if found else ()
            row["reference"] = found.retention if found else None
            row["reference_source"] = ", ".join(filter(None, sources)) or None
        rows.append(row | spent)
    table = pd.DataFrame(rows)
    table = table.assign(**{name: None for name in COLUMNS if name not in table})
    shape, times = ["model", "total_params", "backbone_params"], ["prefill_ms", "decode_ms"]
    timed = table.assign(**table[times].astype(float))
    shared = timed.groupby([*shape, pd.Series(dtypes, table.index)], dropna=False)[times]
    return table.assign(**shared.transform("median"))


@lru_cache(maxsize=4096)
def _ratio(plan: Path) -> float:
    return Plan.load(plan).ratio


@lru_cache(maxsize=4096)
def _retention(result: Path, original: Path) -> Mapping[str, float]:
    """Compute the retention of two result files; cached: files are large."""
    ours, theirs = Result.load(result), Result.load(original)
    kept, kinds = vars(ours.retention(theirs)), ours.retention_by_kind(theirs).items()
    named = {"percent": "avg_percent", "low": "avg_percent_low", "high": "avg_percent_high"}
    row = {named.get(n, n): kept[n] for n in kept if n not in ("above_chance", "floor")}
    return row | {f"{kind}_{name}": getattr(of, name) for kind, of in kinds for name in OF_A_KIND}


@lru_cache(maxsize=4096)
def _scores(path: Path, sighted: frozenset[str]) -> Mapping[str, Any]:
    result = Result.load(path)
    scores = {name: task.score for name, task in result.tasks.items() if task.in_average}
    row: dict[str, Any] = {"avg": None if math.isnan(result.average) else result.average}
    named = {"chosen": "avg_choice", "free": "avg_free"}
    row |= {named[kind]: part.average for kind, part in result.by_kind().items()}
    for group, are_in in (("avg_pictures", True), ("avg_text", False)):
        some = {name: score for name, score in scores.items() if (name in sighted) == are_in}
        row[group] = average(some) if some else None
    row |= {f"score:{name}": task.score for name, task in result.tasks.items()}
    perplexities = (t.score for t in result.tasks.values() if t.metric == "perplexity")
    row["perplexity"] = next(perplexities, None)
    costs = ("backbone_params", "total_params", "prefill_ms", "decode_ms")
    return row | {name: getattr(result, name) for name in costs}


@lru_cache(maxsize=64)
def _tasks_with_pictures(tasks: str) -> frozenset[str]:
    """Name the tasks whose questions show pictures; all of lmms-eval's do."""
    own, _ = split_names(tasks)
    seeing = {t.name for t in (find_tasks(own) if own else []) if t.load(1)[0].images}
    return frozenset(seeing | set(LMMS_TASKS))
