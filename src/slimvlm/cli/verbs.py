"""The verbs of the command line: their options, and what they print."""

import os
import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from slimvlm.cli import options as flags
from slimvlm.cli.options import Model
from slimvlm.cli.printing import print_held_out, print_json, print_results, print_table, show
from slimvlm.core import options
from slimvlm.core.errors import ConfigError, printable
from slimvlm.core.files import path_of
from slimvlm.core.progress import duration, to_log


def score(
    model: Model,
    out: Path,
    criterion: str = "obs",
    calibration: options.CalibrationConfig = options.CalibrationConfig(),
    memory: options.MemoryOptions = options.MemoryOptions(),
    force: bool = False,
) -> None:
    """Calibrate once: save scores for later plans.

    Args:
        out: Scores are written as OUT.json and OUT.safetensors.
        criterion: How to score; docs/criteria.md has the table.
    """
    from slimvlm.runs.verbs import score as run

    run(model, calibration, criterion, out, memory, force, to_log)


def plan(
    model: Model,
    out: Path,
    config: options.PlanConfig = options.PlanConfig(),
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

    made = run(model, config, out, scores, force=force, say=to_log)
    if not json:
        print(made.summary())
        return
    values = {name: getattr(made, name) for name in ("ratio", "asked_ratio")}
    values |= {name: getattr(made.after, name) for name in ("backbone_params", "total_params")}
    print_json({**values, "summary": made.summary()})


def prune(
    model: Model,
    out: Path,
    plan: Path | None = None,
    pruning: options.PruneConfig = options.PruneConfig(),
    memory: options.MemoryOptions = options.MemoryOptions(),
    report: options.ReportOptions = options.ReportOptions(),
    force: bool = False,
) -> None:
    """Write a smaller checkpoint, from a plan or from a ratio, criterion and data.

    With --data, it ends with what was kept on samples that nothing was fitted to. Without, default
    criteria score on the demo's conversations.

    Args:
        plan: A plan file instead of ratio, axis, criterion and allocation.
    """
    from slimvlm.runs.verbs import prune as run

    walked, held_out = run(model, pruning, out, plan, memory, report, force, to_log)
    print(f"{walked.summary()}\ncheckpoint: {out}")
    print_held_out(held_out)


def recover(
    model: Model,
    source: flags.SourceFlags,
    out: Path,
    teacher: str | None = None,
    training: options.RecoverConfig = options.RecoverConfig(),
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
        to_log(f"options of {config}, and those of the command line")
    history = run(model, source, training, out, teacher, shard, force, to_log)
    to_log(f"teacher: {history.teacher}")
    to_log(f"trained on {history.num_samples} samples; checkpoint in {out}")


def evaluate(
    model: Model,
    questions: options.QuestionFlags = options.QuestionFlags(),
    baseline: str | None = None,
    out: Path | None = None,
    source: options.DataConfig = options.DataConfig(),
    require: tuple[str, ...] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Ask a benchmark's questions and score the answers, or measure the loss on your own data.

    With --data no task is needed: loss and perplexity of the answers in it, and beside a baseline
    how often both models say the same next token, and how far their predictions are apart.

    Args:
        baseline: The original model, or for tasks a result file of it: adds what was kept.
        out: Result file (JSON), answers included.
        require: What must hold, else the exit code is 3: 'agreement >= 95%' 'loss <= 1.1x'; x is
            the baseline's figure. See docs/gates.md.
    """
    from slimvlm.evaluation.gates import judge
    from slimvlm.runs.tables import held_out_json, held_out_notes, held_out_rows
    from slimvlm.runs.verbs import evaluate as run

    if source.data is None:
        source.refuse(("images", "max_bad", "max_length", "too_long"), "needs --data")
    else:
        asks = ("tasks", "task_folder", "template_args", "floors", "blind", "log")
        questions.refuse(asks, "is for tasks, not for --data")
    asked = replace(questions, tasks=questions.tasks or options.Questions.tasks)
    found = run(model, asked, source, baseline, out, force, to_log, require)
    if source.data is None:
        print_results(found, json)
        judge(require, found, {}, to_log)
        return
    rows, notes = partial(held_out_rows, found), held_out_notes(found)
    show(json, partial(held_out_json, found), rows, notes=notes)
    judge(require, {}, found, to_log)


def compress(
    model: Model,
    out: Path,
    pruning: options.RunPruning = options.RunPruning(),
    training: flags.TrainingFlags = flags.TrainingFlags(),
    evaluation: flags.RunFlags = flags.RunFlags(),
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
    from slimvlm.evaluation.gates import judge
    from slimvlm.runs import advise as advising
    from slimvlm.runs import compress as runs
    from slimvlm.runs.tables import held_out_json, result_json

    how = {name: value for name, value in vars(training).items() if name != "seed"}  # the run's
    if config is not None and training.train == "none":  # a file's training goes, as a whole
        how, evaluation = {"train": "none"}, replace(evaluation, training_samples=None)
    whole = runs.config_from({**vars(pruning), **vars(evaluation), "recover": how}, model)
    if config is not None:
        to_log(f"options of {config}, and those of the command line")
    if dry_run:
        needs = advising.dry_run(model, whole, to_log)
        values = {name: value for name, value in asdict(needs).items() if name != "plan"}
        values |= {"ratio": needs.plan.ratio, "total_params": needs.plan.after.total_params}
        show(json, lambda: values, lambda: ((), advising.dry_run_rows(needs)))
        return
    done = runs.compress(model, whole, out, force, to_log)
    held_out, times = done.held_out, done.times
    if json:
        figures = {"held_out": held_out_json(held_out), "times": times and asdict(times)}
        print_json({**result_json(done.results), **figures})
    else:
        print_results(done.results, False, str(out))
        print_held_out(held_out)
        if times is not None:
            print(f"the smaller model {times}")
    to_log(f"run folder: {out}; checkpoint: {out / 'checkpoint'}")
    talk = ["slimvlm", "chat", str(out), "your question", "--other", model]
    to_log(f"next: {shlex.join(['slimvlm', 'report', str(out)])}; {shlex.join(talk)}")
    judge(whole.require, done.results, held_out, to_log)


def study(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.yaml")],
    out: Path,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    place: options.DeviceOptions = options.DeviceOptions(),
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
    from slimvlm.cli.printing import print_study
    from slimvlm.runs.study import forecast, run_study

    if not dry_run:
        print_study(run_study(file, out, engine, workers, address, device=place.device), json)
        if not json:
            to_log(f"results: {out}/results.csv, claims: {out}/claims.md")
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
    tasks: str | None = None,
    force: bool = False,
) -> None:
    """Write one HTML file about a run or a study: charts, tables, answers, configuration.

    It opens offline, on a phone, in dark mode, and prints.

    Args:
        folder: The folder of compress or study.
        out: The file; by default report.html in that folder, which is replaced.
        tasks: The run's tasks of your own, as evaluate takes them, to show their questions. Files
            that the folder names are not read: it may be somebody else's.
    """
    from slimvlm.core.files import require_free, write_text
    from slimvlm.runs.report import read_record, report_html

    target = out if out is not None else folder / "report.html"
    require_free(target, force or out is None)
    page = report_html(read_record(folder, tasks))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    to_log(f"report: {target} ({len(page.encode()) / 1e6:.1f} MB)")


def advise(
    model: Model,
    target: flags.SizeFlags = flags.SizeFlags(),
    data: tuple[str, ...] | None = None,
    no_data: bool = False,
    gpu: bool = False,
    no_gpu: bool = False,
    samples: int | None = None,
    dtype: options.Dtype = "auto",
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
    from slimvlm.runs import advise as advising

    if data:
        told = "advise reads no data. Give its --samples, or let compress --dry-run count them"
        raise ConfigError(f"data {data[0]!r}: {told}")
    for name, yes, no in (("data", data is not None, no_data), ("gpu", gpu, no_gpu)):
        if yes and no:
            raise ConfigError(f"--{name} and --no-{name} contradict each other")
    advice = advising.advise(
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
    print_table((), advising.advice_rows(advice))
    print(f"\n{advice.command}")


def demo(
    what: Annotated[Literal["build", "run"], tyro.conf.Positional],
    out: Path | None = None,
    model: str = "demo",
    delta: Path | None = None,
    short: bool = False,
    axis: options.Axis = "width",
    limit: int | None = None,
    place: options.DeviceOptions = options.DeviceOptions(),
    force: bool = False,
) -> None:
    """Build the demo model, or take it through the whole pipeline at 30 %.

    Args:
        what: build writes the model into the cache; run compresses it and shows what was kept.
        out: Folder for the runs, or for the model of a delta; runs/demo if not given, or
            runs/demo-short with --short.
        model: For run: another model that knows the demo's tasks, such as another training seed.
        delta: For build: what slimvlm_tools.demo_training.train exported, instead of the delta in
            the package.
        short: Fewer questions and training samples: a check that everything works.
        axis: For run: what goes beside tokens. Width keeps more than depth here.
        limit: For run: questions of each task, 20 if not given.
    """
    from slimvlm.demo.build import build_demo, build_from_delta
    from slimvlm.demo.run import run_demo

    out = out or Path("runs/demo-short" if short else "runs/demo")
    if what == "build":
        print(build_demo() if delta is None else build_from_delta(delta, out, force))
        return
    header, rows, lines = run_demo(out, short, force, to_log, model, place.device, axis, limit)
    print_table(header, rows, title="the demo model, 30 % smaller")
    for line in lines:
        print(printable(line))


# Verbs of one model or two.


def inspect(model: Model, json: bool = False) -> None:
    """Show what a model is made of: parts, parameters, units, legal widths, memory.

    Reads the configuration only, never the weights.
    """
    from slimvlm.models.load import anatomy
    from slimvlm.runs.tables import anatomy_rows

    found = anatomy(model)
    extra = {name: getattr(found, name) for name in ("backbone_params", "total_params")}
    values = {**asdict(found), **extra, "legal_kv_heads": found.legal_kv_heads()}
    show(json, lambda: values, lambda: (["", model], anatomy_rows(found)))


def compare(
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")],
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")],
    tasks: str = "demo",
    limit: int | None = None,
    out: Path | None = None,
    loading: options.LoadConfig = options.LoadConfig(),
    require: tuple[str, ...] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Set two models side by side, answer by answer: both right, lost, gained, both wrong.

    Args:
        a: The original: a result file of evaluate --out, or a model.
        b: The other one, likewise.
        tasks: Tasks that models are asked; those of result files are in the files.
        limit: Only the first so many questions of each task, for models.
        out: One HTML file with every lost answer and its picture.
        require: What must hold of B, as in evaluate, else the exit code is 3; x is A's figure.
    """
    from slimvlm.core.files import require_free, write_text
    from slimvlm.evaluation.compare import comparison_json, comparison_rows
    from slimvlm.evaluation.gates import judge
    from slimvlm.runs.report import comparison_html
    from slimvlm.runs.verbs import side_by_side

    if out is not None:
        require_free(out, force)
    found, results = side_by_side(a, b, tasks, limit, loading, require)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, comparison_html(found, f"What {found.name_b} lost and gained"))
    notes = [found.note] if found.note else []
    notes += [f"{name} is not compared: {why}" for name, why in found.left_out.items()]
    title = f"A: {found.name_a}   B: {found.name_b}"
    show(json, partial(comparison_json, found), partial(comparison_rows, found), title, notes)
    judge(require, results, {}, to_log)


def chat(
    model: Model,
    question: Annotated[str, tyro.conf.Positional],
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    other: str | None = None,
    max_new_tokens: int = 64,
    loading: options.LoadConfig = options.LoadConfig(),
    json: bool = False,
) -> None:
    """Ask one model, or two side by side.

    Args:
        question: What to ask.
        image: A picture to show; give it again for more.
        other: A second model to ask the same.
        max_new_tokens: Longest answer.
    """
    from slimvlm.data.samples import Question
    from slimvlm.evaluation.ask import answer
    from slimvlm.models.load import check_models, load_as

    if missing := [str(path) for path in image if not path_of(path, "image").is_file()]:
        raise ConfigError(f"image {missing[0]!r}: no such file")
    names = [model] if other is None else [model, other]
    check_models(loading, *names)
    asked = [Question("chat", question, ("",), tuple(image))]
    replies = {name: answer(*load_as(loading, name), asked, max_new_tokens)[0][0] for name in names}
    if json:
        print_json(replies)
        return
    for name, reply in replies.items():
        print(printable(f"{name}: {reply}" if other is not None else reply))


def bench(
    model: Model,
    baseline: str | None = None,
    workload: options.Workload = options.Workload(),
    loading: options.LoadConfig = options.LoadConfig(),
    json: bool = False,
) -> None:
    """Time reading and writing, count FLOPs and memory; with a baseline, against the ideal.

    Prompts are random tokens, so the vision tower is not timed. Model and baseline run in turn, and
    speed-ups are medians of neighbouring runs.

    Args:
        baseline: The model before pruning.
    """
    from slimvlm.evaluation import bench as timing
    from slimvlm.models.load import check_models, load_as

    names = (model,) if baseline is None else (model, baseline)
    check_models(loading, *names)
    small, *large = (load_as(loading, name)[0] for name in names)
    found = timing.bench(small, large[0] if large else None, workload, names)
    title = f"{found.dtype} on {found.device}, {found.threads} CPU threads"
    sides = filter(None, (found.baseline, found.model))
    notes = [f"{side.model}: {line}" for side in sides for line in side.warnings]
    show(json, partial(asdict, found), partial(timing.bench_rows, found), title, notes)


def images(
    model: Model,
    source: options.TrainingData,
    budgets: tuple[float, ...] = (1.0, 0.5, 0.25),
    tasks: str | None = None,
    limit: int | None = None,
    keep: float | None = None,
    out: Path | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Show what fewer tokens for each picture cost and give, or write a model with fewer.

    Nothing is trained: a setting of the processor changes. See docs/images-budget.md.

    Args:
        source: Conversations with pictures, and how the model is read.
        budgets: Shares of the tokens that the data's pictures take now; none measures nothing.
        tasks: Tasks on whose answers it is measured, too.
        keep: Write a model whose pictures take this share: the same weights, another processor.
        out: The new checkpoint folder, for --keep.
    """
    from slimvlm.runs.tables import held_out_json, image_rows
    from slimvlm.runs.verbs import images as run

    found = run(model, source, budgets, tasks, limit, keep, out, force, to_log)
    if json:
        rows = [{**asdict(each), "held_out": held_out_json(each.held_out)} for each in found]
        print_json({"model": model, "budgets": rows})
    elif found:
        print_table(*image_rows(found), title=model)


def export(
    model: Model,
    format: Literal["gguf"] = "gguf",
    out: Path | None = None,
    outtype: options.OutType = "bf16",
    original: str | None = None,
    text_only: bool = False,
    check: tuple[str, ...] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Write files for llama.cpp, or check where the model can be served.

    The file holds the language backbone. Vision tower and projector go into a second file, with
    mmproj- before its name, for models whose vision tower llama.cpp's converter can write. With
    --text-only the language model becomes a text model of its own, without a second file.

    Args:
        format: Format of the file: gguf (needs slimvlm[gguf]).
        out: The new file; with --text-only and a name that does not end in .gguf, the new folder
            for transformers.
        outtype: How the file stores weights.
        original: The original of a model that lost tokens: llama.cpp knows its tokenizer.
        text_only: Leave vision tower and projector out.
        check: Instead of a file: report what vllm, sglang, gguf, openvino, onnx, mlx or tp=N (N
            GPUs that share every layer) make of the shape. Reads the configuration only.
    """
    if bool(check) == (out is not None):
        raise ConfigError("export needs either --out or --check")
    if text_only and out is not None and out.suffix.lower() != ".gguf":
        if outtype != "bf16" or original is not None:
            raise ConfigError("outtype and original are for GGUF: --out must end in .gguf")
        from slimvlm.export.text_only import export_text

        export_text(model, out, force)
        print(f"text model: {out}; its tokens of pictures have no meaning any more")
        return
    if out is not None:
        from slimvlm.export.gguf import export_gguf

        exported = export_gguf(model, out, outtype, force, original, text_only)
        for line in exported.losses:
            to_log(line)
        print(f"language backbone: {exported.text}")
        if exported.pictures is not None:
            print(f"vision tower: {exported.pictures}")
        if exported.has_card:
            print(f"model card: {out.with_name('README.md')}")
        return
    from slimvlm.export.text_only import text_config_alone
    from slimvlm.models import serving
    from slimvlm.models.anatomy import read_anatomy
    from slimvlm.models.load import empty_model, is_quantized, load_config

    config = load_config(model)
    described = text_config_alone(config) if text_only else config
    found = serving.check(read_anatomy(empty_model(described)), check, is_quantized(config))
    found.sort(key=lambda each: ("fail", "warn", "unknown", "ok").index(each.level))
    header = ["target", "", "about", "found", "known from", "what to do"]
    rows = [[f.target, f.level, f.rule, f.what, f.seen or "source", f.advice] for f in found]
    show(json, lambda: [asdict(finding) for finding in found], lambda: (header, rows))


def quantize(
    model: Model,
    out: Path,
    to: Literal["int8", "int4", "fp8"] = "int8",
    backend: Literal["auto", "torchao", "bitsandbytes", "compressed-tensors"] = "auto",
    place: options.DeviceOptions = options.DeviceOptions(),
    force: bool = False,
    json: bool = False,
) -> None:
    """Write a checkpoint whose decoder layers have weights of 8 or 4 bits.

    Tower, projector, embeddings and head stay as they are. Quantise last: the result cannot be
    pruned or trained.

    Args:
        to: Type of the weights.
        backend: Library; auto is torchao, but bitsandbytes for int4 on a CPU and compressed-tensors
            for fp8. What compressed-tensors writes is what vLLM reads best.
    """
    from slimvlm.export.quantize import quantize as run
    from slimvlm.runs.tables import size

    done = run(model, out, to, backend, place.device, force)
    if json:
        print_json({**asdict(done), "saved": done.saved})
        return
    before, after = size(done.bytes_before), size(done.bytes_after)
    print(f"{done.to} by {done.backend}: weights {before} -> {after} ({done.saved:.1%} less)")
    print(f"checkpoint: {out}; loading it needs {done.backend}")


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    vision_tower: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    force: bool = False,
) -> None:
    """Write an original LLaVA-1.5, Bunny-v1.0 or Mini-InternVL-Chat as a native checkpoint.

    Logits, token ids and pixels stay those of the original code, which is neither needed nor run.

    Args:
        source: Folder or hub id of the original.
        vision_tower: Folder or hub id of the vision tower, for LLaVA and Bunny. Its weights are
            read where the original does not hold them, its description always.
        dtype: Data type of the new files; by default every tensor stays as it is stored.
    """
    from slimvlm_tools.convert import convert as write_native

    print(f"checkpoint: {write_native(source, out, vision_tower, force, dtype)}")
