"""Prune in steps: score what is left, remove a part, score again. Model + batches → `Plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.families import INPUT_COLUMNS
from slimvlm.models.parts import projections
from slimvlm.planning.make import make_plan
from slimvlm.planning.mask import masked
from slimvlm.planning.plan import Kept, Plan
from slimvlm.scoring.score_model import score
from slimvlm.scoring.unit_scores import Scores


def plan_in_steps(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Any]],
    criteria: Mapping[str, Mapping[str, Any]],
    ratio: float,
    axis: str = "width",
    steps: int = 1,
    **options: Any,
) -> Plan:
    """Reach a ratio in equal steps, with scores of what the steps before have left.

    Step ``k`` of ``n`` scores the model under the mask of the plan so far and makes the plan for
    ``ratio k / n``. Units that are gone stay gone. With equal widths KV groups go as late as the
    final widths allow; a step for which nothing lies between the plan so far and the final widths
    removes nothing.

    Args:
        model: The original; its weights are never changed.
        batches: Calibration inputs; every step reads all of them.
        criteria: Options by name of the criterion.
        ratio: As for `make_plan`.
        axis: As for `make_plan`.
        steps: Number of steps. One is the same as scoring and `make_plan`.
        **options: Further arguments of `make_plan`.

    Raises:
        ConfigError: If an argument is out of range.
        ImpossiblePlanError: If no legal shape comes near the ratio.
    """
    if steps < 1:
        raise ConfigError(f"steps {steps} must be at least 1")
    anatomy = read_anatomy(model)
    plan = Plan.everything(anatomy)
    for number in range(1, steps):
        given = _scores_of_rest(model, batches, criteria, plan)
        final = make_plan(anatomy, given, ratio, axis, **options)
        candidates = _candidates(given, final, ratio * number / steps, options)
        plan = next((c for c in candidates if _lies_between(plan, c, final, options)), plan)
    given = _scores_of_rest(model, batches, criteria, plan)
    return make_plan(anatomy, given, ratio, axis, **options)


def _scores_of_rest(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Any]],
    criteria: Mapping[str, Mapping[str, Any]],
    plan: Plan,
) -> list[Scores]:
    """Scores of the model that a plan leaves."""
    with silenced(model, plan):
        given = [score(model, batches, name, **chosen) for name, chosen in criteria.items()]
    return [removed_last(scores, plan) for scores in given]


@contextmanager
def silenced(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """The same function as inside `masked`, but removed layers run and write zeros.

    So gradients, which are zero there, still have a way through them.
    """
    everything = Plan.everything(plan.before)
    kept = set(plan.layers)
    sources = [plan if i in kept else everything for i in everything.layers]
    silenced = replace(
        everything,
        kv_groups=tuple(source.kv_groups[i] for i, source in enumerate(sources)),
        neurons=tuple(source.neurons[i] for i, source in enumerate(sources)),
    )
    with ExitStack() as stack:
        stack.enter_context(masked(model, silenced))
        for index, projection, linear in projections(model):
            if index not in kept and projection.dim == INPUT_COLUMNS:
                handle = linear.register_forward_hook(_write_zeros)
                stack.callback(handle.remove)
        yield


def _write_zeros(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0


def removed_last(scores: Scores, plan: Plan) -> Scores:
    """Scores in which the units that a plan has removed stand below all others.

    Of runs of layers only those that contain all removed layers are left.
    """
    layers = [i for i in range(plan.before.num_layers) if i not in plan.layers]
    runs = scores.layer_runs
    if runs is not None and layers:
        lengths, starts = torch.arange(1, len(runs) + 1)[:, None], torch.arange(len(runs))
        covers = (starts <= layers[0]) & (starts + lengths > layers[-1])
        runs = runs.masked_fill(~covers, float("inf"))
    return replace(
        scores,
        layer=None if scores.layer is None else _lowered([scores.layer], [plan.layers])[0],
        kv_group=None if scores.kv_group is None else _lowered(scores.kv_group, plan.kv_groups),
        neuron=None if scores.neuron is None else _lowered(scores.neuron, plan.neurons),
        layer_runs=runs,
    )


def _lowered(values: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
    """The same scores where units are kept, one value below them all elsewhere."""
    lowest = min(float(row.min()) for row in values if len(row)) - 1.0
    lowest = min(lowest, -1.0)
    lowered = []
    for row, indices in zip(values, kept, strict=True):
        gone = torch.ones(len(row), dtype=torch.bool)
        gone[list(indices)] = False
        lowered.append(row.masked_fill(gone, lowest))
    return lowered


def _candidates(
    given: Sequence[Scores], final: Plan, ratio: float, options: Mapping[str, Any]
) -> Iterator[Plan]:
    """Plans for a part of the ratio: for equal widths one for each number of KV groups."""
    is_free = (
        "kv_group" in final.criteria
        and options.get("allocation", "uniform") != "global"
        and options.get("counting", "parameters") == "parameters"
        and options.get("kv_heads") is None
    )
    counts = reversed(final.before.legal_kv_heads()) if is_free else [options.get("kv_heads")]
    for kv_heads in counts:
        chosen = {**options, "kv_heads": kv_heads}
        try:
            yield make_plan(final.before, given, ratio, final.axis, **chosen)
        except ImpossiblePlanError:
            continue


def _lies_between(plan: Plan, candidate: Plan, final: Plan, options: Mapping[str, Any]) -> bool:
    """Whether a candidate brings nothing back and leaves enough for the final widths."""
    if not _is_part(candidate, plan):
        return False
    if options.get("allocation") == "global":
        return _width_params(candidate) <= _width_params(final)
    shared = [i for i in candidate.layers if i in final.layers]
    return len(candidate.layers) >= len(final.layers) and all(
        len(candidate.kv_groups[i]) >= len(final.kv_groups[i])
        and len(candidate.neurons[i]) >= len(final.neurons[i])
        for i in shared
    )


def _width_params(plan: Plan) -> int:
    """Parameters that are gone from the layers that stay."""
    return sum(plan.before.layers[i].params for i in plan.layers) - sum(
        shape.params for shape in plan.after.layers
    )


def _is_part(smaller: Plan, larger: Plan) -> bool:
    """Whether a plan keeps nothing that another has removed."""
    return set(smaller.layers) <= set(larger.layers) and all(
        set(kept) <= set(before)
        for unit in ("kv_groups", "neurons")
        for kept, before in zip(getattr(smaller, unit), getattr(larger, unit), strict=True)
    )
