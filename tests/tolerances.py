"""How near is near: ``(dtype, atol, rtol)``, in one place.

Indices, plans, files and reloaded logits are compared for equality and need no row here.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """When two tensors count as the same."""

    dtype: torch.dtype
    atol: float
    rtol: float


SOLVE = Tolerance(torch.float64, 1e-10, 1e-8)
"""Linear solves."""
FORWARD = Tolerance(torch.float32, 1e-5, 1e-5)
"""Logits of the same function computed along another path (mask against slice)."""
LOSS = Tolerance(torch.float32, 1e-6, 1e-5)
"""Losses and block influence."""
AFTER_ADAM = Tolerance(torch.float32, 1e-4, 1e-3)
"""Weights after AdamW, whose first steps turn rounding of tiny gradients into real moves."""
HALF = Tolerance(torch.bfloat16, 2e-2, 2e-2)
"""Anything in half precision."""
SCORE_SHARE_OF_MAXIMUM = 2e-5
"""Scores of one layer, as a share of its largest: gradients sum in another order."""
ELIMINATION_SHARE_OF_MAXIMUM = 5e-4
"""The same where units went one by one: rounding errors of float32 add up."""


def share_of(criterion: str) -> float:
    """How far scores of a criterion may differ, as a share of the largest of them."""
    return ELIMINATION_SHARE_OF_MAXIMUM if criterion == "obs" else SCORE_SHARE_OF_MAXIMUM


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    """Equal shapes, and values within a tolerance once both have its data type."""
    dtype, atol, rtol = tolerance
    torch.testing.assert_close(actual.to(dtype), expected.to(dtype), atol=atol, rtol=rtol)


def assert_scores_close(
    actual: Tensor, expected: Tensor, share: float = SCORE_SHARE_OF_MAXIMUM
) -> None:
    """Scores of the units of one layer (or of all layers) agree relative to the largest."""
    atol = share * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=0)
