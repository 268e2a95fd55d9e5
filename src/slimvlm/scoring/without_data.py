"""Units scored without data: by their weights, their places, or chance.

L layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.models.anatomy import LAYER_UNITS, WIDTH_UNITS, Anatomy
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Parts, layer_matrices
from slimvlm.scoring.batches import Batch, weight_of
from slimvlm.scoring.statistics import ChannelSums, Place, Statistics
from slimvlm.scoring.unit_scores import Scores


def capture_nothing(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Return empty statistics, for criteria that look at neither weights nor data."""
    return Statistics()


def capture_weights(model: nn.Module, batches: Iterable[Batch], p: int = 1) -> ChannelSums:
    """Sum ``|w|^p`` by channel of each matrix and by expert; no p-th root, as in LLM-Pruner."""
    parts: dict[Place, Tensor] = {}
    view = Parts(model)
    for index, matrix in view.matrices():
        values = weight_of(matrix.owner, matrix.name).float().abs().pow(p)
        others = [dim for dim in range(-values.ndim, 0) if dim != matrix.projection.axis]
        sums = with_float64(values).sum(others, dtype=torch.float64)
        parts[index, matrix.projection.path] = sums.cpu()
    for index, layer in enumerate(view.layers):
        of_experts = []
        for entry in layer_matrices(layer, view.row).experts:
            values = with_float64(weight_of(entry.owner, entry.name).float().abs().pow(p))
            of_experts.append(values.reshape(entry.width, -1).sum(1, dtype=torch.float64))
        if of_experts:
            parts[index, "expert"] = torch.stack(of_experts).sum(0).cpu()
    return ChannelSums(parts=parts)


def score_magnitude(statistics: ChannelSums, anatomy: Anatomy, reduction: str = "mean") -> Scores:
    """Size of the weights of each unit; layers by the mean over their matrices' weights.

    Experts are compared within a layer, by the sum over all that they own. ``reduction`` is the
    ``mean`` over the unit's matrices as LLM-Pruner's scripts have it, or the ``sum``.
    """
    counts = [
        max(sum(s.units(u) * getattr(s, f"{u}_params") for u in WIDTH_UNITS), 1)
        for s in anatomy.layers
    ]
    layer = statistics.per_layer(anatomy) / torch.tensor(counts, dtype=torch.float64)
    found = statistics.per_unit(anatomy, reduction)
    return Scores.of_units("magnitude", anatomy.num_layers, found, layer, LAYER_UNITS)


def score_spacing(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """Removed layers lie as far apart as possible, whatever their number; no data needed.

    Layers are taken in farthest-point order: the next to go is the one farthest from all gone so
    far and from both ends. Ties go to the later layer.
    """
    L = anatomy.num_layers
    distance = torch.minimum(torch.arange(L) + 1, L - torch.arange(L)).double()
    scores = torch.zeros(L)
    for rank in range(L):
        chosen = L - 1 - int(distance.flip(0).argmax())
        scores[chosen] = rank
        distance = torch.minimum(distance, (torch.arange(L) - chosen).abs().double())
        distance[chosen] = -1
    return Scores("spacing", layer=scores)


def score_random(statistics: Statistics, anatomy: Anatomy, seed: int = 0) -> Scores:
    """Uniform random scores: the floor that every other criterion has to beat."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.rand(anatomy.num_layers, generator=generator)
    rows: dict[str, Any] = {
        unit: [torch.rand(shape.units(unit), generator=generator) for shape in anatomy.layers]
        for unit in LAYER_UNITS
    }
    return Scores("random", layer, **rows)
