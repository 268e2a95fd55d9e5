"""Run the stages of one resolved request: calibrate, prune, recover, evaluate."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.documents import digest
from slimvlm.core.errors import ConfigError, NumericalError, SlimError, raised_as
from slimvlm.core.options import Axis, DataConfig, RecoverConfig
from slimvlm.core.progress import Say, progress, silent
from slimvlm.data import read
from slimvlm.data.general import general_samples
from slimvlm.data.samples import VALIDATION_EVERY, Sample, identifying_bytes, split_validation
from slimvlm.evaluation import gates
from slimvlm.models import load as models
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.hidden import evaluating
from slimvlm.models.parts import context_of
from slimvlm.models.pictures import budgets_for, knobs_of, seen_once
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import lost_heads
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk import walk as walking
from slimvlm.pruning.walk.engine import Steps, WalkConfig, steps_for
from slimvlm.pruning.walk.result import Walked
from slimvlm.runs import request as requests
from slimvlm.runs.cost import CALIBRATION_BATCH, TRIAL_SHARE, optimizer_steps
from slimvlm.runs.request import Request, requests_by_axis, scored_by, tokens_alone, with_tokens
from slimvlm.scoring.batches import answer_loss
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.layerwise import Live, Source
from slimvlm.scoring.score_model import calibration_batches, score
from slimvlm.scoring.stores import Memory, Scratch, Store
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import History
from slimvlm.training.recover import recover as train
from slimvlm.training.trainer import prepare_training

TEST_SHARE, FEWEST_TESTS = 5, 2  # fewer than two have no interval
"""At most one of so many samples is a test sample, and there are so many at least or none."""
TEST_BATCH = 4  # test samples in a batch
ORIGINAL, PRUNED, RECOVERED = "original", "pruned", "recovered"  # the compared models
_AXIS, _TRIAL_BATCHES = "axis", 12
EVEN = 0.02  # validation losses of two axes count as even below this relative difference
TRIMMED = " with a trimmed vocabulary"  # suffix of a trial of axis and vocabulary


@dataclass(frozen=True)
class SampleSplit:
    """The samples of a request."""

    calibration: Sequence[Sample]
    training: Sequence[Sample]
    test: Sequence[Sample] = ()  # none equals one of the others

    def counted(self, request: Request) -> list[Sample]:
        """Return the samples whose tokens count: without validation samples if these decide."""
        judges = {*map(id, _judging(self.calibration) if request.tries_tokens else ())}
        known = {id(sample): sample for sample in (*self.calibration, *self.training)}
        return [sample for key, sample in known.items() if key not in judges]


def _judging(calibration: Sequence[Sample]) -> Sequence[Sample]:
    """Return the user's validation samples, which alone decide; all of fewer than four."""
    own = [sample for sample in calibration if not sample.is_general]
    return own if len(own) < VALIDATION_EVERY else split_validation(own)[1]


def split(samples: Sequence[Sample], request: Request) -> SampleSplit:
    """Split samples at random; the test samples are the same for all seeds and numbers."""
    config = request.prune
    tests = min(request.test_samples, len(samples) // TEST_SHARE)
    tests = 0 if tests < FEWEST_TESTS else tests
    order = read.drawn([sample.place for sample in samples], config.seed, tests)
    used, last = ([samples[index] for index in part] for part in order)
    shown, rest = used[: config.samples], used[config.samples :]
    # the first ones, too, where these are none or fewer than `training_samples`
    training = [*rest, *shown][: request.training_samples or len(rest) or None]
    if config.general_text and shown:
        context = context_of(models.load_config(request.model, config.trust_remote_code))
        longest = [each for each in (config.max_length, context) if each is not None]
        count = round(len(shown) * config.general_text / (1 - config.general_text))
        usual = round(median(sample.tokens for sample in shown)) or None  # length of a passage
        shown += general_samples(count, config.seed, min(longest, default=None), usual)
    return SampleSplit(shown, training, not_among(last, used) if tests else ())


def not_among(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """Drop the samples that equal one of the others in text and pictures."""

    def content(sample: Sample) -> tuple[str, ...]:
        pictures = (identifying_bytes(image, may_move=True) for image in sample.images)
        return (repr(sample.messages), *(digest([picture]) for picture in pictures))

    texts = {repr(sample.messages) for sample in samples}
    seen = {content(other) for other in others if repr(other.messages) in texts}
    return [sample for sample in samples if content(sample) not in seen]


def rows_to_read(request: Request) -> int | None:
    """Count the samples that a request needs; None for all."""
    training = request.training_samples if request.trains else 0
    if training is None:
        return None
    needed = request.prune.samples + training + request.test_samples
    return max(needed, request.test_samples * TEST_SHARE)


def read_split(request: Request, say: Say) -> SampleSplit:
    """Read the samples of a request, as many as it needs, and split them."""
    config = request.prune
    how = (rows_to_read(request), say, config.seed, request.test_samples)
    samples = samples_for(request.model, config.part(DataConfig), *how)
    found = split(samples, request)
    if count := sum(sample.is_general for sample in found.calibration):
        say(f"added {count} general-text passages to the calibration set (general_text)")
    if samples and request.test_samples and not found.test:
        enough = FEWEST_TESTS * TEST_SHARE
        few = f"{len(samples)} samples are too few, {enough} are needed"
        why = few if len(samples) < enough else "the last samples equal others"
        say(f"data: no test samples left, so retention will not be measured: {why}")
    return found


def try_lora(config: PreTrainedConfig, recover: RecoverConfig | None) -> None:
    """Refuse what PEFT refuses of ``lora``: try it on a model without weights."""
    if recover is not None and recover.train == "lora" and recover.lora:
        prepare_training(models.empty_model(config), recover)


def settled(
    request: Request, given: Plan | None, say: Say
) -> tuple[Request, Plan | None, SampleSplit]:
    """Resolve a request, check it against model and data, choose its tokens; read no weights."""
    shape, has_data = models.anatomy(request.model), request.prune.data is not None
    described = models.load_config(request.model, request.prune.trust_remote_code)
    if request.image_tokens is not None:
        with raised_as(ConfigError, SlimError, f"image_tokens {request.image_tokens}:"):
            knobs_of(described)
        if not has_data:
            raise ConfigError(f"image_tokens {request.image_tokens} needs --data")
    request = requests.resolved(request, say, shape if given is None else None)
    config = request.prune
    asked = {} if request.questions is None else requests.check_questions(request.questions)
    has_unseen = config.data is not None and request.test_samples > 0
    gates.parse(request.require, gates.in_percent(asked, has_unseen))
    requests.check_options(config)
    if given is None:
        requests.require_possible(request, shape, silent if config.trims_vocabulary else say)
    if (line := lost_heads(described)) is not None:
        say(line)
    try_lora(described, request.recover)
    samples = read_split(request, say)
    if request.recover is not None and request.recover.train == "projector" and samples.training:
        if not shape.projector_params:
            raise ConfigError(f"train 'projector': {shape.model_type!r} has no projector")
        if not any(sample.images for sample in samples.training):
            raise ConfigError("train 'projector' needs images, and the data have none")
    gates.parse(request.require, gates.in_percent(asked, bool(samples.test)))
    if request.image_tokens is not None:
        name = models.resolve(request.model)
        processor = models.load_processor(name, described, config.trust_remote_code)
        shown = [*samples.calibration, *samples.training]
        chosen = budgets_for(described, processor, shown)(request.image_tokens)
        say(f"images take {chosen}; the original is evaluated with all tokens")
        request = replace(request, pictures=chosen)
    if given is None:  # only the user's own data says which tokens are needed
        request = with_tokens(request, samples.counted(request) if has_data else [], say)
        request = requests.resolved(request, shape=shape)  # a latency's ratio is beside the tokens
        given = tokens_alone(request, shape)
        if given is None and config.trims_vocabulary:
            requests.require_possible(request, shape, say)
    return request, given, samples


def samples_for(
    model: str | Path, source: DataConfig, limit: int | None, say: Say, seed: int = 0, test: int = 0
) -> list[Sample]:
    """Read the samples that options name, if any; ``say`` reports each skipped row."""
    if source.data is None:
        return []
    config = models.load_config(model, source.trust_remote_code)
    processor = models.load_processor(models.resolve(model), config, source.trust_remote_code)
    how = (processor, source.max_length, context_of(config), source.too_long, seed, test)
    return read.load_samples(source.data, source.images, limit, source.max_bad_rows, say, *how)


@dataclass
class Calibration:
    """Calibration samples as model inputs, encoded when first needed."""

    processor: Any
    samples: Sequence[Sample]
    hold_out: bool  # keep every fourth sample out of `fitted`, where there are four

    @cached_property
    def fitted(self) -> list[dict[str, Any]]:
        """Batches for scores and repairs."""
        own, general = ([s for s in self.samples if s.is_general == kind] for kind in (False, True))
        if self.hold_out and len(own) >= VALIDATION_EVERY:
            own, general = split_validation(own)[0], split_validation(general)[0]
        return self._encoded([*own, *general], "encode")

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Validation batches of the user's samples."""
        return self._encoded(_judging(self.samples), "encode validation samples")

    @cached_property
    def general(self) -> list[dict[str, Any]]:
        """Validation batches of general text, which decide nothing."""
        general = split_validation([s for s in self.samples if s.is_general and self.hold_out])[1]
        return self._encoded(general, "encode general text") if general else []

    def _encoded(self, samples: Sequence[Sample], description: str) -> list[dict[str, Any]]:
        """Encode batches of similar length."""
        alike = sorted(samples, key=lambda s: (len(s.images), read.estimated_length(s, 0)))
        return list(calibration_batches(self.processor, alike, CALIBRATION_BATCH, description))


def load_original(request: Request, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load the original model and its processor."""
    return models.load_as(request.prune, request.model, device)


def calibrate(
    request: Request, model: PreTrainedModel, calibration: Calibration
) -> dict[str, Scores]:
    """Score a model by each criterion of the request but the one that the walk chooses by."""
    found, weights = dict[str, Scores](), requests.token_weights_of(request.prune)
    for name in scored_by(request.prune):
        reads, options = CRITERIA[name].needs_data, requests.criterion_options(request.prune, name)
        given: Any = (progress(calibration.fitted, name), name, weights) if reads else ((), name)
        found[name] = score(model, *given, **options)
    return found


def walk(
    request: Request,
    source: Source,
    results: Store,
    device: torch.device,
    calibration: Calibration,
    scores: Sequence[Scores] = (),
    plan: Plan | None = None,
    say: Say = silent,
) -> Walked:
    """Choose the units to keep, unless a plan does, and compute their repaired weights."""
    config, shape = request.prune, read_anatomy(source.model)
    if plan is None and scored_by(config) == config.criterion:
        plan = requests.ranked_plan(config, shape, scores, request.tokens)
    along = (config.axis or "width", config.allocation or "uniform")
    kept = {**config.of_units, "tokens": request.tokens}
    plans, chooses = walking.plans_for(shape, scores, config.ratio, *along, plan=plan, **kept)
    if not any(each.cuts_layers for each in plans):
        return Walked(plans[0])
    given = config.local_steps
    count = steps_for(plans[0], len(calibration.fitted)) if given is None else given
    steps = Steps(repair=config.repair, count=count)
    if not chooses and steps.repair == "none" and not count:
        return Walked(plans[0])
    held_out = calibration.held_out if request.hold_out else []
    weights = requests.token_weights_of(config)
    how = WalkConfig(plans, chooses, calibration.fitted, held_out, steps, weights)
    return walking.walk(source, how, device, results, say=say)


def prune_(
    request: Request,
    model: PreTrainedModel,
    calibration: Calibration,
    scores: Sequence[Scores] = (),
    plan: Plan | None = None,
    scratch: Path | None = None,
    training: Sequence[Sample] = (),
    say: Say = silent,
) -> Walked:
    """Prune a model in place; a folder ``scratch`` keeps finished layers for a resume."""
    store: Store = Memory(torch.device("cpu")) if scratch is None else Scratch(scratch)
    notes: tuple[str, ...] = ()
    known: dict[str, Any] = {}  # features of pictures
    if plan is None:
        request = with_tokens(request, SampleSplit(calibration.samples, ()).counted(request))
        plan = tokens_alone(request, read_anatomy(model))
    if plan is None and request.prune.axis == "auto":
        if store.about(_AXIS, 0) is None:
            losses = try_axes(request, model, calibration, scores, training, known)
            store.write(_AXIS, 0, {}, losses)
        shape = read_anatomy(model)
        request, note = best_axis(request, store.about(_AXIS, 0), shape)
        plan = tokens_alone(request, shape)
        notes = (note,)
    with seen_once(model, known):
        walked = walk(request, Live(model), store, model.device, calibration, scores, plan, say)
    texts = calibration.general if walked.plan.tokens is None else []  # else they have other tokens
    before = answer_loss(model, texts) if texts else 0.0
    walked.apply_(model)
    if texts:
        after = answer_loss(model, texts)
        notes += (f"loss on general text (for information): {before:.4f} -> {after:.4f}",)
    return replace(walked, report=replace(walked.report, notes=(*notes, *walked.report.notes)))


def try_axes(
    request: Request,
    model: PreTrainedModel,
    calibration: Calibration,
    scores: Sequence[Scores],
    training: Sequence[Sample] = (),
    known: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Measure the validation loss after a short trial of each axis; the model stays unchanged.

    The best axis is tried again with a trimmed vocabulary, if the request has one. Losses, by axis
    (and `TRIMMED`), are in nats per token of the original's tokenizer.
    """
    shape, shown = read_anatomy(model), replace(calibration)  # with fewer batches, of all lengths
    shown.fitted = calibration.fitted[:: max(len(calibration.fitted) // _TRIAL_BATCHES, 1)]
    shown.held_out = calibration.held_out
    known = {} if known is None else known

    def tried(request: Request) -> float:
        brief = replace(request, prune=replace(request.prune, local_steps=0))
        alone, store = tokens_alone(brief, shape), Memory(torch.device("cpu"))
        with seen_once(model, known):
            walked = walk(brief, Live(model), store, model.device, shown, scores, alone)
        student, read = models.sharing_copy(model), shown.held_out
        walked.apply_(student)
        processor = trimmed_processor(shown.processor, walked.plan)
        if request.recover is not None and training:
            student = copy.deepcopy(student)  # what stays whole is the original's until here
            judges = set(map(id, _judging(shown.samples)))
            samples = [each for each in training if id(each) not in judges] or list(training)
            learnt = max(round(len(samples) * request.recover.fraction), 1)
            steps = optimizer_steps(request.recover, learnt, walked.plan.decoder_ratio)
            few = replace(request.recover, max_steps=max(round(steps * TRIAL_SHARE), 2))
            teacher = model if few.needs_teacher else None
            before = [(each, each.dtype, each.requires_grad) for each in model.parameters()]
            try:  # a teacher that shares weights would be used up
                train(student, teacher, samples, few, processor, plan=walked.plan, share=False)
            finally:  # data types and flags, which training changes in a teacher
                for parameter, dtype, learns in before:
                    parameter.data = parameter.data.to(dtype)
                    parameter.requires_grad_(learns)
        if processor is not shown.processor:
            read = replace(shown, processor=processor).held_out
        with evaluating(student), seen_once(model, known):
            return answer_loss(student, read, like=shown.held_out)

    whole = requests_by_axis(request, shape)
    losses: dict[str, float] = {axis: tried(each) for axis, each in whole.items()}
    if request.fewer_tokens:
        fewer = requests_by_axis(replace(request, tokens=request.fewer_tokens), shape)
        best = min(fewer, key=lambda axis: losses.get(axis, math.inf))
        losses[best + TRIMMED] = tried(fewer[best])
    return losses


def best_axis(request: Request, losses: Mapping[str, float], shape: Anatomy) -> tuple[Request, str]:
    """Resolve the request along the axis with the least loss; of `EVEN` ones that is width."""
    # width kept as many answers or more (docs/results.md)
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if not finite:
        raise NumericalError(
            f"axis auto: every trial ended with a validation loss of NaN: {losses}"
        )
    most = (1 + EVEN) * min(finite)
    even = {name: loss for name, loss in losses.items() if loss <= most}
    best = min(even, key=lambda name: (name.partition(TRIMMED)[0] != "width", even[name]))
    others = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if name != best)
    axis, fewer, _ = best.partition(TRIMMED)
    if fewer:
        request = replace(request, tokens=request.fewer_tokens)
    note = f"axis {best}: validation loss {losses[best]:.4f} ({others})"
    return requests.along(request, cast(Axis, axis), shape), note


def recover_(
    request: Request,
    model: PreTrainedModel,
    processor: Any,
    plan: Plan,
    samples: Sequence[Sample],
    folder: Path,
) -> History:
    """Train a pruned model in place; ``folder`` keeps the state from which a restart resumes."""
    assert request.recover is not None
    teacher = None
    if request.recover.needs_teacher:
        teacher, whole = load_original(request, "cpu")  # what it shares with the model stays there
        if request.pictures is not None:
            request.pictures.apply_(teacher, whole)
    return train(model, teacher, list(samples), request.recover, processor, folder, plan)
