"""KV groups against neurons: the split of a ratio that costs a few layers least."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slimvlm.models.anatomy import WIDTH_UNITS
from slimvlm.models.parts import decoder_layers
from slimvlm.planning.plan import Plan
from slimvlm.pruning.walk.streams import Streams
from slimvlm.pruning.writers import writers_of_layer
from slimvlm.scoring.obs import removal_order

TRIED = 2
"""Layers that are tried, spread evenly over those that lose units."""
TRIAL = "trial"
"""The stream of the trial: behind whole layers."""


def cheapest_plan(streams: Streams, plans: Sequence[Plan]) -> Plan:
    """The plan whose units cost some layers least when they go and the others are refitted.

    In a few layers of the original, all units that any plan removes are removed one after another,
    cheapest first (`slimvlm.scoring.obs`). A plan's cost there is the squared error of attention
    and MLP together when as many are gone as it says, as a share of what both write.

    Args:
        streams: The calibration states.
        plans: Plans that differ in how many KV groups and neurons layers keep.
    """
    if len(plans) == 1:
        return plans[0]
    layers = _tried(plans[0])
    costs = [0.0] * len(plans)
    for index in range(layers[-1] + 1):
        with streams.runner.source.layer(index, streams.runner.device):
            if index in layers:
                for place, cost in enumerate(_costs(streams, plans, index)):
                    costs[place] += cost
            if index < layers[-1]:
                streams.pass_on(TRIAL, index, index + 1, streams.fitted)
        streams.runner.store.drop(f"{TRIAL}-{index}")
    return plans[costs.index(min(costs))]


def _tried(plan: Plan) -> list[int]:
    """Original numbers of the layers to try."""
    loses = {i: sum(_removed(plan, i, unit) for unit in WIDTH_UNITS) for i in plan.layers}
    open_layers = [index for index, count in loses.items() if count]
    step = len(open_layers) / (TRIED + 1)
    return sorted({open_layers[int(step * (place + 1))] for place in range(TRIED)})


def _removed(plan: Plan, index: int, unit: str) -> int:
    """How many units of a kind a plan removes from a layer."""
    return plan.before.layers[index].units(unit) - len(plan.kept(unit)[index])


def _costs(streams: Streams, plans: Sequence[Plan], index: int) -> list[float]:
    """What each plan costs a layer, as a share of what it writes."""
    total, written = [0.0] * len(plans), 0.0
    layer = decoder_layers(streams.runner.model)[index]
    for writer in writers_of_layer(layer, index, plans[0].before.backbone):
        moments, weight = streams.moments(TRIAL, writer, streams.fitted), writer.weight
        channels = torch.arange(weight.shape[1], device=weight.device)
        written += moments.square(weight.double(), channels, centred=False)
        counts = [_removed(plan, index, writer.unit) for plan in plans]
        units = plans[0].before.layers[index].units(writer.unit)
        costs = removal_order(weight, moments.gram, units, stop=max(counts)).costs.cpu()
        for place, count in enumerate(counts):
            total[place] += float(costs[:count].sum())
    return [cost / written for cost in total]
