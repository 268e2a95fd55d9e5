"""The stages one by one, and all in one run: score, plan, prune, recover, evaluate, compress."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from slimvlm.cli.options import INLINE, Model, QuestionFlags, RunFlags, TrainingFlags
from slimvlm.cli.printing import (
    note,
    print_dry_run,
    print_held_out,
    print_on_data,
    print_plan,
    print_results,
    print_run,
)
from slimvlm.core.checked import part_of
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import (
    CalibrationConfig,
    CompressConfig,
    DataConfig,
    MemoryOptions,
    PlanConfig,
    PruneConfig,
    Questions,
    RecoverConfig,
    ReportOptions,
    TrainingConfig,
    TrainingData,
)


def score(
    model: Model,
    out: Path,
    criterion: str = "obs",
    calibration: Annotated[CalibrationConfig, INLINE] = CalibrationConfig(),
    memory: Annotated[MemoryOptions, INLINE] = MemoryOptions(),
    force: bool = False,
) -> None:
    """Calibrate once: save scores for later plans.

    Args:
        model: Folder, hub id, or demo.
        out: Scores are written as OUT.json and OUT.safetensors.
        criterion: How to score; see the table in the README.
        calibration: What the model is shown.
        memory: How much of the model is in memory.
        force: Replace existing files.
    """
    from slimvlm.runs.score import score as run

    run(model, calibration, criterion, out, memory, force, note)


def plan(
    model: Model,
    out: Path,
    config: Annotated[PlanConfig, INLINE] = PlanConfig(),
    scores: tuple[Path, ...] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Choose what to keep, from saved scores and a budget. Nothing is pruned.

    Args:
        model: Folder, hub id, or demo.
        out: The plan, a JSON file that can be edited by hand.
        config: How small the model has to become, and what may go.
        scores: Score files of the units to prune. Without any, the default criteria score on the
            demo's conversations.
        force: Replace an existing file.
        json: Print JSON.
    """
    from slimvlm.runs.score import plan as run

    print_plan(run(model, config, out, scores, force=force, say=note), json)


def prune(
    model: Model,
    out: Path,
    plan: Path | None = None,
    pruning: Annotated[PruneConfig, INLINE] = PruneConfig(),
    memory: Annotated[MemoryOptions, INLINE] = MemoryOptions(),
    report: Annotated[ReportOptions, INLINE] = ReportOptions(),
    force: bool = False,
) -> None:
    """Write a smaller checkpoint, from a plan or from a ratio, criterion and data.

    With --data, it ends with what was kept on samples that nothing was fitted to. Without, default
    criteria score on the demo's conversations.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        plan: A plan file instead of ratio, axis, criterion and allocation.
        pruning: What to remove, and how.
        memory: How much of the model is in memory.
        report: What the end says of the data.
        force: Replace an existing folder.
    """
    from slimvlm.runs.prune import prune as run

    done = run(
        model,
        pruning,
        out,
        plan_file=plan,
        memory=memory,
        report=report,
        force=force,
        say=note,
    )
    print(f"{done.walked.summary()}\ncheckpoint: {out}")
    print_held_out(done.held_out)


def recover(
    model: Model,
    source: Annotated[TrainingData, INLINE],
    out: Path,
    teacher: str | None = None,
    training: Annotated[RecoverConfig, INLINE] = RecoverConfig(),
    config: Path | None = None,
    shard: bool = False,
    force: bool = False,
) -> None:
    """Train a pruned checkpoint back towards the original model.

    Stopped runs go on where they were when the same command is given again. With torchrun, several
    processes share the batches.

    Args:
        model: The pruned checkpoint.
        source: What to learn from.
        out: The recovered checkpoint folder.
        teacher: The original model; not needed for --loss sft.
        training: How to train.
        config: Options from a YAML file, such as the run.yaml of compress: its data, its model as
            teacher, and what it has under recover; those of the command line come on top.
        shard: Divide the weights of model and teacher among the processes of torchrun (FSDP2); such
            a run cannot go on after a stop.
        force: Replace an existing folder.
    """
    from slimvlm.runs.recover import recover as run

    if config is not None:
        note(f"options of {config}, and those of the command line")
    how = {"shard": shard, "force": force}
    history = run(model, source, training, out, teacher=teacher, **how, say=note)
    note(f"teacher: {history.teacher}")
    note(f"trained on {history.num_samples} samples; checkpoint in {out}")


def evaluate(
    model: Model,
    questions: Annotated[QuestionFlags, INLINE] = QuestionFlags(),
    baseline: str | None = None,
    out: Path | None = None,
    source: Annotated[DataConfig, INLINE] = DataConfig(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Ask a benchmark's questions and score the answers, or measure the loss on your own data.

    With --data no task is needed: loss and perplexity of the answers in it, and beside a baseline
    how often both models say the same next token, and how far their predictions are apart.

    Args:
        model: Folder, hub id, or demo.
        questions: What models are asked.
        baseline: The original model, or for tasks a result file of it: adds what was kept.
        out: Result file (JSON), answers included.
        source: The data, and how models are read.
        force: Replace an existing result file.
        json: Print JSON.
    """
    from slimvlm.runs.evaluate import evaluate as run
    from slimvlm.runs.evaluate import evaluate_on_data

    if source.data is not None:
        _require_no_tasks(questions)
        found = evaluate_on_data(
            model,
            source,
            baseline=baseline,
            limit=questions.limit,
            batch_size=questions.batch_size,
            out=out,
            force=force,
            say=note,
        )
        print_on_data(found, json)
        return
    results = run(
        model,
        part_of(replace(questions, tasks=questions.tasks or Questions.tasks), Questions),
        source,
        baseline=baseline,
        blind=questions.blind,
        log_folder=questions.log,
        out=out,
        force=force,
    )
    print_results(results, json)


def _require_no_tasks(questions: QuestionFlags) -> None:
    """Data is not asked: what only tasks have must not be given with it."""
    for name in ("tasks", "task_folder", "floors", "blind", "log"):
        if value := getattr(questions, name):
            flag = name.replace("_", "-")
            raise ConfigError(f"{name} {str(value)!r}: --{flag} is for tasks, not for --data")


def compress(
    model: Model,
    out: Path,
    pruning: Annotated[PruneConfig, INLINE] = PruneConfig(),
    training: Annotated[TrainingFlags, INLINE] = TrainingFlags(),
    evaluation: Annotated[RunFlags, INLINE] = RunFlags(),
    config: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Make a smaller model, start to end, in one run folder.

    Without --axis, depth, width and both are tried on the data before training, and held-out
    answers choose; where nothing is trained, it is width. What learns, and from which loss, follows
    the study's decision chart unless options say otherwise. A stopped run goes on when the same
    command is given again.

    Args:
        model: Folder, hub id, or demo.
        out: The run folder: config, plan, scores, checkpoint, results, summary.md.
        pruning: What to remove, and how. Without data, nothing is trained.
        training: How to train.
        evaluation: What models are asked, and how much is trained on.
        config: Options from a YAML file, such as the run.yaml of another run, model included; those
            of the command line come on top.
        dry_run: Only say what would be done and what it needs. Reads the configuration and the
            data, no weights, and writes nothing.
        force: Replace an existing run folder.
        json: Print JSON.
    """
    from slimvlm.runs.advise import dry_run as look
    from slimvlm.runs.compress import STAGES, read_times
    from slimvlm.runs.compress import compress as run
    from slimvlm.runs.held_out import read_held_out

    latency = evaluation.target_latency
    recover = _recovery(pruning, training, None if latency is None else 1 - latency)
    whole = CompressConfig(**vars(pruning), **vars(evaluation), recover=recover)
    if config is not None:
        note(f"options of {config}, and those of the command line")
    if dry_run:
        print_dry_run(look(model, whole, note), json)
        return
    results = run(model, whole, out, force, note)
    print_run(results, read_held_out(out, STAGES), read_times(out), json, str(out))
    note(f"run folder: {out}; checkpoint: {out / 'checkpoint'}")
    talk = ["slimvlm", "chat", str(out), "your question", "--other", model]
    note(f"next: {shlex.join(['slimvlm', 'report', str(out)])}; {shlex.join(talk)}")


def defaults_from(file: str, verb: str) -> dict[str, Any]:
    """Read a configuration file as values of the parameters of `compress` or `recover`."""
    from slimvlm.runs.command import read_config

    model, config, learning = read_config(file)
    if verb == "recover":
        data = {} if config.data is None else {"source": part_of(config, TrainingData)}
        return {"teacher": model, "training": config.recover or RecoverConfig(), **data}
    given: dict[str, Any] = {"train": "none"} if learning is None else {}
    if config.recover is not None:
        names = {row.name for row in fields(TrainingFlags)} & set(learning or {}) - {"seed"}
        given = {name: getattr(config.recover, name) for name in names}
    return {
        "model": model,
        "pruning": part_of(config, PruneConfig),
        "training": TrainingFlags(**given),
        "evaluation": part_of(config, RunFlags),
    }


def _recovery(
    pruning: PruneConfig, training: TrainingFlags, about: float | None
) -> RecoverConfig | None:
    """Resolve the training options, None for no training; the chart fills in missing ones.

    ``about`` stands in for the ratio where a latency is given.
    """
    from slimvlm.runs.recipes import recipe_for
    from slimvlm.runs.request import ratio_of

    has_data = pruning.data is not None
    if not has_data and training.train not in (None, "none"):
        raise ConfigError(f"train {training.train!r} needs --data")
    ratio = ratio_of(pruning) if about is None else about
    chart = recipe_for(ratio, has_data and training.train != "none")
    learns = training.train or chart.train or "none"
    if learns == "none":
        return None
    how = {**vars(part_of(training, TrainingConfig)), "seed": pruning.seed}
    return RecoverConfig(train=learns, loss=training.loss or chart.loss, **how)
