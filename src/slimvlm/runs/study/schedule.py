"""The stages of a study's cells, their outcomes on disk, their order, the engines that run them."""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any
from uuid import uuid4

from pydantic import Field

from slimvlm.core import documents
from slimvlm.core.errors import ConfigError, InUseError, one_line, raised_as
from slimvlm.core.files import held, new_folder, write_text
from slimvlm.core.options import DataConfig, LoadConfig, Questions, RecoverConfig
from slimvlm.core.progress import without_bars
from slimvlm.data.general import identity_of_general_text
from slimvlm.data.read import drawn, estimated_length, identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation.ask import identities_of_tasks
from slimvlm.evaluation.lmms import evaluate_all
from slimvlm.models.devices import release_memory
from slimvlm.models.load import anatomy, load, resolve
from slimvlm.models.pictures import picture_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import save
from slimvlm.runs import stages
from slimvlm.runs.chart import rules
from slimvlm.runs.cost import Sizes, stage_flops
from slimvlm.runs.recipe import (
    Recipe,
    criterion_options,
    rows_to_read,
    samples_for,
    split,
    vocabulary_for,
)
from slimvlm.runs.study.config import Cell, Resources, StudyConfig, short_name
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.unit_scores import Scores

STAGE_KINDS = ("calibrate", "prune", "recover", "evaluate")
MAKING_MODELS = ("prune", "recover")  # kinds that leave a checkpoint for later stages
PLAN, SCORES, RESULT = "plan.json", "scores", "result.json"
HISTORY, WALK = "history.json", "walk.json"
ENGINES = ("local", "ray")
PAUSE_S = 0.5  # seconds between looks at stages that other workers are doing
RECORD = "stage.json"  # written last into an outcome: request, seconds, estimated work
CHECKPOINT = "checkpoint"  # output of stages that make a model; no other may be removed later
_LONGEST_ERROR = 300


@dataclass(frozen=True)
class Stage:
    """One piece of work, named by a hash of everything that determines its outcome."""

    kind: str  # such as ``prune``
    recipe: Recipe  # with ``inputs`` it determines the outcome
    inputs: "tuple[Stage, ...]"  # stages whose outcomes are read
    label: str = field(compare=False)

    @cached_property
    def name(self) -> str:
        """The hash; cells that need the same work get the same name."""
        inputs = [stage.name for stage in self.inputs]
        request = {"kind": self.kind, "request": documents.asked(self.recipe)}
        return documents.digest([documents.identity_of_code(), request, inputs])[:20]


@dataclass(frozen=True)
class Outcome:
    """The end of a stage."""

    name: str  # of the stage
    seconds: float = 0.0  # 0 if another start or worker had done it
    error: str = ""  # one line; empty without one


@dataclass(frozen=True)
class Record:
    """Content of `RECORD`."""

    label: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    flops: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    request: Mapping[str, Any]
    format: str = "slimvlm-stage/1"


class Cache:
    """Outcomes of stages in one folder, on storage that all workers share.

    ``cache/KIND/NAME/`` holds a stage's outcome, ``work/`` the state from which a stopped stage
    resumes, ``failed/`` the last error of failed stages. A worker locks the folder of its stage.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._opened = time.time()

    def path(self, stage: Stage, name: str = "") -> Path:
        """Return the folder of a stage's outcome, or a file in it."""
        return self.root / "cache" / stage.kind / stage.name / name

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage has an outcome; its checkpoint may have been removed since."""
        return self.path(stage, RECORD).is_file()

    def is_ready(self, stage: Stage) -> bool:
        """Whether another stage could read the outcome."""
        is_whole = stage.kind not in MAKING_MODELS or self.path(stage, CHECKPOINT).is_dir()
        return self.is_done(stage) and is_whole

    def records(self, kind: str, name: str = "[!.]*") -> list[Record]:
        """Read the records of all outcomes of a kind, or of the one of this name."""
        return [
            documents.built(Record, documents.read_object(path, "stage"), f"stage {str(path)!r}")
            for path in sorted((self.root / "cache" / kind).glob(f"{name}/{RECORD}"))
        ]

    def error_of(self, stage: Stage) -> str:
        """Read the error that a stage's last attempt ended with; empty if there is none."""
        path = self._state(stage, "failed", ".json")
        return str(documents.read_object(path, "stage").get("error")) if path.is_file() else ""

    def attempt(
        self,
        stage: Stage,
        flops: float,
        failed: Collection[str],
        left: Collection[str] = (),
        wait: bool = True,
        is_needed: Callable[[Stage], bool] = lambda stage: True,
        started: Callable[[Stage], object] = lambda stage: None,
    ) -> Outcome | None:
        """Do a stage if its inputs are there; None if this worker must look again later.

        Other workers may change the cache at any moment. This one saw ``failed`` stages fail, and
        has still to do those ``left``; ``wait`` is for a stage that another worker is doing.
        """
        if self.is_done(stage) and not is_needed(stage):
            return Outcome(stage.name)  # by another worker, and no open stage reads its checkpoint
        absent = {source.name for source in stage.inputs if not self.is_ready(source)}
        if not absent.isdisjoint(failed):
            return Outcome(stage.name, error=f"{stage.inputs[0].kind} failed")
        if not absent.isdisjoint(left) or (absent and self.is_done(stage)):
            return None  # if done, then since the first look, and the next one sees it
        if absent:
            return Outcome(stage.name, error=f"{stage.inputs[0].kind} was removed meanwhile")
        started(stage)
        failure, scratch = self._state(stage, "failed", ".json"), self._state(stage, "work")
        try:
            with held(self.path(stage), wait=-1 if wait else 0):
                if self.is_ready(stage) or (self.is_done(stage) and not is_needed(stage)):
                    return Outcome(stage.name)
                if failure.is_file() and failure.stat().st_mtime > self._opened:
                    return Outcome(stage.name, error=self.error_of(stage))  # of another worker
                scratch.mkdir(parents=True, exist_ok=True)
                failure.unlink(missing_ok=True)
                start = time.perf_counter()
                try:
                    with new_folder(self.path(stage), force=True) as folder, without_bars():
                        work(stage, [self.path(i) for i in stage.inputs], folder, scratch)
                        seconds = time.perf_counter() - start
                        record = Record(stage.label, seconds, flops, asdict(stage.recipe))
                        write_text(folder / RECORD, json.dumps(vars(record), indent=1) + "\n")
                except Exception as error:
                    return self.failed(stage, error, time.perf_counter() - start)
                finally:
                    release_memory()  # of the stage's models
                shutil.rmtree(scratch, ignore_errors=True)
                return Outcome(stage.name, seconds)
        except InUseError:
            return None

    def failed(self, stage: Stage, error: Exception, seconds: float = 0.0) -> Outcome:
        """Record the error that ended a stage."""
        line = f"{type(error).__name__}: {one_line(error)}"[:_LONGEST_ERROR]
        path = self._state(stage, "failed", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"label": stage.label, "error": line}) + "\n")
        return Outcome(stage.name, seconds, line)

    def sweep(self, stages: Iterable[Stage]) -> None:
        """Remove resume files of done stages, which killed workers left."""
        for stage in stages:
            scratch = self._state(stage, "work")
            if scratch.is_dir() and self.is_ready(stage):
                with suppress(InUseError), held(self.path(stage)):
                    shutil.rmtree(scratch, ignore_errors=True)

    def _state(self, stage: Stage, folder: str, suffix: str = "") -> Path:
        return self.root / folder / f"{stage.kind}-{stage.name}{suffix}"


_identity = lru_cache(maxsize=64)(documents.identity_of_files)
_identity_of_data = lru_cache(maxsize=64)(identity_of_data)
_identities_of_tasks = lru_cache(maxsize=64)(identities_of_tasks)
"""Files are read once for all cells of a study."""


@dataclass(frozen=True)
class CellStages:
    """The stages of one cell."""

    cell: Cell
    original: Stage  # evaluation of the original
    calibrations: tuple[Stage, ...]  # one for each criterion that scores before the walk
    prune: Stage
    recover: Stage | None
    evaluate: Stage

    def all(self) -> list[Stage]:
        """List every stage, inputs first."""
        trained = [] if self.recover is None else [self.recover]
        return [self.original, *self.calibrations, self.prune, *trained, self.evaluate]


def stages_of(study: StudyConfig, cell: Cell) -> CellStages:
    """List the stages of a decided cell; a recipe holds only options that change its outcome."""
    whole = cell.options
    assert isinstance(whole, Recipe)
    name = short_name(cell.model)
    data = [_identity_of_data(whole.data)] if whole.data else []
    data += [_identity(whole.vocab_text, whole.vocab_text)] if whole.vocab_text else []
    data += [identity_of_general_text()] if whole.general_text else []
    whole = replace(whole, made_from=(_identity(cell.model, resolve(cell.model)), *data))
    if whole.trims_vocabulary:  # chosen as by `compress`: training samples also count
        reads = _reading(whole, "vocab_size", "vocab_text", "general_text")
        if whole.recover is not None:
            trained = RecoverConfig()
            reads = replace(reads, recover=trained, training_samples=whole.training_samples)
        whole = replace(whole, tokens=_tokens(reads, study.data is not None))
    base = replace(whole, recover=None, training_samples=None)
    scored = []  # ratio, allocation and repair change no scores
    for criterion in base.scored_by:
        label = f"{name} {criterion}"
        known = {"criterion": (criterion,), **criterion_options(base, criterion)}
        if CRITERIA[criterion].needs_data:
            recipe = replace(_reading(base, "general_text", "token_weights", "hold_out"), **known)
            label += f" seed {whole.seed}"
        else:
            loading = vars(base.part(LoadConfig))
            recipe = Recipe(model=cell.model, made_from=base.made_from[:1], **known, **loading)
        scored.append(Stage("calibrate", recipe, (), label))
    prune = Stage("prune", base, tuple(scored), f"{name} {base.axis} {base.ratio:.0%}")
    recover = None
    if whole.recover is not None:
        recipe = _reading(whole, "recover", "training_samples")
        recover = Stage("recover", recipe, (prune,), cell.label)
    original = _evaluation(study, cell, None, f"{name} original")
    evaluate = _evaluation(study, cell, recover or prune, cell.label)
    return CellStages(cell, original, tuple(scored), prune, recover, evaluate)


def _reading(recipe: Recipe, *more: str) -> Recipe:
    """Keep only the options that say what is read, and in which order, and ``more`` of them."""
    names = {"model", "made_from", "samples", "seed", *more, *(f.name for f in fields(DataConfig))}
    return Recipe(**{name: getattr(recipe, name) for name in names})


def _evaluation(study: StudyConfig, cell: Cell, of: Stage | None, label: str) -> Stage:
    questions = study.part(Questions)
    questions = replace(questions, floors=questions.floors and of is None)
    recipe = Recipe(
        model=cell.model,
        **vars(cell.options.part(LoadConfig)),
        **vars(questions),
        made_from=(_identity(cell.model, resolve(cell.model)), *_identities_of_tasks(questions)),
    )
    return Stage("evaluate", recipe, () if of is None else (of,), label)


def samples_of(recipe: Recipe) -> tuple[list[Sample], list[str]]:
    """Read all samples of a recipe's data, and remarks on them, such as skipped rows."""
    if recipe.data is None:
        return [], []
    return _samples(recipe.model, recipe.part(DataConfig), recipe.made_from)


@lru_cache(maxsize=1)
def _samples(
    model: str, source: DataConfig, made_from: tuple[str, ...]
) -> tuple[list[Sample], list[str]]:
    notes: list[str] = []  # made_from only tells exchanged files apart
    return samples_for(model, source, None, notes.append), notes


@lru_cache(maxsize=64)
def _tokens(recipe: Recipe, has_data: bool) -> tuple[int, ...]:
    """Choose the tokens to keep, from as many samples as `compress` reads."""
    every = samples_of(recipe)[0] if has_data else []
    ahead, behind = drawn([sample.place for sample in every], recipe.seed, recipe.test_samples)
    samples = [every[row] for row in [*behind, *ahead][: rows_to_read(recipe)]]
    counted = split(samples, recipe).counted(recipe)
    return vocabulary_for(recipe.model, recipe, counted, recipe.trust_remote_code).tokens


REMEMBERED = (_identity, _identity_of_data, _identities_of_tasks, _tokens)


def work(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    """Do a stage: folders of inputs, the folder to fill, one that a restart finds again."""
    recipe = stage.recipe
    if inputs and stage.kind in ("recover", "evaluate"):
        model, processor = load(inputs[0] / CHECKPOINT, recipe.dtype, recipe.device)
    else:
        model, processor = stages.load_original(recipe)
    found = split(samples_of(recipe)[0], recipe)
    calibration = stages.Calibration(processor, found.calibration, recipe.hold_out)
    if stage.kind == "calibrate":
        (scores,) = stages.calibrate(recipe, model, calibration).values()
        scores.save(folder / SCORES)
    elif stage.kind == "prune":
        given = [Scores.load(path / SCORES) for path in inputs]
        walked = stages.prune_(recipe, model, calibration, given, scratch=scratch / "walk")
        if walked.scores is not None:
            walked.scores.save(folder / SCORES)
        write_text(folder / WALK, json.dumps(asdict(walked.report), indent=1) + "\n")
        save(model, processor, folder / CHECKPOINT, walked.plan)
        walked.plan.save(folder / PLAN)
    elif stage.kind == "recover":
        plan = Plan.load(inputs[0] / PLAN)
        history = stages.recover_(recipe, model, processor, plan, found.training, scratch)
        history.save(folder / HISTORY)
        save(model, processor, folder / CHECKPOINT, plan)
        plan.save(folder / PLAN)
    else:
        questions = recipe.part(Questions)
        result = evaluate_all(model, processor, questions, stage.label, scratch)
        result.save(folder / RESULT)


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
        names = {cell.cell.model for cell in self.cells}
        models = {name: (anatomy(name), picture_of(name)) for name in names}
        for cell in self.cells:
            shape, picture = models[cell.cell.model]
            recipe = (cell.recover or cell.prune).recipe
            # The order changes no estimate, and shuffling a large file for each cell takes a while.
            found = split(samples_of(recipe)[0], replace(recipe, seed=0))
            lengths = [estimated_length(s, picture.tokens) for s in found.calibration]
            tokens = fmean(lengths or [rules().constants.text_tokens + picture.tokens])
            images = fmean([len(s.images) for s in found.calibration] or [1])
            trained, shown = len(found.training), len(found.calibration)
            counts: dict[str, Any] = {"samples": trained, "calibration": shown, "images": images}
            sizes = Sizes(shape=shape, tokens=tokens, picture=picture, **counts)
            disk = rules().constants.disk_flops * 2 * shape.total_params / 1e9
            smaller = 1 - (cell.cell.options.ratio or 0.0)
            for stage in cell.all():
                kept = smaller if stage in (cell.recover, cell.evaluate) else 1.0
                flops = stage_flops(stage.kind, stage.recipe, sizes, kept)
                times = 3 if stage.kind in MAKING_MODELS else 1
                counted[stage.name] = flops + disk * times
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

        return sorted(
            self.cells,
            key=lambda cell: (
                *(models.index(cell.cell.model), of_plan[cell.prune.name], cell.prune.name),
                *(own[cell.evaluate.name], cell.evaluate.name),
            ),
        )

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
        return any(
            not cache.is_done(reader) or self.is_needed(reader, cache)
            for reader in self.stages()
            if stage.name in (source.name for source in reader.inputs)
            and not cache.is_ready(reader)
        )

    def clear_checkpoints(self, stage: Stage, cache: Cache) -> None:
        """Remove the models that a finished stage has read, where no open stage needs them."""
        for source in () if self.keeps_checkpoints else stage.inputs:
            if source.kind in MAKING_MODELS and not self.is_needed(source, cache):
                path = cache.path(source, CHECKPOINT)
                with suppress(FileNotFoundError):  # unless another worker was faster
                    path.rename(path.with_name(f".{CHECKPOINT}.gone.{uuid4().hex}"))
                for left in path.parent.glob(f".{CHECKPOINT}.gone.*"):  # also of a killed worker
                    shutil.rmtree(left, ignore_errors=True)


def run_local(
    schedule: Schedule,
    missing: Sequence[Stage],
    cache: Cache,
    started: Callable[[Stage], object],
    finished: Callable[[Stage, Outcome], object],
) -> None:
    """Do stages one after another in this process, but not those that other workers are doing."""
    is_needed = partial(schedule.is_needed, cache=cache)
    left, failed = {stage.name: stage for stage in missing}, set[str]()
    while left:
        for stage in left.values():
            flops = schedule.flops[stage.name]
            outcome = cache.attempt(stage, flops, failed, left, False, is_needed, started)
            if outcome is not None:
                break
        else:
            time.sleep(PAUSE_S)
            continue
        del left[stage.name]
        failed |= {stage.name} if outcome.error else set()
        schedule.clear_checkpoints(stage, cache)
        finished(stage, outcome)


def run_ray(
    schedule: Schedule,
    missing: Sequence[Stage],
    cache: Cache,
    finished: Callable[[Stage, Outcome], object],
    resources: Resources,
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Do stages as tasks of a Ray cluster, which must see the cache under the same path."""
    if find_spec("ray") is None:
        raise ConfigError("engine 'ray' needs Ray: pip install 'slimvlm[ray]'")
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
    if workers is not None and not address:
        options["num_cpus"] = max(round(workers * resources.cpus), 1)
    kinds = (ConnectionError, ValueError, RuntimeError)
    with raised_as(ConfigError, kinds, "engine 'ray': cannot start or reach Ray"):
        ray.init(**options, log_to_driver=False)
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3)(ray_task)
    references: dict[str, Any] = {}
    for stage in missing:
        inputs = [references[s.name] for s in stage.inputs if s.name in references]
        flops = schedule.flops[stage.name]
        references[stage.name] = task.remote(stage, str(cache.root), flops, *inputs)
    of, waiting = dict(zip(references.values(), missing, strict=True)), [*references.values()]
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
    return Cache(root).attempt(stage, flops, failed) or Outcome(stage.name)
