"""Prune a model into a checkpoint: in memory, or with one layer in memory at a time."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slimvlm.core import files
from slimvlm.core.documents import asked
from slimvlm.core.errors import ConfigError
from slimvlm.core.progress import Say
from slimvlm.data.general import identity_of_general_text
from slimvlm.data.read import identity_of_data
from slimvlm.data.samples import Sample
from slimvlm.evaluation import on_data
from slimvlm.evaluation.on_data import DataResult, Predictions, evaluate_data, result_of
from slimvlm.models import load as models
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.devices import device_named
from slimvlm.models.hidden import evaluating, head_weights_of
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import CardFacts, prune_checkpoint, save
from slimvlm.pruning.tokens import trimmed_processor
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.walk.tower import joined
from slimvlm.runs import stages
from slimvlm.runs.recipe import Recipe, SampleSplit, criterion_options
from slimvlm.runs.stages import ORIGINAL, PRUNED, Calibration
from slimvlm.runs.tables import held_out_text
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.layerwise import HIDDEN, LayerwiseModel, LazyCheckpoint, open_checkpoint
from slimvlm.scoring.score_model import score_by_layer
from slimvlm.scoring.stores import Scratch, StatesPlace
from slimvlm.scoring.unit_scores import Scores

HELD_OUT_FILE = "slimvlm_held_out.json"


def prune_in_memory(
    recipe: Recipe, plan: Plan | None, samples: SampleSplit, out: Path, force: bool, say: Say
) -> tuple[Walked, dict[str, DataResult]]:
    """Prune a model and write it; also return results on test samples."""
    loaded, processor = stages.load_original(recipe)
    models.require_undivided(loaded, "pruned")
    held_out: dict[str, DataResult] = {}
    if unseen := samples.test:
        how = (stages.TEST_BATCH, ORIGINAL, head_weights_of(loaded))  # which outlive it
        predicted = on_data.predictions_of(loaded, processor, unseen, *how)
        held_out[ORIGINAL] = result_of(predicted, unseen, loaded.device)
    calibration = Calibration(processor, samples.calibration, recipe.hold_out)
    scores = [] if plan else list(stages.calibrate(recipe, loaded, calibration).values())
    walked = stages.prune_(recipe, loaded, calibration, scores, plan, say=say)
    processor, also = trimmed_processor(processor, walked.plan), None
    if unseen:
        found = evaluate_data(loaded, processor, unseen, predicted, name=PRUNED)
        held_out[PRUNED] = found
        also = lambda folder: found.save(folder / HELD_OUT_FILE)  # noqa: E731
    base, text = loaded.config._name_or_path, held_out_text(held_out)
    facts = CardFacts(base=base, name=out.name, held_out=text, data=recipe.data)
    save(loaded, processor, out, walked.plan, force, also=also, facts=facts)
    return walked, held_out


def opened(recipe: Recipe) -> tuple[LazyCheckpoint, Any]:
    """Open the original to read it layer by layer, and load its processor."""
    for option in ("attn_implementation", "device_map"):
        if (value := getattr(recipe, option)) is not None:
            raise ConfigError(
                f"{option} {value!r} conflicts with --low-memory: leave one of them out"
            )
    found = open_checkpoint(recipe.model, recipe.dtype, recipe.trust_remote_code)
    name, described = str(found.folder), found.model.config
    return found, models.load_processor(name, described, recipe.trust_remote_code)


def score_in_memory(recipe: Recipe, samples: Sequence[Sample]) -> list[Scores]:
    """Load the original and score it."""
    loaded, processor = stages.load_original(recipe)
    calibration = Calibration(processor, samples, hold_out=False)
    return list(stages.calibrate(recipe, loaded, calibration).values())


def score_from_files(
    recipe: Recipe, opened: LazyCheckpoint, calibration: Calibration, scratch: Path, say: Say
) -> list[Scores]:
    """Score like `slimvlm.runs.stages.calibrate`, with one layer in memory at a time."""
    how = {name: criterion_options(recipe, name) for name in recipe.scored_by}
    if not how:
        return []
    batches = calibration.fitted if any(CRITERIA[name].needs_data for name in how) else ()
    weights = recipe.weights_of_tokens
    return score_by_layer(opened, batches, how, weights, scratch, say, recipe.device)


def prune_from_files(
    recipe: Recipe,
    plan: Plan | None,
    samples: SampleSplit,
    out: Path,
    scratch: Path,
    force: bool,
    say: Say,
) -> tuple[Walked, dict[str, DataResult]]:
    """Prune with one layer in memory at a time; the same scratch folder resumes."""
    unseen = samples.test
    device, (source, processor) = device_named(recipe.device), opened(recipe)
    data = [] if recipe.data is None else [identity_of_data(recipe.data)]
    data += [identity_of_general_text()] if recipe.general_text else []
    noted = {"asked": asked(recipe), "data": data, **source.identity}
    noted["plan"] = None if plan is None else plan.to_dict()
    Scratch(scratch).keep_if_same(noted)

    calibration = Calibration(processor, samples.calibration, recipe.hold_out)
    scores: list[Scores] = []
    if plan is None:
        stored = scratch / "scored"
        if not stored.exists():
            found = score_from_files(recipe, source, calibration, scratch / "scoring", say)
            with files.new_folder(stored) as folder:
                for each in found:
                    each.save(folder / each.criterion)
        scores = [Scores.load(stored / name) for name in recipe.scored_by]

    held_out: dict[str, DataResult] = {}
    if unseen:
        path, at = scratch / "said" / "original.safetensors", scratch / "unseen"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)  # a folder, which another request removes
            _predictions(ORIGINAL, source, processor, unseen, at, device).save(path)
        predicted = Predictions.load(path)
        held_out[ORIGINAL] = result_of(predicted, unseen, device)

    results = Scratch(scratch / "walk")
    given = (source, results, device, calibration, plan, say)
    tower, rest, small, plan = stages.behind_tower(recipe, *given)
    walked = stages.walk(rest, small, results, device, calibration, scores, plan, say)
    walked = joined(walked, tower, read_anatomy(source.model))

    def describe(folder: Path) -> CardFacts:
        if unseen:
            smaller = open_checkpoint(folder, recipe.dtype)
            words = trimmed_processor(processor, walked.plan)
            said = _predictions(PRUNED, smaller, words, unseen, at, device)
            held_out[PRUNED] = result_of(said, unseen, device, predicted)
            held_out[PRUNED].save(folder / HELD_OUT_FILE)
        base, text = str(source.model.config._name_or_path), held_out_text(held_out)
        return CardFacts(base=base, name=out.name, held_out=text, data=recipe.data)

    trusted, where = recipe.trust_remote_code, (recipe.model, walked.plan, out, recipe.dtype, force)
    weights = walked.weights, {} if tower is None else tower.weights
    prune_checkpoint(*where, False, trusted, *weights, describe)
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
            with source.loaded(index, device):
                runner.pass_on(HIDDEN, index, index + 1, runner.places)
            store.drop(f"{HIDDEN}-{index}")
        with source.loaded("after", device):
            states = (
                (places[i], parts.norm(runner.state(HIDDEN, last, i)), batch["labels"])
                for i, batch in ((batch["place"], batch) for batch in runner.batches())
            )
            head = head_weights_of(runner.model)
            found = Predictions.of(name, states, head, processor)
    shutil.rmtree(folder, ignore_errors=True)
    return found
