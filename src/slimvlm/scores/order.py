"""Scores from an order of removal: what went first scores least."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def strictly_increasing(costs: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """The smallest float32 numbers that rise from unit to unit and never lie below the costs.

    Greedy removal may find a unit cheaper than one that went before it. Its score must not be
    lower, or a plan would take it first: it becomes the next larger float32 number.

    Args:
        costs: What each unit cost when it went, in order of removal; at least 0.
    """
    steps = torch.arange(len(costs), device=costs.device)
    bits = costs.float().contiguous().view(torch.int32).long()  # ordered as the numbers are
    raised = (bits - steps).cummax(0).values + steps
    return raised.int().view(torch.float32)
