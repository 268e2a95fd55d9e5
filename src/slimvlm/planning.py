"""Make a plan: from scores and a budget to the units that stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from slimvlm.errors import ConfigError, ImpossiblePlanError, NumericalError
from slimvlm.geometry import Anatomy, LayerShape
from slimvlm.plan import AXES, Kept, Plan
from slimvlm.values import Scores

ALLOCATIONS = ("uniform",)
COUNTINGS = ("parameters", "per_layer")


@dataclass(frozen=True)
class Budget:
    """How much to remove and where; the arguments of `make_plan`, checked.

    Raises:
        ConfigError: If one is out of range; the message names it.
    """

    anatomy: Anatomy
    ratio: float
    axis: str
    protect: tuple[int, int]
    counting: str
    round_to: int | None
    depth_share: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio} must be at least 0 and below 1")
        for name, allowed in (("axis", AXES), ("counting", COUNTINGS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} must be one of: {', '.join(allowed)}")
        if min(self.protect) < 0 or sum(self.protect) >= self.anatomy.num_layers:
            raise ConfigError(
                f"protect {tuple(self.protect)} must leave at least one of "
                f"{self.anatomy.num_layers} layers"
            )
        if self.round_to is not None and self.round_to < 1:
            raise ConfigError(f"round_to {self.round_to} must be at least 1")
        if not 0 <= self.depth_share <= 1:
            raise ConfigError(f"depth_share {self.depth_share} must be between 0 and 1")

    @property
    def params(self) -> float:
        """Parameters to remove."""
        return self.ratio * self.anatomy.backbone_params

    @property
    def multiple(self) -> int:
        """Multiple for the number of kept neurons."""
        return self.round_to or default_multiple(self.anatomy)

    @property
    def removable_layers(self) -> range:
        """Layers that may go."""
        first = max(self.protect[0], self.anatomy.pinned_layers)
        return range(first, self.anatomy.num_layers - self.protect[1])

    def is_open(self, layer: int) -> bool:
        """Whether a layer's widths may shrink."""
        return self.protect[0] <= layer < self.anatomy.num_layers - self.protect[1]


def make_plan(
    anatomy: Anatomy,
    scores: Scores | Sequence[Scores],
    ratio: float,
    axis: str = "width",
    allocation: str = "uniform",
    protect: tuple[int, int] = (0, 0),
    counting: str = "parameters",
    round_to: int | None = None,
    depth_share: float = 0.5,
) -> Plan:
    """Choose the units to keep.

    Args:
        anatomy: The model's.
        scores: Scores of the units to prune, higher = keep. Units without scores stay whole. If
            two of them score the same unit, the first one counts.
        ratio: Share to remove, in [0, 1): of the backbone's parameters, or with
            ``counting="per_layer"`` of the units of each unprotected layer (of the unprotected
            layers, for ``depth``).
        axis: ``depth`` removes layers, ``width`` KV groups and neurons, ``both`` mixes them.
        allocation: ``uniform`` keeps the same widths in every unprotected layer.
        protect: How many first and last layers are left whole.
        counting: ``parameters`` is exact. ``per_layer`` counts as LLM-Pruner does:
            ``n = C - floor(C (1 - ratio))`` of a projection's ``C`` channels, whole heads only.
        round_to: Multiple for the number of kept neurons. Default 64, halved until the steps are
            at most 0.5 % of the backbone; 1 with ``per_layer``.
        depth_share: With ``both``, the share of the removed parameters that layers give.

    Returns:
        A plan whose achieved ratio is as near as whole units allow.

    Raises:
        ConfigError: If an argument is out of range or scores for the axis are missing.
        ImpossiblePlanError: If no legal shape comes near the ratio; the message names the nearest.
    """
    if allocation not in ALLOCATIONS:
        raise ConfigError(f"allocation {allocation!r} must be one of: {', '.join(ALLOCATIONS)}")
    budget = Budget(anatomy, ratio, axis, protect, counting, round_to, depth_share)
    given = [scores] if isinstance(scores, Scores) else list(scores)
    plan = replace(Plan.everything(anatomy), axis=axis, asked_ratio=ratio)
    if axis in ("depth", "both"):
        plan = _without_layers(plan, _scores_for("layer", given, budget), budget)
    if axis in ("width", "both"):
        plan = _narrowed(plan, given, budget)
    if counting == "parameters":
        _check_reached(plan, budget)
    return plan


def ratio_for_params(anatomy: Anatomy, target_params: int) -> float:
    """The ratio that leaves a whole model (towers included) with so many parameters.

    Raises:
        ImpossiblePlanError: If more than the backbone would have to go.
        ConfigError: If the model is already that small.
    """
    excess = anatomy.total_params - target_params
    if excess < 0:
        raise ConfigError(
            f"target of {target_params:,} parameters: the model has only "
            f"{anatomy.total_params:,} parameters"
        )
    if excess >= anatomy.backbone_params:
        least = anatomy.total_params - anatomy.backbone_params
        raise ImpossiblePlanError(
            f"target of {target_params:,} parameters: only the backbone is pruned, and the rest "
            f"alone has {least:,} parameters"
        )
    return excess / anatomy.backbone_params


def make_plan_for_params(
    anatomy: Anatomy,
    scores: Scores | Sequence[Scores],
    target_params: int,
    axis: str = "width",
    **options: Any,
) -> Plan:
    """The plan with the smallest ratio whose whole model has at most so many parameters.

    Args:
        anatomy: The model's.
        scores: As in `make_plan`.
        target_params: Limit for the whole model, towers included.
        axis: As in `make_plan`.
        **options: Further arguments of `make_plan`.

    Raises:
        ImpossiblePlanError: If no legal shape is that small.
        ConfigError: If the model is already that small, or an argument is out of range.
    """
    ratio = ratio_for_params(anatomy, target_params)
    while True:
        plan = make_plan(anatomy, scores, ratio, axis, **options)
        excess = plan.after.total_params - target_params
        if excess <= 0:
            return plan
        ratio = min(ratio + max(excess / anatomy.backbone_params, 1e-4), 1 - 1e-9)


def channels_to_remove(channels: int, ratio: float) -> int:
    """``C - floor(C (1 - ratio))`` in exact decimal arithmetic.

    LLM-Pruner computes ``int(C * (1 - ratio))`` in floating point, which removes one channel too
    many for, say, 640 channels at 0.9.
    """
    return channels - math.floor(channels * (1 - Fraction(str(ratio))))


def default_multiple(anatomy: Anatomy) -> int:
    """64, halved until one step of all layers' widths is at most 0.5 % of the backbone."""
    multiple = 64
    step = sum(shape.neuron_params for shape in anatomy.layers) / anatomy.backbone_params
    while multiple > 1 and multiple * step > 0.005:
        multiple //= 2
    return multiple


def _scores_for(unit: str, given: list[Scores], budget: Budget) -> Scores:
    """The first scores that cover a unit, checked against the model."""
    shapes = budget.anatomy.layers
    for scores in given:
        values = scores.of(unit)
        if values is None:
            continue
        rows = [values] if unit == "layer" else list(values)
        found = [len(row) for row in rows]
        expected = {
            "layer": [len(shapes)],
            "kv_group": [shape.num_kv_heads for shape in shapes],
            "neuron": [shape.intermediate_size for shape in shapes],
        }[unit]
        if found != expected:
            raise ConfigError(
                f"scores {scores.criterion!r} are for another model: {unit} counts {found[:3]}..., "
                f"expected {expected[:3]}..."
            )
        if not all(bool(torch.isfinite(row).all()) for row in rows):
            raise NumericalError(
                f"scores {scores.criterion!r}: NaN or infinity among {unit} scores"
            )
        return scores
    names = ", ".join(repr(scores.criterion) for scores in given) or "none"
    raise ConfigError(f"axis {budget.axis!r} needs scores of {unit}; given: {names}")


def _without_layers(plan: Plan, scores: Scores, budget: Budget) -> Plan:
    """Drop the layers that matter least, or the run that does."""
    candidates, count = budget.removable_layers, _num_layers_to_remove(budget)
    if scores.layer_runs is not None and count:
        runs = scores.layer_runs[count - 1]
        starts = range(candidates.start, candidates.stop - count + 1)
        first = min(starts, key=lambda start: float(runs[start]))
        removed = set(range(first, first + count))
    else:
        assert scores.layer is not None
        order = torch.argsort(scores.layer[list(candidates)], stable=True)[:count]
        removed = {candidates[int(i)] for i in order}
    return replace(
        plan,
        layers=tuple(i for i in plan.layers if i not in removed),
        kv_groups=tuple(() if i in removed else k for i, k in enumerate(plan.kv_groups)),
        neurons=tuple(() if i in removed else k for i, k in enumerate(plan.neurons)),
        criteria={**plan.criteria, "layer": scores.criterion},
    )


def _num_layers_to_remove(budget: Budget) -> int:
    shapes, candidates = budget.anatomy.layers, budget.removable_layers
    most = min(len(candidates), len(shapes) - 1)
    if budget.counting == "per_layer":
        return min(channels_to_remove(len(candidates), budget.ratio), most)
    share = budget.depth_share if budget.axis == "both" else 1.0
    mean_params = sum(shapes[i].params for i in candidates) / max(len(candidates), 1)
    return min(round(budget.params * share / mean_params) if mean_params else 0, most)


def _narrowed(plan: Plan, given: list[Scores], budget: Budget) -> Plan:
    """Keep the best KV groups and neurons of every open layer."""
    scored = {
        unit: _scores_for(unit, given, budget)
        for unit in ("kv_group", "neuron")
        if any(scores.of(unit) is not None for scores in given)
    }
    if not scored:
        _scores_for("neuron", given, budget)
    open_layers = [i for i in plan.layers if budget.is_open(i)]
    if not open_layers:
        return plan
    if len({budget.anatomy.layers[i] for i in open_layers}) > 1:
        raise ConfigError("allocation 'uniform' needs a model whose layers are equally wide")
    shape = budget.anatomy.layers[open_layers[0]]
    if budget.counting == "per_layer":
        counts = _counts_per_layer(shape, budget.ratio)
    else:
        rest = budget.params - plan.ratio * budget.anatomy.backbone_params
        legal = budget.anatomy.legal_kv_heads() if "kv_group" in scored else [shape.num_kv_heads]
        counts = _counts_for_budget(
            shape, rest / len(open_layers), legal, budget.multiple if "neuron" in scored else None
        )
    kept = {"kv_group": list(plan.kv_groups), "neuron": list(plan.neurons)}
    for unit, scores in scored.items():
        for index in open_layers:
            kept[unit][index] = _best(scores.of(unit)[index], counts[unit])
    return replace(
        plan,
        kv_groups=tuple(kept["kv_group"]),
        neurons=tuple(kept["neuron"]),
        criteria={**plan.criteria, **{unit: s.criterion for unit, s in scored.items()}},
    )


def _best(values: Tensor, count: int) -> Kept:
    """The indices of the highest scores, ascending; of equal ones the later stay."""
    order = torch.argsort(values, stable=True)
    return tuple(sorted(int(i) for i in order[len(values) - count :]))


def _counts_per_layer(shape: LayerShape, ratio: float) -> dict[str, int]:
    """LLM-Pruner's counts of units to keep in each layer."""
    channels = shape.num_kv_heads * shape.head_dim
    groups = channels_to_remove(channels, ratio) // shape.head_dim
    neurons = channels_to_remove(shape.intermediate_size, ratio)
    return {
        "kv_group": max(shape.num_kv_heads - groups, 1),
        "neuron": max(shape.intermediate_size - neurons, 1),
    }


def _counts_for_budget(
    shape: LayerShape, budget: float, legal: list[int], multiple: int | None
) -> dict[str, int]:
    """Units to keep in each layer so that about ``budget`` parameters go from it.

    Both kinds of unit give the same share where whole groups allow it; neurons, which are fine
    grained, make up the difference.

    Args:
        shape: The layer.
        budget: Parameters to remove from it.
        legal: KV-group counts that can be configured; one if groups stay.
        multiple: Of kept neurons; None if neurons stay.
    """
    attention = shape.num_kv_heads * shape.kv_group_params if len(legal) > 1 else 0
    mlp = shape.intermediate_size * shape.neuron_params if multiple else 0
    share = min(budget / (attention + mlp), 1.0) if attention + mlp else 0.0

    def choice(groups: int) -> tuple[float, float, int, int]:
        rest = budget - (shape.num_kv_heads - groups) * shape.kv_group_params
        neurons = shape.intermediate_size
        if multiple:
            neurons = _rounded(neurons - rest / shape.neuron_params, multiple, neurons)
        removed = (shape.intermediate_size - neurons) * shape.neuron_params
        beyond_a_step = max(abs(rest - removed) - (multiple or 0) * shape.neuron_params, 0.0)
        return beyond_a_step, abs(groups - shape.num_kv_heads * (1 - share)), groups, neurons

    *_, groups, neurons = min(choice(groups) for groups in legal)
    return {"kv_group": groups, "neuron": neurons}


def _rounded(value: float, multiple: int, most: int) -> int:
    """The nearest multiple, or the full width if that is nearer; at least one multiple."""
    nearest = max(round(value / multiple), 1) * multiple
    choices = (min(nearest, most), most)
    return min(choices, key=lambda choice: abs(choice - value))


def _check_reached(plan: Plan, budget: Budget) -> None:
    """The achieved ratio must be within the smallest step that the axis has."""
    shapes = budget.anatomy.layers
    if plan.axis == "depth":
        step = min(shape.params for shape in shapes)
    elif "neuron" in plan.criteria:
        step = budget.multiple * sum(shape.neuron_params for shape in shapes)
    else:
        step = sum(shape.kv_group_params for shape in shapes)
    if abs(plan.ratio - budget.ratio) > step / budget.anatomy.backbone_params + 1e-9:
        raise ImpossiblePlanError(
            f"ratio {budget.ratio:g} cannot be reached on axis {plan.axis!r}: the nearest legal "
            f"shape has ratio {plan.ratio:.4f} ({plan.summary()})"
        )
