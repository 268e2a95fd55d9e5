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

from slimvlm.config import RecoverConfig
from slimvlm.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Axis = Literal["depth", "width", "both"]
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
    gradient: Literal["batch", "per_sample"] = "per_sample",
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
        dtype: Data type of the weights.
        max_bad: Broken data rows to skip at most.
        force: Replace existing files.
        trust_remote_code: Run code that lies in the checkpoint.
    """
    from slimvlm.calibrate import calibration_batches, collect, scores_from
    from slimvlm.checkpoint import load, load_config
    from slimvlm.data import load_samples
    from slimvlm.outputs import require_free
    from slimvlm.scores import criterion_named

    options = {"gradient": gradient} if criterion == "taylor" else {}
    row = criterion_named(criterion, options)
    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    require_free(Path(f"{stem}.json"), force)
    if row.needs_data and data is None:
        raise ConfigError(f"criterion {criterion!r} needs --data")
    load_config(model, trust_remote_code)
    chosen = load_samples(data, images, samples, max_bad, _note) if data is not None else []
    loaded, processor = load(model, dtype, trust_remote_code=trust_remote_code)
    batches = calibration_batches(processor, chosen) if row.needs_data else ()
    statistics = collect(loaded, batches, criterion, **options)
    result = scores_from(statistics, loaded, criterion, **options)
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
        protect: First and last layers to leave whole.
        round_to: Multiple for the number of neurons; default 64, smaller for small models.
        dtype: Data type that --target-memory is counted in.
        force: Replace an existing file.
        json: Print JSON.
    """
    from slimvlm.calibrate import score as score_model
    from slimvlm.checkpoint import anatomy, load
    from slimvlm.compression import rehearse
    from slimvlm.outputs import require_free
    from slimvlm.planning import make_plan, make_plan_for_params, ratio_for_params
    from slimvlm.values import Scores

    require_free(out, force)
    shape = anatomy(model)
    target = _target_params(ratio, target_params, target_memory, dtype)
    wanted = ratio if ratio is not None else ratio_for_params(shape, target)
    given = [Scores.load(path) for path in scores]
    if not given:
        criterion = "spacing" if axis == "depth" else "magnitude"
        rehearse(shape, [criterion], wanted, axis, protect=protect, round_to=round_to)
        _note(f"no --scores: using {criterion}")
        given = [score_model(load(model)[0], (), criterion)]
    if ratio is not None:
        made = make_plan(shape, given, ratio, axis, protect=protect, round_to=round_to)
    else:
        made = make_plan_for_params(shape, given, target, axis, protect=protect, round_to=round_to)
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
    ratio: float | None = None,
    axis: Axis = "width",
    criterion: tuple[str, ...] = (),
    data: str | None = None,
    images: str | None = None,
    samples: int = 64,
    plan: Path | None = None,
    round_to: int | None = None,
    dtype: Dtype = "auto",
    max_bad: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write a smaller checkpoint, from a plan or from a ratio, criterion and data.

    Args:
        model: Folder, hub id, or demo.
        out: The new checkpoint folder.
        ratio: Share of the backbone's parameters to remove.
        axis: Remove layers, KV groups and neurons, or both.
        criterion: How to score; default block_influence for layers, activation for
            widths.
        data: Calibration conversations: demo, .json, .jsonl, .parquet or a datasets folder.
        images: Folder that image paths in the data start from.
        samples: Calibration samples, the first ones of the data.
        plan: A plan file instead of ratio, axis, criterion and data.
        round_to: Multiple for the number of neurons; default 64, smaller for small models.
        dtype: Data type of the weights.
        max_bad: Broken data rows to skip at most.
        force: Replace an existing folder.
        trust_remote_code: Run code that lies in the checkpoint.
    """
    from slimvlm.checkpoint import load, load_config, require_writable, save
    from slimvlm.compression import PruneConfig, check_request, choose_plan
    from slimvlm.outputs import require_free
    from slimvlm.plan import Plan
    from slimvlm.surgery import prune_

    require_free(out, force)
    if plan is not None and ratio is None:
        chosen = Plan.load(plan)
        require_writable(chosen.after)
        load_config(model, trust_remote_code)
        loaded, processor = load(model, dtype, trust_remote_code=trust_remote_code)
    elif ratio is not None and plan is None:
        config = PruneConfig(
            model=model,
            ratio=ratio,
            axis=axis,
            criterion=criterion,
            data=data,
            images=images,
            calibration_samples=samples,
            round_to=round_to,
            max_bad=max_bad,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        shown = check_request(config, _note)
        loaded, processor = load(model, dtype, trust_remote_code=trust_remote_code)
        chosen = choose_plan(config, loaded, processor, shown)
    else:
        raise ConfigError("prune needs either --ratio or --plan")
    prune_(loaded, chosen)
    save(loaded, processor, out, chosen, force)
    _report_plan(chosen, out)


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
        teacher: The original model; not needed for --loss sft.
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
    from slimvlm.outputs import require_free, write_text
    from slimvlm.plan import Plan
    from slimvlm.recovery import recover as train

    require_free(out, force)
    needs_teacher = set(options.loss_weights) != {"sft"}
    if needs_teacher and teacher is None:
        raise ConfigError(f"loss {options.loss!r} needs --teacher")
    load_config(model)
    chosen = load_samples(data, images, samples, max_bad, _note)
    student, processor = load(model, dtype)
    original = load(teacher, dtype)[0] if needs_teacher and teacher is not None else None
    work = out.with_name(f".{out.name}.training")
    history = train(student, original, chosen, options, processor, work)
    plan_file = Path(resolve(model)) / PLAN_FILE
    save(student, processor, out, Plan.load(plan_file) if plan_file.exists() else None, force)
    write_text(out / "slimvlm_history.json", json.dumps(asdict(history), indent=1) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    _note(f"trained on {history.num_samples} samples; checkpoint in {out}")


def evaluate(
    model: Model,
    tasks: str = "demo",
    task_folder: Path | None = None,
    baseline: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    blind: bool = False,
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
        log: Folder that keeps replies as they come; a stopped evaluation goes on there.
        out: Result file (JSON), answers included.
        dtype: Data type of the weights.
        force: Replace an existing result file.
        json: Print JSON.
    """
    from slimvlm import summary
    from slimvlm.checkpoint import load, load_config
    from slimvlm.evaluation import Result
    from slimvlm.lmms import check_names, split_names
    from slimvlm.outputs import require_free
    from slimvlm.tasks import find_tasks

    own, theirs = split_names(tasks)
    chosen = find_tasks(own) if own or not theirs else []
    if theirs:
        check_names(theirs, limit, task_folder)
        if blind or log is not None:
            raise ConfigError(f"--blind and --log do not work with {theirs[0]!r}")
    if out is not None:
        require_free(out, force)
    load_config(model)
    ask = partial(_ask, chosen, theirs, limit, batch_size, blind, log, task_folder)
    results: dict[str, Result] = {}
    if baseline is not None and Path(baseline).is_file():
        results["baseline"] = Result.load(baseline)
    elif baseline is not None:
        load_config(baseline)
        results["baseline"] = ask(load(baseline, dtype), baseline)
    results["model"] = ask(load(model, dtype), f"{model} (blind)" if blind else model)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        results["model"].save(out)
    if json:
        _print_json(summary.result_json(results))
    else:
        _console().print(summary.as_table(*summary.result_rows(results)))


def compress(
    model: Model,
    ratio: float,
    out: Path,
    data: str | None = None,
    images: str | None = None,
    axis: Axis | None = None,
    criterion: tuple[str, ...] = (),
    samples: int = 64,
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
    dtype: Dtype = "auto",
    max_bad: int = 0,
    force: bool = False,
    json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Make a smaller model, start to end, in one run folder.

    The recipe follows the study's decision chart unless options say otherwise. A stopped run goes
    on when the same command is given again.

    Args:
        model: Folder, hub id, or demo.
        ratio: Share of the backbone's parameters to remove.
        out: The run folder: config, plan, scores, checkpoint, results, summary.md.
        data: Conversations: demo, .json, .jsonl, .parquet or a datasets folder. Without any,
            nothing is trained.
        images: Folder that image paths in the data start from.
        axis: Remove layers, KV groups and neurons, or both.
        criterion: How to score; default block_influence for layers, activation for
            widths.
        samples: Calibration samples, the first ones of the data.
        training_samples: Use only so many further samples for training.
        train: What learns; none skips training.
        loss: Weighted sum of sft, hidden, kl, rkl.
        epochs: Passes over the training samples.
        learning_rate: Peak learning rate.
        batch_size: Samples in a training step.
        tasks: Evaluate on these tasks before, between and after; demo for the built-in ones.
        limit: Only the first so many questions of each task.
        baseline: Result file of the original model, to save asking it again.
        seed: Seed of training.
        dtype: Data type of the weights.
        max_bad: Broken data rows to skip at most.
        force: Replace an existing run folder.
        json: Print JSON.
        trust_remote_code: Run code that lies in the checkpoint.
    """
    from slimvlm import summary
    from slimvlm.compression import CompressConfig
    from slimvlm.compression import compress as run
    from slimvlm.recipes import recipe_for

    if data is None and train not in (None, "none"):
        raise ConfigError(f"train {train!r} needs --data")
    chart = recipe_for(ratio, data is not None)
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
        model=model,
        ratio=ratio,
        axis=axis,
        criterion=criterion,
        data=data,
        images=images,
        calibration_samples=samples,
        training_samples=training_samples,
        recover=recovery,
        tasks=tasks,
        limit=limit,
        baseline=baseline,
        max_bad=max_bad,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    results = run(config, out, force, _note)
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
) -> Any:
    """One result from our own tasks and from lmms-eval's."""
    from slimvlm.evaluation import evaluate as ask
    from slimvlm.lmms import evaluate_with_lmms, result_with_lmms

    if not chosen:
        return result_with_lmms(*loaded, theirs, limit, batch_size, name, task_folder)
    result = ask(*loaded, chosen, limit, batch_size, name, blind, log)
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


def _report_plan(plan: Any, out: Path) -> None:
    print(plan.summary())
    if plan.needs_retype:
        print(f"language model written as {plan.after.text_type!r}, which computes the same")
    print(f"checkpoint: {out}")


def _console() -> Any:
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2))
