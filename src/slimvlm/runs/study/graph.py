"""The graph of a study: cells → stages, each piece of work named by what determines its outcome.

    calibrate -> prune -> recover -> evaluate

A stage's name is a hash of its request and of its inputs' names, so two cells that ask for the same
piece of work get the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from slimvlm.core.checked import part_of
from slimvlm.core.options import DataConfig, LoadConfig, PruneConfig, Questions
from slimvlm.core.requests import asked, digest, identity_of_files
from slimvlm.data.read import identity_of_data
from slimvlm.evaluation.ask import digest_of_questions
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import anatomy, resolve
from slimvlm.runs.request import Request, criterion_options, resolved, scored_by
from slimvlm.runs.study.cells import Cell
from slimvlm.runs.study.config import StudyConfig
from slimvlm.scoring.criteria import CRITERIA

StageKind = Literal["calibrate", "prune", "recover", "evaluate"]
STAGE_KINDS: tuple[StageKind, ...] = ("calibrate", "prune", "recover", "evaluate")
FORMAT = 3
"""Raised when a stage's outcome changes for the same request."""


_identity = lru_cache(maxsize=64)(identity_of_files)
_identity_of_data = lru_cache(maxsize=64)(identity_of_data)
_shape_of = lru_cache(maxsize=64)(anatomy)
"""Files are read once for all cells of a study."""


def forget_files() -> None:
    """Read files again from now on: another study may find others in the same place."""
    for remembered in (_identity, _identity_of_data, _shape_of, _identity_of_task):
        remembered.cache_clear()


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        kind: What is done.
        request: With which options.
        inputs: Stages whose outcomes it reads.
        label: A few words for people.
    """

    kind: StageKind
    request: Request
    inputs: tuple[Stage, ...] = ()
    label: str = field(default="", compare=False)

    @cached_property
    def name(self) -> str:
        """The hash that the outcome is kept under."""
        values = {
            **{"format": FORMAT, "kind": self.kind, "request": asked(self.request)},
            "inputs": [stage.name for stage in self.inputs],
        }
        return digest([values])[:20]

    @property
    def makes_checkpoint(self) -> bool:
        """Whether the outcome holds a model."""
        return self.kind in ("prune", "recover")


@dataclass(frozen=True)
class CellStages:
    """The stages of one cell.

    Attributes:
        cell: The cell.
        original: Evaluation of the original.
        calibrations: One for each criterion that scores before the walk.
        prune: The plan and the smaller model.
        recover: The trained one, if anything is trained.
        evaluate: Its evaluation.
    """

    cell: Cell
    original: Stage
    calibrations: tuple[Stage, ...]
    prune: Stage
    recover: Stage | None
    evaluate: Stage

    def all(self) -> Iterator[Stage]:
        """Every stage, inputs first."""
        yield self.original
        yield from self.calibrations
        yield self.prune
        if self.recover is not None:
            yield self.recover
        yield self.evaluate


def stages_of(study: StudyConfig, cell: Cell) -> CellStages:
    """The stages of a cell, with everything taken out that does not change their outcome."""
    name = _short(cell.model)
    shape = f"{name} {cell.prune.axis} {cell.prune.ratio:.0%}"
    data = [_identity_of_data(cell.prune.data)] if cell.prune.data else []
    whole = resolved(
        Request(
            model=cell.model,
            prune=cell.prune,
            recover=cell.recover,
            training_samples=study.training_samples,
            made_from=(_identity_of_model(cell.model), *data),
        ),
        shape=_shape_of(cell.model),
    )
    base = replace(whole, recover=None, training_samples=None)
    config = base.prune
    calibrations = tuple(_calibration(base, criterion) for criterion in scored_by(config))
    prune = Stage("prune", base, calibrations, shape)
    recover = None
    if whole.recover is not None:
        request = replace(whole, prune=_reading(config), hold_out=False)
        recover = Stage("recover", request, (prune,), cell.label)
    original = _evaluation(study, cell, None, f"{name} original")
    evaluate = _evaluation(study, cell, recover or prune, cell.label)
    return CellStages(cell, original, calibrations, prune, recover, evaluate)


def _calibration(base: Request, criterion: str) -> Stage:
    """Scores by one criterion, which know nothing of ratio, allocation and repair."""
    config, row = base.prune, CRITERIA[criterion]
    label = f"{_short(base.model)} {criterion}"
    options = criterion_options(config, criterion)
    known = {name: getattr(config, name) for name in options}
    if not row.needs_data:
        wanted = PruneConfig(criterion=(criterion,), **known, **_loading(config))
        request = replace(base, prune=wanted, hold_out=False, made_from=base.made_from[:1])
        return Stage("calibrate", request, (), label)
    wanted = replace(_reading(config), criterion=(criterion,), **known)
    return Stage("calibrate", replace(base, prune=wanted), (), f"{label} seed {config.seed}")


def _loading(config: PruneConfig) -> dict[str, Any]:
    return vars(part_of(config, LoadConfig))


def _reading(config: PruneConfig) -> PruneConfig:
    """Only the options that say what is read, and in which order."""
    source = vars(part_of(config, DataConfig))
    return PruneConfig(samples=config.samples, seed=config.seed, **source)


def _evaluation(study: StudyConfig, cell: Cell, of: Stage | None, label: str) -> Stage:
    asked = part_of(study, Questions)
    request = Request(
        model=cell.model,
        prune=PruneConfig(**_loading(cell.prune)),
        questions=replace(asked, floors=asked.floors and of is None),
        made_from=(_identity_of_model(cell.model), *_identities_of_tasks(study)),
    )
    return Stage("evaluate", request, () if of is None else (of,), label)


def _identities_of_tasks(study: StudyConfig) -> list[str]:
    """Of the questions of tasks that the user wrote, and of local copies of benchmarks."""
    names = [part.strip() for part in study.tasks.split(",")]
    found = [_identity_of_task(n, study.limit) for n in names if n.endswith((".yaml", ".yml"))]
    folder = study.task_folder
    return found if folder is None else [*found, _identity(folder, folder)]


@lru_cache(maxsize=64)
def _identity_of_task(path: str, limit: int | None) -> str:
    (task,) = find_tasks(path)
    return f"{_identity(path, path)} {digest_of_questions('', task, task.load(limit))}"


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _identity_of_model(model: str) -> str:
    return _identity(model, resolve(model))
