"""`walk_`: prune a model in one pass. Choose, cut, refit and distil it layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError, UnsupportedModelError
from slimvlm.core.progress import Say, silent
from slimvlm.models.anatomy import WIDTH_UNITS, Anatomy, read_anatomy
from slimvlm.models.classes import require_full_precision, require_undivided
from slimvlm.models.hidden import device_of, evaluating
from slimvlm.models.parts import shares_keys, text_config_of
from slimvlm.planning.candidates import width_candidates
from slimvlm.planning.make import make_plan
from slimvlm.planning.mask import require_match
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import require_expressible
from slimvlm.pruning.walk.distil import LocalSteps
from slimvlm.pruning.walk.engine import Walk, aims_at_original
from slimvlm.pruning.walk.layer import Steps
from slimvlm.pruning.walk.result import Walked
from slimvlm.pruning.walk.streams import Streams
from slimvlm.pruning.writers import RIDGE
from slimvlm.scoring.batches import Batch, TokenWeights, frozen
from slimvlm.scoring.criteria import DEFAULT_CRITERIA
from slimvlm.scoring.layerwise.runner import LayerwiseModel, Live, Source
from slimvlm.scoring.layerwise.stores import Memory, Scratch, StatesPlace, Store
from slimvlm.scoring.score_model import score
from slimvlm.scoring.unit_scores import Scores

WALKING = "obs"
"""The criterion by which a walk chooses."""


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
    memory or in files (`slimvlm.scoring.layerwise.stores.StatesPlace`); and one layer's sums.

    Args:
        model: The original model.
        batches: Calibration data: model inputs with ``labels``.
        ratio: Share of the backbone to remove, as for `make_plan`.
        axis: ``depth``, ``width`` or ``both``.
        plan: What to remove, instead of a ratio and an axis: nothing is chosen then.
        scores: Scores of layers, for ``depth`` and ``both``; by default those of
            `DEFAULT_CRITERIA`. If they score widths, too, nothing is chosen.
        allocation: As for `make_plan`, or ``balanced``: as many KV groups in each layer as costs a
            few layers least when they are tried, and neurons for the rest.
        repair: ``none``, ``width`` (attention and MLP outputs), ``depth`` (seams), ``both``, or
            ``auto``: both, as far as held-out tokens confirm, and judged at the end by held-out
            answers: the result is never worse there than without repair.
        held_out: Batches that confirm and judge. For ``auto`` and ``local_steps`` without any,
            every fifth batch is set aside.
        local_steps: Optimizer steps on each layer; see `slimvlm.pruning.walk.distil`.
        token_weights: Weight of ``image``, ``prompt`` and ``answer`` tokens in choice and fit; all
            1 if None.
        ridge: See `slimvlm.pruning.least_squares.refit`.
        **options: Further arguments of `make_plan`.

    Returns:
        The plan, a report of every layer, and the weights that are no slices of the original's.

    Raises:
        ConfigError: If an argument is unknown or the plan is for another model.
        DataError: If there are no batches, or too few to set some aside.
        NumericalError: If NaN or infinity appears; the message says in which layer. The model is
            not changed then.
    """
    steps = Steps(repair=repair, ridge=ridge, local=LocalSteps(count=local_steps))
    fitted, judges = split_batches(list(batches), held_out, steps)
    given = [scores] if isinstance(scores, Scores) else list(scores)
    require_full_precision(model.config, "pruned")
    require_undivided(model, "pruned")
    if plan is None:

        def score_layers() -> list[Scores]:
            return [score(model, fitted, DEFAULT_CRITERIA["depth"][0], token_weights)]

        shape = read_anatomy(model)
        plans, chooses = plans_for(shape, given, ratio, axis, allocation, score_layers, **options)
    else:
        require_match(model, plan)
        plans, chooses = [plan], False
    how = (plans, chooses, fitted, judges, steps, token_weights, Memory(torch.device("cpu")))
    walked = walk_batches(Live(model), device_of(model), *how)
    walked.apply_(model)
    return walked


def split_batches(
    batches: list[Batch], held_out: Iterable[Batch] | None, steps: Steps
) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit to, and those to judge by.

    Raises:
        DataError: If there are none, or too few to set some aside.
    """
    judges = list(held_out) if held_out is not None else []
    if (steps.repair == "auto" or steps.local.count) and not judges:
        batches, judges = [b for i, b in enumerate(batches) if i % 5 != 4], batches[4::5]
        if not judges:
            raise DataError("the walk needs held_out batches, or 5 calibration batches")
    if not batches:
        raise DataError("no calibration batch was given")
    return batches, judges


def plans_for(
    anatomy: Anatomy,
    scores: Sequence[Scores],
    ratio: float | None,
    axis: str,
    allocation: str,
    score_layers: Callable[[], list[Scores]] = list,
    **options: Any,
) -> tuple[list[Plan], bool]:
    """The plans that a walk may follow, and whether it chooses the units itself.

    Args:
        anatomy: The model's.
        scores: Of layers; if they are of widths, too, they decide.
        ratio: As for `make_plan`.
        axis: As for `make_plan`.
        allocation: As for `walk_`.
        score_layers: Scores layers, where some are to go and nothing says which.
        **options: Further arguments of `make_plan`.

    Raises:
        ConfigError: If there is no ratio; nothing is scored then.
    """
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
    """Bytes of the hidden states that a walk keeps at one time.

    Those that enter the first layer, twice those behind the walked layers, twice the original's
    where these are aimed at, and those of held-out batches behind plain slices.

    Args:
        hidden_size: Numbers of a token's hidden state.
        tokens: Tokens of all batches, padding included.
        itemsize: Bytes of a number.
        aims: Whether layers are fitted to the original's hidden states.
    """
    return (3.5 + 2 * aims) * tokens * hidden_size * itemsize


def walk_batches(
    source: Source,
    device: torch.device,
    plans: Sequence[Plan],
    chooses: bool,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    steps: Steps,
    token_weights: TokenWeights | None,
    results: Store,
    states: Store | None = None,
    say: Say = silent,
) -> Walked:
    """Walk a model that is run layer by layer; it is the same afterwards.

    Args:
        source: The original, in memory or in files.
        device: Where layers run.
        plans: From `plans_for`, or a plan that is there already.
        chooses: Whether the walk chooses the units.
        batches: What choices and fits come from.
        held_out: What confirms and judges.
        steps: What to do in a layer.
        token_weights: As for `walk_`.
        results: Keeps what came of each layer, so that a stopped walk goes on.
        states: Keeps hidden states; by default where they fit, in files beside the results if need
            be.
        say: Receives one line on where hidden states are.

    Raises:
        ConfigError: If hidden states have to be in files, and the disk has too little room.
        ImpossiblePlanError: If the configuration class cannot express the shape; nothing was run.
        UnsupportedModelError: If neurons of experts are to be chosen; likewise.
    """
    model, everything = source.model, [*batches, *held_out]
    if all(plan.tokens is not None and not plan.cuts_layers for plan in plans):
        return Walked(plans[0])
    for plan in plans:
        require_expressible(model, plan)
        if chooses:
            require_choosable(plan)
    if states is None and shares_keys(model.config) and isinstance(source, Live):
        states = Memory()  # layers share objects
    elif states is None:
        tokens = sum(batch["input_ids"].numel() for batch in everything)
        hidden = text_config_of(model.config).hidden_size
        loses = any(len(plan.layers) < plan.before.num_layers for plan in plans)
        aims = aims_at_original(steps.repair, steps.local.count, loses)
        needed = states_bytes(hidden, tokens, model.dtype.itemsize, aims)
        place = StatesPlace.of(needed, device)
        say(f"hidden states: {place}")
        states = place.store(results.folder / "states" if isinstance(results, Scratch) else None)
    runner = LayerwiseModel(source, states, device)
    with evaluating(model), frozen(model):
        runner.embed(everything)
        places = range(len(batches)), range(len(batches), len(everything))
        streams = Streams(runner, *places, token_weights)
        return Walk(streams, results, plans, chooses, steps).run()


def require_choosable(plan: Plan) -> None:
    """Refuse to choose neurons of experts, which are no modules with an input of their own.

    Raises:
        UnsupportedModelError: If the plan removes some.
    """
    for index in plan.layers:
        shape = plan.before.layers[index]
        if shape.expert_neuron_params and len(plan.neurons[index]) < shape.intermediate_size:
            raise UnsupportedModelError(
                f"layer {index} has experts, whose neurons no walk chooses: score width by "
                "activation, wanda, flap, magnitude or random, or prune depth or experts"
            )
