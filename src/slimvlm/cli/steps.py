"""Define the verbs of one stage: each checks its options before weights are read."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from slimvlm.cli.options import Model
from slimvlm.cli.printing import print_held_out, print_json, print_results, print_table, show
from slimvlm.core import files, options
from slimvlm.core.errors import ConfigError
from slimvlm.core.progress import num_ranks, to_log


def score(
    model: Model,
    out: Path,
    criterion: str = "obs",
    calibration: options.CalibrationConfig = options.CalibrationConfig(),
    memory: options.MemoryOptions = options.MemoryOptions(),
    force: bool = False,
) -> None:
    """Score the units of a model on calibration data, for later plans.

    Args:
        out: Prefix of the files OUT.json and OUT.safetensors.
        criterion: Scoring criterion; docs/criteria.md lists them.
    """
    from slimvlm.models.load import check_models
    from slimvlm.runs.prune import opened, score_from_files, score_in_memory
    from slimvlm.runs.recipe import Recipe, check_recipe, read_split
    from slimvlm.runs.stages import Calibration
    from slimvlm.scoring.criteria import CRITERIA, require_low_memory

    recipe = Recipe(model=model, criterion=(criterion,), **vars(calibration))
    check_recipe(recipe)
    if memory.low_memory:
        require_low_memory(criterion)
    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    for suffix in ("json", "safetensors"):
        files.require_free(Path(f"{stem}.{suffix}"), force)
    check_models(calibration, model)
    samples = read_split(recipe, to_log).calibration
    stem.parent.mkdir(parents=True, exist_ok=True)
    if memory.low_memory:
        source, processor = opened(recipe)
        shown = Calibration(processor, samples, hold_out=False)
        folder = memory.scratch_beside(stem)
        (scores,) = score_from_files(recipe, source, shown, folder, to_log)
    else:
        (scores,) = score_in_memory(recipe, samples)
    scores.save(stem)
    to_log(f"{criterion} scores of {', '.join(CRITERIA[criterion].units)} written to {stem}.json")


def plan(
    model: Model,
    out: Path,
    config: options.PlanConfig = options.PlanConfig(),
    scores: tuple[Path, ...] = (),
    force: bool = False,
    json: bool = False,
) -> Any:
    """Choose the units to keep, from saved scores and a target size, without pruning.

    Args:
        out: Plan file (JSON), which can be edited by hand.
        scores: Score files of the units to prune. Default: the default criteria on the demo's
            samples.
    """
    from slimvlm.models.cost import params_of_target
    from slimvlm.models.devices import device_named
    from slimvlm.models.load import anatomy
    from slimvlm.planning.make import make_plan, make_plan_for_params
    from slimvlm.runs.prune import score_in_memory
    from slimvlm.runs.recipe import Recipe, decide, dummy_scores, read_split, vocabulary_for
    from slimvlm.scoring.unit_scores import Scores

    files.require_free(out, force)
    device_named(config.device)
    shape, targets = anatomy(model), (config.target_params, config.target_memory)
    named = sum(value is not None for value in (config.ratio, *targets))
    if named > 1 or not (named or config.tokens_first):
        raise ConfigError("plan needs exactly one of --ratio, --target-params, --target-memory")
    target = params_of_target(*targets, "bfloat16" if config.dtype == "auto" else config.dtype)
    given = [Scores.load(path) for path in scores]
    make: Callable[..., Any] = make_plan if target is None else make_plan_for_params
    size = (config.ratio or 0.0) if target is None else target
    how = {name: getattr(config, name) for name in ("axis", "allocation", "kv_heads")}
    how |= config.of_units
    if config.trims_vocabulary:
        chosen = vocabulary_for(model, config, ())
        to_log(chosen.line())
        how["tokens"] = chosen.tokens
    if not given:
        ratio = size if target is None else 0.5  # any ratio: 0 needs fewer scores
        shown = options.PruneConfig(data="demo", too_long="truncate", device=config.device)
        whole = replace(shown, ratio=ratio, axis=config.axis, experts=config.experts)
        recipe = decide(model, whole, shape)
        dry = [dummy_scores(shape, [name]) for name in recipe.criterion]
        if make(shape, dry, size, **how).cuts_layers or not config.tokens_first:
            to_log(
                f"no --scores: scoring by {' and '.join(recipe.criterion)} on the demo's samples"
            )
            wanted = Recipe(model=model, **vars(shown) | {"criterion": recipe.criterion})
            given = score_in_memory(wanted, read_split(wanted, to_log).calibration)
    made = make(shape, given, size, **how)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    if not json:
        print(made.summary())
        return made
    values = {name: getattr(made, name) for name in ("ratio", "asked_ratio")}
    values |= {name: getattr(made.after, name) for name in ("backbone_params", "total_params")}
    print_json({**values, "summary": made.summary()})
    return made


def prune(
    model: Model,
    out: Path,
    plan: Path | None = None,
    pruning: options.PruneConfig = options.PruneConfig(),
    memory: options.MemoryOptions = options.MemoryOptions(),
    final: options.FinalEvaluation = options.FinalEvaluation(),
    force: bool = False,
) -> Any:
    """Write a pruned checkpoint, from a plan or from a ratio, criterion and data.

    With --data, the pruned model is compared with the original on test samples. Without, the demo's
    samples calibrate the default criteria.

    Args:
        plan: Plan file, instead of ratio, axis, criterion and allocation.
    """
    from slimvlm.planning.plan import Plan
    from slimvlm.runs.prune import prune_from_files, prune_in_memory
    from slimvlm.runs.recipe import resolve
    from slimvlm.scoring.criteria import require_low_memory
    from slimvlm.scoring.stores import scratch_folder

    files.require_free(out, force)
    if (plan is None) != (pruning.ratio is not None or pruning.tokens_first):
        told = "either --ratio or --plan, or --vocab-size, --experts or --tower-ratio alone"
        raise ConfigError(f"prune needs {told}")
    if plan is not None:
        planned = ("axis", "allocation", "criterion", "gradient", "units", "protect", "round_to")
        pruning.refuse(planned, "conflicts with --plan, which decides it: leave one of them out")
    if pruning.data is None:
        final.refuse(("test_samples",), "needs --data")
    if memory.low_memory:
        if pruning.axis == "auto":
            raise ConfigError("axis 'auto' with --low-memory must be depth, width, both or chart")
        for criterion in pruning.criterion:
            require_low_memory(criterion)
    most = 0 if pruning.data is None else final.most_test_samples(pruning.samples)
    given = None if plan is None else Plan.load(plan)
    recipe, given, samples = resolve(model, pruning, given, to_log, most)
    if memory.low_memory:
        with scratch_folder(memory.scratch_beside(out)) as folder:
            done = prune_from_files(recipe, given, samples, out, folder, force, to_log)
    else:
        done = prune_in_memory(recipe, given, samples, out, force, to_log)
    walked, held_out = done
    print(f"{walked.summary()}\ncheckpoint: {out}")
    print_held_out(held_out)
    return walked, held_out


def recover(
    model: Model,
    source: options.RecoverData,
    out: Path,
    teacher: str | None = None,
    training: options.RecoverConfig = options.RecoverConfig(),
    config: Path | None = None,
    shard: bool = False,
    force: bool = False,
) -> Any:
    """Train a pruned checkpoint towards the original model.

    The same command resumes a stopped run. With torchrun, several processes share the batches.

    Args:
        model: The pruned checkpoint.
        teacher: The original model; not needed for --loss sft.
        config: YAML file of options, such as the run.yaml of compress: its data, its model as
            teacher, and its options under recover. Flags override it.
        shard: Shard the weights of model and teacher over the processes of torchrun (FSDP2); such
            a run cannot be resumed.
    """
    from slimvlm.core.progress import is_first_rank
    from slimvlm.models.devices import end_of_processes
    from slimvlm.models.hidden import gathered_weights
    from slimvlm.models.load import check_models, load_as, load_config, resolve
    from slimvlm.pruning.save import CardFacts, plan_of, save
    from slimvlm.runs.recipe import samples_for, try_lora
    from slimvlm.training.recover import ADAPTER_FOLDER, TRACKER_FOLDER
    from slimvlm.training.recover import recover as train

    if config is not None:
        to_log(f"options of {config}, and those of the command line")

    def loaded(name: str, device: str | None = None) -> tuple[Any, Any]:
        if shard:  # in float32
            return load_as(replace(source, dtype="float32"), name, shard=True)
        return load_as(source, name, device)

    def add_files(folder: Path) -> None:
        history.save(folder / "slimvlm_history.json")
        for name in (ADAPTER_FOLDER, TRACKER_FOLDER):
            if (work / name).exists():
                shutil.copytree(work / name, folder / name)

    files.require_free(out, force)
    if not training.needs_teacher:
        teacher = None
    elif teacher is None:
        raise ConfigError(f"loss {training.loss!r} needs --teacher")
    if shard and num_ranks() < 2:
        raise ConfigError("--shard needs several processes: start slimvlm with torchrun")
    if shard and source.device is not None:
        raise ConfigError(f"device {source.device!r} conflicts with --shard: leave --device out")
    check_models(source, *filter(None, (model, teacher)))
    try_lora(load_config(model, source.trust_remote_code), training)
    samples = samples_for(model, source, None, to_log)
    student, processor = loaded(model)
    # what a teacher shares must never go to a GPU
    original = None if teacher is None else loaded(teacher, "cpu")[0]
    plan = plan_of(model)
    work = files.working_folder(files.beside(out, "training"))
    history = train(student, original, samples, training, processor, work, plan)
    weights = gathered_weights(student) if shard else None
    if is_first_rank():
        if weights is not None:  # a whole model again, in its file's data type
            student, _ = load_as(source, model, "cpu")
            missing, unexpected = student.load_state_dict(weights, strict=False)
            assert not unexpected
            assert set(missing) <= set(student.all_tied_weights_keys or {}), missing
        how = (training.train, training.loss, history.num_samples)
        facts = CardFacts(base=resolve(model), name=out.name, training=how, data=source.data)
        save(student, processor, out, plan, force, also=add_files, facts=facts)
        shutil.rmtree(work, ignore_errors=True)
    end_of_processes()
    to_log(f"teacher: {history.teacher}")
    to_log(f"trained on {history.num_samples} samples; checkpoint in {out}")
    return history


def evaluate(
    model: Model,
    questions: options.QuestionFlags = options.QuestionFlags(),
    baseline: str | None = None,
    out: Path | None = None,
    source: options.DataConfig = options.DataConfig(),
    require: tuple[str, ...] = (),
    force: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on benchmark tasks, or on your own data.

    With --data, report loss and perplexity of the answers; with --baseline, also next-token
    agreement and KL divergence.

    Args:
        baseline: The original model, or for tasks a result file of it: adds retention.
        out: Result file (JSON), replies included.
        require: Conditions such as 'agreement >= 95%' 'loss <= 1.1x', where x is the baseline's
            figure; the exit code is 3 if one is not met. See docs/gates.md.
    """
    from slimvlm.evaluation import gates, on_data
    from slimvlm.evaluation.lmms import evaluate_all
    from slimvlm.evaluation.results import read_baseline
    from slimvlm.models.hidden import head_weights_of
    from slimvlm.models.load import check_models, load_as
    from slimvlm.runs.recipe import check_questions, samples_for
    from slimvlm.runs.tables import held_out_json, held_out_notes, held_out_rows

    has_data, tasks = source.data is not None, {}
    if not has_data:
        source.refuse(("images", "max_bad_rows", "max_length", "too_long"), "needs --data")
    else:
        asks = ("tasks", "task_folder", "floors", "replies")
        questions.refuse(asks, "is for tasks, not for --data")
    questions = replace(questions, tasks=questions.tasks or options.Questions.tasks)
    is_file = baseline is not None and files.path_of(baseline, "baseline").is_file()
    if not has_data:
        tasks = check_questions(questions, log=questions.replies is not None)
    elif is_file:
        raise ConfigError(f"baseline {baseline!r}: with --data it must be a model, not a file")
    gates.parse(require, gates.in_percent(tasks, has_data), baseline is not None)
    if out is not None:
        files.require_free(out, force)
    named = {"baseline": baseline} if baseline is not None and not is_file else {}
    named["model"] = model
    check_models(source, *named.values())
    samples = samples_for(model, source, questions.limit, to_log)
    results: dict[str, Any] = {}
    predicted, size, floors = None, questions.batch_size, questions.floors
    if baseline is not None and is_file:
        results["baseline"] = read_baseline(baseline, floors, tasks, questions.limit)
    for role, name in named.items():
        loaded = load_as(source, name)
        if not has_data:  # floors are the original's
            is_original = role == "baseline" or baseline is None
            given = replace(questions, floors=floors and is_original)
            results[role] = evaluate_all(*loaded, given, name, questions.replies)
        elif role == "baseline":
            head = head_weights_of(loaded[0])
            predicted = on_data.predictions_of(*loaded, samples, size, name, head)
            results[role] = on_data.result_of(predicted, samples, loaded[0].device)
        else:
            results[role] = on_data.evaluate_data(
                *loaded, samples, predicted, batch_size=size, name=name
            )
        del loaded  # before the next one is read
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        results["model"].save(out)
    if has_data:
        rows, notes = partial(held_out_rows, results), held_out_notes(results)
        show(json, partial(held_out_json, results), rows, notes=notes)
        gates.judge(require, {}, results, to_log)
    else:
        print_results(results, json)
        gates.judge(require, results, {}, to_log)
    return results


def image_tokens(
    model: Model,
    source: options.TrainingData,
    budgets: tuple[float, ...] = (1.0, 0.5, 0.25),
    no_measure: bool = False,
    tasks: str | None = None,
    limit: int | None = None,
    keep: float | None = None,
    out: Path | None = None,
    force: bool = False,
    json: bool = False,
) -> None:
    """Measure what fewer image tokens cost and save, or write a model that uses fewer.

    Only a setting of the image processor changes. See docs/images-budget.md.

    Args:
        source: Data with images, and model loading.
        budgets: Shares of the image tokens to measure.
        no_measure: With --keep, only write the model.
        tasks: Also measure on these tasks.
        keep: Write a model that uses this share of the image tokens: same weights, another
            processor.
        out: Checkpoint folder to write, for --keep.
    """
    from slimvlm.runs.images import image_tokens as run
    from slimvlm.runs.tables import held_out_json, image_rows

    if not budgets or (no_measure and keep is None):
        raise ConfigError("budgets must be shares; to measure none give --keep and --no-measure")
    shares = () if no_measure else budgets
    found = run(model, source, shares, tasks, limit, keep, out, force, to_log)
    if json:
        rows = [{**asdict(each), "held_out": held_out_json(each.held_out)} for each in found]
        print_json({"model": model, "budgets": rows})
    elif found:
        print_table(*image_rows(found), title=model)
