"""Which layers go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slimvlm.core.errors import ImpossiblePlanError
from slimvlm.planning.budget import Budget, channels_to_remove
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores


def without_layers(plan: Plan, scores: Scores, budget: Budget) -> Plan:
    """Drop the layers that matter least, or the run that does."""
    candidates, count = budget.removable_layers, _num_layers_to_remove(plan, budget)
    if scores.layer_runs is not None and count:
        removed = _lowest_run(candidates, scores.layer_runs[count - 1], count)
    else:
        assert scores.layer is not None
        order = torch.argsort(scores.layer[candidates], stable=True)[:count]
        removed = {candidates[int(i)] for i in order}
    criteria = {**plan.criteria, "layer": scores.criterion}
    return replace(plan.without_layers(removed), criteria=criteria)


def _lowest_run(candidates: Sequence[int], costs: Tensor, count: int) -> set[int]:
    """The run of layers that costs least, by the cost of the run from each layer on."""
    runs = [range(start, start + count) for start in candidates]
    possible = [run for run in runs if set(run) <= set(candidates)]
    if not possible:
        raise ImpossiblePlanError(
            f"plan: no {count} layers in a row can go; score layers one by one, such as by "
            "'block_influence'"
        )
    cheapest = min(possible, key=lambda run: float(costs[run.start]))
    return set(cheapest)


def _num_layers_to_remove(plan: Plan, budget: Budget) -> int:
    shapes, candidates = plan.shapes, budget.removable_layers
    most = min(len(candidates), len(shapes) - 1)
    if budget.counting == "per_layer":
        return min(channels_to_remove(len(candidates), budget.ratio), most)
    share = budget.depth_share if budget.axis == "both" else 1.0
    mean_params = sum(shapes[i].params for i in candidates) / max(len(candidates), 1)
    return min(round(budget.left(plan) * share / mean_params) if mean_params else 0, most)
