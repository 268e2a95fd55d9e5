"""The stages of a study's cells, their order, and the engines that run them.

calibrate -> prune -> recover -> evaluate
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import write_text
from slimvlm.core.options import DataConfig, LoadConfig, PruneConfig, Questions, part_of
from slimvlm.core.requests import identity_of_files
from slimvlm.data.read import estimated_length, identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation.ask import digest_of_questions
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import anatomy, load, resolve
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import save
from slimvlm.runs import stages
from slimvlm.runs.cost import Sizes, image_tokens, stage_flops
from slimvlm.runs.recipes import rules
from slimvlm.runs.request import Request, criterion_options, resolved, scored_by
from slimvlm.runs.stages import Calibration, samples_for, split
from slimvlm.runs.study.cache import CHECKPOINT, Cache, Outcome, Stage
from slimvlm.runs.study.config import Cell, Resources, StudyConfig, short_name
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.unit_scores import Scores

STAGE_KINDS = ("calibrate", "prune", "recover", "evaluate")
PLAN, SCORES, RESULT = "plan.json", "scores", "result.json"
HISTORY, WALK = "history.json", "walk.json"
ENGINES = ("local", "ray")
PAUSE_S = 0.5
"""Seconds between looks at stages that other workers are doing."""


@lru_cache(maxsize=64)
def _identity_of_task(path: str, limit: int | None) -> str:
    (task,) = find_tasks(path)
    return f"{_identity(path, path)} {digest_of_questions('', task, task.load(limit))}"


_identity = lru_cache(maxsize=64)(identity_of_files)
_identity_of_data = lru_cache(maxsize=64)(identity_of_data)
_shape_of = lru_cache(maxsize=64)(anatomy)
"""Files are read once for all cells of a study."""


def forget_files() -> None:
    """Clear cached files: another study may find others in the same place."""
    for remembered in (_identity, _identity_of_data, _shape_of, _identity_of_task):
        remembered.cache_clear()


@dataclass(frozen=True)
class CellStages:
    """The stages of one cell: one calibration for each criterion that scores before the walk."""

    cell: Cell
    original: Stage
    """Evaluation of the original."""
    calibrations: tuple[Stage, ...]
    prune: Stage
    recover: Stage | None
    evaluate: Stage

    def all(self) -> Iterator[Stage]:
        """Yield every stage, inputs first."""
        yield self.original
        yield from self.calibrations
        yield self.prune
        if self.recover is not None:
            yield self.recover
        yield self.evaluate


def stages_of(study: StudyConfig, cell: Cell) -> CellStages:
    """List the stages of a cell; each request holds only the options that change its outcome."""
    name, config = short_name(cell.model), cell.prune
    data = [_identity_of_data(config.data)] if config.data else []
    whole = resolved(
        Request(
            model=cell.model,
            prune=config,
            recover=cell.recover,
            training_samples=study.training_samples,
            made_from=(_identity(cell.model, resolve(cell.model)), *data),
        ),
        shape=_shape_of(cell.model),
    )
    base = replace(whole, recover=None, training_samples=None)
    scored = tuple(_calibration(base, criterion) for criterion in scored_by(base.prune))
    shape = f"{name} {config.axis} {config.ratio:.0%}"
    prune = Stage("prune", base, scored, _prune, CHECKPOINT, shape)
    recover = None
    if whole.recover is not None:
        request = replace(whole, prune=_reading(base.prune), hold_out=False)
        recover = Stage("recover", request, (prune,), _recover, CHECKPOINT, cell.label)
    original = _evaluation(study, cell, None, f"{name} original")
    evaluate = _evaluation(study, cell, recover or prune, cell.label)
    return CellStages(cell, original, scored, prune, recover, evaluate)


def _calibration(base: Request, criterion: str) -> Stage:
    """Make a stage of scores by one criterion, which ratio, allocation and repair do not change."""
    config, label = base.prune, f"{short_name(base.model)} {criterion}"
    known = {name: getattr(config, name) for name in criterion_options(config, criterion)}
    if CRITERIA[criterion].needs_data:
        wanted = replace(_reading(config), criterion=(criterion,), **known)
        request, label = replace(base, prune=wanted), f"{label} seed {config.seed}"
    else:
        loading = vars(part_of(config, LoadConfig))
        wanted = PruneConfig(criterion=(criterion,), **known, **loading)
        request = replace(base, prune=wanted, hold_out=False, made_from=base.made_from[:1])
    return Stage("calibrate", request, (), _calibrate, f"{SCORES}.json", label)


def _reading(config: PruneConfig) -> PruneConfig:
    """Keep only the options that say what is read, and in which order."""
    source = vars(part_of(config, DataConfig))
    return PruneConfig(samples=config.samples, seed=config.seed, **source)


def _evaluation(study: StudyConfig, cell: Cell, of: Stage | None, label: str) -> Stage:
    questions = part_of(study, Questions)
    folder, names = study.task_folder, [part.strip() for part in study.tasks.split(",")]
    made_from = [
        _identity(cell.model, resolve(cell.model)),
        *(_identity_of_task(n, study.limit) for n in names if n.endswith((".yaml", ".yml"))),
        *([] if folder is None else [_identity(folder, folder)]),
    ]
    request = Request(
        model=cell.model,
        prune=PruneConfig(**vars(part_of(cell.prune, LoadConfig))),
        questions=replace(questions, floors=questions.floors and of is None),
        made_from=tuple(made_from),
    )
    return Stage("evaluate", request, () if of is None else (of,), _evaluate, RESULT, label)


def samples_of(request: Request) -> tuple[list[Sample], list[str]]:
    """Read all samples of a request's data, and remarks on them, such as skipped rows."""
    if request.prune.data is None:
        return [], []
    return _all_samples(request.model, part_of(request.prune, DataConfig), request.made_from)


@lru_cache(maxsize=1)
def _all_samples(
    model: str, source: DataConfig, made_from: tuple[str, ...]
) -> tuple[list[Sample], list[str]]:
    """Read all rows of the data; ``made_from`` only tells exchanged files apart."""
    notes: list[str] = []
    return samples_for(model, source, None, notes.append), notes


# The work of the stages.


def _calibrate(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    (scores,) = stages.calibrate(stage.request, *_original(stage.request)).values()
    scores.save(folder / SCORES)


def _original(request: Request) -> tuple[Any, Calibration]:
    """Load the unpruned model and its calibration data."""
    model, processor = stages.load_original(request)
    shown = split(samples_of(request)[0], request).calibration
    return model, Calibration(processor, shown, request.hold_out)


def _prune(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    model, calibration = _original(stage.request)
    given = [Scores.load(path / SCORES) for path in inputs]
    walked = stages.prune_(stage.request, model, calibration, given, scratch=scratch / "walk")
    if walked.scores is not None:
        walked.scores.save(folder / SCORES)
    write_text(folder / WALK, json.dumps(asdict(walked.report), indent=1) + "\n")
    save(model, calibration.processor, folder / CHECKPOINT, walked.plan)
    walked.plan.save(folder / PLAN)


def _recover(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    request, plan = stage.request, Plan.load(inputs[0] / PLAN)
    model, processor = load(inputs[0] / CHECKPOINT, request.prune.dtype, request.prune.device)
    training = split(samples_of(request)[0], request).training
    history = stages.recover_(request, model, processor, plan, training, scratch)
    history.save(folder / HISTORY)
    save(model, processor, folder / CHECKPOINT, plan)
    plan.save(folder / PLAN)


def _evaluate(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    request = stage.request
    if inputs:
        model, processor = load(inputs[0] / CHECKPOINT, request.prune.dtype, request.prune.device)
    else:
        model, processor = stages.load_original(request)
    stages.evaluate(request, model, processor, stage.label, scratch).save(folder / RESULT)


# Their order.


@dataclass(frozen=True)
class Schedule:
    """All stages of a study."""

    cells: Sequence[CellStages]  # in the order of the file
    keeps_checkpoints: bool = False  # also those that no open stage needs

    def stages(self) -> list[Stage]:
        """List every stage once, inputs before their readers."""
        return list({stage.name: stage for cell in self.cells for stage in cell.all()}.values())

    @cached_property
    def flops(self) -> dict[str, float]:
        """Estimated FLOP of each stage by its name, with some for each GB read or written."""
        counted: dict[str, float] = {}
        trusted = {cell.cell.model: cell.cell.prune.trust_remote_code for cell in self.cells}
        models = {
            name: (anatomy(name), image_tokens(name, trust)) for name, trust in trusted.items()
        }
        for cell in self.cells:
            shape, image = models[cell.cell.model]
            request = (cell.recover or cell.prune).request
            # The order changes no estimate, and shuffling a large file for each cell takes a while.
            in_order = replace(request, prune=replace(request.prune, seed=0))
            samples = split(samples_of(request)[0], in_order)
            lengths = [estimated_length(s, image) for s in samples.calibration]
            sizes = Sizes(
                shape=shape,
                tokens=fmean(lengths or [rules().constants.image_tokens]),
                samples=len(samples.training),
                calibration=len(samples.calibration),
            )
            disk = rules().constants.disk_flops * 2 * shape.total_params / 1e9
            smaller = 1 - (cell.cell.prune.ratio or 0.0)
            for stage in cell.all():
                kept = smaller if stage in (cell.recover, cell.evaluate) else 1.0
                work = stage_flops(stage.kind, stage.request, sizes, kept)
                counted[stage.name] = work + disk * (3 if stage.kind in ("prune", "recover") else 1)
        return counted

    @cached_property
    def ordered(self) -> list[CellStages]:
        """The cells in the order of work: those of one pruned model together, cheap ones first.

        So at most one pruned and one trained checkpoint of each worker are on disk at a time, and
        among cells that share a plan those without training answer first.
        """
        models = list(dict.fromkeys(cell.cell.model for cell in self.cells))
        own, of_plan = {}, dict.fromkeys((cell.prune.name for cell in self.cells), 0.0)
        for cell in self.cells:
            after = (stage for stage in (cell.recover, cell.evaluate) if stage is not None)
            own[cell.evaluate.name] = sum(self.flops[stage.name] for stage in after)
            of_plan[cell.prune.name] += own[cell.evaluate.name]

        def place(cell: CellStages) -> tuple[int, float, str, float, str]:
            plan, name = cell.prune.name, cell.evaluate.name
            return models.index(cell.cell.model), of_plan[plan], plan, own[name], name

        return sorted(self.cells, key=place)

    def missing(self, cache: Cache) -> list[Stage]:
        """List the open stages in order: those that lead to a missing evaluation."""
        wanted: dict[str, Stage] = {}

        def want(stage: Stage) -> None:
            if stage.name in wanted or cache.is_ready(stage):
                return
            for source in stage.inputs:
                want(source)
            wanted[stage.name] = stage

        for cell in self.ordered:
            want(cell.original)
            want(cell.evaluate)
        return list(wanted.values())

    def is_needed(self, stage: Stage, cache: Cache) -> bool:
        """Whether an open stage, or one to be done again, reads this one's checkpoint."""
        readers = [r for r in self._readers.get(stage.name, ()) if not cache.is_ready(r)]
        return any(not cache.is_done(r) or self.is_needed(r, cache) for r in readers)

    @cached_property
    def _readers(self) -> dict[str, list[Stage]]:
        """Stages that read an outcome, by its name."""
        readers: dict[str, list[Stage]] = {}
        for stage in self.stages():
            for source in stage.inputs:
                readers.setdefault(source.name, []).append(stage)
        return readers

    def clear_checkpoints(self, stage: Stage, cache: Cache) -> None:
        """Remove the models that a finished stage has read, where no open stage needs them."""
        for source in () if self.keeps_checkpoints else stage.inputs:
            if source.output == CHECKPOINT and not self.is_needed(source, cache):
                cache.drop_checkpoint(source)


# The engines. ``started`` and ``finished`` are told when stages begin and end.


def run_local(
    schedule: Schedule,
    missing: Sequence[Stage],
    cache: Cache,
    started: Callable[[Stage], object],
    finished: Callable[[Stage, Outcome], object],
) -> None:
    """Do stages one after another in this process, but not those that other workers are doing."""

    def is_needed(stage: Stage) -> bool:
        return schedule.is_needed(stage, cache)

    left, failed = {stage.name: stage for stage in missing}, set[str]()
    while left:
        for stage in left.values():
            flops = schedule.flops[stage.name]
            outcome = _attempt(stage, cache, flops, failed, left, False, is_needed, started)
            if outcome is not None:
                break
        else:
            time.sleep(PAUSE_S)
            continue
        del left[stage.name]
        failed |= {stage.name} if outcome.error else set()
        schedule.clear_checkpoints(stage, cache)
        finished(stage, outcome)


def _attempt(
    stage: Stage,
    cache: Cache,
    flops: float,
    failed: Collection[str],
    left: Collection[str] = (),
    wait: bool = True,
    is_needed: Callable[[Stage], bool] = lambda stage: True,
    started: Callable[[Stage], object] = lambda stage: None,
) -> Outcome | None:
    """Do a stage if its inputs are there; None if this worker must look again later.

    Other workers may change the cache at any moment. ``failed`` names stages that this worker saw
    fail, ``left`` those that it has still to do.
    """
    if cache.is_done(stage) and not is_needed(stage):
        return Outcome(stage.name)  # by another worker, and no open stage reads its checkpoint
    absent = {source.name for source in stage.inputs if not cache.is_ready(source)}
    if not absent:
        started(stage)
        return cache.run(stage, flops, wait, is_needed)
    if not absent.isdisjoint(failed):
        return Outcome(stage.name, error=f"{stage.inputs[0].kind} failed")
    if not absent.isdisjoint(left) or cache.is_done(stage):
        return None  # if done, then since the first look, and the next one sees it
    return Outcome(stage.name, error=f"{stage.inputs[0].kind} was removed meanwhile")


def run_ray(
    schedule: Schedule,
    missing: Sequence[Stage],
    cache: Cache,
    finished: Callable[[Stage, Outcome], object],
    resources: Resources,
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Do stages as tasks of a Ray cluster, as many at once as its resources allow.

    The cache must be on storage that all nodes see under the same path. Without an address (also in
    ``RAY_ADDRESS``) Ray is started here, with so many ``workers`` if they are given.
    """
    if find_spec("ray") is None:
        raise ConfigError("engine 'ray' needs Ray: pip install 'slimvlm[ray]'")
    import ray

    options: dict[str, Any] = {"log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        options["address"] = address
    else:
        options["include_dashboard"] = False
        if workers is not None:
            options["num_cpus"] = max(round(workers * resources.cpus), 1)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"engine 'ray': cannot start or reach Ray ({error})") from error
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3)(ray_task)
    references: dict[str, Any] = {}
    for stage in missing:
        inputs = [references[s.name] for s in stage.inputs if s.name in references]
        flops = schedule.flops[stage.name]
        references[stage.name] = task.remote(stage, str(cache.root), flops, *inputs)
    of = {references[stage.name]: stage for stage in missing}
    waiting = list(of)
    try:
        while waiting:
            (reference,), waiting = ray.wait(waiting, num_returns=1)
            stage = of[reference]
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:  # its worker died, more often than Ray retries
                outcome = cache.failed(stage, error)
            schedule.clear_checkpoints(stage, cache)
            finished(stage, outcome)
    finally:
        ray.shutdown()


def ray_task(stage: Stage, root: str, flops: float, *inputs: Outcome) -> Outcome:
    """Do a stage on a Ray worker; Ray calls this when the outcomes of its inputs are there."""
    failed = {done.name for done in inputs if done.error}
    return _attempt(stage, Cache(root), flops, failed) or Outcome(stage.name)
