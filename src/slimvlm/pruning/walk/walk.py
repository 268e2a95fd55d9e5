"""`walk_` and `walk_checkpoint`: prune a model in one pass through its layers."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError, UnsupportedModelError
from slimvlm.core.files import require_free
from slimvlm.core.options import Repair
from slimvlm.core.progress import Say, silent
from slimvlm.data.roles import valid_tokens
from slimvlm.data.samples import split_validation
from slimvlm.models import load as models
from slimvlm.models.anatomy import WIDTH_UNITS, Anatomy, read_anatomy
from slimvlm.models.devices import device_named, digest_of_tensors
from slimvlm.models.hidden import device_of, evaluating, frozen
from slimvlm.models.parts import text_config_of
from slimvlm.planning.make import make_plan, width_candidates
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import require_expressible
from slimvlm.pruning.repair import RIDGE
from slimvlm.pruning.save import prune_checkpoint
from slimvlm.pruning.walk.engine import Steps, Walk, WalkConfig
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.walk.streams import Streams
from slimvlm.scoring.batches import Batch, TokenWeights
from slimvlm.scoring.criteria import DEFAULT_CRITERIA, criterion_named
from slimvlm.scoring.layerwise import LayerwiseModel, Live, Source, open_checkpoint
from slimvlm.scoring.score_model import score, score_by_layer
from slimvlm.scoring.stores import Memory, Scratch, StatesPlace, Store, scratch_folder
from slimvlm.scoring.unit_scores import Scores

WALKING = "obs"  # the criterion by which a walk chooses


def walk_(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    ratio: float | None = None,
    axis: str = "width",
    *,
    plan: Plan | None = None,
    scores: Scores | Sequence[Scores] = (),
    allocation: str = "balanced",
    repair: str = "auto",
    held_out: Iterable[Batch] | None = None,
    local_steps: int = 0,
    token_weights: TokenWeights | None = None,
    ridge: float = RIDGE,
    **options: Any,
) -> Walked:
    """Prune a model in one pass through its layers, in place.

    Each layer reads the hidden states after the already pruned layers before it. The attention
    units are chosen whose removal costs least there once the others are refitted (criterion
    ``obs``); the layer is cut, and ``o_proj`` refitted by least squares. Then the same is done with
    the MLP. At a seam (the layer before removed ones) the MLP's output is fitted to the original's
    hidden states after the removed layers. With ``local_steps``, the layer is then trained alone
    towards the original's hidden states.

    Memory, beyond the model: the new weights, in host memory; the hidden states of all batches
    between two layers (twice where the original's are a target), on the model's device, in host
    memory or in files (`slimvlm.scoring.stores.StatesPlace`); and one layer's sums.

    Options are those of ``slimvlm compress``, or of `make_plan`. A ``plan`` takes the place of
    these, of ``ratio`` and of ``axis``. ``scores`` of widths choose the units instead of the walk;
    those of layers default to `DEFAULT_CRITERIA`. ``held_out`` are validation batches, which
    confirm and judge: for ``repair="auto"`` and ``local_steps`` without any, every fourth batch is
    set aside. ``ridge`` is that of `slimvlm.pruning.repair.refit`.

    Raises:
        ConfigError: If an argument is unknown or the plan is for another model.
        DataError: If there are no batches, or too few to set some aside.
        NumericalError: If NaN or infinity appears, with the layer's number. The model is unchanged.
    """
    how = (repair, ridge, local_steps, plan, token_weights)
    fitted, judges, steps = _prepared(batches, held_out, *how, ratio=ratio, **options)
    models.require_full_precision(model.config, "pruned")
    models.require_undivided(model, "pruned")
    given = [scores] if isinstance(scores, Scores) else scores
    by = DEFAULT_CRITERIA["depth"][0]
    requested = (ratio, axis, allocation, lambda: [score(model, fitted, by, token_weights)])
    plans, chooses = plans_for(read_anatomy(model), given, *requested, plan=plan, **options)
    config = WalkConfig(plans, chooses, fitted, judges, steps, token_weights)
    walked = walk(Live(model), config, device_of(model), Memory(torch.device("cpu")))
    walked.apply_(model)
    return walked


def walk_checkpoint(
    model: str | Path,
    batches: Iterable[Batch],
    out: str | Path,
    ratio: float | None = None,
    axis: str = "width",
    *,
    plan: Plan | None = None,
    scores: Scores | Sequence[Scores] = (),
    allocation: str = "balanced",
    repair: str = "auto",
    held_out: Iterable[Batch] | None = None,
    local_steps: int = 0,
    token_weights: TokenWeights | None = None,
    ridge: float = RIDGE,
    dtype: str = "auto",
    scratch: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    say: Say = silent,
    device: str | torch.device | None = None,
    **options: Any,
) -> Walked:
    """`slimvlm.walk_` and `slimvlm.save` for a checkpoint that does not fit in memory.

    One decoder layer is in memory at a time, read from the safetensors files. Hidden states between
    layers are kept where they fit (see `walk_`), new weights in a scratch folder; a killed run
    resumes after the last whole layer when it is started again with the same ``scratch``.

    ``say`` receives a line on where hidden states are kept. ``out`` and ``force`` are as in
    `slimvlm.save`, ``model``, ``dtype``, ``scratch``, ``device`` and ``trust_remote_code`` as in
    `slimvlm.score_checkpoint`, all other arguments as in `walk_`. Errors are those of these three.
    """
    require_free(out, force)
    place = device_named(device)
    how = (repair, ridge, local_steps, plan, token_weights)
    fitted, judges, steps = _prepared(batches, held_out, *how, ratio=ratio, **options)
    given = [scores] if isinstance(scores, Scores) else scores
    opened = open_checkpoint(model, dtype, trust_remote_code)
    with scratch_folder(scratch) as folder:
        request = {
            **opened.identity,
            "batches": [[*map(digest_of_tensors, part)] for part in (fitted, judges)],
            "asked": repr((ratio, axis, plan, allocation, token_weights, steps, options)),
            "scores": [digest_of_tensors(each.tensors()) for each in given],
        }
        Scratch(folder).keep_if_same("request.json", request)
        by: dict[str, Any] = {DEFAULT_CRITERIA["depth"][0]: {}}
        scoring = (fitted, by, token_weights, folder / "scoring", say, device)
        requested = (ratio, axis, allocation, lambda: score_by_layer(opened, *scoring))
        anatomy = read_anatomy(opened.model)
        plans, chooses = plans_for(anatomy, given, *requested, plan=plan, **options)
        config = WalkConfig(plans, chooses, fitted, judges, steps, token_weights)
        walked = walk(opened, config, place, Scratch(folder / "walk"), say=say)
        weights = walked.weights
        prune_checkpoint(model, walked.plan, out, dtype, force, False, trust_remote_code, weights)
    return walked


def _prepared(
    batches: Iterable[Batch],
    held_out: Iterable[Batch] | None,
    repair: str,
    ridge: float,
    count: int,
    plan: Plan | None,
    token_weights: TokenWeights | None,
    **options: Any,
) -> tuple[list[Batch], list[Batch], Steps]:
    """Check the options; set validation batches aside, if none are given and some are needed."""
    for name, value in options.items():
        if plan is not None and value is not None:
            raise ConfigError(f"{name} {value} conflicts with the plan: leave one of them out")
    if token_weights is not None:
        criterion_named(WALKING, {}, token_weights)
    steps = Steps(repair=cast(Repair, repair), ridge=ridge, count=count)
    fitted, judges = list(batches), [] if held_out is None else list(held_out)
    if (steps.repair == "auto" or steps.count) and not judges:
        fitted, judges = split_validation(fitted)
        if not judges:
            raise DataError("the walk needs held_out batches, or 4 calibration batches")
    if not fitted:
        raise DataError("no calibration batch was given")
    return fitted, judges, steps


def plans_for(
    anatomy: Anatomy,
    scores: Sequence[Scores],
    ratio: float | None,
    axis: str,
    allocation: str,
    score_layers: Callable[[], list[Scores]] = list,
    *,
    plan: Plan | None = None,
    **options: Any,
) -> tuple[list[Plan], bool]:
    """Make the plans that a walk may follow; return whether it chooses the units itself."""
    if plan is not None:
        return [plan], False
    if ratio is None:
        raise ConfigError("a walk needs a ratio or a plan")
    if axis != "width" and not any(each.layer is not None for each in scores):
        scores = [*scores, *score_layers()]
    has_widths = any(given.of(unit) is not None for given in scores for unit in WIDTH_UNITS)
    if axis == "depth" or has_widths:
        even = "uniform" if allocation == "balanced" else allocation
        return [make_plan(anatomy, scores, ratio, axis, even, **options)], False
    return width_candidates(anatomy, scores, ratio, axis, WALKING, allocation, **options), True


def states_bytes(hidden_size: int, tokens: float, itemsize: int, aims: bool) -> float:
    """Count the bytes of the hidden states, padding included, that a walk keeps at one time."""
    # embeddings, twice those after walked layers, half of plain slices; twice the original's
    return (3.5 + 2 * aims) * tokens * hidden_size * itemsize


def walk(
    source: Source,
    config: WalkConfig,
    device: torch.device,
    results: Store,
    states: Store | None = None,
    say: Say = silent,
) -> Walked:
    """Walk a model that is run layer by layer; it does not change."""
    model, everything = source.model, [*config.batches, *config.held_out]
    if all(plan.tokens is not None and not plan.cuts_layers for plan in config.plans):
        return Walked(config.plans[0])
    for plan in config.plans:
        require_expressible(model, plan)
        if config.chooses:
            require_choosable(plan)
    with evaluating(model), frozen(model):
        if states is None:
            # shared keys, and the masks of flex_attention, which are no tensors, stay on the device
            with suppress(UnsupportedModelError):
                tensors = ([v for v in b.values() if isinstance(v, Tensor)] for b in everything)
                sizes = [sum(value.nbytes for value in each) for each in tensors]
                # the largest batch tells what is kept but hidden states: masks, images
                one = LayerwiseModel(source, Memory(torch.device("cpu")), device)
                one.embed([everything[sizes.index(max(sizes))]])
                kept = one.store.read("batches", 0, torch.device("cpu"))
                others = sum(value.nbytes for name, value in kept.items() if name != "hidden")
                del one, kept  # which hold the batch
                tokens = sum(valid_tokens(batch).numel() for batch in everything)
                size, aims = text_config_of(model.config).hidden_size, config.aims_at_original
                needed = states_bytes(size, tokens, model.dtype.itemsize, aims)
                needed += others * sum(sizes) / max(sizes)
                place = StatesPlace.of(needed, device)
                say(f"hidden states: {place}")
                folder = results.folder / "states" if isinstance(results, Scratch) else None
                states = place.store(folder)
        states = Memory() if states is None else states
        runner = LayerwiseModel(source, states, device)
        runner.embed(everything)
        fitted = range(len(config.batches))
        held_out = range(len(fitted), len(everything))
        streams = Streams(runner, fitted, held_out, config.token_weights)
        if not any(bool(streams.weights[place].any()) for place in fitted):
            raise DataError("no calibration token has a weight above 0")
        return Walk(streams, results, config).run()


def require_choosable(plan: Plan) -> None:
    """Refuse to choose neurons of experts, which are no modules with an input of their own."""
    for index in plan.layers:
        shape = plan.before.layers[index]
        if shape.expert_neuron_params and len(plan.neurons[index]) < shape.intermediate_size:
            cure = "activation, wanda, flap, magnitude or random, or prune depth or experts"
            told = f"layer {index} has experts, whose neurons no walk chooses"
            raise UnsupportedModelError(f"{told}: score width by {cure}")
