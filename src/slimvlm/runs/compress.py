"""Compress in one run folder: score, plan, prune, recover, evaluate, save.

Every stage writes its output whole. A stopped run resumes when the same command is given again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimvlm.core.errors import SlimError, is_out_of_memory, one_line
from slimvlm.core.files import (
    discard_replacement,
    held,
    replacement,
    require_free,
    write_text,
)
from slimvlm.core.options import CompressConfig, PruneConfig, Questions, part_of
from slimvlm.core.progress import Say, silent
from slimvlm.core.requests import asked, identity_of_files, is_begun_for, note_request
from slimvlm.data.read import identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation.on_data import evaluate_data, single_result
from slimvlm.evaluation.predictions import Predictions
from slimvlm.evaluation.results import Result, read_baseline
from slimvlm.evaluation.timing import PairedTimes, paired_times
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import free_memory, peak_memory, release_memory, weight_bytes
from slimvlm.models.load import anatomy, load, resolve
from slimvlm.planning.plan import Plan
from slimvlm.pruning.card import CardFacts
from slimvlm.pruning.save import save
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.runs import held_out, stages, tables
from slimvlm.runs.command import compress_command, config_text
from slimvlm.runs.recipes import recipe_for
from slimvlm.runs.request import (
    Request,
    check_questions,
    ratio_of,
    resolved,
    scored_by,
    tokens_alone,
)
from slimvlm.runs.stages import Calibration, SampleSplit
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import TRACKER_FOLDER

STAGES = ("original", "pruned", "recovered")
TIMES_FILE = "times.json"
"""Times of the smaller model beside the original's, among a run's results."""
_PREDICTIONS = "said.safetensors"
"""The original's predictions on held-out samples, for later stages."""


def request_of(model: str, config: CompressConfig) -> Request:
    """Make the request of a run. Before training, an axis that is not named is ``auto``."""
    prune = part_of(config, PruneConfig)
    if prune.axis is None and prune.data is not None and config.recover is not None:
        prune = replace(prune, axis="auto")
    return Request(
        model=model,
        prune=prune,
        recover=config.recover,
        training_samples=config.training_samples,
        report_samples=config.unseen(config.samples),
        questions=part_of(config, Questions) if config.tasks else None,
        latency=config.target_latency,
    )


@dataclass
class Run:
    """A run in its folder: configuration and results so far."""

    model: str
    folder: Path  # with ``force`` a new one beside the run folder
    name: str  # of the run folder
    config: CompressConfig
    say: Say
    results: dict[str, Result] = field(default_factory=dict)

    @cached_property
    def about(self) -> dict[str, Any]:
        """The request, with hashes of its model and data, whose files are read once."""
        data = self.config.data
        made_from = [identity_of_files(self.model, resolve(self.model))]
        made_from += [] if data is None else [identity_of_data(data)]
        return {"model": self.model, **asked(self.config), "made_from": made_from}

    @cached_property
    def request(self) -> Request:
        """The resolved request; its tokens are chosen once samples are read."""
        return resolved(request_of(self.model, self.config), self.say, anatomy(self.model))

    def path(self, name: str) -> Path:
        """Return a file or folder inside the run folder."""
        return self.folder / name


def compress(
    model: str,
    config: CompressConfig,
    out: str | Path,
    force: bool = False,
    say: Say = print,
) -> dict[str, Result]:
    """Make a smaller model in one run folder.

    The folder holds ``config.json``, ``run.yaml`` (which ``--config`` takes), ``plan.json``,
    ``scores/``, ``results/``, ``checkpoint/`` and ``summary.md``.

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
        # whether the folder is free, or holds the same run unfinished
        is_open = force or not run.path("summary.md").exists()
        is_same = is_open and is_begun_for(run.path("config.json"), run.about)
        require_free(folder, force or is_same)
        if is_same:
            say(f"going on with the unfinished run in {folder}")
        # every mistake that can be found without weights
        if run.request.questions is not None:
            check_questions(run.request.questions)
        if config.baseline:
            read_baseline(config.baseline, floors=config.floors)
        has_data = config.data is not None
        run.request, given, samples = stages.settled(run.request, None, has_data, say)
        if given is not None:
            say("the tokens alone give the ratio: nothing else goes")
        elif run.request.prune.axis == "auto":
            say("axis auto: depth, width and both are tried, and held-out answers choose")
        elif run.request.prune.axis != config.axis:
            chart = recipe_for(ratio_of(run.request.prune), run.request.trains)
            say(f"axis {chart.axis}: {chart.why} ({chart.source})")
        # begin the folder, or resume in it
        if not force:
            discard_replacement(folder)
        elif not is_same:
            shutil.rmtree(folder, ignore_errors=True)
        run.path("scores").mkdir(parents=True, exist_ok=True)
        run.path("results").mkdir(exist_ok=True)
        note_request(run.path("config.json"), run.about)
        write_text(run.path("run.yaml"), config_text(model, config))
        # the stages that are not done yet
        original, processor = stages.load_original(run.request)
        _evaluated(run, "original", original, processor)
        _asked_on_data(run, "original", original, processor, samples.report)
        trains = run.request.trains and bool(samples.training)
        plan = _pruned(run, original, processor, samples, trains)
        del original  # before two models are read for recovery
        release_memory()
        if trains:
            _recovered(run, plan, samples)
        finish(run, plan)
    return run.results


def results_of(model: str, config: CompressConfig, out: Path) -> dict[str, Result] | None:
    """Read the results of a finished `compress` with the same arguments; None without one."""
    run = Run(model, out, out.name, config, silent)
    is_done = run.path("summary.md").exists() and is_begun_for(run.path("config.json"), run.about)
    return read_results(out) if is_done else None


def _pruned(
    run: Run, model: PreTrainedModel, processor: Any, samples: SampleSplit, trains: bool
) -> Plan:
    """Walk the model and write it, unless a later stage has been reached; return its plan."""
    folder = "pruned" if trains else "checkpoint"
    if run.path(folder).exists() or run.path("checkpoint").exists():
        return Plan.load(run.path("plan.json"))
    calibration = Calibration(processor, samples.calibration, run.request.hold_out)
    given = tokens_alone(run.request, read_anatomy(model))
    names = () if given else scored_by(run.request.prune)
    stored = [run.path("scores") / name for name in names]
    if not all(path.with_suffix(".json").exists() for path in stored):
        for name, found in stages.calibrate(run.request, model, calibration).items():
            found.save(run.path("scores") / name)
    scores = [Scores.load(path) for path in stored]
    training = samples.training if trains else ()
    scratch = run.path("walk")
    walked = stages.prune_(
        run.request, model, calibration, scores, given, scratch, training, run.say
    )
    release_memory()
    run.say(walked.summary())
    if walked.scores is not None:
        walked.scores.save(run.path("scores") / walked.scores.criterion)
    write_text(run.path("walk.json"), json.dumps(asdict(walked.report), indent=1) + "\n")
    walked.plan.save(run.path("plan.json"))
    trimmed = trimmed_processor(processor, walked.plan)
    _evaluated(run, "pruned", model, trimmed)
    _timed(run, model, trimmed, processor)
    _asked_on_data(run, "pruned", model, trimmed, samples.report)
    save(model, trimmed, run.path(folder), walked.plan, facts=_card_facts(run, ""))
    shutil.rmtree(run.path("walk"), ignore_errors=True)
    return walked.plan


def _recovered(run: Run, plan: Plan, samples: SampleSplit) -> None:
    if run.path("checkpoint").exists():
        return
    model, processor = load(run.path("pruned"), run.config.dtype, run.config.device)
    history = stages.recover_(
        run.request, model, processor, plan, samples.training, run.path("training")
    )
    write_text(run.path("history.json"), json.dumps(asdict(history), indent=1) + "\n")
    _evaluated(run, "recovered", model, processor)
    _asked_on_data(run, "recovered", model, processor, samples.report)
    assert run.config.recover is not None
    about = (
        f"Then {run.config.recover.train} was trained from {run.config.recover.loss} on "
        f"{history.num_samples} conversations."
    )
    save(model, processor, run.path("checkpoint"), plan, facts=_card_facts(run, about))


def _evaluated(run: Run, stage: str, model: PreTrainedModel, processor: Any) -> None:
    request, path = run.request, run.path("results") / f"{stage}.json"
    if request.questions is None or path.exists():
        return
    if stage == "original" and run.config.baseline:
        Result.load(run.config.baseline).save(path)
        return
    run.say(f"evaluate the {stage} model")
    if stage != "original":  # floors are the original's
        request = replace(request, questions=replace(request.questions, floors=False))
    result = stages.evaluate(request, model, processor, stage, run.path("answers"))
    pruned = run.path("results") / "pruned.json"
    if stage == "recovered" and pruned.exists():
        result = result.timed_as(Result.load(pruned))
    result.save(path)


def _timed(run: Run, model: PreTrainedModel, processor: Any, whole_processor: Any) -> None:
    """Time the smaller model beside the original, which is read once more."""
    path = run.path("results") / TIMES_FILE
    if path.exists():
        return
    needed = weight_bytes(anatomy(run.model), str(model.dtype).removeprefix("torch."))
    if needed > (free := free_memory(model.device)):
        size, left = tables.size(needed), tables.size(free)
        run.say(f"times are not paired: the original's {size} beside it exceed {left} of memory")
        return
    run.say("time the original and the pruned model in turn")
    try:
        found = paired_times(
            model, processor, stages.load_original(run.request)[0], whole_processor
        )
    except Exception as error:  # a run goes on without times, and says why it has none
        if is_out_of_memory(error):
            why = f"both models do not fit on {model.device} together ({one_line(error)})"
        else:
            why = one_line(error) if isinstance(error, SlimError) else repr(error)
        run.say(f"times are not paired: {why}")
        return
    finally:
        release_memory()  # of the original
    for stage, times in (("original", found.original), ("pruned", found.pruned)):
        if (result := run.path("results") / f"{stage}.json").exists():
            replace(Result.load(result), **vars(times)).save(result)
    found.save(path)
    if run.config.target_latency is not None:
        run.say(f"target_latency {run.config.target_latency}: here it is {found.prefill}")


def _asked_on_data(
    run: Run, stage: str, model: PreTrainedModel, processor: Any, samples: Sequence[Sample]
) -> None:
    """Evaluate a stage on held-out samples, beside the original."""
    path, original = run.path("results") / held_out.FILE.format(stage), run.path(_PREDICTIONS)
    if not samples or path.exists():
        return
    run.say(f"ask the {stage} model on {len(samples)} samples that stay unseen")
    if stage == "original":
        found = held_out.predictions_of_original(model, processor, samples)
        found.save(original)
        single_result(found, samples, model.device).save(path)
    else:
        found = Predictions.load(original)
        evaluate_data(model, processor, samples, found, name=stage).save(path)


def read_results(folder: Path) -> dict[str, Result]:
    """Read the results of a run so far, by stage, the original first."""
    paths = {stage: folder / "results" / f"{stage}.json" for stage in STAGES}
    return {stage: Result.load(path) for stage, path in paths.items() if path.exists()}


def read_times(folder: Path) -> PairedTimes | None:
    """Read the times of a run's model beside the original's, if they were measured."""
    path = folder / "results" / TIMES_FILE
    return PairedTimes.load(path) if path.exists() else None


def _kept_text(folder: Path) -> str:
    """Format the held-out figures and the times as Markdown."""
    text = tables.held_out_text(held_out.read_held_out(folder, STAGES))
    times = read_times(folder)
    return text if times is None else f"{text}\nThe smaller model {times}.\n"


def _card_facts(run: Run, training: str) -> CardFacts:
    """Collect the facts of the model card; its scores are those of the last stage."""
    results = read_results(run.folder)
    measured = list(results.values())[-1].tasks if len(results) > 1 else {}
    return CardFacts(
        base=resolve(run.model),
        name=run.name,
        command=compress_command(run.model, run.config, run.name),
        results=tables.as_markdown(*tables.result_rows(results)) if results else "",
        scores={name: (task.metric, task.score) for name, task in measured.items()},
        training=training,
        held_out=_kept_text(run.folder),
    )


def finish(run: Run, plan: Plan) -> None:
    """Read the results, write the summary, remove what only a resume needs."""
    run.results.update(read_results(run.folder))
    lines = [f"# {run.model} at {plan.ratio:.1%}", "", plan.summary(), ""]
    if run.results:
        lines.append(tables.as_markdown(*tables.result_rows(run.results)))
    if kept := _kept_text(run.folder):
        lines += ["## What was kept", "", kept]
    lines += [f"Peak memory: {peak_memory()}.", ""]
    lines.append("The checkpoint is in `checkpoint/`; plain `from_pretrained` loads it.")
    write_text(run.path("summary.md"), "\n".join(lines) + "\n")
    if (logs := run.path("training") / TRACKER_FOLDER).exists():
        logs.replace(run.path(TRACKER_FOLDER))
    run.path(_PREDICTIONS).unlink(missing_ok=True)
    for name in ("pruned", "training", "walk"):
        shutil.rmtree(run.path(name), ignore_errors=True)
