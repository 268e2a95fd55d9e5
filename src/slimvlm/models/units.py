"""Units and the channels they own. The only place where head geometry becomes indices.

A projection's channels along its divided dimension are a row of segments (see
`slimvlm.models.families.Projection`). Within a segment, unit ``u`` owns the consecutive channels
``u * width ... (u + 1) * width - 1``: for queries of a grouped-attention model these are the
``queries_per_group`` heads that read KV head ``u``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from slimvlm.models.anatomy import LayerShape
from slimvlm.models.families import Projection, Segment

WIDTH_UNITS = ("kv_group", "neuron")
"""The kinds of unit that a width takes away."""
LAYER_UNITS = (*WIDTH_UNITS, "expert")
"""The kinds of unit that a layer has several of."""


def unit_of(projection: Projection) -> str:
    """Whether a projection's channels belong to neurons, to experts or to KV groups."""
    segment = projection.segments[0]
    return segment if segment in ("neuron", "expert") else "kv_group"


def segments(projection: Projection, shape: LayerShape) -> Iterator[tuple[Segment, int, int, int]]:
    """The segments of a projection: (name, offset, number of units, channels of a unit)."""
    offset = 0
    for segment in projection.segments:
        units, width = shape.block(segment)
        yield segment, offset, units, width
        offset += units * width


def channels_of(
    projection: Projection, shape: LayerShape, units: Sequence[int]
) -> Int[Tensor, " channel"]:
    """Channels that some units own along a projection's divided dimension, in storage order.

    Args:
        projection: The matrix.
        shape: The layer's geometry before pruning.
        units: Sorted indices of KV groups or neurons.
    """
    return torch.cat(channels_by_segment(projection, shape, units))


def channels_by_segment(
    projection: Projection, shape: LayerShape, units: Sequence[int]
) -> list[Int[Tensor, " channel"]]:
    """`channels_of`, one tensor for each segment."""
    index = torch.tensor(units, dtype=torch.long)
    return [
        (offset + index[:, None] * width + torch.arange(width)).flatten()
        for _, offset, _, width in segments(projection, shape)
    ]


def fold(
    projection: Projection, shape: LayerShape, channel_values: Float[Tensor, " channel"]
) -> list[Float[Tensor, " unit"]]:
    """Sum a value per channel into a value per unit, one tensor for each segment."""
    return [
        channel_values[offset : offset + units * width].view(units, width).sum(1)
        for _, offset, units, width in segments(projection, shape)
    ]


def spread(
    projection: Projection, shape: LayerShape, unit_values: Float[Tensor, "*batch unit"]
) -> Float[Tensor, "*batch channel"]:
    """Repeat a value per unit over the unit's channels: the transpose of `fold`."""
    parts = [
        unit_values.repeat_interleave(width, dim=-1)
        for _, _, _, width in segments(projection, shape)
    ]
    return torch.cat(parts, dim=-1)
