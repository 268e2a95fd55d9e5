"""The whole way in one run folder: score, plan, prune, recover, evaluate, save.

Every stage writes its output whole. A run that was stopped goes on where it was when the same
command is given again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.files import (
    discard_replacement,
    held,
    replacement,
    require_free,
    write_text,
)
from slimvlm.core.options import CompressConfig, compress_command
from slimvlm.core.requests import identity_of_files, is_begun_for, note_request
from slimvlm.data.read import identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation.ask import evaluate
from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.load import load, resolve
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CardFacts
from slimvlm.pruning.save import save
from slimvlm.runs import tables as summary
from slimvlm.runs.recipes import recipe_for
from slimvlm.runs.stages import Calibration, check_request, choose_plan, cut_, ratio_of, samples_for
from slimvlm.training.recover import TRACKER_FOLDER, recover

STAGES = ("original", "pruned", "recovered")


@dataclass
class Run:
    """One run: the model, the folder it works in, its configuration and what it has measured.

    ``name`` is the run folder's; with ``force`` the work is done beside it first.
    """

    model: str
    folder: Path
    name: str
    config: CompressConfig
    say: Callable[[str], None]
    results: dict[str, Result] = field(default_factory=dict)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The request, and what its model and data are made of: their files are read once."""
        data = self.config.data
        made_from = [identity_of_files(self.model, resolve(self.model))]
        made_from += [] if data is None else [identity_of_data(data)]
        return {"model": self.model, **asdict(self.config), "made_from": made_from}

    def path(self, name: str) -> Path:
        """A file or folder inside the run folder."""
        return self.folder / name


def compress(
    model: str,
    config: CompressConfig,
    out: str | Path,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """Make a smaller model in one run folder.

    The folder holds ``config.json``, ``plan.json``, ``scores/``, ``results/``, ``checkpoint/``
    and ``summary.md``.

    Args:
        model: Folder, hub id or ``demo``.
        config: What to do.
        out: The run folder.
        force: Whether a folder of another run may be replaced; it stays until the new one is whole.
        say: Receives one line for each stage.

    Returns:
        Results by stage (``original``, ``pruned``, ``recovered``), if tasks were given.

    Raises:
        SlimError: For anything that the user can mend; checked before weights are read.
    """
    place = Path(out)
    with held(place), replacement(place) if force else nullcontext(place) as folder:
        run = Run(model, folder, place.name, config, say)
        _go(run, _checked_samples(run, force), force)
    return run.results


def _checked_samples(run: Run, force: bool) -> list[Sample]:
    """The data, after every mistake in the request that can be found without weights."""
    config, say = run.config, run.say
    _require_startable(run, force)
    if config.tasks:
        find_tasks(config.tasks)
    if config.baseline:
        Result.load(config.baseline)
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"limit {config.limit} must be at least 1")
    check_request(run.model, config, say)
    samples = samples_for(run.model, config, _samples_to_read(config), say)
    if config.axis is None:
        chart = recipe_for(ratio_of(config), config.trains)
        say(f"axis {chart.axis}: {chart.why} ({chart.source})")
    return samples


def _go(run: Run, samples: list[Sample], force: bool) -> None:
    """All stages that are not done yet."""
    config, say = run.config, run.say
    _open_folder(run, force)
    original, processor = load(run.model, config.dtype, trust_remote_code=config.trust_remote_code)
    _evaluated(run, "original", original, processor)
    calibration = Calibration(config, processor, samples)
    plan = _planned(run, original, calibration)
    say(plan.summary())
    if plan.needs_retype:
        say(f"language model is written as {plan.after.text_type!r}, which computes the same")
    trains = config.recover is not None and bool(samples)
    _pruned(run, original, plan, calibration, "pruned" if trains else "checkpoint")
    del original, calibration  # before two models are read for recovery
    if trains:
        _recovered(run, plan, samples)
    finish(run, plan)


def _require_startable(run: Run, force: bool) -> None:
    """The folder must be free, or hold the same run unfinished; with ``force`` it is cleared."""
    is_open = force or not run.path("summary.md").exists()
    goes_on = is_open and is_begun_for(run.path("config.json"), run.about)
    require_free(run.folder, force or goes_on)
    if goes_on:
        run.say(f"going on with the unfinished run in {run.folder}")


def _samples_to_read(config: CompressConfig) -> int | None:
    """Calibration samples and training samples, None for all."""
    if config.training_samples is None:
        return None
    return config.samples + config.training_samples


def _open_folder(run: Run, force: bool) -> None:
    """Begin the run folder, or go on in it: the request was found good."""
    if not force:
        discard_replacement(run.folder)
    elif not is_begun_for(run.path("config.json"), run.about):
        shutil.rmtree(run.folder, ignore_errors=True)
    run.path("scores").mkdir(parents=True, exist_ok=True)
    run.path("results").mkdir(exist_ok=True)
    note_request(run.path("config.json"), run.about)


def _planned(run: Run, model: PreTrainedModel, calibration: Calibration) -> Plan:
    if run.path("plan.json").exists():
        return Plan.load(run.path("plan.json"))
    plan = choose_plan(run.config, model, calibration, run.say, run.path("scores"))
    plan.save(run.path("plan.json"))
    return plan


def _pruned(
    run: Run, model: PreTrainedModel, plan: Plan, calibration: Calibration, folder: str
) -> None:
    """Cut the model and write it, unless a later stage has been reached already."""
    if run.path(folder).exists() or run.path("checkpoint").exists():
        return
    report = cut_(run.config, model, plan, calibration)
    if report is not None:
        run.say(report.summary())
        write_text(run.path("repair.json"), json.dumps(asdict(report), indent=1) + "\n")
    _evaluated(run, "pruned", model, calibration.processor)
    pad, compat = (
        wanted and folder == "checkpoint" for wanted in (run.config.pad, run.config.compat)
    )
    facts, place = _card_facts(run, ""), run.path(folder)
    save(model, calibration.processor, place, plan, pad=pad, facts=facts, compat=compat)


def _recovered(run: Run, plan: Plan, samples: list[Sample]) -> None:
    config = run.config
    if run.path("checkpoint").exists():
        return
    assert config.recover is not None
    model, processor = load(run.path("pruned"), config.dtype)
    teacher = None
    if config.recover.needs_teacher:
        # what it shares with the model never goes to a GPU
        teacher, _ = load(run.model, config.dtype, "cpu", config.trust_remote_code)
    fresh = samples[config.samples :] or samples
    history = recover(model, teacher, fresh, config.recover, processor, run.path("training"), plan)
    write_text(run.path("history.json"), json.dumps(asdict(history), indent=1) + "\n")
    _evaluated(run, "recovered", model, processor)
    facts = _card_facts(
        run,
        f"Then {config.recover.train} was trained from {config.recover.loss} on "
        f"{history.num_samples} conversations.",
    )
    place, pad, compat = run.path("checkpoint"), config.pad, config.compat
    save(model, processor, place, plan, pad=pad, facts=facts, compat=compat)


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


def read_results(folder: Path) -> dict[str, Result]:
    """What a run has measured so far, by stage, the original first."""
    paths = {stage: folder / "results" / f"{stage}.json" for stage in STAGES}
    return {stage: Result.load(path) for stage, path in paths.items() if path.exists()}


def _card_facts(run: Run, training: str) -> CardFacts:
    """What the model card says; its scores are those of the last stage."""
    results = read_results(run.folder)
    measured = list(results.values())[-1].tasks if len(results) > 1 else {}
    return CardFacts(
        base=resolve(run.model),
        name=run.name,
        command=compress_command(run.model, run.config, run.name),
        results=summary.as_markdown(*summary.result_rows(results)) if results else "",
        scores={name: (task.metric, task.score) for name, task in measured.items()},
        training=training,
    )


def finish(run: Run, plan: Plan) -> None:
    """Read the results back, write the summary, remove what only a restart needs."""
    run.results.update(read_results(run.folder))
    lines = [f"# {run.model} at {plan.ratio:.1%}", "", plan.summary(), ""]
    if run.results:
        lines.append(summary.as_markdown(*summary.result_rows(run.results)))
    lines.append("The checkpoint is in `checkpoint/`; plain `from_pretrained` loads it.")
    write_text(run.path("summary.md"), "\n".join(lines) + "\n")
    if (logs := run.path("training") / TRACKER_FOLDER).exists():
        logs.replace(run.path(TRACKER_FOLDER))
    for name in ("pruned", "training"):
        shutil.rmtree(run.path(name), ignore_errors=True)
