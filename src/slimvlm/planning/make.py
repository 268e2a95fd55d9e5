"""Make a plan: choose the kept units by scores and a budget."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import accumulate
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from slimvlm.core.errors import ConfigError, ImpossiblePlanError, NumericalError
from slimvlm.core.options import AT_LEAST_1, SHARE, Axis, Options
from slimvlm.models.anatomy import LAYER_UNITS, WIDTH_UNITS, Anatomy
from slimvlm.models.cost import TILE_MULTIPLE, WIDTH_MULTIPLE
from slimvlm.models.hidden import all_finite
from slimvlm.planning.plan import Kept, Plan, why_tower_stays
from slimvlm.scoring.unit_scores import Scores

_TOWER_MULTIPLE = TILE_MULTIPLE  # of the neurons that stay
_PROTECTED_OF_32 = (4, 2)  # first and last layers that the paper's code leaves unpruned


class Budget(Options):
    """Check the arguments of `make_plan`; a `ConfigError` names the one that is out of range."""

    anatomy: Anatomy
    ratio: Annotated[float, SHARE]
    axis: Axis
    protect: tuple[int, int] = (0, 0)
    counting: Literal["parameters", "per_layer"] = "parameters"
    round_to: Annotated[int | None, AT_LEAST_1] = None
    allocation: Literal["uniform", "protect"] = "uniform"
    units: tuple[str, ...] = WIDTH_UNITS
    kv_heads: int | None = None
    experts: Annotated[float, SHARE] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.protected
        if min(first, last) < 0 or first + last >= self.anatomy.num_layers:
            count = self.anatomy.num_layers
            raise ConfigError(f"protect {(first, last)} must leave at least one of {count} layers")
        if self.counting == "per_layer" and self.axis == "both":  # layers and units are two counts
            raise ConfigError("counting 'per_layer' is for axis 'width' or 'depth', not 'both'")
        if not self.units or not set(self.units) <= set(WIDTH_UNITS):
            raise ConfigError(f"units {self.units} must be some of: {', '.join(WIDTH_UNITS)}")
        if self.kv_heads is not None:
            legal = self.anatomy.legal_kv_heads()
            if self.kv_heads not in legal:
                raise ConfigError(f"kv_heads {self.kv_heads} must be one of: {legal}")
            if self.counting == "per_layer" or self.axis == "depth":
                raise ConfigError(f"kv_heads {self.kv_heads} needs width, counting 'parameters'")
            if "kv_group" not in self.units and self.kv_heads != legal[-1]:
                raise ConfigError(f"kv_heads {self.kv_heads} needs 'kv_group' among units")
        if self.experts and not self.anatomy.expert_counts:
            kind = self.anatomy.model_type
            raise ConfigError(f"experts {self.experts}: {kind!r} has none that can be removed")
        taken, left = self.anatomy.experts_per_token, self.left_experts
        if left < taken:
            told = f"leaves {left} in a layer, but each token takes {taken}"
            most = 1 - taken / self.anatomy.expert_counts[0]
            raise ImpossiblePlanError(f"experts {self.experts} {told}: at most {most:g}")

    @property
    def left_experts(self) -> int:
        """Count the kept experts of every layer that has some."""
        count = max(self.anatomy.expert_counts, default=0)
        return count - round(count * self.experts)

    @property
    def multiple(self) -> int:
        """Multiple for the number of kept neurons; a larger one if the model needs it."""
        default = 1 if self.counting == "per_layer" else default_multiple(self.anatomy)
        return math.lcm(self.round_to or default, self.anatomy.backbone.neuron_multiple)

    @property
    def protected(self) -> tuple[int, int]:
        """How many first and last layers are left unpruned."""
        first, last = self.protect
        if self.allocation != "protect" or first or last:
            return first, last
        scaled = [max(round(n * self.anatomy.num_layers / 32), 1) for n in _PROTECTED_OF_32]
        return scaled[0], scaled[1]

    @property
    def open_layers(self) -> range:
        """The layers between the protected ones."""
        first, last = self.protected
        return range(first, self.anatomy.num_layers - last)


def make_plan(
    anatomy: Anatomy,
    scores: Scores | Sequence[Scores],
    ratio: float,
    axis: str = "width",
    allocation: str = "uniform",
    protect: tuple[int, int] = (0, 0),
    counting: str = "parameters",
    round_to: int | None = None,
    *,
    units: Sequence[str] = WIDTH_UNITS,
    kv_heads: int | None = None,
    tokens: Collection[int] | None = None,
    experts: float = 0.0,
    tower_ratio: float = 0.0,
    tower_scores: Scores | None = None,
) -> Plan:
    """Choose the units to keep.

    Args:
        anatomy: The model's.
        scores: Scores of the units to prune, higher = keep; of two for a unit, the first one
            counts. Units without scores are kept.
        ratio: Share to remove, in [0, 1): of the backbone's parameters, or with
            ``counting="per_layer"`` of the units (for ``depth``, layers) that are not protected.
        axis: ``depth`` removes layers, but keeps one of each kind at least; ``width`` KV groups
            and neurons; with ``both`` each gives half of the removed parameters.
        allocation: How widths share the budget. ``uniform``: the same widths in every unprotected
            layer. ``protect``: the same, with the first 4 and last 2 of 32 layers unpruned (scaled
            to the model's depth, one at least) unless ``protect`` is given.
        protect: Number of first and last layers to leave unpruned.
        counting: ``parameters`` is exact. ``per_layer`` counts as LLM-Pruner does:
            ``n = C - floor(C (1 - ratio))`` of a projection's ``C`` channels, whole heads only.
        round_to: Multiple for the number of kept neurons. Default: 128, less in smaller models
            (`default_multiple`); 1 with ``per_layer``.
        units: Kinds to prune, of ``kv_group`` and ``neuron``.
        kv_heads: KV groups to keep in every unprotected layer; neurons give the rest. By default
            both kinds give the same share where whole groups allow it.
        tokens: Ids of the tokens to keep, as `slimvlm.choose_tokens` finds them; None for all.
            Removed rows count towards the ratio; the axis gives the rest.
        experts: Share of the experts to remove from every layer, protected ones included, in
            [0, 1); at least as many stay as each token takes. Also counts towards the ratio.
        tower_ratio: Share of the vision tower's parameters to remove, in [0, 1), whatever the
            ratio: first the layers that nobody reads, then neurons, equally many of each layer (see
            `plan_tower`).
        tower_scores: Scores of the tower on its own, by which its neurons are chosen; without them
            the last ones stay, until a walk chooses.

    Returns:
        A plan with the nearest ratio; `ImpossiblePlanError` if none is within one layer for
        ``depth``, within one multiple of neurons in all layers for widths.

    Reference:
        Protected layers: Huang et al. 2025, arXiv:2507.20749, in the released code for InternVL.
    """
    values: Any = {"axis": axis, "counting": counting, "allocation": allocation}
    values |= {"protect": tuple(protect), "round_to": round_to, "units": tuple(units)}
    budget = Budget(anatomy=anatomy, ratio=ratio, kv_heads=kv_heads, experts=experts, **values)
    given = [scores] if isinstance(scores, Scores) else list(scores)
    kept = None if tokens is None else tuple(sorted(set(tokens)))
    plan = replace(Plan.everything(anatomy), axis=axis, asked_ratio=ratio, tokens=kept)
    if tower_ratio:
        plan = replace(plan, tower=plan_tower(anatomy, tower_ratio, tower_scores))
        if not ratio and not experts:
            return plan
    if experts:
        of_experts = scores_for("expert", given, budget)
        for index, values in enumerate(of_experts.of("expert")):
            if len(values):
                plan = plan.with_units(index, {"expert": best_units(values, budget.left_experts)})
        plan = replace(plan, criteria={**plan.criteria, "expert": of_experts.criterion})
    if (tokens is not None or experts) and counting == "parameters" and plan.ratio >= ratio:
        return plan
    if axis in ("depth", "both"):
        plan = _without_layers(plan, scores_for("layer", given, budget), budget)
    if axis in ("width", "both"):
        plan = with_uniform_widths(plan, given, budget)
    if counting != "parameters":
        return plan
    if axis == "depth":
        step = max(shape.params for shape in anatomy.layers)
    elif "neuron" in plan.criteria:
        step = budget.multiple * sum(shape.neuron_params for shape in anatomy.layers)
    elif "kv_group" in plan.criteria and len(anatomy.legal_kv_heads()) > 1:
        step = sum(shape.kv_group_params for shape in anatomy.layers)
    else:
        step = 0
    if abs(plan.ratio - ratio) > step / anatomy.backbone_params + 1e-9:
        nearest = f"the nearest legal shape has ratio {plan.ratio:.4f} ({plan.summary()})"
        raise ImpossiblePlanError(f"ratio {ratio:g} cannot be reached on axis {axis!r}: {nearest}")
    return plan


def plan_tower(anatomy: Anatomy, ratio: float, scores: Scores | None = None) -> Plan:
    """Choose the units of a model's vision tower to keep, so that a share of it goes.

    The layers that nobody reads go first. Then each layer loses equally many neurons, so many that
    a multiple of `_TOWER_MULTIPLE` stays (of less in narrow towers). Where less than a quarter of
    the neurons would stay, whole layers go, too: those with the lowest scores, else evenly spread
    ones. Without scores the last neurons stay; a walk chooses others.

    Raises:
        ConfigError: If the ratio is out of range.
        ImpossiblePlanError: If nothing of the tower can be removed, or not so much.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"tower_ratio {ratio} must be at least 0 and below 1")
    if why := why_tower_stays(anatomy):
        raise ImpossiblePlanError(f"tower_ratio {ratio:g}: {why}")
    assert anatomy.tower is not None
    return _plan_alone(anatomy.tower, ratio, scores)


def is_open(plan: Plan) -> bool:
    """Whether nothing has chosen the neurons of a tower's plan: no scores and no person."""
    ratio = plan.asked_ratio
    return not plan.criteria and ratio is not None and plan == _plan_alone(plan.before, ratio)


def _plan_alone(tower: Anatomy, ratio: float, scores: Scores | None = None) -> Plan:
    """Choose the units of a tower; see `plan_tower`."""
    read = range(tower.num_layers - tower.unread)
    width, each = tower.mlp_widths[-1], tower.layers[0].neuron_params
    multiple = _TOWER_MULTIPLE
    while multiple > 1 and 8 * multiple > width:
        multiple //= 2
    (usual, _), *_ = tower.kinds.most_common()
    stay = {*tower.pinned_layers, *(i for i, s in enumerate(tower.layers) if s.kind != usual)}
    order = [index for index in _tower_order(read, scores) if index not in stay]
    wanted = ratio * tower.backbone_params
    for count in range(len(order) + 1):
        layers = tuple(index for index in read if index not in order[:count])
        gone = sum(s.params for i, s in enumerate(tower.layers) if i not in layers)
        of_neuron = len(layers) * each + tower.head_neuron_params
        left = width - (wanted - gone) / of_neuron
        if 4 * left >= width:
            break
    neurons = min(max(round(left / multiple), 1) * multiple, width)
    most = gone + (width - multiple) * of_neuron
    if wanted > most + multiple * of_neuron:
        told = f"cannot be reached: at most {most / tower.backbone_params:.2f}"
        raise ImpossiblePlanError(f"tower_ratio {ratio:g} {told}")
    best = cache(best_units)
    units, criteria = [torch.zeros(width)] * tower.num_layers, dict[str, str]()
    if scores is not None and scores.neuron is not None:
        units, criteria = list(scores.neuron), {"neuron": scores.criterion}
    kept = tuple(best(units[i], neurons) if i in layers else () for i in range(tower.num_layers))
    plan = Plan.everything(tower)
    rows: dict[str, Any] = {"layers": layers, "neurons": kept, "kv_groups": ((),) * len(kept)}
    return replace(plan, **rows, experts=(), asked_ratio=ratio, criteria=criteria)


def _tower_order(read: range, scores: Scores | None) -> list[int]:
    """List the layers in the order in which they may go: the first and the last one never."""
    inner = list(read[1:-1])
    if scores is not None and scores.layer is not None:
        return sorted(inner, key=lambda index: float(scores.layer[index]))  # type: ignore[index]
    step = (5**0.5 - 1) / 2  # the golden section spreads any number of them
    return sorted(inner, key=lambda index: (index * step) % 1)


def ratio_for_params(anatomy: Anatomy, target_params: int) -> float:
    """Return the ratio that leaves a whole model (towers included) with so many parameters."""
    whole, backbone = anatomy.total_params, anatomy.backbone_params
    where = f"target of {target_params:,} parameters"
    if target_params > whole:
        raise ConfigError(f"{where}: the model has only {whole:,} parameters")
    if target_params <= whole - backbone:
        told = f"only the backbone is pruned, and the rest has {whole - backbone:,}"
        raise ImpossiblePlanError(f"{where}: {told}")
    return (whole - target_params) / backbone


def make_plan_for_params(
    anatomy: Anatomy,
    scores: Scores | Sequence[Scores],
    target_params: int,
    axis: str = "width",
    **options: Any,
) -> Plan:
    """Make the plan with the smallest ratio that leaves at most so many parameters.

    Those of towers count. All other arguments are as in `make_plan`.
    """
    ratio = ratio_for_params(anatomy, target_params)
    while True:
        plan = make_plan(anatomy, scores, ratio, axis, **options)
        excess = plan.after.total_params - target_params
        if excess <= 0:
            return plan
        if ratio >= 1 - 1e-9:
            told = f"the smallest legal shape has {plan.after.total_params:,}"
            raise ImpossiblePlanError(f"target of {target_params:,} parameters: {told}")
        ratio = min(ratio + max(excess / anatomy.backbone_params, 1e-4), 1 - 1e-9)


def width_candidates(
    anatomy: Anatomy,
    layer_scores: Sequence[Scores],
    ratio: float,
    axis: str,
    criterion: str,
    allocation: str = "balanced",
    **options: Any,
) -> list[Plan]:
    """Make plans of one ratio for the number of units of each layer, not yet for their choice.

    ``balanced`` gives a plan for each legal number of KV groups, with as many neurons in each layer
    as the ratio leaves; any other ``allocation`` the one plan of `make_plan`. The kept units are
    arbitrary: ``criterion`` will choose them. ``layer_scores`` choose layers; none for ``width``.
    """
    zeros = cache(torch.zeros)
    groups = [zeros(shape.num_kv_heads) for shape in anatomy.layers]
    neurons = [zeros(shape.intermediate_size) for shape in anatomy.layers]
    scores = [*layer_scores, Scores(criterion, kv_group=groups, neuron=neurons)]
    if allocation != "balanced":
        return [make_plan(anatomy, scores, ratio, axis, allocation, **options)]
    found: list[Plan] = []
    units = options.get("units", WIDTH_UNITS)
    is_open = options.get("kv_heads") is None and options.get("counting") != "per_layer"
    for kv_heads in anatomy.legal_kv_heads() if "kv_group" in units and is_open else ():
        try:
            plan = make_plan(anatomy, scores, ratio, axis, **{**options, "kv_heads": kv_heads})
        except ImpossiblePlanError:
            continue
        if plan not in found:  # where tokens or experts alone reach the ratio
            found.append(plan)
    return found or [make_plan(anatomy, scores, ratio, axis, **options)]


def _without_layers(plan: Plan, scores: Scores, budget: Budget) -> Plan:
    """Remove the layers with the lowest scores, or the run of layers that costs least."""
    anatomy, shapes = budget.anatomy, plan.shapes
    candidates = [index for index in budget.open_layers if index not in anatomy.pinned_layers]
    assert scores.layer is not None
    stay, order = anatomy.kinds, list[int]()  # of every kind of layer one is kept
    for place in torch.argsort(scores.layer[candidates], stable=True).tolist():
        index = candidates[place]
        if stay[shapes[index].kind] > 1:
            stay[shapes[index].kind] -= 1
            order.append(index)
    if budget.counting == "per_layer":
        count = channels_to_remove(len(candidates), budget.ratio)
    else:  # so many that their parameters come nearest; layers may differ in size
        backbone = anatomy.backbone_params
        wanted = budget.ratio * backbone - plan.ratio * backbone
        wanted *= 0.5 if budget.axis == "both" else 1.0
        sums = list(accumulate((shapes[i].params for i in order), initial=0))
        count = min(range(len(sums)), key=lambda n: abs(sums[n] - wanted))
    count = min(count, len(order))
    if scores.layer_runs is not None and count:
        costs = scores.layer_runs[count - 1]  # of the run that begins at each layer
        runs = [{*range(start, start + count)} for start in candidates]
        runs = [run for run in runs if run <= set(candidates)]
        rest = [{s.kind for i, s in enumerate(anatomy.layers) if i not in run} for run in runs]
        possible = [run for run, kinds in zip(runs, rest, strict=True) if kinds == {*stay}]
        if not possible:
            told = f"plan: no {count} layers in a row can be removed"
            raise ImpossiblePlanError(f"{told}; score them one by one, as 'block_influence' does")
        removed = min(possible, key=lambda run: float(costs[min(run)]))
    else:
        removed = set(order[:count])
    rows: dict[str, Any] = {
        f"{unit}s": tuple(() if i in removed else k for i, k in enumerate(plan.kept(unit)))
        for unit in LAYER_UNITS
    }
    layers = tuple(index for index in plan.layers if index not in removed)
    criteria = {**plan.criteria, "layer": scores.criterion}
    return replace(plan, layers=layers, criteria=criteria, **rows)


def scores_for(unit: str, given: list[Scores], budget: Budget) -> Scores:
    """Find the first scores of a unit; raise without any, or if they do not fit."""
    shapes = budget.anatomy.layers
    for scores in given:
        if scores.of(unit) is None:
            continue
        where = f"scores {scores.criterion!r}"
        rows = [scores.of(unit)] if unit == "layer" else list(scores.of(unit))
        found = [len(row) for row in rows]
        expected = [len(shapes)] if unit == "layer" else [shape.units(unit) for shape in shapes]
        if found != expected:
            told = f"{unit} counts {found[:3]}..., expected {expected[:3]}..."
            raise ConfigError(f"{where} are for another model: {told}")
        if not all(map(all_finite, rows)):
            raise NumericalError(f"{where}: NaN or infinity among {unit} scores")
        return scores
    names = ", ".join(repr(scores.criterion) for scores in given) or "none"
    asking = f"experts {budget.experts}" if unit == "expert" else f"axis {budget.axis!r}"
    raise ConfigError(f"{asking} needs scores of {unit}; given: {names}")


def best_units(values: Tensor, count: int) -> Kept:
    """Return the indices of the highest scores, ascending; of equal ones the later are kept."""
    order = torch.argsort(values, stable=True)
    return tuple(order[len(values) - count :].sort().values.tolist())


def with_uniform_widths(plan: Plan, given: list[Scores], budget: Budget) -> Plan:
    """Keep the best units of each open layer, equally many; kinds without scores stay whole."""
    can_shrink = {"kv_group": True, "neuron": len(budget.anatomy.legal_neurons()) > 1}
    scored = {
        unit: scores_for(unit, given, budget)
        for unit in budget.units
        if (can_shrink[unit] and any(scores.of(unit) is not None for scores in given))
        or (unit == "kv_group" and budget.kv_heads is not None)
    }
    if not scored:
        scores_for(budget.units[-1], given, budget)
    shapes = {index: shape for index, shape in plan.shapes.items() if index in budget.open_layers}
    if not shapes:
        return plan
    equal = budget.anatomy.with_layers(list(shapes.values()))
    if not equal.is_uniform:
        raise ConfigError(f"allocation {budget.allocation!r} needs layers of equal widths")
    counts = _widths(equal, plan, scored.keys(), budget)
    kept = {unit: list(plan.kept(unit)) for unit in scored}
    best = cache(best_units)  # by the tensor, which layers may share
    for unit, scores in scored.items():
        for index, shape in shapes.items():
            count = counts[unit] if shape.units(unit) else 0
            kept[unit][index] = best(scores.of(unit)[index], count)
    rows: dict[str, Any] = {f"{unit}s": tuple(units) for unit, units in kept.items()}
    criteria = {**plan.criteria, **{unit: scores.criterion for unit, scores in scored.items()}}
    return replace(plan, criteria=criteria, **rows)


def _widths(equal: Anatomy, plan: Plan, scored: Collection[str], budget: Budget) -> dict[str, int]:
    """Choose how many units each open layer keeps: both kinds the same share, in whole groups."""
    widest = max(equal.layers, key=lambda shape: shape.num_kv_heads)
    all_groups = widest.num_kv_heads
    all_neurons = max(shape.intermediate_size for shape in equal.layers)
    if budget.counting == "per_layer":
        channels = all_groups * widest.head_dim
        removed = channels_to_remove(channels, budget.ratio) // max(widest.head_dim, 1)
        neurons = all_neurons - channels_to_remove(all_neurons, budget.ratio)
        neurons = max(round(neurons / budget.multiple), 1) * budget.multiple
        return {"kv_group": max(all_groups - removed, 1), "neuron": min(neurons, all_neurons)}
    # parameters of one unit in every open layer
    group_params = sum(shape.kv_group_params for shape in equal.layers)
    neuron_params = sum(shape.neuron_params for shape in equal.layers)
    legal = budget.anatomy.legal_kv_heads() if "kv_group" in scored else []
    if budget.kv_heads is not None and legal:
        legal = [budget.kv_heads]
    legal = legal or [all_groups]
    backbone = plan.before.backbone_params
    params = budget.ratio * backbone - plan.ratio * backbone  # that are still to be removed
    multiple = budget.multiple if "neuron" in scored else 0
    attention = all_groups * group_params if len(legal) > 1 else 0
    mlp = all_neurons * neuron_params if multiple else 0
    share = min(params / (attention + mlp), 1.0) if attention + mlp else 0.0
    # parameters off the budget beyond one step of neurons, groups off the share; widths
    misses: list[tuple[float, float, int, int]] = []
    for groups in legal:
        rest = params - (all_groups - groups) * group_params
        neurons = all_neurons
        if multiple:  # the nearest multiple, or the full width if that is nearer
            wanted = all_neurons - rest / neuron_params
            nearest = min(max(round(wanted / multiple), 1) * multiple, all_neurons)
            is_nearer = abs(nearest - wanted) <= abs(all_neurons - wanted)
            neurons = nearest if is_nearer else all_neurons
        removed_params = (all_neurons - neurons) * neuron_params
        off_budget = max(abs(rest - removed_params) - multiple * neuron_params, 0.0)
        misses.append((off_budget, abs(groups - all_groups * (1 - share)), groups, neurons))
    *_, groups, neurons = min(misses)
    return {"kv_group": groups, "neuron": neurons}


def channels_to_remove(channels: int, ratio: float) -> int:
    """``C - floor(C (1 - ratio))`` in exact decimals; floats remove one of 640 too many at 0.9."""
    return channels - math.floor(channels * (1 - Fraction(str(ratio))))


def default_multiple(anatomy: Anatomy) -> int:
    """Return 128 where a step of all widths is at most 1 % of the backbone, else 64 halved."""
    step = sum(shape.neuron_params for shape in anatomy.layers) / anatomy.backbone_params
    if WIDTH_MULTIPLE * step <= 0.01:
        return WIDTH_MULTIPLE
    multiple = TILE_MULTIPLE
    while multiple > 1 and multiple * step > 0.005:
        multiple //= 2
    return multiple
