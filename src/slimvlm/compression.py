"""The whole way in one run folder: score, plan, prune, recover, evaluate, save.

Every stage writes its output whole. A run that was stopped goes on where it was when the same
command is given again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimvlm import summary
from slimvlm.calibrate import DEFAULT_CRITERIA, calibration_batches, score
from slimvlm.checkpoint import DTYPES, load, save
from slimvlm.checkpoint import anatomy as anatomy_of
from slimvlm.config import RecoverConfig
from slimvlm.data import load_samples
from slimvlm.errors import ConfigError
from slimvlm.evaluation import Result, evaluate
from slimvlm.geometry import Anatomy
from slimvlm.outputs import require_free, write_text
from slimvlm.plan import Plan
from slimvlm.planning import make_plan
from slimvlm.recipes import Axis, recipe_for
from slimvlm.recovery import recover
from slimvlm.samples import Sample
from slimvlm.scores import CRITERIA, criterion_named
from slimvlm.scores.width import score_random
from slimvlm.surgery import prune_
from slimvlm.tasks import find_tasks
from slimvlm.values import Scores, Statistics

STAGES = ("original", "pruned", "recovered")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What to prune, how much, and how to choose."""

    model: str
    """Folder, hub id or ``demo``."""
    ratio: float
    """Share of the backbone's parameters to remove."""
    axis: Axis | None = None
    """Where to prune; by default what the study's chart says for the ratio."""
    criterion: tuple[str, ...] = ()
    """Criteria, one for each kind of unit; by default block_influence and activation."""
    data: str | None = None
    """Conversations for calibration and recovery."""
    images: str | None = None
    """Folder that image paths in the data start from."""
    calibration_samples: int = 64
    """Samples for calibration: the first ones of the data."""
    round_to: int | None = None
    """Multiple for the number of neurons."""
    max_bad: int = 0
    """Broken data rows to skip at most."""
    dtype: str = "auto"
    """Data type to load the model in."""
    trust_remote_code: bool = False
    """Whether code in the checkpoint may run."""

    @property
    def chosen_axis(self) -> Axis:
        """The axis, by the chart if none was given."""
        return self.axis or recipe_for(self.ratio, self.data is not None).axis

    @property
    def samples_to_read(self) -> int | None:
        """Samples of the data that are needed, None for all."""
        return self.calibration_samples

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria; without data, ones that need none."""
        if self.criterion:
            return self.criterion
        if self.data is None:
            return ("spacing", "magnitude")
        return DEFAULT_CRITERIA[self.chosen_axis]


@dataclass(frozen=True, kw_only=True)
class CompressConfig(PruneConfig):
    """Everything a run depends on; written into the run folder and compared when it goes on."""

    training_samples: int | None = None
    """Use only so many samples of the data for recovery, after the calibration samples."""
    recover: RecoverConfig | None = None
    """Recovery options; None for no recovery."""
    tasks: str | None = None
    """Tasks to evaluate on, comma-separated; none if not given."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    baseline: str | None = None
    """Result file of the original model, to save asking it again."""

    @property
    def samples_to_read(self) -> int | None:
        """Calibration samples and training samples, None for all."""
        if self.training_samples is None:
            return None
        return self.calibration_samples + self.training_samples


@dataclass
class Run:
    """One run: its folder, its configuration and what it has measured."""

    folder: Path
    config: CompressConfig
    say: Callable[[str], None]
    results: dict[str, Result] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """A file or folder inside the run folder."""
        return self.folder / name


def check_request(config: PruneConfig, say: Callable[[str], None]) -> list[Sample]:
    """Find every mistake that can be found without weights, and read the data.

    Returns:
        The samples, none if the configuration names no data.

    Raises:
        SlimError: If an option, the data or the ratio cannot work for this model.
    """
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype {config.dtype!r} must be one of: {', '.join(DTYPES)}")
    if config.calibration_samples < 1:
        raise ConfigError(f"samples {config.calibration_samples} must be at least 1")
    rows = {name: criterion_named(name, {}) for name in config.criteria}
    data_bound = [name for name, row in rows.items() if row.needs_data]
    if data_bound and config.data is None:
        raise ConfigError(f"criterion {data_bound[0]!r} needs --data")
    anatomy = anatomy_of(config.model)
    rehearse(anatomy, config.criteria, config.ratio, config.chosen_axis, round_to=config.round_to)
    if config.data is None:
        say(f"no data: scoring by {' and '.join(config.criteria)}")
        return []
    return load_samples(config.data, config.images, config.samples_to_read, config.max_bad, say)


def rehearse(
    anatomy: Anatomy, criteria: Iterable[str], ratio: float, axis: str, **options: Any
) -> None:
    """Find out whether a plan is possible, with random scores in place of real ones.

    Raises:
        SlimError: What `make_plan` would raise after the weights were read and scored.
    """
    pretended = score_random(Statistics("nothing", {}), anatomy)
    units = {unit for name in criteria for unit in CRITERIA[name].units}
    scores = Scores(", ".join(criteria), **{unit: pretended.of(unit) for unit in units})
    make_plan(anatomy, scores, ratio, axis, **options)


def choose_plan(
    config: PruneConfig,
    model: PreTrainedModel,
    processor: Any,
    samples: list[Sample],
    scores_folder: Path | None = None,
) -> Plan:
    """Score a loaded model and make the plan.

    Args:
        config: The request.
        model: The model.
        processor: Its processor or tokenizer.
        samples: What `check_request` read; the first ``calibration_samples`` are used.
        scores_folder: Where to keep the scores, if anywhere.
    """
    given = []
    for name in config.criteria:
        batches: Any = ()
        if CRITERIA[name].needs_data:
            shown = samples[: config.calibration_samples]
            batches = calibration_batches(processor, shown, description=name)
        options = {"gradient": "per_sample"} if name == "taylor" else {}
        scores = score(model, batches, name, **options)
        if scores_folder is not None:
            scores.save(scores_folder / name)
        given.append(scores)
    anatomy = anatomy_of(model)
    return make_plan(anatomy, given, config.ratio, config.chosen_axis, round_to=config.round_to)


def compress(
    config: CompressConfig,
    out: str | Path,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """Make a smaller model in one run folder.

    The folder holds ``config.json``, ``plan.json``, ``scores/``, ``results/``, ``checkpoint/``
    and ``summary.md``.

    Args:
        config: What to do.
        out: The run folder.
        force: Whether a folder of another run may be replaced.
        say: Receives one line for each stage.

    Returns:
        Results by stage (``original``, ``pruned``, ``recovered``), if tasks were given.

    Raises:
        SlimError: For anything that the user can mend; checked before weights are read.
    """
    run = Run(Path(out), config, say)
    _require_startable(run, force)
    if config.tasks:
        find_tasks(config.tasks)
    if config.baseline:
        Result.load(config.baseline)
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"limit {config.limit} must be at least 1")
    samples = check_request(config, say)
    if config.axis is None:
        chart = recipe_for(config.ratio, config.data is not None)
        say(f"axis {chart.axis}: {chart.why} (arXiv:2507.20749)")
    _open_folder(run, force)
    model, processor = load(config.model, config.dtype, trust_remote_code=config.trust_remote_code)
    _evaluated(run, "original", model, processor)
    plan = _planned(run, model, processor, samples)
    say(plan.summary())
    if plan.needs_retype:
        say(f"language model is written as {plan.after.text_type!r}, which computes the same")
    trains = config.recover is not None and bool(samples)
    _pruned(run, model, processor, plan, "pruned" if trains else "checkpoint")
    if trains:
        _recovered(run, plan, samples)
    _finish(run, plan)
    return run.results


def _require_startable(run: Run, force: bool) -> None:
    """The folder must be free, replaceable, or hold the same run unfinished."""
    if run.folder.exists() and not force:
        if run.path("summary.md").exists() or not _is_same_run(run):
            require_free(run.folder)
        run.say(f"going on with the unfinished run in {run.folder}")
    require_free(run.folder, force=True)


def _is_same_run(run: Run) -> bool:
    try:
        return bool(json.loads(run.path("config.json").read_text()) == _stored(run.config))
    except (OSError, ValueError):
        return False


def _stored(config: CompressConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return values


def _open_folder(run: Run, force: bool) -> None:
    """Begin the run folder, with ``force`` in place of an old one: the request was found good."""
    if force:
        shutil.rmtree(run.folder, ignore_errors=True)
    run.path("scores").mkdir(parents=True, exist_ok=True)
    run.path("results").mkdir(exist_ok=True)
    write_text(run.path("config.json"), json.dumps(_stored(run.config), indent=2) + "\n")


def _planned(run: Run, model: PreTrainedModel, processor: Any, samples: list[Sample]) -> Plan:
    if run.path("plan.json").exists():
        return Plan.load(run.path("plan.json"))
    plan = choose_plan(run.config, model, processor, samples, run.path("scores"))
    plan.save(run.path("plan.json"))
    return plan


def _pruned(run: Run, model: PreTrainedModel, processor: Any, plan: Plan, folder: str) -> None:
    """Cut the model and write it, unless a later stage has been reached already."""
    if run.path(folder).exists() or run.path("checkpoint").exists():
        return
    prune_(model, plan)
    _evaluated(run, "pruned", model, processor)
    save(model, processor, run.path(folder), plan)


def _recovered(run: Run, plan: Plan, samples: list[Sample]) -> None:
    config = run.config
    if run.path("checkpoint").exists():
        return
    assert config.recover is not None
    model, processor = load(run.path("pruned"), config.dtype)
    teacher = None
    if set(config.recover.loss_weights) != {"sft"}:
        teacher, _ = load(config.model, config.dtype, trust_remote_code=config.trust_remote_code)
    fresh = samples[config.calibration_samples :] or samples
    history = recover(model, teacher, fresh, config.recover, processor, run.path("training"))
    write_text(run.path("history.json"), json.dumps(asdict(history), indent=1) + "\n")
    _evaluated(run, "recovered", model, processor)
    save(model, processor, run.path("checkpoint"), plan)


def _evaluated(run: Run, stage: str, model: PreTrainedModel, processor: Any) -> None:
    config = run.config
    if not config.tasks:
        return
    path = run.path("results") / f"{stage}.json"
    if not path.exists():
        if stage == "original" and config.baseline:
            Result.load(config.baseline).save(path)
        else:
            run.say(f"evaluate the {stage} model")
            tasks = find_tasks(config.tasks)
            result = evaluate(
                model, processor, tasks, config.limit, name=stage, log_folder=run.path("answers")
            )
            result.save(path)


def _finish(run: Run, plan: Plan) -> None:
    """Read the results back, write the summary, remove what only a restart needs."""
    for stage in STAGES:
        path = run.path("results") / f"{stage}.json"
        if path.exists():
            run.results[stage] = Result.load(path)
    lines = [f"# {run.config.model} at {plan.ratio:.1%}", "", plan.summary(), ""]
    if run.results:
        lines.append(summary.as_markdown(*summary.result_rows(run.results)))
    lines.append("The checkpoint is in `checkpoint/`; plain `from_pretrained` loads it.")
    write_text(run.path("summary.md"), "\n".join(lines) + "\n")
    for name in ("pruned", "training"):
        shutil.rmtree(run.path(name), ignore_errors=True)
