"""Make a plan: from scores and a budget to the units that stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.models.anatomy import WIDTH_UNITS, Anatomy
from slimvlm.planning.budget import (
    Budget,
    best_units,
    channels_to_remove,
    scores_for,
    with_uniform_widths,
)
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores


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
    *,
    units: Sequence[str] = WIDTH_UNITS,
    kv_heads: int | None = None,
    tokens: Collection[int] | None = None,
    experts: float = 0.0,
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
        allocation: How widths share the budget. ``uniform``: the same widths in every unprotected
            layer. ``protect``: the same, with the first 4 and last 2 of 32 layers left whole
            (scaled to the model's depth, one at least) unless ``protect`` says otherwise.
        protect: How many first and last layers are left whole.
        counting: ``parameters`` is exact. ``per_layer`` counts as LLM-Pruner does:
            ``n = C - floor(C (1 - ratio))`` of a projection's ``C`` channels, whole heads only.
        round_to: Multiple for the number of kept neurons. Default 128, in smaller models as little
            as the ratio needs (`default_multiple`); 1 with ``per_layer``.
        depth_share: With ``both``, the share of the removed parameters that layers give.
        units: Which of ``kv_group`` and ``neuron`` may become fewer.
        kv_heads: KV groups to keep in every unprotected layer; neurons give the rest. By default
            both kinds give the same share where whole groups allow it.
        tokens: Ids of the tokens to keep, as `slimvlm.choose_tokens` finds them; None for all. The
            rows that go are part of the ratio: the axis gives the rest, and nothing where they
            alone reach it.
        experts: Share of the experts of every layer that goes, in [0, 1), protected layers too; as
            near as whole experts allow, and as many must stay as each token takes. Scores must
            cover ``expert``. Their parameters are part of the ratio, as with tokens.

    Returns:
        A plan whose achieved ratio is as near as whole units allow: within a layer for ``depth``,
        within one multiple of neurons in all layers for widths.

    Raises:
        ConfigError: If an argument is out of range or scores for the axis are missing.
        ImpossiblePlanError: If no legal shape comes near the ratio; the message names the nearest.

    Reference:
        The protected layers are those of Huang et al. 2025, arXiv:2507.20749, in the released code
        for InternVL; for its other models that code protects more (3 first and 11 last of 32).
    """
    budget = Budget(
        anatomy,
        ratio,
        axis,
        protect,
        counting,
        round_to,
        depth_share,
        allocation,
        tuple(units),
        kv_heads,
        experts,
    )
    given = [scores] if isinstance(scores, Scores) else list(scores)
    kept = None if tokens is None else tuple(sorted(set(tokens)))
    plan = replace(Plan.everything(anatomy), axis=axis, asked_ratio=ratio, tokens=kept)
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
    """Make the plan with the smallest ratio whose whole model has at most so many parameters.

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


def width_candidates(
    anatomy: Anatomy,
    layer_scores: Sequence[Scores],
    ratio: float,
    axis: str,
    criterion: str,
    allocation: str = "balanced",
    **options: Any,
) -> list[Plan]:
    """Make plans of one ratio that say how many units each layer keeps, but not yet which ones.

    ``balanced`` gives a plan for each legal number of KV groups, with as many neurons in each layer
    as the ratio leaves; any other ``allocation`` the one plan of `make_plan`. The units are
    arbitrary: ``criterion`` will choose them. ``layer_scores`` choose layers; none for ``width``.
    """
    groups = [torch.zeros(shape.num_kv_heads) for shape in anatomy.layers]
    neurons = [torch.zeros(shape.intermediate_size) for shape in anatomy.layers]
    scores = [*layer_scores, Scores(criterion, kv_group=groups, neuron=neurons)]
    if allocation != "balanced":
        return [make_plan(anatomy, scores, ratio, axis, allocation, **options)]
    found: list[Plan] = []
    units = options.get("units", WIDTH_UNITS)
    for kv_heads in anatomy.legal_kv_heads() if "kv_group" in units else ():
        try:
            plan = make_plan(anatomy, scores, ratio, axis, kv_heads=kv_heads, **options)
        except ImpossiblePlanError:
            continue
        if plan not in found:  # where tokens or experts alone reach the ratio
            found.append(plan)
    return found or [make_plan(anatomy, scores, ratio, axis, **options)]


def _without_layers(plan: Plan, scores: Scores, budget: Budget) -> Plan:
    """Drop the layers with the lowest scores, or the run of layers that costs least."""
    candidates, shapes = budget.removable_layers, plan.shapes
    if budget.counting == "per_layer":
        count = channels_to_remove(len(candidates), budget.ratio)
    else:
        share = budget.depth_share if budget.axis == "both" else 1.0
        mean_params = sum(shapes[i].params for i in candidates) / max(len(candidates), 1)
        count = round(budget.left(plan) * share / mean_params) if mean_params else 0
    count = min(count, len(candidates), len(shapes) - 1)
    if scores.layer_runs is not None and count:
        costs = scores.layer_runs[count - 1]  # of the run that begins at each layer
        runs = [range(start, start + count) for start in candidates]
        possible = [run for run in runs if set(run) <= set(candidates)]
        if not possible:
            raise ImpossiblePlanError(
                f"plan: no {count} layers in a row can go; score layers one by one, such as by "
                "'block_influence'"
            )
        cheapest = min(possible, key=lambda run: float(costs[run.start]))
        removed = set(cheapest)
    else:
        assert scores.layer is not None
        order = torch.argsort(scores.layer[candidates], stable=True)[:count]
        removed = {candidates[int(i)] for i in order}
    criteria = {**plan.criteria, "layer": scores.criterion}
    return replace(plan.without_layers(removed), criteria=criteria)


def _check_reached(plan: Plan, budget: Budget) -> None:
    """The achieved ratio must be within the smallest step that the axis has."""
    shapes = budget.anatomy.layers
    if plan.axis == "depth":
        step = min(shape.params for shape in shapes)
    elif "neuron" in plan.criteria:
        step = budget.multiple * sum(shape.neuron_params for shape in shapes)
    elif "kv_group" in plan.criteria and len(budget.anatomy.legal_kv_heads()) > 1:
        step = sum(shape.kv_group_params for shape in shapes)
    else:
        step = 0
    if abs(plan.ratio - budget.ratio) > step / budget.anatomy.backbone_params + 1e-9:
        raise ImpossiblePlanError(
            f"ratio {budget.ratio:g} cannot be reached on axis {plan.axis!r}: the nearest legal "
            f"shape has ratio {plan.ratio:.4f} ({plan.summary()})"
        )
