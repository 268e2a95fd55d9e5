"""Which layers go."""

from __future__ import annotations

from dataclasses import replace

import torch

from slimvlm.plan import Plan
from slimvlm.planning.budget import Budget, channels_to_remove
from slimvlm.values import Scores


def without_layers(plan: Plan, scores: Scores, budget: Budget) -> Plan:
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
