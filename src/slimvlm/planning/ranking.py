"""One ranking of the units of all layers: how wide each layer stays follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from slimvlm.planning.budget import Budget
from slimvlm.planning.plan import Plan
from slimvlm.planning.widths import Widths
from slimvlm.scoring.criteria import layers_compare
from slimvlm.scoring.unit_scores import WIDTH_UNITS, Scores


@dataclass(frozen=True, order=True)
class _Step:
    """Units of one layer that go together; steps are ordered by what goes first.

    Attributes:
        density: What is lost for each parameter that is saved, the mean over the step's units.
        share: Share of the layer's units of this kind that are gone half-way through the step. Of
            equally dense steps the smaller share goes first, so that equal scores thin all layers
            and kinds equally, to the nearest whole step.
        layer: The layer.
        unit: The kind of unit.
        count: Units of the step.
        params: Parameters of the step.
    """

    density: float
    share: float
    layer: int
    unit: str
    count: int
    params: int


def globally_ranked_widths(plan: Plan, scored: Mapping[str, Scores], budget: Budget) -> Widths:
    """Widths from one ranking of the KV groups and neurons of all open layers.

    Units are ranked by score per parameter. KV groups go one by one, neurons one multiple of
    ``round_to`` at a time, the lowest of a layer together. The ranking is cut where the removed
    parameters come nearest to the budget. So a higher ratio keeps a subset of what a lower one
    keeps, and the ratio is met within half of a step. One KV group and one multiple of neurons
    stay in every layer.

    Scores are first made relative, to the mean of their kind of unit where layers compare (Taylor,
    gate), else to the mean of their layer and kind. A relative score is what a unit takes of the
    scores over what it takes of the parameters. Kinds do not compare as they are: first-order
    estimates see too little of a whole KV group, whose effects cancel in the sum.

    Args:
        plan: What is kept so far, all layers in it whole.
        scored: Scores by kind of unit.
        budget: What to remove.

    Reference:
        Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, arXiv:1906.10771,
        Sec. 3.2 rank all layers together; the cost per parameter and the steps are ours.
    """
    layers = [i for i in plan.layers if budget.is_open(i)]
    steps = sorted(
        step
        for unit, scores in scored.items()
        for step in _steps(unit, _densities(unit, scores, layers, budget), budget)
    )
    rest = budget.params - plan.ratio * budget.anatomy.backbone_params
    allowed = list(_within_cap(steps, budget))
    count = _nearest_count(allowed, rest)
    widths = _widths_after(allowed[:count], layers, budget)
    if count and not can_be_written(plan, widths):
        is_short = sum(step.params for step in allowed[:count]) < rest
        count += 1 if is_short and count < len(allowed) else -1
        widths = _widths_after(allowed[:count], layers, budget)
    return widths


def _densities(
    unit: str, scores: Scores, layers: Sequence[int], budget: Budget
) -> dict[int, Float64[Tensor, " unit"]]:
    """Each unit's score per parameter, on the scale that the budget asks for."""
    shapes = budget.anatomy.layers
    params = {i: s.kv_group_params if unit == "kv_group" else s.neuron_params
              for i, s in enumerate(shapes)}  # fmt: skip
    values = {i: scores.of(unit)[i].double() / params[i] for i in layers}
    scale = budget.relative_to or ("kind" if layers_compare(scores) else "layer")
    if scale == "layer":
        return {i: row / _mean(row) for i, row in values.items()}
    if scale == "kind":
        mean = _mean(torch.cat(list(values.values())))
        return {i: row / mean for i, row in values.items()}
    return values


def _mean(values: Float64[Tensor, " unit"]) -> Float64[Tensor, ""]:
    """The mean; scores below zero, which say "first of all", count as zero. 1 if all do."""
    mean = values.clamp_min(0).mean()
    return mean if mean > 0 else torch.ones_like(mean)


def _steps(
    unit: str, densities: Mapping[int, Float64[Tensor, " unit"]], budget: Budget
) -> Iterator[_Step]:
    """What may go from each layer, from its lowest scores up."""
    for index, values in densities.items():
        shape, ascending = budget.anatomy.layers[index], values.sort().values
        params = shape.kv_group_params if unit == "kv_group" else shape.neuron_params
        start = 0
        for size in _sizes(len(values), 1 if unit == "kv_group" else budget.multiple):
            mean = float(ascending[start : start + size].mean().float())
            middle = (start + size / 2) / len(values)
            start += size
            yield _Step(mean, middle, index, unit, size, size * params)


def _sizes(width: int, multiple: int) -> list[int]:
    """Units of each step: down to a multiple first, then by multiples; one multiple stays."""
    if width <= multiple:
        return []
    ragged = [width % multiple] if width % multiple else []
    return ragged + [multiple] * (width // multiple - 1)


def _within_cap(steps: list[_Step], budget: Budget) -> Iterator[_Step]:
    """The steps that no layer's largest ratio forbids."""
    if budget.max_layer_ratio is None:
        yield from steps
        return
    shapes, gone = budget.anatomy.layers, dict.fromkeys(range(budget.anatomy.num_layers), 0)
    for step in steps:
        params = gone[step.layer] + step.params
        if params <= budget.max_layer_ratio * shapes[step.layer].params:
            gone[step.layer] = params
            yield step


def _nearest_count(steps: list[_Step], params: float) -> int:
    """How many first steps sum nearest to a budget; of two equally near counts the smaller."""
    total = 0
    for number, step in enumerate(steps):
        if total + step.params - params >= params - total:
            return number
        total += step.params
    return len(steps)


def _widths_after(steps: list[_Step], layers: list[int], budget: Budget) -> Widths:
    """What the layers keep once some steps are gone."""
    gone = dict.fromkeys(((i, unit) for i in layers for unit in WIDTH_UNITS), 0)
    for step in steps:
        gone[step.layer, step.unit] += step.count
    return {
        i: (
            budget.anatomy.layers[i].num_kv_heads - gone[i, "kv_group"],
            budget.anatomy.layers[i].intermediate_size - gone[i, "neuron"],
        )
        for i in layers
    }


def can_be_written(plan: Plan, widths: Widths) -> bool:
    """Equal widths need a head count that a configuration can hold; unequal ones do not.

    Args:
        plan: Says which layers are kept; those without widths are whole.
        widths: KV groups and neurons that layers keep.
    """
    shapes = [
        replace(shape, num_kv_heads=groups, intermediate_size=neurons)
        for i in plan.layers
        for shape in [plan.before.layers[i]]
        for groups, neurons in [widths.get(i, (shape.num_kv_heads, shape.intermediate_size))]
    ]
    after = plan.before.with_layers(shapes)
    if not after.is_uniform or not after.attention_shapes:
        return True
    return after.attention_shapes[0][0] in plan.before.legal_kv_heads()
