"""The stages of a study's cells: options, inputs and function of each.

calibrate -> prune -> recover -> evaluate
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from slimvlm.core.options import DataConfig, LoadConfig, PruneConfig, Questions, part_of
from slimvlm.core.requests import identity_of_files
from slimvlm.data.read import identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation.ask import digest_of_questions
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import anatomy, load, resolve
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import save
from slimvlm.runs import stages
from slimvlm.runs.request import Request, criterion_options, resolved, scored_by
from slimvlm.runs.stages import Calibration, samples_for, split
from slimvlm.runs.study.cache import CHECKPOINT, Stage
from slimvlm.runs.study.config import Cell, StudyConfig, short_name
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.unit_scores import Scores

StageKind = Literal["calibrate", "prune", "recover", "evaluate"]
STAGE_KINDS: tuple[StageKind, ...] = ("calibrate", "prune", "recover", "evaluate")
PLAN = "plan.json"
SCORES = "scores"
RESULT = "result.json"
HISTORY = "history.json"
WALK = "walk.json"


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
    (folder / WALK).write_text(json.dumps(asdict(walked.report), indent=1) + "\n")
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
