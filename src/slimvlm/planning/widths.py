"""How many KV groups and neurons each layer keeps, and the plan that keeps the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import Anatomy, LayerShape
from slimvlm.planning.budget import Budget, channels_to_remove
from slimvlm.planning.plan import Kept, Plan
from slimvlm.scoring.unit_scores import Scores

Widths = Mapping[int, tuple[int, int]]
"""KV groups and neurons that a layer keeps, by the layer's index."""


def with_widths(plan: Plan, scored: Mapping[str, Scores], widths: Widths) -> Plan:
    """Keep the best units of each layer, so many as its widths say.

    Args:
        plan: What is kept so far; layers without widths stay as they are in it.
        scored: Scores by kind of unit; a kind without scores stays whole.
        widths: KV groups and neurons to keep.
    """
    kept = {"kv_group": list(plan.kv_groups), "neuron": list(plan.neurons)}
    for unit, scores in scored.items():
        for index, counts in widths.items():
            count = counts[0] if unit == "kv_group" else counts[1]
            kept[unit][index] = best_units(scores.of(unit)[index], count)
    return replace(
        plan,
        kv_groups=tuple(kept["kv_group"]),
        neurons=tuple(kept["neuron"]),
        criteria={**plan.criteria, **{unit: s.criterion for unit, s in scored.items()}},
    )


def uniform_widths(plan: Plan, scored: Mapping[str, Scores], budget: Budget) -> Widths:
    """The same widths for every open layer.

    Raises:
        ConfigError: If the layers are not equally wide to begin with.
    """
    shapes = {index: shape for index, shape in plan.shapes.items() if budget.is_open(index)}
    equal = budget.anatomy.with_layers(list(shapes.values()))
    if not equal.is_uniform:
        raise ConfigError(
            f"allocation {budget.allocation!r} needs a model whose layers are equally wide"
        )
    shape = _summed_shape(equal)
    if budget.counting == "per_layer":
        counts = _counts_per_layer(shape, budget.ratio)
    else:
        rest = budget.left(plan)
        legal = budget.anatomy.legal_kv_heads() if "kv_group" in scored else []
        if budget.kv_heads is not None and "kv_group" in scored:
            legal = [budget.kv_heads]
        counts = _counts_for_params(
            shape,
            rest,
            legal or [shape.num_kv_heads],
            budget.multiple if "neuron" in scored else None,
        )
    groups, neurons = counts
    return {
        i: (groups if s.num_kv_heads else 0, neurons if s.intermediate_size else 0)
        for i, s in shapes.items()
    }


def _summed_shape(anatomy: Anatomy) -> LayerShape:
    """One shape for all layers together: each unit weighs what its like weigh in all of them."""
    widest = max(anatomy.layers, key=lambda shape: shape.num_kv_heads)
    sums = {
        name: sum(getattr(shape, name) for shape in anatomy.layers)
        for name in ("kv_group_params", "neuron_params", "fixed_params")
    }
    neurons = max(shape.intermediate_size for shape in anatomy.layers)
    return replace(widest, intermediate_size=neurons, **sums)


def best_units(values: Tensor, count: int) -> Kept:
    """The indices of the highest scores, ascending; of equal ones the later stay."""
    order = torch.argsort(values, stable=True)
    return tuple(sorted(int(i) for i in order[len(values) - count :]))


def _counts_per_layer(shape: LayerShape, ratio: float) -> tuple[int, int]:
    """LLM-Pruner's counts of KV groups and neurons to keep in each layer."""
    channels = shape.num_kv_heads * shape.head_dim
    groups = channels_to_remove(channels, ratio) // shape.head_dim
    neurons = channels_to_remove(shape.intermediate_size, ratio)
    return max(shape.num_kv_heads - groups, 1), max(shape.intermediate_size - neurons, 1)


def _counts_for_params(
    shape: LayerShape, params: float, legal: list[int], multiple: int | None
) -> tuple[int, int]:
    """KV groups and neurons to keep in each layer so that about ``params`` parameters go in all.

    Both kinds of unit give the same share where whole groups allow it; neurons, which are fine
    grained, make up the difference.

    Args:
        shape: The layers; what a unit weighs is its weight in all of them.
        params: Parameters to remove.
        legal: KV-group counts to choose from; one if it is given.
        multiple: Of kept neurons; None if neurons stay.
    """
    attention = shape.num_kv_heads * shape.kv_group_params if len(legal) > 1 else 0
    mlp = shape.intermediate_size * shape.neuron_params if multiple else 0
    share = min(params / (attention + mlp), 1.0) if attention + mlp else 0.0

    def candidate(groups: int) -> _Candidate:
        rest = params - (shape.num_kv_heads - groups) * shape.kv_group_params
        neurons = shape.intermediate_size
        if multiple:
            neurons = _rounded(neurons - rest / shape.neuron_params, multiple, neurons)
        removed = (shape.intermediate_size - neurons) * shape.neuron_params
        return _Candidate(
            off_budget=max(abs(rest - removed) - (multiple or 0) * shape.neuron_params, 0.0),
            off_share=abs(groups - shape.num_kv_heads * (1 - share)),
            groups=groups,
            neurons=neurons,
        )

    best = min(candidate(groups) for groups in legal)
    return best.groups, best.neurons


@dataclass(frozen=True, order=True)
class _Candidate:
    """Widths that every layer could keep, ordered by what decides between them.

    Attributes:
        off_budget: Parameters by which they miss the budget, beyond one step of neurons.
        off_share: KV groups by which they miss the share that both kinds of unit should give.
        groups: KV groups to keep.
        neurons: Neurons to keep.
    """

    off_budget: float
    off_share: float
    groups: int
    neurons: int


def _rounded(value: float, multiple: int, most: int) -> int:
    """The nearest multiple, or the full width if that is nearer; at least one multiple."""
    nearest = max(round(value / multiple), 1) * multiple
    choices = (min(nearest, most), most)
    return min(choices, key=lambda choice: abs(choice - value))
