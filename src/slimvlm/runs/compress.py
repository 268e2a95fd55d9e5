"""Compress a model in one run folder: score, plan, prune, recover, evaluate, save.

Every stage writes its output whole and is skipped where that exists, so that a stopped run resumes
when the same command is given again.
"""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from slimvlm.core import documents, options
from slimvlm.core.errors import ConfigError, SlimError, is_out_of_memory, one_line
from slimvlm.core.files import beside, held, replacement, require_free, write_text
from slimvlm.core.options import CompressConfig, PruneConfig, RecoverConfig
from slimvlm.core.progress import Say
from slimvlm.data.chat import USUAL_SIZE
from slimvlm.data.general import identity_of_general_text
from slimvlm.data.read import identity_of_data
from slimvlm.evaluation import on_data
from slimvlm.evaluation.ask import identities_of_tasks
from slimvlm.evaluation.bench import PairedTimes, paired_times
from slimvlm.evaluation.lmms import evaluate_all
from slimvlm.evaluation.results import Result, read_baseline
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.cost import weight_bytes
from slimvlm.models.devices import free_memory, peak_memory, release_memory
from slimvlm.models.hidden import head_weights_of
from slimvlm.models.load import anatomy, load_as, resolve
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import CardFacts, save
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.runs import request as requests
from slimvlm.runs import stages, tables
from slimvlm.runs.recipes import recipe_for
from slimvlm.runs.request import Request, ratio_of, resolved, scored_by
from slimvlm.runs.stages import ORIGINAL, PRUNED, RECOVERED, Calibration, SampleSplit
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import TRACKER_FOLDER

STAGES = (ORIGINAL, PRUNED, RECOVERED)
TIMES_FILE = "times.json"  # times of the smaller model beside the original's, among a run's results
_PREDICTIONS = "said.safetensors"  # of the original, on test samples
_NOT_TRAINED, _UNTRAINED = "none", "needs training"


def request_of(model: str, config: CompressConfig) -> Request:
    """Make the request of a run. Before training, an axis that is not named is ``auto``."""
    if config.tasks is None:
        of_tasks = ("limit", "batch_size", "baseline", "task_folder", "template_args", "floors")
        config.refuse(of_tasks, "needs --tasks")
    if config.data is None:
        config.refuse(("training_samples", "test_samples"), "needs --data")
        if config.recover is not None:
            raise ConfigError(f"train {config.recover.train!r} needs --data")
    if config.recover is None:
        config.refuse(("training_samples",), _UNTRAINED)
    prune = config.part(PruneConfig)
    if prune.axis is None and prune.data is not None and config.recover is not None:
        prune = replace(prune, axis="auto")
    return Request(
        model=model,
        prune=prune,
        recover=config.recover,
        training_samples=config.training_samples,
        test_samples=config.most_test_samples(config.samples),
        questions=config.part(options.Questions) if config.tasks else None,
        require=config.require,
        latency=config.target_latency,
        image_tokens=config.image_tokens,
    )


@dataclass(frozen=True)
class Run:
    """A run folder and what is done in it."""

    folder: Path  # with ``force`` a new one beside the run folder
    name: str  # of the run folder
    config: CompressConfig
    request: Request
    samples: SampleSplit
    trains: bool
    say: Say


@dataclass(frozen=True)
class Compressed:
    """A finished run; ``model, processor, run = compress(...)`` also reads its model."""

    folder: Path
    config: CompressConfig
    plan: Plan
    results: dict[str, Result]  # by stage (original, pruned, recovered), if tasks were given
    held_out: dict[str, on_data.DataResult]  # by stage, if there was data
    times: PairedTimes | None  # against the original's, if they were measured

    def load(self) -> tuple[PreTrainedModel, Any]:
        """Read the compressed model and its processor."""
        return load_as(self.config, self.folder)

    def __iter__(self) -> Iterator[Any]:
        return iter((*self.load(), self))

    def __getitem__(self, stage: str) -> Result:
        return self.results[stage]


def compress(
    model: str,
    config: CompressConfig | None = None,
    out: str | Path | None = None,
    force: bool = False,
    say: Say = print,
    **options: Any,
) -> Compressed:
    """Compress a model in one run folder.

    Give ``config``, or as ``options`` what a file of ``--config`` may hold. As there, the extended
    paper's decision chart says how to train unless ``recover`` does: ``"none"``, a `RecoverConfig`,
    or some options. With ``force``, a folder of another run is replaced once the new one is whole.
    Mistakes are found before weights are read. docs/files.md lists what is in the folder.
    """
    if out is None or (config is not None and options):
        raise ConfigError("compress needs out, and either config or options by name")
    config = config_from(options, model) if config is None else config
    place = Path(out)
    with held(place), replacement(place) if force else nullcontext(place) as folder:
        # whether the folder is free, or holds the same run unfinished
        if not force and (folder / "summary.md").exists():
            require_free(folder)
        about = _about(model, config)
        is_same = documents.is_begun_for(folder / "config.json", about)
        noted = documents.noted_request(folder / "config.json") or {}
        if not force and "made_from" in noted:
            told = f"output {str(place)!r} exists: it was begun"
            documents.require_same_request(noted, about, told, "Use --force to replace it")
        require_free(folder, force or is_same)
        if is_same:
            say(f"resuming the unfinished run in {folder}")
        # every mistake that can be found without weights
        request = request_of(model, config)
        if config.baseline:
            known = {} if request.questions is None else requests.check_questions(request.questions)
            read_baseline(config.baseline, floors=config.floors, tasks=known, limit=config.limit)
        request, given, samples = stages.settled(request, None, say)
        chart = recipe_for(ratio_of(request.prune), request.trains)
        if given is not None:
            say("trimming the vocabulary reaches the ratio: no layer is pruned")
        elif request.prune.axis == "auto":
            say("axis auto: short trials of depth, width, both; the lowest validation loss decides")
        elif config.axis != request.prune.axis == chart.axis:
            say(f"axis {chart.axis}: {chart.why} ({chart.source})")
        # begin the folder, or resume in it
        if not force:
            shutil.rmtree(beside(folder, "partial"), ignore_errors=True)  # of a stopped `--force`
        elif not is_same:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        documents.note_request(folder / "config.json", about)
        for name in ("scores", "results"):
            (folder / name).mkdir(exist_ok=True)
        write_text(folder / "run.yaml", config_text(model, config))
        # the stages that are not done yet
        trains = request.trains and bool(samples.training)
        run = Run(folder, place.name, config, request, samples, trains, say)
        original, processor = stages.load_original(request)
        _measure(run, ORIGINAL, original, processor)
        if request.pictures is not None:  # from here on
            processor = request.pictures.apply_(original, processor)
        plan = _prune(run, original, processor)
        del original  # before two models are read for recovery
        release_memory()
        if run.trains and not (folder / "checkpoint").exists():
            assert request.recover is not None
            student, processor = load_as(config, folder / "pruned")
            where = (samples.training, folder / "training")
            history = stages.recover_(request, student, processor, plan, *where)
            history.save(folder / "history.json")
            _measure(run, RECOVERED, student, processor)
            how = (request.recover.train, request.recover.loss, history.num_samples)
            facts = replace(_card_facts(run), training=how)
            measured = (read_results(folder), read_held_out(folder), request.recover.loss)
            notes = "\n".join(f"- {note}" for note in tables.training_notes(*measured))
            facts = replace(facts, held_out=facts.held_out + f"\n{notes}\n" * bool(notes))
            save(student, processor, folder / "checkpoint", plan, facts=facts)
            write_text(folder / "checkpoint.sha256", _identity(folder / "checkpoint"))
        finish(run, plan)
        done = (plan, read_results(folder), read_held_out(folder), read_times(folder))
    return Compressed(place, config, *done)


def config_from(given: Mapping[str, Any], model: str) -> CompressConfig:
    """Build a configuration from options; the decision chart says how to train if they do not."""
    recover = given.get("recover", {})
    config = documents.built(CompressConfig, {k: given[k] for k in given if k != "recover"})
    if recover is None or isinstance(recover, RecoverConfig):
        return replace(config, recover=recover)
    if not isinstance(recover, str | Mapping):
        raise ConfigError(f"recover {recover!r} must be options by name, a value of train, or None")
    how = {"train": recover} if isinstance(recover, str) else dict(recover)
    train, has_data = how.get("train"), config.data is not None
    if not has_data and train not in (None, _NOT_TRAINED):
        raise ConfigError(f"train {train!r} needs --data")
    ratio = ratio_of(config) if config.target_latency is None else 1 - config.target_latency
    chart = recipe_for(ratio, has_data and train != _NOT_TRAINED)
    if train is None and chart.train == "projector" and not anatomy(model).projector_params:
        chart = recipe_for(ratio, has_data, has_projector=False)
    if how.setdefault("seed", config.seed) != config.seed:
        raise ConfigError(f"seed {config.seed} conflicts with recover.seed {how['seed']}")
    how["train"] = train or chart.train or _NOT_TRAINED
    if how["train"] == _NOT_TRAINED:
        asked = {n: v for n, v in how.items() if n not in ("train", "seed") and v is not None}
        why = _UNTRAINED if has_data else "needs --data"
        documents.built(RecoverConfig, asked, "recover").refuse(asked, why)
        return config
    how["loss"] = how.get("loss") or chart.loss
    return replace(config, recover=documents.built(RecoverConfig, how, "recover"))


def _about(model: str, config: CompressConfig) -> dict[str, Any]:
    """Describe a run by its options and by hashes of the files that they name, which are read."""
    made_from = [documents.identity_of_files(model, resolve(model))]
    made_from += [] if config.data is None else [identity_of_data(config.data)]
    files = filter(None, (config.vocab_text, config.baseline))
    made_from += [documents.identity_of_files(file, file) for file in files]
    request = resolved(request_of(model, config), shape=anatomy(model))
    if request.questions is not None:
        made_from += identities_of_tasks(request.questions)
    if request.prune.general_text:
        made_from.append(identity_of_general_text())
    config = replace(config, recover=request.recover)  # with the run's seed
    return {"model": model, **documents.asked(config), "made_from": made_from}


def _prune(run: Run, model: PreTrainedModel, processor: Any) -> Plan:
    """Walk the model and write it, unless a later stage has been reached; return its plan."""
    folder, request = run.folder, run.request
    target = folder / ("pruned" if run.trains else "checkpoint")
    for made in (folder / "checkpoint", folder / "pruned"):
        noted = made.with_suffix(".sha256")
        if noted.is_file() and made.exists() and noted.read_bytes() != _identity(made).encode():
            raise ConfigError(f"{str(made)!r} changed after it was written: remove it to go on")
    if target.exists() or (folder / "checkpoint").exists():
        return Plan.load(folder / "plan.json")
    calibration = Calibration(processor, run.samples.calibration, request.hold_out)
    given = requests.tokens_alone(request, read_anatomy(model))
    stored = [folder / "scores" / name for name in (() if given else scored_by(request.prune))]
    if not all(path.with_suffix(".json").exists() for path in stored):
        for name, found in stages.calibrate(request, model, calibration).items():
            found.save(folder / "scores" / name)
    scores = [Scores.load(path) for path in stored]
    more = (folder / "walk", run.samples.training if run.trains else (), run.say)
    walked = stages.prune_(request, model, calibration, scores, given, *more)
    release_memory()
    run.say(walked.summary())
    if walked.scores is not None:
        walked.scores.save(folder / "scores" / walked.scores.criterion)
    write_text(folder / "walk.json", json.dumps(asdict(walked.report), indent=1) + "\n")
    walked.plan.save(folder / "plan.json")
    trimmed = trimmed_processor(processor, walked.plan)
    _measure(run, PRUNED, model, trimmed)
    _time(run, model, trimmed)
    save(model, trimmed, target, walked.plan, facts=_card_facts(run))
    write_text(target.with_suffix(".sha256"), _identity(target))
    shutil.rmtree(folder / "walk", ignore_errors=True)
    return walked.plan


def _identity(made: Path) -> str:
    """Hash a checkpoint of a run and the plan beside it."""
    plan = made.with_name("plan.json")
    return " ".join(documents.identity_of_files(path.name, str(path)) for path in (made, plan))


def _measure(run: Run, stage: str, model: PreTrainedModel, processor: Any) -> None:
    """Evaluate the model of a stage on the tasks and on test samples, unless it was."""
    questions, samples, results = run.request.questions, run.samples.test, run.folder / "results"
    path = results / f"{stage}.json"
    if questions is not None and not path.exists():
        if stage == ORIGINAL and run.config.baseline:
            result = Result.load(run.config.baseline)
        else:
            run.say(f"evaluating the {stage} model on the tasks")
            if stage != ORIGINAL:  # floors are the original's
                questions = replace(questions, floors=False)
            result = evaluate_all(model, processor, questions, stage, run.folder / "answers")
        pruned = results / f"{PRUNED}.json"
        if stage == RECOVERED and pruned.exists():  # training changes no shape
            result = result.timed_as(Result.load(pruned))
        result.save(path)
    path, stored = results / f"data-{stage}.json", run.folder / _PREDICTIONS
    if samples and not path.exists():
        run.say(f"evaluating the {stage} model on {len(samples)} test samples")
        if stage == ORIGINAL:
            how = (stages.TEST_BATCH, ORIGINAL, head_weights_of(model))
            found = on_data.predictions_of(model, processor, samples, *how)
            found.save(stored)
            on_data.result_of(found, samples, model.device).save(path)
        else:
            original = on_data.Predictions.load(stored)
            on_data.evaluate_data(model, processor, samples, original, name=stage).save(path)


def _time(run: Run, model: PreTrainedModel, processor: Any) -> None:
    """Time the pruned model against the original, which is read once more."""
    results, say, pictures = run.folder / "results", run.say, run.request.pictures
    if (results / TIMES_FILE).exists():
        return
    needed = weight_bytes(anatomy(run.request.model), str(model.dtype).removeprefix("torch."))
    if needed > (free := free_memory(model.device)):
        size, left = tables.size(needed), tables.size(free)
        say(f"times are not measured: the original's {size} exceed the {left} of free memory")
        return
    say("timing the original and the pruned model in turn")
    try:
        shown = USUAL_SIZE if pictures is None else pictures.size
        found = paired_times(model, processor, *stages.load_original(run.request), shown)
    except Exception as error:  # a run goes on without times, and says why it has none
        why = one_line(error) if isinstance(error, SlimError) else repr(error)
        if is_out_of_memory(error):
            why = f"both models do not fit on {model.device} together ({one_line(error)})"
        say(f"times are not measured: {why}")
        return
    finally:
        release_memory()  # of the original
    for stage, times in ((ORIGINAL, found.original), (PRUNED, found.pruned)):
        if (path := results / f"{stage}.json").exists():
            replace(Result.load(path), **vars(times)).save(path)
    found.save(results / TIMES_FILE)
    if run.config.target_latency is not None:
        say(f"target_latency {run.config.target_latency}: measured {found.prefill}")


def _card_facts(run: Run) -> CardFacts:
    """Collect the facts of the model card; its scores are those of the last stage."""
    results, model = read_results(run.folder), run.request.model
    measured = list(results.values())[-1].tasks if len(results) > 1 else {}
    figures = list(tables.result_json(results).values())[-1] if measured else {}
    return CardFacts(
        base=resolve(model),
        name=run.name,
        data=run.config.data,
        command=compress_command(model, run.config, run.name),
        share=figures.get("retention"),
        kinds=figures.get("by_kind", {}),
        results=tables.as_markdown(*tables.result_rows(results)) if results else "",
        scores={name: (task.metric, task.score) for name, task in measured.items()},
        held_out=tables.held_out_text(read_held_out(run.folder), read_times(run.folder)),
        pictures=run.request.pictures,
    )


def finish(run: Run, plan: Plan) -> None:
    """Write the summary, remove what only a resume needs."""
    folder, results, pictures = run.folder, read_results(run.folder), run.request.pictures
    removed = f"{plan.ratio:.1%} of the backbone removed"
    lines = [f"# {run.request.model}, {removed}", "", plan.summary(), ""]
    if pictures is not None:
        lines += [f"Images take {pictures}. The original is evaluated with all tokens.", ""]
    if results:
        lines.append(tables.as_markdown(*tables.result_rows(results)))
    if held_out := tables.held_out_text(read_held_out(folder), read_times(folder)):
        lines += ["## Retention on test samples", "", held_out]
    loss = "" if run.request.recover is None else run.request.recover.loss
    for note in tables.training_notes(results, read_held_out(folder), loss):
        run.say(note)
        lines += [f"- {note}", ""]
    lines += [f"Peak memory, since the last start: {peak_memory()}.", ""]
    how = " with `trust_remote_code=True`" if plan.file_format == "uneven" else ""
    lines.append(f"The checkpoint is in `checkpoint/`; `from_pretrained` loads it{how}.")
    if (logs := folder / "training" / TRACKER_FOLDER).exists():
        logs.replace(folder / TRACKER_FOLDER)
    for name in (_PREDICTIONS, "pruned.sha256", "checkpoint.sha256"):
        (folder / name).unlink(missing_ok=True)
    for name in ("pruned", "training", "walk"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_text(folder / "summary.md", "\n".join(lines) + "\n")  # the last: it ends the run


# What a run folder says: its results, and its configuration as YAML and as a command.


def results_of(model: str, config: CompressConfig, out: Path) -> dict[str, Result] | None:
    """Read the results of a finished `compress` with the same arguments; None without one."""
    is_done = (out / "summary.md").exists()
    is_same = is_done and documents.is_begun_for(out / "config.json", _about(model, config))
    return read_results(out) if is_same else None


def read_results(folder: Path) -> dict[str, Result]:
    """Read the results of a run so far, by stage, the original first."""
    paths = {stage: folder / "results" / f"{stage}.json" for stage in STAGES}
    return {stage: Result.load(path) for stage, path in paths.items() if path.exists()}


def read_held_out(folder: Path) -> dict[str, on_data.DataResult]:
    """Read the results on test samples of a run so far, by stage, the original first."""
    paths = {stage: folder / "results" / f"data-{stage}.json" for stage in STAGES}
    return {stage: on_data.DataResult.load(path) for stage, path in paths.items() if path.exists()}


def read_times(folder: Path) -> PairedTimes | None:
    """Read the times of a run's model against the original's, if they were measured."""
    path = folder / "results" / TIMES_FILE
    return PairedTimes.load(path) if path.exists() else None


def compress_command(model: str, config: CompressConfig, out: str | Path) -> str:
    """Write the ``slimvlm compress`` command for a run; options at their defaults are left out."""
    has_no_flag = options.file_only(CompressConfig) | options.file_only(RecoverConfig)
    has_no_flag |= {"paper_exact"}
    config = replace(config, require=())  # which changes no model
    if {*_unusual(config), *_unusual(config.recover or RecoverConfig())} & has_no_flag:
        return shlex.join(["slimvlm", "compress", "--config", f"{out}/run.yaml", "--out", str(out)])
    words = ["slimvlm", "compress", model, *_flags(config, {"batch_size": options.TASK_BATCH_SIZE})]
    if config.recover is not None:
        words += _flags(config.recover, {"seed": None})
    elif config.data is not None:
        words += ["--train", _NOT_TRAINED]
    return shlex.join([*words, "--out", str(out)])


def config_text(model: str, config: CompressConfig) -> str:
    """Write a run's configuration as YAML: the model, and every option that is not the default."""
    trained = _NOT_TRAINED if config.recover is None else _unusual(config.recover)
    values = {"model": model, **_unusual(config), "recover": trained}
    values.pop("trust_remote_code", None)  # it counts on the command line only
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def read_config(path: str | Path) -> tuple[str, CompressConfig, Mapping[str, Any] | None]:
    """Read model, configuration and given training options from YAML or a run's ``config.json``."""
    read = documents.read_object if Path(path).suffix == ".json" else documents.read_yaml
    where, values = f"config {str(path)!r}", read(path, "config")
    if not isinstance(values, dict) or not isinstance(values.get("model"), str):
        raise ConfigError(f"{where}: must name a model, and options")
    meta = ("model", "made_from", documents.VERSION)
    chosen = {name: v for name, v in values.items() if name not in meta}
    for name in {"trust_remote_code", "force"} & chosen.keys():
        if chosen[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{where}: {name} is only a flag of the command line: give {flag}")
        del chosen[name]
    if chosen.get("recover") == _NOT_TRAINED:
        chosen["recover"] = None
    given, config = chosen.get("recover", {}), documents.built(CompressConfig, chosen, where)
    if config.recover is not None:
        if read is documents.read_yaml and given.get("seed", config.seed) != config.seed:
            told = f"seed {config.seed} conflicts with recover.seed {given['seed']}"
            raise ConfigError(f"{where}: {told}")
        config = replace(config, recover=replace(config.recover, seed=config.seed))
    return values["model"], config, given


def _unusual(config: Any) -> dict[str, Any]:
    """Collect the options that differ from their defaults or that a recipe chooses."""
    chosen = {name: getattr(config, name, None) for name in ("axis", "train", "loss")}
    found = (chosen | config.given()).items()
    plain = {n: v for n, v in found if v is not None and not isinstance(v, RecoverConfig)}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items()}


def _flags(config: Any, names: Mapping[str, str | None]) -> Iterator[str]:
    """Yield these options as words; ``names`` renames some, or leaves them out by None."""
    for option, value in _unusual(config).items():
        if (name := names.get(option, option)) is not None:
            yield f"--{name.replace('_', '-')}"
            if value is not True:
                yield from map(str, value if isinstance(value, list) else (value,))
