"""Run the verbs of one stage, from folder to files; each checks options before reading weights."""

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from slimvlm.core import files, options
from slimvlm.core.documents import asked, read_object
from slimvlm.core.errors import ConfigError, ReloadError
from slimvlm.core.progress import Say, is_first_rank, num_ranks
from slimvlm.data.chat import answered_sample
from slimvlm.data.general import identity_of_general_text
from slimvlm.data.read import identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation import ask, gates, on_data
from slimvlm.evaluation.bench import paired_times
from slimvlm.evaluation.compare import Comparison, compare
from slimvlm.evaluation.lmms import evaluate_all
from slimvlm.evaluation.on_data import DataResult, Predictions, evaluate_data, result_of
from slimvlm.evaluation.results import Result, read_baseline
from slimvlm.evaluation.tasks import builtin_tasks, find_tasks
from slimvlm.models import load as models
from slimvlm.models import pictures
from slimvlm.models.cost import kv_cache_bytes, params_of_target
from slimvlm.models.devices import device_named
from slimvlm.models.hidden import evaluating, gathered_weights, head_weights_of
from slimvlm.models.load import check_models, load_as
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.planning.make import make_plan, make_plan_for_params
from slimvlm.planning.plan import Plan
from slimvlm.pruning.layout import write_processor
from slimvlm.pruning.save import CARD_FILE, CardFacts, plan_of, prune_checkpoint, save, write_card
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk.result import Walked
from slimvlm.runs import request as requests
from slimvlm.runs import stages
from slimvlm.runs.request import Request, check_options, check_questions, scored_by
from slimvlm.runs.stages import ORIGINAL, PRUNED, Calibration, SampleSplit
from slimvlm.runs.tables import AtBudget, held_out_text
from slimvlm.scoring.criteria import CRITERIA, require_low_memory
from slimvlm.scoring.layerwise import LayerwiseModel, LazyCheckpoint, open_checkpoint
from slimvlm.scoring.score_model import score_by_layer
from slimvlm.scoring.stores import Scratch, StatesPlace, scratch_folder
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import ADAPTER_FOLDER, TRACKER_FOLDER, History
from slimvlm.training.recover import recover as train

HELD_OUT_FILE = "slimvlm_held_out.json"


def score(
    model: str,
    config: options.CalibrationConfig,
    criterion: str,
    out: Path,
    memory: options.MemoryOptions,
    force: bool,
    say: Say,
) -> None:
    """Score a model by one criterion; save the scores."""
    wanted = options.PruneConfig(criterion=(criterion,), **vars(config))
    request = Request(model=model, prune=wanted)
    check_options(wanted)
    if memory.low_memory:
        require_low_memory(criterion)
    stem = out.with_suffix("") if out.suffix in (".json", ".safetensors") else out
    for suffix in ("json", "safetensors"):
        files.require_free(Path(f"{stem}.{suffix}"), force)
    check_models(config, model)
    samples = stages.read_split(request, say).calibration
    stem.parent.mkdir(parents=True, exist_ok=True)
    if memory.low_memory:
        opened, processor = _opened(request)
        calibration = Calibration(processor, samples, hold_out=False)
        folder = memory.scratch_beside(stem)
        (scores,) = _scores_from_files(request, opened, calibration, folder, say)
    else:
        (scores,) = _scores(request, samples)
    scores.save(stem)
    say(f"{criterion} scores of {', '.join(CRITERIA[criterion].units)} written to {stem}.json")


def _scores(request: Request, samples: Sequence[Sample]) -> list[Scores]:
    """Load the original and score it."""
    loaded, processor = stages.load_original(request)
    calibration = Calibration(processor, samples, hold_out=False)
    return list(stages.calibrate(request, loaded, calibration).values())


def _opened(request: Request) -> tuple[LazyCheckpoint, Any]:
    """Open the original to read it layer by layer, and load its processor."""
    config = request.prune
    for option in ("attn_implementation", "device_map"):
        if (value := getattr(config, option)) is not None:
            raise ConfigError(
                f"{option} {value!r} conflicts with --low-memory: leave one of them out"
            )
    opened = open_checkpoint(request.model, config.dtype, config.trust_remote_code)
    name, described = str(opened.folder), opened.model.config
    return opened, models.load_processor(name, described, config.trust_remote_code)


def _scores_from_files(
    request: Request, opened: LazyCheckpoint, calibration: Calibration, scratch: Path, say: Say
) -> list[Scores]:
    """Score like `slimvlm.runs.stages.calibrate`, with one layer in memory at a time."""
    config = request.prune
    how = {name: requests.criterion_options(config, name) for name in scored_by(config)}
    if not how:
        return []
    batches = calibration.fitted if any(CRITERIA[name].needs_data for name in how) else ()
    weights = requests.token_weights_of(config)
    return score_by_layer(opened, batches, how, weights, scratch, say, config.device)


def plan(
    model: str,
    config: options.PlanConfig,
    out: Path,
    scores: Sequence[Path] = (),
    *,
    force: bool = False,
    say: Say = print,
) -> Plan:
    """Make and write a plan; without scores, score on the demo's samples."""
    files.require_free(out, force)
    device_named(config.device)
    shape, targets = models.anatomy(model), (config.target_params, config.target_memory)
    named = sum(value is not None for value in (config.ratio, *targets))
    if named > 1 or not (named or config.tokens_first):
        raise ConfigError("plan needs exactly one of --ratio, --target-params, --target-memory")
    target = params_of_target(*targets, "bfloat16" if config.dtype == "auto" else config.dtype)
    given = [Scores.load(path) for path in scores]
    make: Callable[..., Plan] = make_plan if target is None else make_plan_for_params
    size = (config.ratio or 0.0) if target is None else target
    how = {name: getattr(config, name) for name in ("axis", "allocation", "kv_heads")}
    how |= config.of_units
    if config.trims_vocabulary:
        chosen = requests.vocabulary_for(model, config, ())
        say(chosen.line())
        how["tokens"] = chosen.tokens
    if not given:
        ratio = size if target is None else 0.5  # any ratio: 0 needs fewer scores
        shown = options.PruneConfig(data="demo", too_long="truncate", device=config.device)
        whole = replace(shown, ratio=ratio, axis=config.axis, experts=config.experts)
        criteria = requests.resolved(Request(model=model, prune=whole), shape=shape).prune.criterion
        dry = [requests.dummy_scores(shape, [name]) for name in criteria]
        if make(shape, dry, size, **how).cuts_layers or not config.trims_vocabulary:
            say(f"no --scores: scoring by {' and '.join(criteria)} on the demo's samples")
            request = Request(model=model, prune=replace(shown, criterion=criteria))
            given = _scores(request, stages.read_split(request, say).calibration)
    made = make(shape, given, size, **how)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    return made


def prune(
    model: str,
    config: options.PruneConfig,
    out: Path,
    plan_file: Path | None = None,
    memory: options.MemoryOptions = options.MemoryOptions(),
    final: options.FinalEvaluation = options.FinalEvaluation(),
    force: bool = False,
    say: Say = print,
) -> tuple[Walked, dict[str, DataResult]]:
    """Write a pruned checkpoint, from a plan or a request; return results on test samples."""
    files.require_free(out, force)
    if (plan_file is None) != (config.ratio is not None or config.tokens_first):
        told = "either --ratio or --plan, or --vocab-size or --experts without a ratio"
        raise ConfigError(f"prune needs {told}")
    if plan_file is not None:
        planned = ("axis", "allocation", "criterion", "gradient", "units", "protect", "round_to")
        config.refuse(planned, "conflicts with --plan, which decides it: leave one of them out")
    if config.data is None:
        final.refuse(("test_samples",), "needs --data")
    plan = None if plan_file is None else Plan.load(plan_file)
    most = final.most_test_samples(config.samples)
    request = Request(model=model, prune=config, test_samples=most)
    if memory.low_memory:
        if config.axis == "auto":
            raise ConfigError("axis 'auto' with --low-memory must be depth, width, both or chart")
        for criterion in scored_by(config):
            require_low_memory(criterion)
    request, plan, samples = stages.settled(request, plan, say)
    if memory.low_memory:
        with scratch_folder(memory.scratch_beside(out)) as folder:
            return _prune_from_files(request, plan, samples, out, folder, force, say)
    loaded, processor = stages.load_original(request)
    models.require_undivided(loaded, "pruned")
    held_out: dict[str, DataResult] = {}
    if unseen := samples.test:
        how = (stages.TEST_BATCH, ORIGINAL, head_weights_of(loaded))  # which outlive it
        predicted = on_data.predictions_of(loaded, processor, unseen, *how)
        held_out[ORIGINAL] = result_of(predicted, unseen, loaded.device)
    calibration = Calibration(processor, samples.calibration, request.hold_out)
    scores = [] if plan else list(stages.calibrate(request, loaded, calibration).values())
    walked = stages.prune_(request, loaded, calibration, scores, plan, say=say)
    processor, also = trimmed_processor(processor, walked.plan), None
    if unseen:
        found = evaluate_data(loaded, processor, unseen, predicted, name=PRUNED)
        held_out[PRUNED] = found
        also = lambda folder: found.save(folder / HELD_OUT_FILE)  # noqa: E731
    base, text = loaded.config._name_or_path, held_out_text(held_out)
    facts = CardFacts(base=base, name=out.name, held_out=text, data=config.data)
    save(loaded, processor, out, walked.plan, force, also=also, facts=facts)
    return walked, held_out


def _prune_from_files(
    request: Request,
    plan: Plan | None,
    samples: SampleSplit,
    out: Path,
    scratch: Path,
    force: bool,
    say: Say,
) -> tuple[Walked, dict[str, DataResult]]:
    """Prune with one layer in memory at a time; the same scratch folder resumes."""
    config, model, unseen = request.prune, request.model, samples.test
    device, (opened, processor) = device_named(config.device), _opened(request)
    data = [] if config.data is None else [identity_of_data(config.data)]
    data += [identity_of_general_text()] if config.general_text else []
    noted = {"asked": asked(request), "data": data, **opened.identity}
    noted["plan"] = None if plan is None else plan.to_dict()
    Scratch(scratch).keep_if_same("request.json", noted)

    calibration = Calibration(processor, samples.calibration, request.hold_out)
    scores: list[Scores] = []
    if plan is None:
        stored = scratch / "scored"
        if not stored.exists():
            found = _scores_from_files(request, opened, calibration, scratch / "scoring", say)
            with files.new_folder(stored) as folder:
                for each in found:
                    each.save(folder / each.criterion)
        scores = [Scores.load(stored / name) for name in scored_by(config)]

    held_out: dict[str, DataResult] = {}
    if unseen:
        path, at = scratch / "said" / "original.safetensors", scratch / "unseen"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)  # a folder, which another request removes
            _predictions(ORIGINAL, opened, processor, unseen, at, device).save(path)
        predicted = Predictions.load(path)
        held_out[ORIGINAL] = result_of(predicted, unseen, device)

    results = Scratch(scratch / "walk")
    walked = stages.walk(request, opened, results, device, calibration, scores, plan, say)

    def describe(folder: Path) -> CardFacts:
        if unseen:
            smaller = open_checkpoint(folder, config.dtype)
            words = trimmed_processor(processor, walked.plan)
            said = _predictions(PRUNED, smaller, words, unseen, at, device)
            held_out[PRUNED] = result_of(said, unseen, device, predicted)
            held_out[PRUNED].save(folder / HELD_OUT_FILE)
        base, text = str(opened.model.config._name_or_path), held_out_text(held_out)
        return CardFacts(base=base, name=out.name, held_out=text, data=config.data)

    trusted, where = config.trust_remote_code, (model, walked.plan, out, config.dtype, force)
    prune_checkpoint(*where, trust_remote_code=trusted, weights=walked.weights, describe=describe)
    return walked, held_out


@torch.no_grad()
def _predictions(
    name: str,
    source: LazyCheckpoint,
    processor: Any,
    samples: Sequence[Sample],
    folder: Path,
    device: torch.device,
) -> Predictions:
    """Predict samples layer by layer; what does not fit in memory between lies in ``folder``."""
    encoded = on_data.batches_of(processor, samples, stages.TEST_BATCH)
    places, batches = map(list, zip(*encoded, strict=True))
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    width = text_config_of(source.model.config).hidden_size
    needed = 3 * tokens * width * source.model.dtype.itemsize
    store = StatesPlace.of(needed, device).store(folder)
    runner = LayerwiseModel(source, store, device)
    parts = Parts(runner.model)
    last = len(parts.layers)
    with evaluating(runner.model):
        runner.embed(batches)
        for index in range(last):
            with runner.layer(index):
                runner.finish(index)
            store.drop(f"hidden-{index}")
        with source.loaded("after", device):
            states = (
                (places[i], parts.norm(runner.input_of(last, i)), batch["labels"])
                for i, batch in ((batch["place"], batch) for batch in runner.batches())
            )
            head = head_weights_of(runner.model)
            found = Predictions.of(name, states, head, processor)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def recover(
    model: str,
    source: options.TrainingData,
    config: options.RecoverConfig,
    out: Path,
    teacher: str | None,
    shard: bool,
    force: bool,
    say: Say,
) -> History:
    """Train a pruned checkpoint towards the original model."""

    def loaded(name: str, device: str | None = None) -> tuple[PreTrainedModel, Any]:
        if shard:  # in float32
            return load_as(replace(source, dtype="float32"), name, shard=True)
        return load_as(source, name, device)

    def add_files(folder: Path) -> None:
        history.save(folder / "slimvlm_history.json")
        for name in (ADAPTER_FOLDER, TRACKER_FOLDER):
            if (work / name).exists():
                shutil.copytree(work / name, folder / name)

    files.require_free(out, force)
    if not config.needs_teacher:
        teacher = None
    elif teacher is None:
        raise ConfigError(f"loss {config.loss!r} needs --teacher")
    if shard and num_ranks() < 2:
        raise ConfigError("--shard needs several processes: start slimvlm with torchrun")
    if shard and source.device is not None:
        raise ConfigError(f"device {source.device!r} conflicts with --shard: leave --device out")
    check_models(source, *filter(None, (model, teacher)))
    stages.try_lora(models.load_config(model, source.trust_remote_code), config)
    samples = stages.samples_for(model, source, None, say)
    student, processor = loaded(model)
    # what a teacher shares must never go to a GPU
    original = None if teacher is None else loaded(teacher, "cpu")[0]
    plan = plan_of(model)
    work = files.working_folder(files.beside(out, "training"))
    history = train(student, original, samples, config, processor, work, plan)
    if shard:
        weights = gathered_weights(student)
        if is_first_rank():  # a whole model again, in its file's data type
            student, _ = load_as(source, model, "cpu")
            missing, unexpected = student.load_state_dict(weights, strict=False)
            assert not unexpected
            assert set(missing) <= set(student.all_tied_weights_keys or {}), missing
    if is_first_rank():
        how = (config.train, config.loss, history.num_samples)
        facts = CardFacts(base=models.resolve(model), name=out.name, training=how, data=source.data)
        save(student, processor, out, plan, force, also=add_files, facts=facts)
        shutil.rmtree(work, ignore_errors=True)
    # threads that still listen when the interpreter ends can abort a process, and with it torchrun
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    return history


def evaluate(
    model: str,
    questions: options.QuestionFlags,
    source: options.DataConfig,
    baseline: str | None,
    out: Path | None,
    force: bool,
    say: Say,
    require: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate ``model``, after ``baseline`` if given, on data or else on tasks."""
    has_data, blind, tasks = source.data is not None, questions.blind, {}
    is_file = baseline is not None and files.path_of(baseline, "baseline").is_file()
    if not has_data:
        tasks = check_questions(questions, blind, questions.replies is not None)
    elif is_file:
        raise ConfigError(f"baseline {baseline!r}: with --data it must be a model, not a file")
    gates.parse(require, gates.in_percent(tasks, has_data), baseline is not None)
    if out is not None:
        files.require_free(out, force)
    named = {"baseline": baseline} if baseline is not None and not is_file else {}
    named["model"] = model
    check_models(source, *named.values())
    samples = stages.samples_for(model, source, questions.limit, say)
    results: dict[str, Any] = {}
    predicted, size, floors = None, questions.batch_size, questions.floors
    if baseline is not None and is_file:
        results["baseline"] = read_baseline(baseline, blind, floors, tasks, questions.limit)
    for role, name in named.items():
        loaded = load_as(source, name)
        if not has_data:  # floors are the original's
            is_original = role == "baseline" or baseline is None
            given = replace(questions, floors=floors and is_original)
            title = f"{name} (blind)" if blind else name
            results[role] = evaluate_all(*loaded, given, title, questions.replies, blind)
        elif role == "baseline":
            head = head_weights_of(loaded[0])
            predicted = on_data.predictions_of(*loaded, samples, size, name, head)
            results[role] = result_of(predicted, samples, loaded[0].device)
        else:
            results[role] = evaluate_data(*loaded, samples, predicted, batch_size=size, name=name)
        del loaded  # before the next one is read
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        results["model"].save(out)
    return results


def side_by_side(
    a: str,
    b: str,
    tasks: str,
    limit: int | None,
    loading: options.LoadConfig,
    require: Sequence[str] = (),
) -> tuple[Comparison, dict[str, Result]]:
    """Compare two models or result files, question by question; also return their results."""
    chosen = find_tasks(tasks)
    results = {name: Result.load(name) for name in (a, b) if name.endswith(".json")}
    models = [name for name in dict.fromkeys((a, b)) if name not in results]
    asked = results[b].tasks if b in results else {task.name: task for task in chosen}
    gates.parse(require, gates.in_percent(asked))
    check_models(loading, *models)
    for name in models:
        results[name] = ask.evaluate(*load_as(loading, name), chosen, limit, name=name)
    known = {**builtin_tasks(), **{task.name: task for task in chosen}}
    return compare(results[a], results[b], known), {"A": results[a], "B": results[b]}


def image_tokens(
    model: str,
    source: options.TrainingData,
    shares: Sequence[float],
    tasks: str | None,
    limit: int | None,
    keep: float | None,
    out: Path | None,
    force: bool,
    say: Say,
) -> list[AtBudget]:
    """Measure a model at shares of its image tokens, and write it with one of them."""
    if (keep is None) != (out is None):
        raise ConfigError("--keep and --out must be given together")
    named = [] if tasks is None else find_tasks(tasks)
    check_models(source, model)
    base, trusted = models.resolve(model), source.trust_remote_code
    config = models.load_config(model, trusted)
    pictures.knobs_of(config)
    groups = {"data": stages.samples_for(model, source, None, say)}
    processor = models.load_processor(base, config, trusted)
    choose = pictures.budgets_for(config, processor, groups["data"])
    if keep is not None and out is not None:
        budget, small = choose(keep), models.empty_model(config)
        changed = budget.apply_(small, processor)
        words = ["slimvlm", "image-tokens", model, "--data", source.data, "--no-measure", "--keep"]
        command = shlex.join([*words, str(keep), "--out", out.name])
        facts = CardFacts(base=base, name=out.name, command=command, pictures=budget, copied=True)
        with files.new_folder(out, force) as folder:
            others = shutil.ignore_patterns(CARD_FILE, HELD_OUT_FILE)  # measured with all tokens
            shutil.copytree(models.folder_of(model), folder, ignore=others, dirs_exist_ok=True)
            write_processor(changed, folder)
            if (folder / IMAGE_PROCESSOR_NAME).is_file():  # which older readers read
                changed.image_processor.save_pretrained(folder)
            values = read_object(folder / CONFIG_NAME, "model")
            values |= {n: v for n, v in budget.settings.items() if n in vars(config)}
            files.write_text(folder / CONFIG_NAME, json.dumps(values, indent=2) + "\n")
            again = models.load_processor(str(folder), models.load_config(folder, trusted), trusted)
            if again.image_processor.to_dict() != changed.image_processor.to_dict():
                raise ReloadError(f"{str(out)!r}: the processor reads back with other settings")
            write_card(folder, small, plan_of(folder), facts, changed)
            files.mark_checkpoint(folder)
        say(f"{out}: images take {budget}")
        if option := pictures.llama_cpp_option(changed, config):
            say(f"llama.cpp resizes images by itself: give it {option}")
    chosen = {1.0: choose(1.0)} if shares else {}
    for share in sorted({*shares} - {1.0}, reverse=True):
        try:
            chosen[share] = choose(share)
        except ConfigError as error:
            say(f"not measured: {error}")
    if not chosen:
        return []

    loaded, processor = load_as(source, model)
    for task in named:
        groups[task.name] = [answered_sample(q, q.answers[0]) for q in task.load(limit)]
    full = {name: on_data.predictions_of(loaded, processor, its) for name, its in groups.items()}
    dtype, found = str(loaded.dtype).removeprefix("torch."), []
    for budget in chosen.values():
        times, cache = None, kv_cache_bytes(models.anatomy(config), round(budget.tokens), dtype)
        held_out = {n: result_of(full[n], groups[n], loaded.device) for n in groups}
        if budget.settings:
            small = models.sharing_copy(loaded)
            changed = budget.apply_(small, processor)
            times = paired_times(small, changed, loaded, processor, budget.size)
            held_out = {n: evaluate_data(small, changed, groups[n], full[n]) for n in groups}
        given = {**vars(budget), "kv_cache_bytes": round(cache), "times": times}
        found.append(AtBudget(**given, held_out=held_out))
    return found
