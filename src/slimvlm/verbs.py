"""What each verb of the command line does, as functions that Python could call too.

Their signatures are the options, their docstrings the help. Heavy libraries are imported inside, so
that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from slimvlm.config import (
    Axis,
    CompressConfig,
    Dtype,
    Gradient,
    PruneConfig,
    RecoverConfig,
    Unit,
)
from slimvlm.errors import ConfigError

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


def inspect(model: Model, json: bool = False) -> None:
    """Show what a model is made of: parts, parameters, units, legal widths, memory.

    Reads the configuration only, never the weights.

    Args:
        model: Folder, hub id, or demo.
        json: Print JSON.
    """
    from slimvlm import summary
    from slimvlm.checkpoint import anatomy

    found = anatomy(model)
    if json:
        extra = {
            "backbone_params": found.backbone_params,
            "total_params": found.total_params,
            "legal_kv_heads": found.legal_kv_heads(),
        }
        _print_json({**found.to_dict(), **extra})
    else:
        _console().print(summary.as_table(["", model], summary.anatomy_rows(found)))


def score(
    model: Model,
    out: Path,
    criterion: str = "taylor",
    data: str | None = None,
    images: str | None = None,
    samples: int = 64,
    gradient: Gradient = "per_sample",
    token_weights: str | None = None,
    dtype: Dtype = "auto",
    max_bad: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Calibrate once: save scores (and the statistics behind them) for later plans.

    Args:
        model: Folder, hub id, or demo.
        out: Scores are written as OUT.json and OUT.safetensors, statistics as
            OUT.statistics.safetensors.
        criterion: How to score; see the table in the README.
        data: demo, a LLaVA-format .json, a .jsonl/.parquet/datasets folder with messages.
        images: Folder that image paths in the data start from.
        samples: Calibration samples, the first ones of the data.
        gradient: For taylor: one gradient over all samples, or one for each.
        token_weights: Weight of tokens by role, such as image=0.1,prompt=1,answer=1.
        dtype: Data type of the weights.
        max_bad: Broken data rows to skip at most.
        force: Replace existing files.
        trust_remote_code: Run code that lies in the checkpoint.
    """
    from slimvlm.calibrate import (
        calibration_batches,
        check_token_weights,
        collect,
        scores_from,
    )
    from slimvlm.checkpoint import load, load_config
    from slimvlm.data import load_samples
    from slimvlm.outputs import require_free
    from slimvlm.roles import parse_token_weights
    from slimvlm.scores import criterion_named

    options = {"gradient": gradient} if criterion == "taylor" else {}
    row = criterion_named(criterion, options)
    weights = None if token_weights is None else parse_token_weights(token_weights)
    if weights is not None:
        check_token_weights(criterion, weights)
    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    require_free(Path(f"{stem}.json"), force)
    if row.needs_data and data is None:
        raise ConfigError(f"criterion {criterion!r} needs --data")
    load_config(model, trust_remote_code)
    chosen = load_samples(data, images, samples, max_bad, _note) if data is not None else []
    loaded, processor = load(model, dtype, trust_remote_code=trust_remote_code)
    batches = calibration_batches(processor, chosen) if row.needs_data else ()
    statistics = collect(loaded, batches, criterion, weights, **options)
    result = scores_from(statistics, loaded, criterion, weights, **options)
    stem.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(f"{stem}.statistics.safetensors")
    result.save(stem)
    _note(f"{criterion} scores of {', '.join(row.units)} written to {stem}.json")


def plan(
    model: Model,
    out: Path,
    ratio: float | None = None,
    target_params: str | None = None,
    target_memory: str | None = None,
    scores: tuple[Path, ...] = (),
    axis: Axis = "width",
    allocation: Literal["uniform", "protect", "global"] = "uniform",
    units: tuple[Unit, ...] = ("kv_group", "neuron"),
    kv_heads: int | None = None,
    protect: tuple[int, int] = (0, 0),
    round_to: int | None = None,
    dtype: Dtype = "auto",
    force: bool = False,
    json: bool = False,
) -> None:
    """Choose what to keep, from saved scores and a budget. Nothing is pruned.

    Args:
        model: Folder, hub id, or demo.
        out: The plan, a JSON file that can be edited by hand.
        ratio: Share of the backbone's parameters to remove.
        target_params: Instead: parameters of the whole smaller model, such as 5B or 90M.
        target_memory: Instead: memory of its weights, such as 8GiB, in --dtype (bfloat16 for auto).
        scores: Score files of the units to prune. Without any: spacing for layers; magnitude, which
            reads the weights, for widths.
        axis: Remove layers, KV groups and neurons, or both.
        allocation: The same widths in every layer; first and last layers whole; or one ranking of
            the units of all layers. The last two write files with code.
        units: What width may remove.
        kv_heads: KV groups to keep in every layer; neurons give the rest.
        protect: First and last layers to leave whole.
        round_to: Multiple for the number of neurons; default 64, smaller for small models.
        dtype: Data type that --target-memory is counted in.
        force: Replace an existing file.
        json: Print JSON.
    """
    from slimvlm.calibrate import score as score_model
    from slimvlm.checkpoint import anatomy, load
    from slimvlm.outputs import require_free
    from slimvlm.planning import make_plan, make_plan_for_params, ratio_for_params
    from slimvlm.pruning import rehearse
    from slimvlm.values import Scores

    require_free(out, force)
    shape = anatomy(model)
    target = _target_params(ratio, target_params, target_memory, dtype)
    wanted = ratio if ratio is not None else ratio_for_params(shape, target)
    given = [Scores.load(path) for path in scores]
    options: dict[str, Any] = {
        "allocation": allocation,
        "units": units,
        "kv_heads": kv_heads,
        "protect": protect,
        "round_to": round_to,
    }
    if not given:
        criterion = "spacing" if axis == "depth" else "magnitude"
        rehearse(shape, [criterion], wanted, axis, **options)
        _note(f"no --scores: using {criterion}")
        given = [score_model(load(model)[0], (), criterion)]
    if ratio is not None:
        made = make_plan(shape, given, ratio, axis, **options)
    else:
        made = make_plan_for_params(shape, given, target, axis, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    if json:
        after = made.after
        _print_json(
            {
                "ratio": made.ratio,
                "asked_ratio": made.asked_ratio,
                "backbone_params": after.backbone_params,
                "total_params": after.total_params,
                "summary": made.summary(),
            }
        )
    else:
        print(made.summary())


def prune(
    model: Model,
    out: Path,
    plan: Path | None = None,
    options: Annotated[PruneConfig, tyro.conf.arg(name="")] = PruneConfig(),  # noqa: B008
    force: bool = False,
) -> None:
    """Write a smaller checkpoint, from a plan or from a ratio, criterion and data.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        plan: A plan file instead of ratio, axis, criterion and allocation.
        options: What to remove, and how.
        force: Replace an existing folder.
    """
    from slimvlm.checkpoint import load, load_config, save
    from slimvlm.outputs import require_free
    from slimvlm.plan import Plan
    from slimvlm.pruning import Calibration, check_request, choose_plan, cut_

    require_free(out, force)
    if (plan is None) == (options.ratio is None):
        raise ConfigError("prune needs either --ratio or --plan")
    options = replace(options, axis=options.axis or "width")
    if plan is not None:
        chosen = Plan.load(plan)
        shown = _samples_for_repair(options)
        load_config(model, options.trust_remote_code)
    else:
        shown = check_request(model, options, _note, options.samples)
    loaded, processor = load(model, options.dtype, trust_remote_code=options.trust_remote_code)
    calibration = Calibration(options, processor, shown)
    if plan is None:
        chosen = choose_plan(options, loaded, calibration, _note)
    report = cut_(options, loaded, chosen, calibration)
    save(loaded, processor, out, chosen, force, pad=options.pad)
    print(chosen.summary())
    if chosen.needs_retype:
        print(f"language model written as {chosen.after.text_type!r}, which computes the same")
    if report is not None:
        print(report.summary())
    print(f"checkpoint: {out}")


def recover(
    model: Model,
    data: str,
    out: Path,
    teacher: str | None = None,
    images: str | None = None,
    samples: int | None = None,
    options: Annotated[RecoverConfig, tyro.conf.arg(name="")] = RecoverConfig(),  # noqa: B008
    dtype: Dtype = "auto",
    max_bad: int = 0,
    force: bool = False,
) -> None:
    """Train a pruned checkpoint back towards the original model.

    Stopped runs go on where they were when the same command is given again.

    Args:
        model: The pruned checkpoint.
        data: Conversations to learn from: demo, .json, .jsonl, .parquet or a datasets folder.
        out: The recovered checkpoint folder.
        teacher: The original model, or a folder that cache-teacher wrote; not needed for --loss
            sft.
        images: Folder that image paths in the data start from.
        samples: Read only the first so many samples.
        options: How to train.
        dtype: Data type of the weights.
        max_bad: Broken data rows to skip at most.
        force: Replace an existing folder.
    """
    import shutil

    from slimvlm.checkpoint import PLAN_FILE, load, load_config, resolve, save
    from slimvlm.data import load_samples
    from slimvlm.offline_teacher import OfflineTeacher, is_cache
    from slimvlm.outputs import require_free, write_text
    from slimvlm.plan import Plan
    from slimvlm.recovery import ADAPTER_FOLDER
    from slimvlm.recovery import recover as train

    require_free(out, force)
    needs_teacher = set(options.loss_weights) != {"sft"}
    if needs_teacher and teacher is None:
        raise ConfigError(f"loss {options.loss!r} needs --teacher")
    load_config(model)
    source: Any = None
    if teacher is not None and needs_teacher:
        source = OfflineTeacher(teacher) if is_cache(teacher) else None
        if source is None:
            load_config(teacher)
    chosen = load_samples(data, images, samples, max_bad, _note)
    student, processor = load(model, dtype)
    if teacher is not None and needs_teacher and source is None:
        source = load(teacher, dtype, device="cpu")[0]  # what it shares never goes to a GPU
    plan_file = Path(resolve(model)) / PLAN_FILE
    plan = Plan.load(plan_file) if plan_file.exists() else None
    work = out.with_name(f".{out.name}.training")
    history = train(student, source, chosen, options, processor, work, plan)
    save(student, processor, out, plan, force)
    write_text(out / "slimvlm_history.json", json.dumps(asdict(history), indent=1) + "\n")
    if options.keep_adapter:
        shutil.move(work / ADAPTER_FOLDER, out / ADAPTER_FOLDER)
    shutil.rmtree(work, ignore_errors=True)
    _note(f"teacher: {history.teacher}")
    _note(f"trained on {history.num_samples} samples; checkpoint in {out}")


def cache_teacher(
    model: Model,
    data: str,
    out: Path,
    what: Literal["hidden", "top-k"] = "hidden",
    k: int = 64,
    kd_on: Literal["answer", "text", "all"] = "answer",
    images: str | None = None,
    samples: int | None = None,
    batch_size: int = 8,
    dtype: Dtype = "auto",
    max_bad: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write down what a teacher says about some data, for recover without a teacher in memory.

    Stopped runs go on where they were when the same command is given again.

    Args:
        model: The original model.
        data: Conversations: demo, .json, .jsonl, .parquet or a datasets folder.
        out: The folder to write; recover takes it as --teacher.
        what: Final hidden states (bfloat16), or the largest logits.
        k: How many logits for each position.
        kd_on: Positions that recover will compare.
        images: Folder that image paths in the data start from.
        samples: Read only the first so many samples.
        batch_size: Samples that run at once.
        dtype: Data type of the weights.
        max_bad: Broken data rows to skip at most.
        force: Replace an existing folder.
        trust_remote_code: Run code that lies in the checkpoint.
    """
    import shutil

    from slimvlm.checkpoint import load, load_config
    from slimvlm.data import load_samples
    from slimvlm.offline_teacher import is_cache, write_cache
    from slimvlm.outputs import require_free

    if not is_cache(out):
        require_free(out, force)
    if k < 1 or batch_size < 1:
        name, value = ("k", k) if k < 1 else ("batch_size", batch_size)
        raise ConfigError(f"{name} {value} must be at least 1")
    load_config(model, trust_remote_code)
    chosen = load_samples(data, images, samples, max_bad, _note)
    loaded, processor = load(model, dtype, trust_remote_code=trust_remote_code)
    if force and out.exists():
        shutil.rmtree(out)
    count = write_cache(loaded, processor, chosen, out, what, k, kd_on, batch_size)
    _note(f"{what} of {len(chosen)} samples in {out}; shards written now: {count}")


def evaluate(
    model: Model,
    tasks: str = "demo",
    task_folder: Path | None = None,
    baseline: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    blind: bool = False,
    floors: bool = False,
    log: Path | None = None,
    out: Path | None = None,
    dtype: Dtype = "auto",
    force: bool = False,
    json: bool = False,
) -> None:
    """Ask a benchmark's questions and score the answers.

    Args:
        model: Folder, hub id, or demo.
        tasks: Comma-separated names: built-in tasks (demo for all), YAML files of your own, or the
            study's benchmarks mme, pope, gqa, scienceqa_img, mmmu_val, ai2d, mathvista, docvqa
            (needs slimvlm[eval]).
        task_folder: Folder with local copies of the benchmarks' task files.
        baseline: The original model, or a result file of it: adds retention with an interval.
        limit: Only the first so many questions of each task.
        batch_size: Questions answered at once.
        blind: Show the pictures of other questions: the floor of a model that cannot see.
        floors: Ask the original model (without --baseline, this one) a second time, blind, so that
            tables show each task's blind floor and retention above the floors.
        log: Folder that keeps replies as they come; a stopped evaluation goes on there.
        out: Result file (JSON), answers included.
        dtype: Data type of the weights.
        force: Replace an existing result file.
        json: Print JSON.
    """
    from slimvlm import summary
    from slimvlm.checkpoint import load, load_config
    from slimvlm.evaluation import Result, read_baseline
    from slimvlm.lmms import check_names, split_names
    from slimvlm.outputs import require_free
    from slimvlm.tasks import find_tasks

    own, theirs = split_names(tasks)
    chosen = find_tasks(own) if own or not theirs else []
    if theirs:
        check_names(theirs, limit, task_folder)
        if blind or floors or log is not None:
            raise ConfigError(f"--blind, --floors and --log do not work with {theirs[0]!r}")
    if blind and floors:
        raise ConfigError("--floors: a --blind result is the floor; leave out one of them")
    if out is not None:
        require_free(out, force)
    load_config(model)
    ask = partial(_ask, chosen, theirs, limit, batch_size, blind, log, task_folder)
    results: dict[str, Result] = {}
    if baseline is not None and Path(baseline).is_file():
        results["baseline"] = read_baseline(baseline, blind, floors)
    elif baseline is not None:
        load_config(baseline)
        results["baseline"] = ask(load(baseline, dtype), baseline, floors)
    asks_floors = floors and baseline is None
    name = f"{model} (blind)" if blind else model
    results["model"] = ask(load(model, dtype), name, asks_floors)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        results["model"].save(out)
    if json:
        _print_json(summary.result_json(results))
    else:
        _console().print(summary.as_table(*summary.result_rows(results)))


def compress(
    model: Model,
    out: Path,
    options: Annotated[PruneConfig, tyro.conf.arg(name="")] = PruneConfig(),  # noqa: B008
    training_samples: int | None = None,
    train: Literal["projector", "lora", "full", "none"] | None = None,
    loss: str | None = None,
    epochs: float = 1.0,
    learning_rate: float = 2e-4,
    batch_size: int = 8,
    tasks: str | None = None,
    limit: int | None = None,
    baseline: str | None = None,
    seed: int = 0,
    force: bool = False,
    json: bool = False,
) -> None:
    """Make a smaller model, start to end, in one run folder.

    The recipe follows the study's decision chart unless options say otherwise. A stopped run goes
    on when the same command is given again.

    Args:
        model: Folder, hub id, or demo.
        out: The run folder: config, plan, scores, checkpoint, results, summary.md.
        options: What to remove, and how. Without data, nothing is trained.
        training_samples: Use only so many further samples for training.
        train: What learns; none skips training.
        loss: Weighted sum of sft, hidden, cosine, kl, rkl, jsd.
        epochs: Passes over the training samples.
        learning_rate: Peak learning rate.
        batch_size: Samples in a training step.
        tasks: Evaluate on these tasks before, between and after; demo for the built-in ones.
        limit: Only the first so many questions of each task.
        baseline: Result file of the original model, to save asking it again.
        seed: Seed of training.
        force: Replace an existing run folder.
        json: Print JSON.
    """
    from slimvlm import summary
    from slimvlm.compression import compress as run
    from slimvlm.pruning import ratio_of
    from slimvlm.recipes import recipe_for

    if options.data is None and train not in (None, "none"):
        raise ConfigError(f"train {train!r} needs --data")
    chart = recipe_for(ratio_of(options), options.data is not None)
    learns = train or chart.train or "none"
    recovery = None
    if learns != "none":
        recovery = RecoverConfig(
            train=learns,
            loss=loss or chart.loss,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        )
    config = CompressConfig(
        **vars(options),
        training_samples=training_samples,
        recover=recovery,
        tasks=tasks,
        limit=limit,
        baseline=baseline,
    )
    results = run(model, config, out, force, _note)
    if json:
        _print_json(summary.result_json(results) if results else {})
    elif results:
        _console().print(summary.as_table(*summary.result_rows(results), title=str(out)))
    _note(f"run folder: {out}; checkpoint: {out / 'checkpoint'}")


def chat(
    model: Model,
    question: Annotated[str, tyro.conf.Positional],
    image: tuple[Path, ...] = (),
    other: str | None = None,
    max_new_tokens: int = 64,
    dtype: Dtype = "auto",
    json: bool = False,
) -> None:
    """Ask one model, or two side by side.

    Args:
        model: Folder, hub id, or demo.
        question: What to ask.
        image: Pictures to show.
        other: A second model to ask the same.
        max_new_tokens: Longest answer.
        dtype: Data type of the weights.
        json: Print JSON.
    """
    from slimvlm.checkpoint import load, load_config
    from slimvlm.evaluation import answer
    from slimvlm.samples import Question

    missing = [str(path) for path in image if not path.is_file()]
    if missing:
        raise ConfigError(f"image {missing[0]!r}: no such file")
    names = [model, *([other] if other is not None else [])]
    for name in names:
        load_config(name)
    asked = Question("chat", question, ("",), tuple(image))
    replies = {n: answer(*load(n, dtype), [asked], max_new_tokens)[0] for n in names}
    if json:
        _print_json(replies)
    else:
        for name, reply in replies.items():
            print(f"{name}: {reply}" if other is not None else reply)


def compare(
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")],
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")],
    tasks: str = "demo",
    limit: int | None = None,
    out: Path | None = None,
    dtype: Dtype = "auto",
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
        dtype: Data type of the weights.
        force: Replace an existing file.
        json: Print JSON.
    """
    from slimvlm import summary
    from slimvlm.checkpoint import load, load_config
    from slimvlm.comparison import compare as set_side_by_side
    from slimvlm.comparison import comparison_html, comparison_json, comparison_rows
    from slimvlm.evaluation import Result
    from slimvlm.evaluation import evaluate as ask
    from slimvlm.outputs import require_free, write_text
    from slimvlm.tasks import builtin_tasks, find_tasks

    chosen = find_tasks(tasks)
    if out is not None:
        require_free(out, force)
    results = {name: Result.load(name) for name in (a, b) if name.endswith(".json")}
    for name in {a, b} - set(results):
        load_config(name)
    for name in (a, b):
        if name not in results:
            results[name] = ask(*load(name, dtype), chosen, limit, name=name)
    known = {**builtin_tasks(), **{task.name: task for task in chosen}}
    found = set_side_by_side(results[a], results[b], known)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, comparison_html(found, f"What {found.name_b} lost and gained"))
    if json:
        _print_json(comparison_json(found))
        return
    title = f"A: {found.name_a}   B: {found.name_b}"
    _console().print(summary.as_table(*comparison_rows(found), title=title))
    if found.note:
        _note(found.note)
    for name, why in found.left_out.items():
        _note(f"{name} is not compared: {why}")


def demo(
    what: Annotated[Literal["build", "run"], tyro.conf.Positional],
    out: Path = Path("runs/demo"),
    short: bool = False,
    force: bool = False,
) -> None:
    """Build the demo model, or take it through the whole pipeline at 30 %.

    Args:
        what: build writes the model into the cache; run compresses it along depth and width.
        out: Folder for the runs.
        short: Fewer questions and training samples: a check that everything works.
        force: Replace the runs of an earlier demo.
    """
    from slimvlm import summary
    from slimvlm.demo.build import build_demo
    from slimvlm.showcase import run_demo

    if what == "build":
        print(build_demo())
        return
    results = run_demo(out, short, force, _note)
    _console().print(summary.as_table(*summary.result_rows(results), title="demo at 30 %"))
    _note(f"checkpoints: {out}/depth/checkpoint and {out}/width/checkpoint")


def _ask(
    chosen: list[Any],
    theirs: list[str],
    limit: int | None,
    batch_size: int,
    blind: bool,
    log: Path | None,
    task_folder: Path | None,
    loaded: tuple[Any, Any],
    name: str,
    floors: bool,
) -> Any:
    """One result from our own tasks and from lmms-eval's."""
    from slimvlm.evaluation import evaluate as ask
    from slimvlm.lmms import evaluate_with_lmms, result_with_lmms

    if not chosen:
        return result_with_lmms(*loaded, theirs, limit, batch_size, name, task_folder)
    result = ask(*loaded, chosen, limit, batch_size, name, blind, log, floors)
    if not theirs:
        return result
    more = evaluate_with_lmms(*loaded, theirs, limit, batch_size, task_folder)
    return replace(result, tasks={**result.tasks, **more})


def _target_params(
    ratio: float | None, target_params: str | None, target_memory: str | None, dtype: str
) -> int:
    """Parameters of the whole smaller model; 0 if a ratio was given instead."""
    from slimvlm.cost import params_for_memory, parse_bytes, parse_count

    given = [value for value in (ratio, target_params, target_memory) if value is not None]
    if len(given) != 1:
        raise ConfigError("plan needs exactly one of --ratio, --target-params, --target-memory")
    if target_params is not None:
        return parse_count(target_params)
    if target_memory is not None:
        counted_in = "bfloat16" if dtype == "auto" else dtype
        return params_for_memory(parse_bytes(target_memory), counted_in)
    return 0


def _samples_for_repair(options: PruneConfig) -> list[Any]:
    """Calibration samples for a plan that is there already: repair alone reads them."""
    from slimvlm.data import load_samples

    if options.repair == "none":
        return []
    if options.data is None:
        raise ConfigError(f"repair {options.repair!r} needs --data")
    return load_samples(options.data, options.images, options.samples, options.max_bad, _note)


def _console() -> Any:
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2))
