"""Plans that say how many units each layer keeps, while which ones is not decided yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from slimvlm.core.errors import ImpossiblePlanError
from slimvlm.models.anatomy import WIDTH_UNITS, Anatomy
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores


def width_candidates(
    anatomy: Anatomy,
    layer_scores: Sequence[Scores],
    ratio: float,
    axis: str,
    criterion: str,
    allocation: str = "balanced",
    **options: Any,
) -> list[Plan]:
    """Plans of one ratio, with as many units in each layer as it needs.

    Args:
        anatomy: The model's.
        layer_scores: What decides which layers stay; none for ``width``.
        ratio: As for `make_plan`.
        axis: ``width`` or ``both``.
        criterion: What will choose the units.
        allocation: ``balanced``: a plan for each legal number of KV groups, with as many neurons
            in each layer as the ratio leaves. Otherwise the one plan of `make_plan`.
        **options: ``protect``, ``round_to``, ``depth_share`` and ``units`` of `make_plan`.

    Returns:
        Plans whose units are arbitrary, at least one.

    Raises:
        ImpossiblePlanError: If no legal shape comes near the ratio.
    """
    scores = [*layer_scores, _equal_scores(anatomy, criterion)]
    found: list[Plan] = []
    if allocation == "balanced":
        allocation = "uniform"
        groups = options.get("units", WIDTH_UNITS)
        for kv_heads in anatomy.legal_kv_heads() if "kv_group" in groups else ():
            try:
                plan = make_plan(
                    anatomy, scores, ratio, axis, allocation, kv_heads=kv_heads, **options
                )
            except ImpossiblePlanError:
                continue
            if plan not in found:  # where tokens or experts alone reach the ratio
                found.append(plan)
    return found or [make_plan(anatomy, scores, ratio, axis, allocation, **options)]


def _equal_scores(anatomy: Anatomy, criterion: str) -> Scores:
    groups = [torch.zeros(shape.num_kv_heads) for shape in anatomy.layers]
    neurons = [torch.zeros(shape.intermediate_size) for shape in anatomy.layers]
    return Scores(criterion, kv_group=groups, neuron=neurons)
