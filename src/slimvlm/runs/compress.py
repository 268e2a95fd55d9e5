"""Compress a model in one run folder: score, plan, prune, recover, evaluate, save.

Every stage writes its output whole and is skipped where that exists, so that a stopped run resumes
when the same command is given again.
"""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from slimvlm.core import documents, options
from slimvlm.core.errors import ConfigError, SlimError, is_out_of_memory, one_line
from slimvlm.core.files import beside, held, replacement, require_free, write_text
from slimvlm.core.options import CompressConfig, Questions, RecoverConfig, TrainingConfig
from slimvlm.core.progress import Say
from slimvlm.data.chat import USUAL_SIZE
from slimvlm.data.general import identity_of_general_text
from slimvlm.data.read import identity_of_data
from slimvlm.evaluation import on_data
from slimvlm.evaluation.ask import identities_of_tasks
from slimvlm.evaluation.bench import PairedTimes, paired_times
from slimvlm.evaluation.lmms import evaluate_all
from slimvlm.evaluation.results import Result, read_baseline
from slimvlm.models.cost import weight_bytes
from slimvlm.models.devices import free_memory, peak_memory, release_memory
from slimvlm.models.hidden import head_weights_of
from slimvlm.models.load import anatomy, load_as
from slimvlm.models.load import resolve as resolve_name
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import CardFacts, save
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.runs import stages, tables
from slimvlm.runs.chart import chart_row
from slimvlm.runs.recipe import Recipe, SampleSplit, check_questions, decide, resolve
from slimvlm.runs.stages import ORIGINAL, PRUNED, RECOVERED, Calibration
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import TRACKER_FOLDER

STAGES = (ORIGINAL, PRUNED, RECOVERED)
TIMES_FILE = "times.json"  # times of the smaller model beside the original's, among a run's results
_PREDICTIONS = "said.safetensors"  # of the original, on test samples
_NOT_TRAINED = "none"
RUN_FILE = "run.yaml"  # options, hashes of what was read, and of slimvlm


@dataclass(frozen=True)
class Run:
    """A run folder and what is done in it."""

    folder: Path  # with ``force`` a new one beside the run folder
    name: str  # of the run folder
    options: CompressConfig
    recipe: Recipe
    samples: SampleSplit
    say: Say

    @property
    def trains(self) -> bool:
        """Whether training follows."""
        return self.recipe.recover is not None and bool(self.samples.training)


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
    **given: Any,
) -> Compressed:
    """Compress a model in one run folder.

    Give ``config``, or its fields by name. The extended paper's decision chart says how to train
    unless ``recover`` does: ``"none"``, a `RecoverConfig`, or some options. With ``force``, a
    folder of another run is replaced once the new one is whole. Mistakes are found before weights
    are read. docs/files.md lists what is in the folder.
    """
    if out is None or (config is not None and given):
        raise ConfigError("compress needs out, and either config or options by name")
    config = CompressConfig(**given) if config is None else config
    place = Path(out)
    with held(place), replacement(place) if force else nullcontext(place) as folder:
        if not force and (folder / "summary.md").exists():
            require_free(folder)
        about = _about(model, config)
        is_same = _is_begun(folder, about, f"output {str(place)!r} exists: it was begun", force)
        if is_same:
            say(f"resuming the unfinished run in {folder}")
        # every mistake that can be found without weights
        if config.baseline:  # of tasks, as options require
            known = check_questions(config.part(Questions))
            read_baseline(config.baseline, floors=config.floors, tasks=known, limit=config.limit)
        recipe, ready, samples = resolve(model, config, say=say)
        chart = chart_row(recipe.size, recipe.recover is not None)
        if ready is not None:
            say("trimming the vocabulary reaches the ratio: no layer is pruned")
        elif recipe.axis == "auto":
            say("axis auto: short trials of depth, width, both; the lowest validation loss decides")
        elif config.axis != recipe.axis == chart.axis:
            say(f"axis {chart.axis}: {chart.why} ({chart.source})")
        # begin the folder, or resume in it
        if not force:
            shutil.rmtree(beside(folder, "partial"), ignore_errors=True)  # of a stopped `--force`
        elif not is_same:
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("scores", "results"):  # as long as no file is in them, a folder is free
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_text(folder / RUN_FILE, _as_yaml(about))
        # the stages that are not done yet
        config = replace(config, recover=recipe.recover or options.UNTRAINED)
        run = Run(folder, place.name, config, recipe, samples, say)
        original, processor = stages.load_original(recipe)
        _measure(run, ORIGINAL, original, processor)
        if recipe.pictures is not None:  # from here on
            processor = recipe.pictures.apply_(original, processor)
        plan = _prune(run, original, processor, ready)
        del original  # before two models are read for recovery
        release_memory()
        if run.trains and not (folder / "checkpoint").exists():
            _recover(run, plan)
        finish(run, plan)
        done = (plan, read_results(folder), read_held_out(folder), read_times(folder))
    return Compressed(place, config, *done)


def _is_begun(folder: Path, about: Mapping[str, Any], told: str, force: bool) -> bool:
    """Whether a folder holds the same run unfinished; refuse another one without ``force``."""
    noted, wanted = _noted(folder), _compared(about)
    if noted is not None and not force:
        documents.require_same(noted, wanted, told, "Use --force to replace it")
    require_free(folder, force or noted == wanted)
    return noted == wanted


def _recover(run: Run, plan: Plan) -> None:
    """Train the pruned model and write it."""
    folder, recipe = run.folder, run.recipe
    assert recipe.recover is not None
    student, processor = load_as(recipe, folder / "pruned")
    where = (run.samples.training, folder / "training")
    history = stages.recover_(recipe, student, processor, plan, *where)
    history.save(folder / "history.json")
    _measure(run, RECOVERED, student, processor)
    how = (recipe.recover.train, recipe.recover.loss, history.num_samples)
    facts = replace(_card_facts(run), training=how)
    measured = (read_results(folder), read_held_out(folder), recipe.recover.loss)
    notes = "\n".join(f"- {note}" for note in tables.training_notes(*measured))
    facts = replace(facts, held_out=facts.held_out + f"\n{notes}\n" * bool(notes))
    save(student, processor, folder / "checkpoint", plan, facts=facts)
    write_text(folder / "checkpoint.sha256", _identity(folder / "checkpoint"))


def _prune(run: Run, model: PreTrainedModel, processor: Any, given: Plan | None) -> Plan:
    """Walk the model and write it, unless a later stage has been reached; return its plan."""
    folder, recipe = run.folder, run.recipe
    target = folder / ("pruned" if run.trains else "checkpoint")
    for made in (folder / "checkpoint", folder / "pruned"):
        noted = made.with_suffix(".sha256")
        if noted.is_file() and made.exists() and noted.read_bytes() != _identity(made).encode():
            raise ConfigError(f"{str(made)!r} changed after it was written: remove it to go on")
    if target.exists() or (folder / "checkpoint").exists():
        return Plan.load(folder / "plan.json")
    calibration = Calibration(processor, run.samples.calibration, recipe.hold_out)
    stored = [folder / "scores" / name for name in (() if given else recipe.scored_by)]
    if not all(path.with_suffix(".json").exists() for path in stored):
        for name, found in stages.calibrate(recipe, model, calibration).items():
            found.save(folder / "scores" / name)
    scores = [Scores.load(path) for path in stored]
    more = (folder / "walk", run.samples.training if run.trains else (), run.say)
    walked = stages.prune_(recipe, model, calibration, scores, given, *more)
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
    samples, results = run.samples.test, run.folder / "results"
    path = results / f"{stage}.json"
    if run.recipe.tasks is not None and not path.exists():
        if stage == ORIGINAL and run.options.baseline:
            result = Result.load(run.options.baseline)
        else:
            run.say(f"evaluating the {stage} model on the tasks")
            questions = run.recipe.part(Questions)
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
    results, say, pictures = run.folder / "results", run.say, run.recipe.pictures
    if (results / TIMES_FILE).exists():
        return
    needed = weight_bytes(anatomy(run.recipe.model), str(model.dtype).removeprefix("torch."))
    if needed > (free := free_memory(model.device)):
        size, left = tables.size(needed), tables.size(free)
        say(f"times are not measured: the original's {size} exceed the {left} of free memory")
        return
    say("timing the original and the pruned model in turn")
    try:
        shown = USUAL_SIZE if pictures is None else pictures.size
        found = paired_times(model, processor, *stages.load_original(run.recipe), shown)
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
    if run.options.target_latency is not None:
        say(f"target_latency {run.options.target_latency}: measured {found.prefill}")


def _card_facts(run: Run) -> CardFacts:
    """Collect the facts of the model card; its scores are those of the last stage."""
    results, model = read_results(run.folder), run.recipe.model
    measured = list(results.values())[-1].tasks if len(results) > 1 else {}
    figures = list(tables.result_json(results).values())[-1] if measured else {}
    return CardFacts(
        base=resolve_name(model),
        name=run.name,
        data=run.options.data,
        command=compress_command(model, run.options, run.name),
        share=figures.get("retention"),
        kinds=figures.get("by_kind", {}),
        results=tables.as_markdown(*tables.result_rows(results)) if results else "",
        scores={name: (task.metric, task.score) for name, task in measured.items()},
        held_out=tables.held_out_text(read_held_out(run.folder), read_times(run.folder)),
        pictures=run.recipe.pictures,
    )


def finish(run: Run, plan: Plan) -> None:
    """Write the summary, remove what only a resume needs."""
    folder, results, pictures = run.folder, read_results(run.folder), run.recipe.pictures
    removed = f"{plan.ratio:.1%} of the backbone removed"
    lines = [f"# {run.recipe.model}, {removed}", "", plan.summary(), ""]
    if pictures is not None:
        lines += [f"Images take {pictures}. The original is evaluated with all tokens.", ""]
    if results:
        lines.append(tables.as_markdown(*tables.result_rows(results)))
    if held_out := tables.held_out_text(read_held_out(folder), read_times(folder)):
        lines += ["## Retention on test samples", "", held_out]
    loss = "" if run.recipe.recover is None else run.recipe.recover.loss
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
    noted = _noted(out) if (out / "summary.md").exists() else None
    if noted is None or noted != _compared(_about(model, config)):
        return None
    return read_results(out)


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


def _about(model: str, config: CompressConfig) -> dict[str, Any]:
    """Describe a run by its options and by hashes of the files that they name, which are read."""
    recipe = decide(model, config, anatomy(model))  # refuses before files are hashed
    made_from = [documents.identity_of_files(model, resolve_name(model))]
    made_from += [] if config.data is None else [identity_of_data(config.data)]
    files = filter(None, (config.vocab_text, config.baseline))
    made_from += [documents.identity_of_files(file, file) for file in files]
    if config.tasks is not None:
        made_from += identities_of_tasks(config.part(Questions))
    made_from += [identity_of_general_text()] if recipe.general_text else []
    made_from += ["the model's code"] if config.trust_remote_code else []
    told = option_values(model, replace(config, recover=recipe.recover or options.UNTRAINED))
    return {**told, "made_from": made_from, documents.VERSION: documents.identity_of_code()}


def option_values(model: str, config: CompressConfig) -> dict[str, Any]:
    """List a run's model, every option that is not the default, and how it is trained."""
    learning = config.recover
    trained: Any = _NOT_TRAINED
    if learning.train != _NOT_TRAINED:
        trained = {name: v for name, v in _unusual(learning).items() if name != "seed"}
    values = {"model": model, **_unusual(config), "recover": trained}
    values.pop("trust_remote_code", None)  # it counts on the command line only
    return values


def _as_yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """YAML without aliases, which `documents` does not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _noted(folder: Path) -> dict[str, Any] | None:
    """Read what a run folder was begun for, as `_compared` gives it; None without such a file."""
    with suppress(ConfigError):
        values = documents.read_yaml(folder / RUN_FILE, "run")
        if isinstance(values, dict) and documents.VERSION in values:
            return _compared(values)
    return None


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what changes no result from what a run's file or `_about` says."""
    read: dict[str, Any] = documents.parse_yaml(_as_yaml(values))
    return {name: v for name, v in read.items() if name not in (*options.NO_RESULT, "require")}


def read_config(path: str | Path) -> tuple[str, CompressConfig]:
    """Read the model and the options of a run from YAML, such as a run's own file."""
    where, values = f"config {str(path)!r}", documents.read_yaml(path, "config")
    if not isinstance(values, dict) or not isinstance(values.get("model"), str):
        raise ConfigError(f"{where}: must name a model, and options")
    chosen = {n: v for n, v in values.items() if n not in ("model", "made_from", documents.VERSION)}
    for name in {"trust_remote_code", "force"} & chosen.keys():
        if chosen[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{where}: {name} is only a flag of the command line: give {flag}")
        del chosen[name]
    return values["model"], documents.built(CompressConfig, chosen, where)


def compress_command(model: str, config: CompressConfig, out: str | Path) -> str:
    """Write the ``slimvlm compress`` command for a run; options at their defaults are left out."""
    hidden = options.file_only(CompressConfig) | {"paper_exact"}
    hidden |= options.file_only(RecoverConfig)
    config = replace(config, require=())  # which changes no model
    if {*_unusual(config), *_unusual(config.recover)} & hidden:
        return shlex.join(["slimvlm", "compress", "--config", f"{out}/run.yaml", "--out", str(out)])
    flags = CompressConfig.flags
    given = [(flags.get(name, name), value) for name, value in _unusual(config).items()]
    if config.data is not None:
        learning = config.recover
        is_trained = learning.train != _NOT_TRAINED
        trained = _unusual(learning) if is_trained else {"train": _NOT_TRAINED}
        given += [(name, value) for name, value in trained.items() if name != "seed"]
    words = ["slimvlm", "compress", model]
    for name, value in given:
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else (value,))
    return shlex.join([*words, "--out", str(out)])


def _unusual(config: options.Options) -> dict[str, Any]:
    """Collect the options that differ from their defaults or that a recipe chooses."""
    chosen = {name: getattr(config, name, None) for name in ("axis", "train", "loss")}
    found = (chosen | config.given()).items()
    plain = {n: v for n, v in found if v is not None and not isinstance(v, TrainingConfig)}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items()}
