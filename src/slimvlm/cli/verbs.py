"""Define the verbs of the command line: their options, and what they print."""

import os
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from slimvlm.cli.options import Model
from slimvlm.cli.printing import print_held_out, print_json, print_results, print_table, show
from slimvlm.core import options
from slimvlm.core.errors import ConfigError, printable
from slimvlm.core.files import path_of
from slimvlm.core.progress import duration, to_log


def compress(
    model: Model,
    out: Path,
    options: options.CompressConfig = options.CompressConfig(),
    config: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    json: bool = False,
) -> None:
    """Prune, repair, train and evaluate a model in one run folder.

    Before training, short trials choose the axis by validation loss unless you set --axis; without
    training it is width. --train and --loss follow the extended paper's decision chart unless set.
    The same command resumes a stopped run.

    Args:
        out: Run folder: configuration, plan, scores, checkpoint, results, summary.md.
        config: YAML file of options, such as the run.yaml of another run, model included. Flags
            override it.
        dry_run: Only report the plan, and the time and memory that it takes. Reads the
            configuration and the data, but no weights, and writes nothing.
    """
    from slimvlm.evaluation.gates import judge
    from slimvlm.runs import advise as advising
    from slimvlm.runs import compress as runs
    from slimvlm.runs.tables import held_out_json, result_json

    if config is not None:
        to_log(f"options of {config}, and those of the command line")
    if dry_run:
        needs = advising.dry_run(model, options, to_log)
        values = {name: value for name, value in asdict(needs).items() if name != "plan"}
        values |= {"ratio": needs.plan.ratio, "total_params": needs.plan.after.total_params}
        show(json, lambda: values, lambda: ((), advising.dry_run_rows(needs)))
        return
    done = runs.compress(model, options, out, force, to_log)
    held_out, times = done.held_out, done.times
    if json:
        figures = {"held_out": held_out_json(held_out), "times": times and asdict(times)}
        print_json({**result_json(done.results), **figures})
    else:
        print_results(done.results, False, str(out))
        print_held_out(held_out)
        if times is not None:
            print(f"the compressed model {times}")
    to_log(f"run folder: {out}; checkpoint: {out / 'checkpoint'}")
    talk = ["slimvlm", "chat", str(out), "your question", "--other", model]
    to_log(f"next: {shlex.join(['slimvlm', 'report', str(out)])}; {shlex.join(talk)}")
    judge(options.require, done.results, held_out, to_log)


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
    """Measure a grid of compressions, and share stages among its cells.

    Finished stages are cached: a stopped study resumes, a larger one adds its new cells, and failed
    stages are retried.

    Args:
        file: Study file (YAML); see docs/studies.md.
        out: Folder for results.parquet, results.csv, claims.md and the cache.
        engine: local runs one stage after another; ray runs many in parallel on a Ray cluster.
        workers: Parallel stages, for a Ray instance that is started here.
        address: Address of a running Ray cluster. Default: RAY_ADDRESS.
        dry_run: Only show the cells, their cached stages and the estimated time of the others.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # lines show the progress; before imports
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
    """Write an HTML report on a run or a study: charts, tables, replies, configuration.

    One file, which opens offline.

    Args:
        folder: Folder of compress or study.
        out: HTML file. Default: report.html in that folder, which is overwritten.
        tasks: The run's own tasks, as in evaluate, so that their questions are shown. Files that
            the folder names are not read, as the folder may come from someone else.
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
    target: options.BudgetOptions = options.BudgetOptions(),
    no_data: bool = False,
    gpu: bool = False,
    no_gpu: bool = False,
    training_samples: int | None = None,
    dtype: options.Dtype = "auto",
    json: bool = False,
) -> None:
    """Recommend a recipe for a size or latency target, with expected score, cost and command.

    Reads the configuration and the tokenizer, but no weights. The rules and figures are those of
    recipes.yaml.

    Args:
        no_data: Assume that there is no training data.
        gpu: Assume a GPU. Default: what this machine has.
        no_gpu: Assume that there is no GPU.
        training_samples: Number of training samples. Default: as in the paper.
        dtype: Data type of the weights (bfloat16 for auto).
    """
    from slimvlm.runs import advise as advising

    if gpu and no_gpu:
        raise ConfigError("--gpu conflicts with --no-gpu: leave one of them out")
    advice = advising.advise(
        model,
        **vars(target),
        data=not no_data,
        gpu=True if gpu else False if no_gpu else None,
        samples=training_samples,
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
    """Build the demo model, or run the whole pipeline on it at a ratio of 30 %.

    Args:
        what: build writes the model into the cache; run compresses it and shows the retention.
        out: Folder of the runs, or of the model built from --delta. Default: runs/demo, or
            runs/demo-short with --short.
        model: For run: another model trained on the demo's tasks, such as another training seed.
        delta: For build: export of slimvlm_tools.demo_training.train. Default: the delta in the
            package.
        short: Fewer questions and training samples, to check that everything works.
        axis: For run: what to remove in addition to vocabulary tokens.
        limit: For run: maximum number of questions per task. Default: 20.
    """
    from slimvlm.demo.build import build_demo, build_from_delta
    from slimvlm.demo.run import run_demo
    from slimvlm.runs.compress import read_held_out

    out = out or Path("runs/demo-short" if short else "runs/demo")
    if what == "build":
        print(build_demo() if delta is None else build_from_delta(delta, out, force))
        return
    results = run_demo(out, short, force, to_log, model, place.device, axis, limit)
    print_results(results, False, "the demo model, 30 % of the backbone removed")
    print_held_out(read_held_out(out / axis))
    talk = ["slimvlm", "chat", str(out / axis), "What is a llama?", "--other", model]
    to_log(f"next: {shlex.join(['slimvlm', 'report', str(out / axis)])}; {shlex.join(talk)}")


# Verbs of one model or two.


def inspect(model: Model, json: bool = False) -> None:
    """Show a model's parts, parameters, units, legal widths, memory and work.

    Reads the configuration only, not the weights.
    """
    from slimvlm.models.cost import question_flops
    from slimvlm.models.load import anatomy
    from slimvlm.models.pictures import picture_of
    from slimvlm.runs.tables import anatomy_rows

    found, picture = anatomy(model), picture_of(model)
    extra = {name: getattr(found, name) for name in ("backbone_params", "total_params")}
    extra |= {"image": vars(picture), "image_flops": question_flops(found, picture)._asdict()}
    values = {**asdict(found), **extra, "legal_kv_heads": found.legal_kv_heads()}
    show(json, lambda: values, lambda: (["", model], anatomy_rows(found, picture)))


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
    """Compare two models question by question: both right, lost, gained, both wrong.

    Args:
        a: The original: a result file of evaluate --out, or a model.
        b: The compressed model, or a result file of it.
        tasks: Tasks on which models are evaluated; result files contain theirs.
        limit: Maximum number of questions per task, for models.
        out: HTML file with every lost answer and its image.
        require: Conditions on B, as in evaluate; the exit code is 3 if one is not met; x is A's
            figure.
    """
    from slimvlm.core.files import require_free, write_text
    from slimvlm.evaluation import ask, gates
    from slimvlm.evaluation import compare as comparing
    from slimvlm.evaluation.results import Result
    from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
    from slimvlm.models.load import check_models, load_as
    from slimvlm.runs.report import comparison_html

    if out is not None:
        require_free(out, force)
    chosen = {task.name: task for task in find_tasks(tasks)}
    results = {name: Result.load(name) for name in (a, b) if name.endswith(".json")}
    models = [name for name in dict.fromkeys((a, b)) if name not in results]
    gates.parse(require, gates.in_percent(results[b].tasks if b in results else chosen))
    check_models(loading, *models)
    for name in models:
        loaded = load_as(loading, name)
        results[name] = ask.evaluate(*loaded, list(chosen.values()), limit, name=name)
    found = comparing.compare(results[a], results[b], {**builtin_tasks(), **chosen})
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, comparison_html(found, f"Answers lost and gained by {found.name_b}"))
    notes = [f"{name} is not compared: {why}" for name, why in found.left_out.items()]
    title = f"A: {found.name_a}   B: {found.name_b}"
    values, rows = comparing.comparison_json, comparing.comparison_rows
    show(json, partial(values, found), partial(rows, found), title, notes)
    gates.judge(require, {"A": results[a], "B": results[b]}, {}, to_log)


def chat(
    model: Model,
    question: Annotated[str, tyro.conf.Positional],
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    other: str | None = None,
    max_new_tokens: int = 64,
    loading: options.LoadConfig = options.LoadConfig(),
    json: bool = False,
) -> None:
    """Chat with one model, or with two side by side.

    Args:
        question: The prompt.
        image: Image file; repeat the option for more.
        other: A second model for the same prompt.
        max_new_tokens: Maximum tokens of a reply.
    """
    from slimvlm.data.samples import Question
    from slimvlm.evaluation.ask import answer
    from slimvlm.models.load import check_models, load_as

    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens} must be at least 1")
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
    """Measure prefill and decode speed, FLOPs and memory; with a baseline, against the ideal.

    Prompts are random tokens. For models that take images, a question about an image of usual size
    is timed as well, from pixels to the first token. Model and baseline run in turn, and speed-ups
    are medians over neighbouring runs.

    Args:
        baseline: The model before pruning.
    """
    from slimvlm.evaluation import bench as timing
    from slimvlm.models.load import check_models, load_as

    names = (model,) if baseline is None else (model, baseline)
    check_models(loading, *names)
    models, processors = zip(*(load_as(loading, name) for name in names), strict=True)
    found = timing.bench(models[0], (*models, None)[1], workload, names, processors)
    title = f"{found.dtype} on {found.device}, {found.threads} CPU threads"
    sides = filter(None, (found.baseline, found.model))
    notes = [f"{side.model}: {line}" for side in sides for line in side.warnings]
    show(json, partial(asdict, found), partial(timing.bench_rows, found), title, notes)


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
    """Export to GGUF or to a text-only model, or check which engines can serve a model.

    The GGUF file contains the language backbone. Vision tower and projector are written to a second
    file named mmproj-..., for vision towers that llama.cpp's converter supports. With --text-only
    the language backbone becomes a text model, without a second file.

    Args:
        format: File format: gguf (needs slimvlm[gguf]).
        out: File to write; with --text-only and another suffix than .gguf, checkpoint folder for
            transformers.
        outtype: Data type of the weights in the file.
        original: The original of a model with a trimmed vocabulary, whose tokenizer llama.cpp
            knows.
        text_only: Leave out vision tower and projector.
        check: Instead of a file: check the shape for vllm, sglang, gguf, openvino, onnx, mlx or
            tp=N (tensor parallelism over N GPUs). Reads the configuration only.
    """
    if bool(check) == (out is not None):
        raise ConfigError("export needs either --out or --check")
    if text_only and out is not None and out.suffix.lower() != ".gguf":
        if outtype != "bf16" or original is not None:
            raise ConfigError("outtype and original need an --out that ends in .gguf")
        from slimvlm.export.text_only import export_text

        export_text(model, out, force)
        print(f"text model: {out}; its image tokens have no meaning any more")
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
    """Quantize the decoder layers to int8, int4 or fp8.

    Vision tower, projector, embeddings and head are not quantized. Quantize last: the result cannot
    be pruned or trained.

    Args:
        to: Data type of the weights.
        backend: Library; auto is torchao, but bitsandbytes for int4 and compressed-tensors for
            fp8. vLLM supports checkpoints of compressed-tensors best.
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
    """Convert an original LLaVA-1.5, Bunny-v1.0 or Mini-InternVL-Chat to native transformers.

    Logits, token ids and pixels equal those of the original code, which is not run.

    Args:
        source: Local folder or Hub id of the original.
        vision_tower: Local folder or Hub id of the vision tower, for LLaVA and Bunny. Its
            configuration is always read, its weights where the original does not contain them.
        dtype: Data type of the weights to write. Default: that of each stored tensor.
    """
    from slimvlm_tools.convert import convert as write_native

    print(f"checkpoint: {write_native(source, out, vision_tower, force, dtype)}")
