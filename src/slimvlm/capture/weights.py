"""Statistics that need no data."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from slimvlm.capture.batches import Batch
from slimvlm.geometry import projections
from slimvlm.scores.width import magnitude
from slimvlm.values import Statistics


def capture_nothing(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Statistics for criteria that look at neither weights nor data."""
    return Statistics("nothing", {})


def capture_weights(model: nn.Module, batches: Iterable[Batch], p: int = 1) -> Statistics:
    """Sums of ``|w|^p`` for each channel of each matrix."""
    sums = {
        f"{index}.{projection.path}": magnitude(linear.weight.detach().float(), p)
        .double()
        .sum(1 - projection.dim)
        .cpu()
        for index, projection, linear in projections(model)
    }
    return Statistics("weights", sums)
