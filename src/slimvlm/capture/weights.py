"""Statistics that need no data."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from slimvlm.capture.batches import Batch
from slimvlm.capture.hooks import weight_of
from slimvlm.geometry import matrices
from slimvlm.scores.width import channel_sums, magnitude
from slimvlm.values import Statistics


def capture_nothing(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Statistics for criteria that look at neither weights nor data."""
    return Statistics("nothing", {})


def capture_weights(model: nn.Module, batches: Iterable[Batch], p: int = 1) -> Statistics:
    """Sums of ``|w|^p`` for each channel of each matrix."""
    sums = {
        f"{index}.{matrix.projection.path}": channel_sums(
            magnitude(weight_of(matrix.owner, matrix.name).float(), p), matrix.projection.axis
        )
        for index, matrix in matrices(model)
    }
    return Statistics("weights", sums)
