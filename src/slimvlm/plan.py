"""Which units stay: a `Plan`, and how to make one from scores and a budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimvlm.errors import ConfigError, ImpossiblePlanError
from slimvlm.geometry import Anatomy, LayerShape
from slimvlm.values import Scores

AXES = ("depth", "width", "both")
ALLOCATIONS = ("uniform",)
COUNTINGS = ("parameters", "per_layer")
FORMAT = "slimvlm-plan/1"

Kept = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The kept units of every layer.

    Attributes:
        before: The model that the plan is for.
        layers: Kept layers.
        kv_groups: For each original layer its kept KV groups; empty where the layer is gone.
        neurons: Likewise its kept neurons.
        axis: ``depth``, ``width`` or ``both``.
        asked_ratio: The ratio that was asked for, None for a plan made by hand.
        criteria: Criterion used for each unit.
    """

    before: Anatomy
    layers: Kept
    kv_groups: tuple[Kept, ...]
    neurons: tuple[Kept, ...]
    axis: str
    asked_ratio: float | None = None
    criteria: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_indices("layers", self.layers, self.before.num_layers, self.layers != ())
        for index, shape in enumerate(self.before.layers):
            is_kept = index in self.layers
            groups, neurons = self.kv_groups[index], self.neurons[index]
            _check_indices(
                f"kv_groups[{index}]", groups, shape.num_kv_heads, is_kept == bool(groups)
            )
            _check_indices(
                f"neurons[{index}]", neurons, shape.intermediate_size, is_kept == bool(neurons)
            )
        missing = set(range(self.before.pinned_layers)) - set(self.layers)
        if missing:
            raise ImpossiblePlanError(
                f"plan: layers {sorted(missing)} must stay, since image features are added to the "
                f"first {self.before.pinned_layers} layers of {self.before.model_type}"
            )

    @classmethod
    def everything(cls, anatomy: Anatomy) -> Plan:
        """The plan that removes nothing."""
        return cls(
            before=anatomy,
            layers=tuple(range(anatomy.num_layers)),
            kv_groups=tuple(tuple(range(s.num_kv_heads)) for s in anatomy.layers),
            neurons=tuple(tuple(range(s.intermediate_size)) for s in anatomy.layers),
            axis="both",
            asked_ratio=0.0,
        )

    @property
    def after(self) -> Anatomy:
        """The smaller model's anatomy."""
        shapes = [
            replace(
                self.before.layers[index],
                num_kv_heads=len(self.kv_groups[index]),
                intermediate_size=len(self.neurons[index]),
            )
            for index in self.layers
        ]
        after = self.before.with_layers(shapes)
        return after.retyped() if self.needs_retype else after

    @property
    def ratio(self) -> float:
        """Share of the backbone's parameters that the plan removes."""
        kept = sum(
            shape.fixed_params
            + len(self.kv_groups[i]) * shape.kv_group_params
            + len(self.neurons[i]) * shape.neuron_params
            for i, shape in enumerate(self.before.layers)
            if i in self.layers
        )
        removed = sum(shape.params for shape in self.before.layers) - kept
        return removed / self.before.backbone_params

    @property
    def needs_retype(self) -> bool:
        """Whether the head counts need the freer configuration type of the backbone's row."""
        if not self.before.retypable:
            return False
        heads = {
            len(self.kv_groups[i]) * self.before.layers[i].queries_per_group for i in self.layers
        }
        return any(self.before.hidden_size % count for count in heads)

    def summary(self) -> str:
        """One line: what is kept and which ratio that is."""
        groups = sorted({len(self.kv_groups[i]) for i in self.layers})
        neurons = sorted({len(self.neurons[i]) for i in self.layers})
        asked = "" if self.asked_ratio is None else f" (asked {self.asked_ratio:.2%})"
        return (
            f"removes {self.ratio:.2%} of the backbone{asked}: "
            f"{len(self.layers)} of {self.before.num_layers} layers, "
            f"{_span(groups)} KV groups, {_span(neurons)} neurons a layer"
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        values = {
            "format": FORMAT,
            "axis": self.axis,
            "asked_ratio": self.asked_ratio,
            "ratio": self.ratio,
            "criteria": dict(self.criteria),
            "layers": self.layers,
            "kv_groups": self.kv_groups,
            "neurons": self.neurons,
            "before": self.before.to_dict(),
        }
        Path(path).write_text(json.dumps(values) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; ``ratio`` is computed anew, so a plan may be edited by hand.

        Raises:
            ConfigError: If the file is missing, is not a plan, or names units that do not exist.
        """
        try:
            values = json.loads(Path(path).read_text())
            if values["format"] != FORMAT:
                raise ConfigError(f"plan {str(path)!r}: format must be {FORMAT!r}")
            return cls(
                before=Anatomy.from_dict(values["before"]),
                layers=tuple(values["layers"]),
                kv_groups=tuple(map(tuple, values["kv_groups"])),
                neurons=tuple(map(tuple, values["neurons"])),
                axis=values["axis"],
                asked_ratio=values["asked_ratio"],
                criteria=values["criteria"],
            )
        except (OSError, json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"plan {str(path)!r}: cannot be read ({error!r})") from error


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
    given = [scores] if isinstance(scores, Scores) else list(scores)
    _check_arguments(anatomy, ratio, axis, allocation, protect, counting)
    budget = ratio * anatomy.backbone_params
    plan = replace(Plan.everything(anatomy), axis=axis, asked_ratio=ratio)
    if axis in ("depth", "both"):
        source = _scores_for("layer", given, anatomy, axis)
        share = depth_share if axis == "both" else 1.0
        count = _num_layers_to_remove(anatomy, budget * share, ratio, protect, counting)
        plan = _without_layers(plan, source, count, protect)
    if axis in ("width", "both"):
        rest = budget - plan.ratio * anatomy.backbone_params
        plan = _narrowed(plan, given, rest, ratio, protect, counting, round_to)
    if counting == "parameters":
        _check_reached(plan, ratio, round_to)
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


def _check_arguments(
    anatomy: Anatomy,
    ratio: float,
    axis: str,
    allocation: str,
    protect: tuple[int, int],
    counting: str,
) -> None:
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio {ratio} must be at least 0 and below 1")
    for name, value, allowed in (
        ("axis", axis, AXES),
        ("allocation", allocation, ALLOCATIONS),
        ("counting", counting, COUNTINGS),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} {value!r} must be one of: {', '.join(allowed)}")
    if min(protect) < 0 or sum(protect) >= anatomy.num_layers:
        raise ConfigError(
            f"protect {tuple(protect)} must leave at least one of {anatomy.num_layers} layers"
        )


def _scores_for(unit: str, given: list[Scores], anatomy: Anatomy, axis: str) -> Scores:
    """The first scores that cover a unit, checked against the model."""
    for scores in given:
        values = scores.of(unit)
        if values is None:
            continue
        if unit == "layer":
            found, expected = [len(values)], [anatomy.num_layers]
        else:
            attribute = "num_kv_heads" if unit == "kv_group" else "intermediate_size"
            found = [len(v) for v in values]
            expected = [getattr(s, attribute) for s in anatomy.layers]
        if found != expected:
            raise ConfigError(
                f"scores {scores.criterion!r} are for another model: {unit} counts {found[:3]}..., "
                f"expected {expected[:3]}..."
            )
        return scores
    names = ", ".join(repr(s.criterion) for s in given) or "none"
    raise ConfigError(f"axis {axis!r} needs scores of {unit}; given: {names}")


def _removable(anatomy: Anatomy, protect: tuple[int, int]) -> range:
    first = max(protect[0], anatomy.pinned_layers)
    return range(first, anatomy.num_layers - protect[1])


def _num_layers_to_remove(
    anatomy: Anatomy, budget: float, ratio: float, protect: tuple[int, int], counting: str
) -> int:
    candidates = _removable(anatomy, protect)
    most = min(len(candidates), anatomy.num_layers - 1)
    if counting == "per_layer":
        return min(channels_to_remove(len(candidates), ratio), most)
    mean_params = sum(anatomy.layers[i].params for i in candidates) / max(len(candidates), 1)
    return min(round(budget / mean_params) if mean_params else 0, most)


def channels_to_remove(channels: int, ratio: float) -> int:
    """``C - floor(C (1 - ratio))`` in exact decimal arithmetic.

    LLM-Pruner computes ``int(C * (1 - ratio))`` in floating point, which removes one channel too
    many for, say, 640 channels at 0.9.
    """
    return channels - math.floor(channels * (1 - Fraction(str(ratio))))


def _without_layers(plan: Plan, scores: Scores, count: int, protect: tuple[int, int]) -> Plan:
    candidates = _removable(plan.before, protect)
    if scores.layer_runs is not None and count:
        starts = range(candidates.start, candidates.stop - count + 1)
        first = min(starts, key=lambda start: float(scores.layer_runs[count - 1, start]))  # type: ignore[index]
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


def _narrowed(
    plan: Plan,
    given: list[Scores],
    budget: float,
    ratio: float,
    protect: tuple[int, int],
    counting: str,
    round_to: int | None,
) -> Plan:
    """Keep the best KV groups and neurons of every unprotected layer."""
    anatomy = plan.before
    if not any(s.kv_group is not None or s.neuron is not None for s in given):
        _scores_for("neuron", given, anatomy, plan.axis)
    open_layers = [i for i in plan.layers if protect[0] <= i < anatomy.num_layers - protect[1]]
    if len({anatomy.layers[i] for i in open_layers}) > 1:
        raise ConfigError("allocation 'uniform' needs a model whose layers are equally wide")
    shape = anatomy.layers[open_layers[0]]
    scored = {
        unit: next((_scores_for(unit, [s], anatomy, plan.axis) for s in given if s.of(unit)), None)
        for unit in ("kv_group", "neuron")
    }
    if counting == "per_layer":
        counts = _counts_per_layer(shape, ratio)
    else:
        multiple = round_to or default_multiple(anatomy)
        legal = anatomy.legal_kv_heads() if scored["kv_group"] else [shape.num_kv_heads]
        counts = _counts_for_budget(
            shape, budget / len(open_layers), legal, scored["neuron"] is not None, multiple
        )
    groups, neurons = list(plan.kv_groups), list(plan.neurons)
    for index in open_layers:
        for unit, kept, count in (("kv_group", groups, counts[0]), ("neuron", neurons, counts[1])):
            source = scored[unit]
            if source is not None:
                kept[index] = _best(source.of(unit)[index], count)
    used = {unit: source.criterion for unit, source in scored.items() if source is not None}
    return replace(
        plan,
        kv_groups=tuple(groups),
        neurons=tuple(neurons),
        criteria={**plan.criteria, **used},
    )


def _best(values: Tensor, count: int) -> Kept:
    """The indices of the highest scores, ascending; of equal ones the later stay."""
    order = torch.argsort(values, stable=True)
    return tuple(sorted(int(i) for i in order[len(values) - count :]))


def _counts_per_layer(shape: LayerShape, ratio: float) -> tuple[int, int]:
    """LLM-Pruner's counts: (KV groups, neurons) to keep."""
    channels = shape.num_kv_heads * shape.head_dim
    groups = channels_to_remove(channels, ratio) // shape.head_dim
    neurons = channels_to_remove(shape.intermediate_size, ratio)
    return max(shape.num_kv_heads - groups, 1), max(shape.intermediate_size - neurons, 1)


def _counts_for_budget(
    shape: LayerShape, budget: float, legal: list[int], neurons_scored: bool, multiple: int
) -> tuple[int, int]:
    """(KV groups, neurons) to keep in each layer so that about ``budget`` parameters go.

    Both kinds of unit give the same share where whole groups allow it; neurons, which are fine
    grained, make up the difference.
    """
    attention = shape.num_kv_heads * shape.kv_group_params
    mlp = shape.intermediate_size * shape.neuron_params if neurons_scored else 0
    prunable = (attention if len(legal) > 1 else 0) + mlp
    share = min(budget / prunable, 1.0) if prunable else 0.0
    wanted = shape.num_kv_heads * (1 - share)

    def options(groups: int) -> tuple[float, float, int, int]:
        rest = budget - (shape.num_kv_heads - groups) * shape.kv_group_params
        neurons = shape.intermediate_size
        if neurons_scored:
            neurons = _rounded(neurons - rest / shape.neuron_params, multiple, neurons)
        removed = (shape.intermediate_size - neurons) * shape.neuron_params
        error = abs(rest - removed)
        tolerance = multiple * shape.neuron_params if neurons_scored else 0
        return max(error - tolerance, 0), abs(groups - wanted), groups, neurons

    *_, groups, neurons = min(options(groups) for groups in legal)
    return groups, neurons


def _rounded(value: float, multiple: int, most: int) -> int:
    """The nearest multiple, or the full width if that is nearer; at least one multiple."""
    nearest = max(round(value / multiple), 1) * multiple
    choices = (min(nearest, most), most)
    return min(choices, key=lambda choice: abs(choice - value))


def default_multiple(anatomy: Anatomy) -> int:
    """64, halved until one step of all layers' widths is at most 0.5 % of the backbone."""
    multiple = 64
    step = sum(shape.neuron_params for shape in anatomy.layers) / anatomy.backbone_params
    while multiple > 1 and multiple * step > 0.005:
        multiple //= 2
    return multiple


def _check_reached(plan: Plan, ratio: float, round_to: int | None) -> None:
    """The achieved ratio must be within the smallest step that the axis has."""
    anatomy = plan.before
    smallest = min(anatomy.layers, key=lambda shape: shape.params)
    if plan.axis == "depth":
        step = smallest.params
    elif "neuron" in plan.criteria:
        multiple = round_to or default_multiple(anatomy)
        step = multiple * sum(shape.neuron_params for shape in anatomy.layers)
    else:
        step = sum(shape.kv_group_params for shape in anatomy.layers)
    if abs(plan.ratio - ratio) > step / anatomy.backbone_params + 1e-9:
        raise ImpossiblePlanError(
            f"ratio {ratio:g} cannot be reached on axis {plan.axis!r}: the nearest legal shape "
            f"has ratio {plan.ratio:.4f} ({plan.summary()})"
        )


def _check_indices(name: str, kept: Kept, count: int, right_emptiness: bool) -> None:
    in_range = all(isinstance(i, int) and 0 <= i < count for i in kept)
    if not right_emptiness or not in_range or list(kept) != sorted(set(kept)):
        raise ConfigError(
            f"plan: {name} must be sorted, unique, below {count}, and empty only where the layer "
            "is gone"
        )


def _span(values: Sequence[Any]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}-{values[-1]}"
