"""Verbs of stages and whole runs, from score to compress, study and report."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from slimvlm.cli.options import Model, QuestionFlags, RunFlags, TargetFlags, TrainingFlags
from slimvlm.cli.printing import (
    note,
    print_grid,
    print_held_out,
    print_json,
    print_results,
    print_study,
    print_table,
    show,
)
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import (
    CalibrationConfig,
    CompressConfig,
    DataConfig,
    DeviceOptions,
    Dtype,
    MemoryOptions,
    PlanConfig,
    PruneConfig,
    Questions,
    RecoverConfig,
    ReportOptions,
    TrainingConfig,
    TrainingData,
    part_of,
)


def score(
    model: Model,
    out: Path,
    criterion: str = "obs",
    calibration: CalibrationConfig = CalibrationConfig(),
    memory: MemoryOptions = MemoryOptions(),
    force: bool = False,
) -> None:
    """Calibrate once: save scores for later plans.

    Args:
        out: Scores are written as OUT.json and OUT.safetensors.
        criterion: How to score; see the table in the README.
    """
    from slimvlm.runs.verbs import score as run

    run(model, calibration, criterion, out, memory, force, note)


def plan(
    model: Model,
    out: Path,
    config: PlanConfig = PlanConfig(),
    scores: tuple[Path, ...] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Choose what to keep, from saved scores and a budget. Nothing is pruned.

    Args:
        out: The plan, a JSON file that can be edited by hand.
        scores: Score files of the units to prune. Without any, the default criteria score on the
            demo's conversations.
    """
    from slimvlm.runs.verbs import plan as run

    made = run(model, config, out, scores, force=force, say=note)
    if not json:
        print(made.summary())
        return
    sizes = {name: getattr(made.after, name) for name in ("backbone_params", "total_params")}
    ratios = {"ratio": made.ratio, "asked_ratio": made.asked_ratio}
    print_json({**ratios, **sizes, "summary": made.summary()})


def prune(
    model: Model,
    out: Path,
    plan: Path | None = None,
    pruning: PruneConfig = PruneConfig(),
    memory: MemoryOptions = MemoryOptions(),
    report: ReportOptions = ReportOptions(),
    force: bool = False,
) -> None:
    """Write a smaller checkpoint, from a plan or from a ratio, criterion and data.

    With --data, it ends with what was kept on samples that nothing was fitted to. Without, default
    criteria score on the demo's conversations.

    Args:
        out: The new checkpoint folder.
        plan: A plan file instead of ratio, axis, criterion and allocation.
    """
    from slimvlm.runs.verbs import prune as run

    walked, held_out = run(model, pruning, out, plan, memory, report, force, note)
    print(f"{walked.summary()}\ncheckpoint: {out}")
    print_held_out(held_out)


def recover(
    model: Model,
    source: TrainingData,
    out: Path,
    teacher: str | None = None,
    training: RecoverConfig = RecoverConfig(),
    config: Path | None = None,
    shard: bool = False,
    force: bool = False,
) -> None:
    """Train a pruned checkpoint back towards the original model.

    Stopped runs go on where they were when the same command is given again. With torchrun, several
    processes share the batches.

    Args:
        model: The pruned checkpoint.
        out: The recovered checkpoint folder.
        teacher: The original model; not needed for --loss sft.
        config: Options from a YAML file, such as the run.yaml of compress: its data, its model as
            teacher, and what it has under recover; those of the command line come on top.
        shard: Divide the weights of model and teacher among the processes of torchrun (FSDP2); such
            a run cannot go on after a stop.
    """
    from slimvlm.runs.verbs import recover as run

    if config is not None:
        note(f"options of {config}, and those of the command line")
    history = run(model, source, training, out, teacher, shard, force, note)
    note(f"teacher: {history.teacher}")
    note(f"trained on {history.num_samples} samples; checkpoint in {out}")


def evaluate(
    model: Model,
    questions: QuestionFlags = QuestionFlags(),
    baseline: str | None = None,
    out: Path | None = None,
    source: DataConfig = DataConfig(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Ask a benchmark's questions and score the answers, or measure the loss on your own data.

    With --data no task is needed: loss and perplexity of the answers in it, and beside a baseline
    how often both models say the same next token, and how far their predictions are apart.

    Args:
        baseline: The original model, or for tasks a result file of it: adds what was kept.
        out: Result file (JSON), answers included.
    """
    from slimvlm.runs.tables import held_out_json, held_out_notes, held_out_rows
    from slimvlm.runs.verbs import evaluate as run
    from slimvlm.runs.verbs import evaluate_on_data

    where = (source, baseline, out, force)
    if source.data is None:
        asked = part_of(replace(questions, tasks=questions.tasks or Questions.tasks), Questions)
        print_results(run(model, asked, *where, questions.blind, questions.log), json)
        return
    for name in ("tasks", "task_folder", "floors", "blind", "log"):
        if value := getattr(questions, name):
            flag = name.replace("_", "-")
            raise ConfigError(f"{name} {str(value)!r}: --{flag} is for tasks, not for --data")
    found = evaluate_on_data(model, *where, questions.limit, questions.batch_size, note)
    rows, notes = partial(held_out_rows, found), held_out_notes(found)
    show(json, partial(held_out_json, found), rows, notes=notes)


def compress(
    model: Model,
    out: Path,
    pruning: PruneConfig = PruneConfig(),
    training: TrainingFlags = TrainingFlags(),
    evaluation: RunFlags = RunFlags(),
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
        out: The run folder: config, plan, scores, checkpoint, results, summary.md.
        pruning: What to remove, and how. Without data, nothing is trained.
        config: Options from a YAML file, such as the run.yaml of another run, model included; those
            of the command line come on top.
        dry_run: Only say what would be done and what it needs. Reads the configuration and the
            data, no weights, and writes nothing.
    """
    from slimvlm.runs.advise import dry_run as look
    from slimvlm.runs.advise import dry_run_rows
    from slimvlm.runs.compress import compress as run
    from slimvlm.runs.compress import read_held_out, read_times
    from slimvlm.runs.tables import held_out_json, result_json

    latency = evaluation.target_latency
    recover = _recovery(pruning, training, None if latency is None else 1 - latency)
    whole = CompressConfig(**vars(pruning), **vars(evaluation), recover=recover)
    if config is not None:
        note(f"options of {config}, and those of the command line")
    if dry_run:
        needs = look(model, whole, note)
        if not json:
            print_grid(dry_run_rows(needs))
            return
        values = {name: value for name, value in vars(needs).items() if name != "plan"}
        plan = {"ratio": needs.plan.ratio, "total_params": needs.plan.after.total_params}
        print_json({**values, **plan, "cost": asdict(needs.cost)})
        return
    results = run(model, whole, out, force, note)
    held_out, times = read_held_out(out), read_times(out)
    if json:
        plain = None if times is None else asdict(times)
        figures = {"held_out": held_out_json(held_out), "times": plain}
        print_json({**result_json(results), **figures})
    else:
        print_results(results, False, str(out))
        print_held_out(held_out)
        if times is not None:
            print(f"the smaller model {times}")
    note(f"run folder: {out}; checkpoint: {out / 'checkpoint'}")
    talk = ["slimvlm", "chat", str(out), "your question", "--other", model]
    note(f"next: {shlex.join(['slimvlm', 'report', str(out)])}; {shlex.join(talk)}")


def defaults_from(file: str, verb: str) -> dict[str, Any]:
    """Read a configuration file as values of the parameters of `compress` or `recover`."""
    from slimvlm.runs.compress import read_config

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


def study(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.yaml")],
    out: Path,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    place: DeviceOptions = DeviceOptions(),
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Measure a grid of compressions, doing each piece of work once.

    Stages in the folder's cache are used again: a stopped study resumes, a larger one adds its new
    cells, and failed stages are tried again.

    Args:
        file: The study; see docs/studies.md.
        out: Folder for results.parquet, results.csv, claims.md and the cache.
        engine: local does one stage after another; ray does many at once on a Ray cluster.
        workers: Stages at once, for a Ray that is started here.
        address: A running Ray cluster; by default the one in RAY_ADDRESS.
        dry_run: Only show the cells, their cached stages and the estimated time of the rest.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # one table shows the progress; before imports
    from slimvlm.core.progress import duration
    from slimvlm.runs.study import forecast, run_study

    if not dry_run:
        print_study(run_study(file, out, engine, workers, address, device=place.device), json)
        if not json:
            note(f"results: {out}/results.csv, claims: {out}/claims.md")
        return
    found = forecast(file, out)
    if json:
        print_json(asdict(found))
        return
    cells = [[label, ", ".join(stages) or "nothing"] for label, stages in found.cells.items()]
    print_table(["cell", "to do"], cells, title=f"{len(cells)} cells")
    counts = [
        [kind, str(to_do), str(done), found.basis.get(kind, "")]
        for kind, (to_do, done) in found.stages.items()
    ]
    print_table(["stage", "to do", "in the cache", "time is"], counts)
    print(f"about {duration(found.seconds)}, one stage after another")


def report(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Write one HTML file about a run or a study: charts, tables, answers, configuration.

    It opens offline, on a phone, in dark mode, and prints.

    Args:
        folder: The folder of compress or study.
        out: The file; by default report.html in that folder, which is replaced.
    """
    from slimvlm.core.files import require_free, write_text
    from slimvlm.runs.report import read_record, report_html

    target = out if out is not None else folder / "report.html"
    require_free(target, force or out is None)
    page = report_html(read_record(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    note(f"report: {target} ({len(page.encode()) / 1e6:.1f} MB)")


def advise(
    model: Model,
    target: TargetFlags = TargetFlags(),
    data: tuple[str, ...] | None = None,
    no_data: bool = False,
    gpu: bool = False,
    no_gpu: bool = False,
    samples: int | None = None,
    dtype: Dtype = "auto",
    json: bool = False,
) -> None:
    """Say which recipe fits a budget, what it should keep, what it costs, and the command.

    Reads the configuration and the tokenizer, no weights. Rules and numbers are those of
    recipes.yaml.

    Args:
        data: There are conversations to train on; so it is unless --no-data is given.
        no_data: There are none.
        gpu: There is a GPU; by default this machine is looked at.
        no_gpu: There is none.
        samples: How many conversations there are; by default as many as the study had.
        dtype: Data type of the weights (bfloat16 for auto).
    """
    from slimvlm.runs.advise import advice_rows
    from slimvlm.runs.advise import advise as find

    if data:
        raise ConfigError(
            f"data {data[0]!r}: advise reads no data. Say how much there is with --samples, or let "
            "compress --dry-run count it"
        )
    for name, yes, no in (("data", data is not None, no_data), ("gpu", gpu, no_gpu)):
        if yes and no:
            raise ConfigError(f"--{name} and --no-{name} contradict each other")
    advice = find(
        model,
        **vars(target),
        data=not no_data,
        gpu=True if gpu else False if no_gpu else None,
        samples=samples,
        dtype="bfloat16" if dtype == "auto" else dtype,
    )
    if json:
        print_json(asdict(advice))
        return
    print_grid(advice_rows(advice))
    print(f"\n{advice.command}")


def demo(
    what: Annotated[Literal["build", "run"], tyro.conf.Positional],
    out: Path = Path("runs/demo"),
    model: str = "demo",
    delta: Path | None = None,
    short: bool = False,
    place: DeviceOptions = DeviceOptions(),
    force: bool = False,
) -> None:
    """Build the demo model, or take it through the whole pipeline at 30 %.

    Args:
        what: build writes the model into the cache; run compresses it along depth and width.
        out: Folder for the runs, or for the model of a delta.
        model: For run: another model that knows the demo's tasks, such as another training seed.
        delta: For build: what slimvlm_tools.demo_training.train exported, instead of the delta in
            the package.
        short: Fewer questions and training samples: a check that everything works.
    """
    from slimvlm.demo.build import build_demo, build_from_delta
    from slimvlm.demo.run import run_demo

    if what == "build":
        print(build_demo() if delta is None else build_from_delta(delta, out, force))
        return
    print_results(run_demo(out, short, force, note, model, place.device), False, "demo at 30 %")
    note(f"checkpoints: {out}/depth/checkpoint and {out}/width/checkpoint")
