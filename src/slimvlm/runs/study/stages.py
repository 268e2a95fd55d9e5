"""Cells → stages: the work that cells share, each piece named by what determines its outcome.

    calibrate -> plan -> prune -> recover -> evaluate

A stage's name is a hash of its request and of its inputs' names, so two cells that ask for the same
piece of work get the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from slimvlm.core.options import PruneConfig, RecoverConfig
from slimvlm.core.requests import digest, identity_of_files
from slimvlm.data.read import identity_of_data
from slimvlm.evaluation.answers import digest_of_questions
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import resolve
from slimvlm.runs.stages import criteria_of
from slimvlm.runs.study.cells import Cell
from slimvlm.runs.study.config import StudyConfig
from slimvlm.scoring.criteria import CRITERIA

Kind = Literal["calibrate", "plan", "prune", "recover", "evaluate"]
KINDS: tuple[Kind, ...] = ("calibrate", "plan", "prune", "recover", "evaluate")
FORMAT = 1
"""Raised when a stage's outcome changes for the same request."""


_identity = lru_cache(maxsize=64)(identity_of_files)
_identity_of_data = lru_cache(maxsize=64)(identity_of_data)
"""Files are read once for all cells of a study."""


def forget_files() -> None:
    """Read files again from now on: another study may find others in the same place."""
    for remembered in (_identity, _identity_of_data, _identity_of_task):
        remembered.cache_clear()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a model is asked.

    Attributes:
        tasks: Names, separated by commas.
        task_folder: Folder with local task files.
        limit: Questions of each task.
        batch_size: Questions at once.
        floors: Whether to ask blind as well.
    """

    tasks: str
    task_folder: str | None
    limit: int | None
    batch_size: int
    floors: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that determines what a stage makes of its inputs.

    Attributes:
        model: The original.
        identity: What the model and the data are made of, so that exchanged files are noticed.
        prune: The options of pruning that matter to the stage; the others have their defaults.
        seed: Seed of the samples; 0 where none are read.
        recover: Options of the training.
        training_samples: Samples to train on at most.
        asked: What the model is asked.
    """

    model: str
    identity: tuple[str, ...]
    prune: PruneConfig
    seed: int = 0
    recover: RecoverConfig | None = None
    training_samples: int | None = None
    asked: Asked | None = None


@dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
        kind: What is done.
        request: With which options.
        inputs: Stages whose outcomes it reads.
        label: A few words for people.
    """

    kind: Kind
    request: Request
    inputs: tuple[Stage, ...] = ()
    label: str = field(default="", compare=False)

    @cached_property
    def name(self) -> str:
        """The hash that the outcome is kept under."""
        values = {
            **{"format": FORMAT, "kind": self.kind, "request": asdict(self.request)},
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
        calibrations: One for each criterion; none where scoring is part of planning.
        plan: The plan.
        prune: The smaller model.
        recover: The trained one, if anything is trained.
        evaluate: Its evaluation.
    """

    cell: Cell
    original: Stage
    calibrations: tuple[Stage, ...]
    plan: Stage
    prune: Stage
    recover: Stage | None
    evaluate: Stage

    def all(self) -> Iterator[Stage]:
        """Every stage, inputs first."""
        yield self.original
        yield from self.calibrations
        yield from (self.plan, self.prune)
        if self.recover is not None:
            yield self.recover
        yield self.evaluate


def stages_of(study: StudyConfig, cell: Cell) -> CellStages:
    """The stages of a cell, with everything taken out that does not change their outcome."""
    config = cell.prune
    name = _short(cell.model)
    shape = f"{name} {config.axis} {config.ratio:.0%}"
    data = [_identity_of_data(config.data)] if config.data else []
    identity = (_identity_of_model(cell.model), *data)
    base = Request(model=cell.model, identity=identity, prune=config, seed=cell.seed)
    calibrations: tuple[Stage, ...] = ()
    if config.steps == 1:
        calibrations = tuple(_calibration(base, criterion) for criterion in criteria_of(config))
    planned = replace(config, repair=_repair_for_plan(config))
    plan = Stage("plan", replace(base, prune=planned), calibrations, shape)
    prune = Stage("prune", base, (plan,), shape)
    recover = None
    if cell.recover is not None:
        request = replace(
            base,
            prune=_reading(config),
            recover=cell.recover,
            training_samples=study.training_samples,
        )
        recover = Stage("recover", request, (prune,), cell.label)
    original = _evaluation(study, cell, None, f"{name} original")
    evaluate = _evaluation(study, cell, recover or prune, cell.label)
    return CellStages(cell, original, calibrations, plan, prune, recover, evaluate)


def _calibration(base: Request, criterion: str) -> Stage:
    """Scores by one criterion, which know nothing of ratio and allocation."""
    config = base.prune
    label = f"{_short(base.model)} {criterion}"
    if not CRITERIA[criterion].needs_data:
        reads = PruneConfig(dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        request = Request(
            model=base.model,
            identity=base.identity[:1],
            prune=replace(reads, criterion=(criterion,)),
        )
        return Stage("calibrate", request, (), label)
    wanted = replace(
        _reading(config),
        criterion=(criterion,),
        **CRITERIA[criterion].requested(config),
        token_weights=config.token_weights,
        allocation="balanced" if config.needs_held_out else "uniform",
    )
    return Stage("calibrate", replace(base, prune=wanted), (), f"{label} seed {base.seed}")


def _repair_for_plan(config: PruneConfig) -> Any:
    """No repair, but where it is what sets samples aside."""
    without = replace(config, repair="none")
    return "none" if without.needs_held_out or not config.needs_held_out else "auto"


def _reading(config: PruneConfig) -> PruneConfig:
    """Only the options that say what is read."""
    return PruneConfig(allocation="uniform", samples=config.samples, **config.reading)


def _evaluation(study: StudyConfig, cell: Cell, of: Stage | None, label: str) -> Stage:
    asked = Asked(
        tasks=study.tasks,
        task_folder=study.task_folder,
        limit=study.limit,
        batch_size=study.batch_size,
        floors=study.floors and of is None,
    )
    config = cell.prune
    request = Request(
        model=cell.model,
        identity=(_identity_of_model(cell.model), *_identities_of_tasks(study)),
        prune=PruneConfig(dtype=config.dtype, trust_remote_code=config.trust_remote_code),
        asked=asked,
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
