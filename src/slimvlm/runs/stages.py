"""Run the stages of a recipe: calibrate, prune, recover, evaluate."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slimvlm.core.errors import NumericalError
from slimvlm.core.progress import Say, progress, silent
from slimvlm.data import read
from slimvlm.data.samples import VALIDATION_EVERY, Sample, split_validation
from slimvlm.models import load as models
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import evaluating
from slimvlm.models.pictures import seen_once
from slimvlm.planning.make import is_open, plan_tower
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import tower_of
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk import walk as walking
from slimvlm.pruning.walk.engine import Steps, WalkConfig, steps_for
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.walk.tower import joined, walk_tower, with_tower
from slimvlm.runs.cost import CALIBRATION_BATCH, TRIAL_SHARE, optimizer_steps
from slimvlm.runs.recipe import (
    TRIMMED,
    Recipe,
    criterion_options,
    judging,
    ranked_plan,
    tokens_alone,
)
from slimvlm.scoring.batches import answer_loss
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.layerwise import Live, Source
from slimvlm.scoring.score_model import calibration_batches, score
from slimvlm.scoring.stores import Memory, Scratch, Store
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import History
from slimvlm.training.recover import recover as train

TEST_BATCH = 4  # test samples in a batch
ORIGINAL, PRUNED, RECOVERED = "original", "pruned", "recovered"  # the compared models
_AXIS, _TRIAL_BATCHES = "axis", 12
EVEN = 0.02  # validation losses of two axes count as even below this relative difference


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
        return self._encoded(judging(self.samples), "encode validation samples")

    @cached_property
    def general(self) -> list[dict[str, Any]]:
        """Validation batches of general text, which decide nothing."""
        general = split_validation([s for s in self.samples if s.is_general and self.hold_out])[1]
        return self._encoded(general, "encode general text") if general else []

    def _encoded(self, samples: Sequence[Sample], description: str) -> list[dict[str, Any]]:
        """Encode batches of similar length."""
        alike = sorted(samples, key=lambda s: (len(s.images), read.estimated_length(s, 0)))
        return list(calibration_batches(self.processor, alike, CALIBRATION_BATCH, description))


def load_original(recipe: Recipe, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load the original model and its processor."""
    return models.load_as(recipe, recipe.model, device)


def calibrate(
    recipe: Recipe, model: PreTrainedModel, calibration: Calibration
) -> dict[str, Scores]:
    """Score a model by each criterion of the recipe but the one that the walk chooses by."""
    found = dict[str, Scores]()
    for name in recipe.scored_by:
        given: Any = ((), name)
        if CRITERIA[name].needs_data:
            given = (progress(calibration.fitted, name), name, recipe.weights_of_tokens)
        found[name] = score(model, *given, **criterion_options(recipe, name))
    return found


def walk(
    recipe: Recipe,
    source: Source,
    results: Store,
    device: torch.device,
    calibration: Calibration,
    scores: Sequence[Scores] = (),
    plan: Plan | None = None,
    say: Say = silent,
) -> Walked:
    """Choose the units to keep, unless a plan does, and compute their repaired weights."""
    shape = read_anatomy(source.model)
    if plan is None and recipe.scored_by == recipe.criterion:
        plan = ranked_plan(recipe, shape, scores)
    along = (recipe.axis or "width", recipe.allocation or "uniform")
    kept = {**recipe.of_units, "tokens": recipe.tokens}
    plans, chooses = walking.plans_for(shape, scores, recipe.ratio, *along, plan=plan, **kept)
    if not any(each.cuts_layers for each in plans):
        return Walked(plans[0])
    given = recipe.local_steps
    count = steps_for(plans[0], len(calibration.fitted)) if given is None else given
    steps = Steps(repair=recipe.repair, count=count)
    if not chooses and steps.repair == "none" and not count:
        return Walked(plans[0])
    held_out = calibration.held_out if recipe.hold_out else []
    weights = recipe.weights_of_tokens
    how = WalkConfig(plans, chooses, calibration.fitted, held_out, steps, weights)
    return walking.walk(source, how, device, results, say=say)


def behind_tower(
    recipe: Recipe,
    source: Source,
    results: Store,
    device: torch.device,
    calibration: Calibration,
    plan: Plan | None,
    say: Say = silent,
) -> tuple[Walked | None, Recipe, Source, Plan | None]:
    """Walk the vision tower, if some of it goes; return that, and what is left to do behind it."""
    its = None if plan is None else plan.tower
    if its is None and not recipe.tower_ratio:
        return None, recipe, source, plan
    shape = read_anatomy(source.model)
    if its is None or (recipe.data is None and is_open(its)):
        ratio, scores = recipe.tower_ratio if its is None else its.asked_ratio, None
        assert ratio is not None
        if recipe.data is None:
            with source.loaded("before", torch.device("cpu")):
                scores = score(tower_of(source.model), (), "magnitude")
        its = plan_tower(shape, ratio, scores)
    tower = Walked(its)
    if recipe.data is not None:
        steps = Steps(repair=recipe.repair, count=recipe.local_steps or 0)
        held_out = calibration.held_out if recipe.hold_out else []
        how = (calibration.fitted, held_out, steps, device, results, say)
        tower = walk_tower(source, its, *how, steps_open=recipe.local_steps is None)
    source = with_tower(source, tower)
    left = read_anatomy(source.model)
    if plan is not None:
        plan = replace(plan, tower=None, before=left)
    elif not (recipe.size or recipe.experts or recipe.tokens):  # nothing else goes
        plan = replace(Plan.everything(left), axis=recipe.axis or "width")
    return tower, replace(recipe, tower_ratio=0.0), source, plan


def prune_(
    recipe: Recipe,
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
    if plan is None and recipe.trials:
        if store.about(_AXIS, 0) is None:
            losses = try_axes(recipe, model, calibration, scores, training, known)
            store.write(_AXIS, 0, {}, losses)
        recipe, note = best_trial(recipe, store.about(_AXIS, 0))
        notes = (note,)
    given = (Live(model), store, model.device, calibration, plan, say)
    tower, recipe, source, plan = behind_tower(recipe, *given)
    plan = tokens_alone(recipe, read_anatomy(source.model)) if plan is None else plan
    with seen_once(source.model, known if tower is None else {}):
        walked = walk(recipe, source, store, model.device, calibration, scores, plan, say)
    walked = joined(walked, tower, read_anatomy(model))
    texts = calibration.general if walked.plan.tokens is None else []  # else they have other tokens
    before = answer_loss(model, texts) if texts else 0.0
    walked.apply_(model)
    if texts:
        after = answer_loss(model, texts)
        notes += (f"loss on general text (for information): {before:.4f} -> {after:.4f}",)
    return replace(walked, report=replace(walked.report, notes=(*notes, *walked.report.notes)))


def try_axes(
    recipe: Recipe,
    model: PreTrainedModel,
    calibration: Calibration,
    scores: Sequence[Scores],
    training: Sequence[Sample] = (),
    known: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Measure the validation loss after a short trial of each axis; the model stays unchanged.

    The best axis is tried again with a trimmed vocabulary, if the recipe has such trials. Losses,
    by `Recipe.name`, are in nats per token of the original's tokenizer.
    """
    shape, shown = read_anatomy(model), replace(calibration)  # with fewer batches, of all lengths
    shown.fitted = calibration.fitted[:: -max(len(calibration.fitted) // _TRIAL_BATCHES, 1)][::-1]
    shown.held_out = calibration.held_out
    known = {} if known is None else known
    # by the tower's ratio: its walk, the model behind it, features of pictures
    towers = dict[float, tuple[Walked | None, Source, dict[str, Any]]]()

    def tried(trial: Recipe) -> float:
        brief, store = replace(trial, local_steps=0), Memory(torch.device("cpu"))
        if brief.tower_ratio not in towers:
            found = behind_tower(brief, Live(model), store, model.device, shown, None)
            own = known if found[0] is None else {}
            towers[brief.tower_ratio] = (found[0], found[2], own)
        tower, source, features = towers[brief.tower_ratio]
        brief = replace(brief, tower_ratio=0.0)
        alone = tokens_alone(brief, read_anatomy(source.model))
        with seen_once(source.model, features):
            walked = walk(brief, source, store, model.device, shown, scores, alone)
        walked = joined(walked, tower, shape)
        student, read = models.sharing_copy(model), shown.held_out
        walked.apply_(student)
        processor = trimmed_processor(shown.processor, walked.plan)
        if trial.recover is not None and training:
            student = copy.deepcopy(student)  # what stays whole is the original's until here
            judges = set(map(id, judging(shown.samples)))
            samples = [each for each in training if id(each) not in judges] or list(training)
            learnt = max(round(len(samples) * trial.recover.fraction), 1)
            steps = optimizer_steps(trial.recover, learnt, walked.plan.decoder_ratio)
            few = replace(trial.recover, max_steps=max(round(steps * TRIAL_SHARE), 2))
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

    losses = {each.name: tried(each) for each in recipe.trials if not each.is_trimmed}
    trimmed = [each for each in recipe.trials if each.is_trimmed]
    if trimmed:
        best = min(trimmed, key=lambda each: losses.get(each.name.removesuffix(TRIMMED), math.inf))
        losses[best.name] = tried(best)
    return losses


def best_trial(recipe: Recipe, losses: Mapping[str, float]) -> tuple[Recipe, str]:
    """Choose the trial with the least loss; of `EVEN` ones that is width."""
    # width kept as many answers or more (docs/results.md)
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if not finite:
        raise NumericalError(
            f"axis auto: every trial ended with a validation loss of NaN: {losses}"
        )
    most = (1 + EVEN) * min(finite)
    even = [each for each in recipe.trials if losses.get(each.name, math.inf) <= most]
    best = min(even, key=lambda each: (each.axis != "width", losses[each.name]))
    others = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if name != best.name)
    return best, f"axis {best.name}: validation loss {losses[best.name]:.4f} ({others})"


def recover_(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: Any,
    plan: Plan,
    samples: Sequence[Sample],
    folder: Path,
) -> History:
    """Train a pruned model in place; ``folder`` keeps the state from which a restart resumes."""
    assert recipe.recover is not None
    teacher = None
    if recipe.recover.needs_teacher:
        teacher, whole = load_original(recipe, "cpu")  # what it shares with the model stays there
        if recipe.pictures is not None:
            recipe.pictures.apply_(teacher, whole)
    return train(model, teacher, list(samples), recipe.recover, processor, folder, plan)
