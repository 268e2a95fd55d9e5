"""`walk_` and `walk_checkpoint`: prune a model in one pass through its layers."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
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

    The decoder is gone through once. Each layer reads what the already smaller layers before it
    give. Units of attention are chosen by what their removal costs there when the others are
    refitted (criterion ``obs``), cut, and what is left of ``o_proj`` is refitted by least squares;
    then those of the MLP behind it, likewise. In the layer before removed ones, the MLP's output is
    fitted to what brings the hidden states to where the original has them after the removed layers.
    With ``local_steps``, the layer then learns alone from what the original gives there.

    Needs, beyond the model: the new weights, in host memory; the hidden states of all batches
    between two layers (twice where the original's are aimed at), on the model's device, in host
    memory or in files (`slimvlm.scoring.stores.StatesPlace`); and one layer's sums.

    Options are those of ``slimvlm compress``, or of `make_plan`. A ``plan`` says what to remove
    instead of these, ``ratio`` and ``axis``; ``scores`` of widths choose the units in place of the
    walk, and those of layers default to `DEFAULT_CRITERIA`. ``held_out`` batches confirm and judge:
    for ``repair="auto"`` and ``local_steps`` without any, every fourth batch is set aside.
    ``ridge`` is that of `slimvlm.pruning.repair.refit`.

    Raises:
        ConfigError: If an argument is unknown or the plan is for another model.
        DataError: If there are no batches, or too few to set some aside.
        NumericalError: If NaN or infinity appears; the message says in which layer. The model is
            not changed then.
    """
    _check(plan, token_weights, ratio=ratio, **options)
    fitted, judges, steps = _prepared(list(batches), held_out, repair, ridge, local_steps)
    models.require_full_precision(model.config, "pruned")
    models.require_undivided(model, "pruned")
    given = [scores] if isinstance(scores, Scores) else scores
    by = DEFAULT_CRITERIA["depth"][0]
    asked = (ratio, axis, allocation, lambda: [score(model, fitted, by, token_weights)])
    plans, chooses = plans_for(read_anatomy(model), given, *asked, plan=plan, **options)
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

    One decoder layer is in memory at a time, read from the safetensors files; on a GPU, it travels
    there. Hidden states between layers are kept where they fit (see `walk_`), new weights in a
    scratch folder; a run that was killed goes on after the last whole layer when it is started
    again with the same ``scratch``.

    ``out`` is the new folder, which ``force`` lets replace an existing one; ``say`` receives a line
    on where hidden states are kept. ``model``, ``dtype`` (``auto``: as stored), ``scratch``,
    ``device`` and ``trust_remote_code`` are as in `slimvlm.score_checkpoint`, and all other
    arguments those of `walk_`. Errors are those of these two and of `slimvlm.prune_checkpoint`.
    """
    require_free(out, force)
    place = device_named(device)
    _check(plan, token_weights, ratio=ratio, **options)
    fitted, judges, steps = _prepared(list(batches), held_out, repair, ridge, local_steps)
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
        how = (fitted, by, token_weights, folder / "scoring", say, device)
        asked = (given, ratio, axis, allocation, lambda: score_by_layer(opened, *how))
        plans, chooses = plans_for(read_anatomy(opened.model), *asked, plan=plan, **options)
        config = WalkConfig(plans, chooses, fitted, judges, steps, token_weights)
        walked = walk(opened, config, place, Scratch(folder / "walk"), say=say)
        weights = walked.weights
        prune_checkpoint(model, walked.plan, out, dtype, force, False, trust_remote_code, weights)
    return walked


def _check(plan: Plan | None, weights: TokenWeights | None, **options: Any) -> None:
    """Refuse options beside a plan, and token weights as those of scores."""
    for name, value in options.items():
        if plan is not None and value is not None:
            raise ConfigError(f"{name} {value}: the plan says that already")
    if weights is not None:
        criterion_named(WALKING, {}, weights)


def _prepared(
    batches: list[Batch], held_out: Iterable[Batch] | None, repair: str, ridge: float, count: int
) -> tuple[list[Batch], list[Batch], Steps]:
    """Check the steps; set held-out batches aside, if none are given and some are needed."""
    steps = Steps(repair=cast(Repair, repair), ridge=ridge, count=count)
    judges = list(held_out) if held_out is not None else []
    if (steps.repair == "auto" or steps.count) and not judges:
        batches, judges = split_validation(batches)
        if not judges:
            raise DataError("the walk needs held_out batches, or 4 calibration batches")
    if not batches:
        raise DataError("no calibration batch was given")
    return batches, judges, steps


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
    """Make the plans that a walk may follow; tell whether it chooses the units itself."""
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
    """Count the bytes of the hidden states that a walk keeps at one time; padding counts."""
    # embeddings, twice those after walked layers, half of plain slices; twice the original's
    return (3.5 + 2 * aims) * tokens * hidden_size * itemsize


def bytes_beside(source: Source, batches: Sequence[Batch], device: torch.device) -> float:
    """Measure by the largest batch what is kept of all beside hidden states: masks, pictures."""
    sizes = [sum(v.nbytes for v in b.values() if isinstance(v, torch.Tensor)) for b in batches]
    one = LayerwiseModel(source, Memory(torch.device("cpu")), device)
    one.embed([batches[sizes.index(max(sizes))]])
    kept = one.store.read("batches", 0, torch.device("cpu"))
    beside = sum(value.nbytes for name, value in kept.items() if name != "hidden")
    return beside * sum(sizes) / max(sizes)


def walk(
    source: Source,
    config: WalkConfig,
    device: torch.device,
    results: Store,
    states: Store | None = None,
    say: Say = silent,
) -> Walked:
    """Walk a model that is run layer by layer; it is the same afterwards."""
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
                beside = bytes_beside(source, everything, device)
                tokens = sum(valid_tokens(batch).numel() for batch in everything)
                size, aims = text_config_of(model.config).hidden_size, config.aims_at_original
                needed = beside + states_bytes(size, tokens, model.dtype.itemsize, aims)
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
            raise UnsupportedModelError(
                f"layer {index} has experts, whose neurons no walk chooses: score width by "
                "activation, wanda, flap, magnitude or random, or prune depth or experts"
            )
