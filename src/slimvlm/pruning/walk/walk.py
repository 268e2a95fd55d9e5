"""`walk_` and `walk_checkpoint`: prune a model in one pass through its layers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
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
from slimvlm.pruning.walk.tower import joined, walk_tower, with_tower
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
    token_weights: TokenWeights | None = None,
    **options: Any,
) -> Walked:
    """Prune a model in one pass through its layers, in place.

    Each layer reads the hidden states after the already pruned layers before it. The attention
    units are chosen whose removal costs least there once the others are refitted (criterion
    ``obs``); the layer is cut, and ``o_proj`` refitted by least squares. Then the same is done with
    the MLP. At a seam (the layer before removed ones) the MLP's output is fitted to the original's
    hidden states after the removed layers. With ``local_steps``, the layer is then trained alone
    towards the original's hidden states. With ``tower_ratio`` the vision tower is walked first,
    over the batches' pictures; the decoder then reads its new features.

    Memory, beyond the model: the new weights, in host memory; the hidden states of all batches
    between two layers (twice where the original's are a target), on the model's device, in host
    memory or in files (`slimvlm.scoring.stores.StatesPlace`); and one layer's sums.

    Args:
        model: A model in full precision with all its weights in place.
        batches: Model inputs, for choices and fits.
        ratio: As in `slimvlm.make_plan`.
        axis: As in `slimvlm.make_plan`.
        token_weights: Weights of tokens by role; without them all weigh 1.
        options: ``repair`` (``auto``), ``local_steps`` (0) and ``allocation`` (``balanced``) are
            those of ``slimvlm compress``; ``held_out`` are validation batches, which confirm and
            judge: for ``repair="auto"`` and ``local_steps`` without any, every fourth batch is set
            aside; ``ridge`` is that of `slimvlm.pruning.repair.refit`. ``scores`` of widths choose
            the units instead of the walk; those of layers default to `DEFAULT_CRITERIA`. All others
            are those of `slimvlm.make_plan`; a ``plan`` takes the place of these, of ``ratio`` and
            of ``axis``.

    Raises:
        ConfigError: If an argument is unknown or the plan is for another model.
        DataError: If there are no batches, or too few to set some aside.
        NumericalError: If NaN or infinity appears, with the layer's number. The model is unchanged.
    """
    models.require_full_precision(model.config, "pruned")
    models.require_undivided(model, "pruned")
    source, store, by = Live(model), Memory(torch.device("cpu")), DEFAULT_CRITERIA["depth"][0]
    found = lambda fitted: [score(model, fitted, by, token_weights)]  # noqa: E731
    walking = _checked(batches, ratio, axis, token_weights, **options)
    walked = walking(source, device_of(model), store, found)
    walked.apply_(model)
    return walked


def walk_checkpoint(
    model: str | Path,
    batches: Iterable[Batch],
    out: str | Path,
    ratio: float | None = None,
    axis: str = "width",
    *,
    token_weights: TokenWeights | None = None,
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
    place, opened = device_named(device), open_checkpoint(model, dtype, trust_remote_code)
    data, held_out = list(batches), [*(options.pop("held_out", None) or ())]
    scores = _listed(options.pop("scores", ()))
    given: dict[str, Any] = {"scores": scores, "held_out": held_out, "say": say}
    # checked before the scratch folder of another request is emptied
    walking = _checked(data, ratio, axis, token_weights, **given, **options)
    with scratch_folder(scratch) as folder:
        request = {
            **opened.identity,
            "batches": [[*map(digest_of_tensors, part)] for part in (data, held_out)],
            "asked": repr((ratio, axis, token_weights, sorted(options.items()))),
            "scores": [digest_of_tensors(each.tensors()) for each in scores],
        }
        Scratch(folder).keep_if_same(request)
        store = Scratch(folder / "walk")
        by: dict[str, Any] = {DEFAULT_CRITERIA["depth"][0]: {}}
        scoring = (by, token_weights, folder / "scoring", say, device)
        found = lambda fitted: score_by_layer(opened, fitted, *scoring)  # noqa: E731
        walked = walking(opened, place, store, found)
        weights = walked.weights
        of_tower = {} if walked.tower is None else walked.tower.weights
        trusted = trust_remote_code
        prune_checkpoint(model, walked.plan, out, dtype, force, False, trusted, weights, of_tower)
    return walked


def _checked(
    batches: Iterable[Batch],
    ratio: float | None,
    axis: str,
    token_weights: TokenWeights | None,
    *,
    plan: Plan | None = None,
    scores: Scores | Sequence[Scores] = (),
    allocation: str = "balanced",
    repair: str = "auto",
    held_out: Iterable[Batch] | None = None,
    local_steps: int = 0,
    ridge: float = RIDGE,
    say: Say = silent,
    **options: Any,
) -> Callable[..., Walked]:
    """Check the arguments of `walk_`, and set validation batches aside if needed.

    Returns a function that walks a source of layers on a device; results go to a store, and scores
    of layers come from a function of batches.
    """
    for name, value in {"ratio": ratio, **options}.items():
        if plan is not None and value is not None:
            raise ConfigError(f"{name} {value} conflicts with the plan: leave one of them out")
    if token_weights is not None:
        criterion_named(WALKING, {}, token_weights)
    steps = Steps(repair=cast(Repair, repair), ridge=ridge, count=local_steps)
    fitted, judges = list(batches), [*(held_out or ())]
    if (steps.repair == "auto" or steps.count) and not judges:
        fitted, judges = split_validation(fitted)
        if not judges:
            raise DataError("the walk needs held_out batches, or 4 calibration batches")
    if not fitted:
        raise DataError("no calibration batch was given")

    def walking(
        source: Source,
        device: torch.device,
        results: Store,
        score_layers: Callable[[Sequence[Batch]], list[Scores]],
    ) -> Walked:
        requested = (ratio, axis, allocation, lambda: score_layers(fitted))
        anatomy = read_anatomy(source.model)
        plans, chooses = plans_for(anatomy, _listed(scores), *requested, plan=plan, **options)
        config = WalkConfig(plans, chooses, fitted, judges, steps, token_weights)
        return walk(source, config, device, results, say=say)

    return walking


def _listed(scores: Scores | Sequence[Scores]) -> list[Scores]:
    return [scores] if isinstance(scores, Scores) else list(scores)


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
    for plan in config.plans:
        require_expressible(source.model, plan)
        if config.chooses:
            require_choosable(plan)
    tower, before = None, config.plans[0].before
    if (its := config.plans[0].tower) is not None:
        how = (config.batches, config.held_out, config.steps, device, results, say)
        tower = walk_tower(source, its, *how)
        source = with_tower(source, tower)
        bare = read_anatomy(source.model)
        plans = [replace(plan, tower=None, before=bare) for plan in config.plans]
        config = replace(config, plans=plans)
    model, (plan, *_) = source.model, config.plans
    is_cut = any(each.cuts_layers for each in config.plans)
    if not is_cut and (plan.tokens is not None or tower is not None):
        return joined(Walked(plan), tower, before)
    with evaluating(model), frozen(model):
        if states is None:
            states = _states_store(source, config, device, results, say)
        streams = Streams(source, states, device, config.token_weights)
        streams.embed_all(config.batches, config.held_out)
        if not any(bool(streams.weights[place].any()) for place in streams.fitted):
            raise DataError("no calibration token has a weight above 0")
        return joined(Walk(streams, results, config).run(), tower, before)


def _states_store(
    source: Source, config: WalkConfig, device: torch.device, results: Store, say: Say
) -> Store:
    """Make a store of hidden states where they fit, by what is kept of the largest batch."""
    everything, cpu = [*config.batches, *config.held_out], torch.device("cpu")
    tensors = ([v for v in batch.values() if isinstance(v, Tensor)] for batch in everything)
    sizes = [sum(value.nbytes for value in each) for each in tensors]
    one = LayerwiseModel(source, Memory(cpu), device)
    try:
        one.embed([everything[sizes.index(max(sizes))]])
    except UnsupportedModelError:
        # shared keys, and the masks of flex_attention, which are no tensors, stay on the device
        return Memory()
    kept = one.store.read("batches", 0, cpu)  # also masks, and features of images
    others = sum(value.nbytes for name, value in kept.items() if name != "hidden")
    del one, kept  # before free memory is measured
    tokens = sum(valid_tokens(batch).numel() for batch in everything)
    size, itemsize = text_config_of(source.model.config).hidden_size, source.model.dtype.itemsize
    needed = states_bytes(size, tokens, itemsize, config.aims_at_original)
    place = StatesPlace.of(needed + others * sum(sizes) / max(sizes), device)
    say(f"hidden states: {place}")
    return place.store(results.folder / "states" if isinstance(results, Scratch) else None)


def require_choosable(plan: Plan) -> None:
    """Refuse to choose neurons of experts, which are no modules with an input of their own."""
    for index in plan.layers:
        shape = plan.before.layers[index]
        if shape.expert_neuron_params and len(plan.neurons[index]) < shape.intermediate_size:
            cure = "activation, wanda, flap, magnitude or random, or prune depth or experts"
            told = f"layer {index} has experts, whose neurons no walk chooses"
            raise UnsupportedModelError(f"{told}: score width by {cure}")
