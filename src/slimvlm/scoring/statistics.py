"""Sums over tokens or samples that calibration collects, never the activations themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from slimvlm.core.errors import NumericalError
from slimvlm.models.anatomy import Anatomy, LayerShape, fold, unit_of
from slimvlm.models.families import Projection
from slimvlm.models.hidden import all_finite

Place = tuple[int, str]
"""A layer's index, and the path of one of its matrices or the name of one of its kinds of unit."""

Values = dict[Place | str, Tensor]
"""A value for each unit of a layer and kind, at its place; or for all layers, by a field's name."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Collected by calibration: sums of matrices, of kinds of unit, or of all layers.

    Attributes:
        parts: Sums by their place, or by name those of all layers.
        num_samples: Samples seen.
        num_tokens: Valid tokens seen; of losses, the predictions that count.
        weight: Sum of the weights of these tokens.

    Raises:
        NumericalError: If a number is not finite.
    """

    parts: Mapping[Any, Any] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0
    weight: Float64[Tensor, ""] = field(default_factory=lambda: torch.zeros(()).double())

    def __post_init__(self) -> None:
        fields = [value for value in vars(self).values() if isinstance(value, Mapping)]
        for name, tensor in _named("", *fields, {"weight": self.weight}):
            if not all_finite(tensor):
                raise NumericalError(
                    f"calibration: NaN or infinity at {name!r}. Use --dtype float32, or look at "
                    "the calibration data"
                )


@dataclass(frozen=True, kw_only=True)
class Grams(Statistics):
    """`Moments` of the inputs of ``o_proj`` and ``down_proj``: all that a refit needs."""

    matrices: Mapping[Place, Float[Tensor, "_ _"]]  # no copies: pruning makes new parameters


def _named(name: str, *parts: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors within values, each with a name such as ``3.mlp.down_proj.total``."""
    for part in parts:
        if isinstance(part, Tensor):
            yield name, part
        elif isinstance(part, Mapping) or is_dataclass(part):
            for key, value in (part if isinstance(part, Mapping) else vars(part)).items():
                word = key if isinstance(key, str) else ".".join(map(str, key))
                yield from _named(f"{name}.{word}".lstrip("."), value)


def with_shapes(
    parts: Mapping[Any, Any], anatomy: Anatomy
) -> Iterator[tuple[int, LayerShape, Projection, Any]]:
    """Yield parts that belong to matrices, in order: layer index, layer, matrix, part."""
    for index, shape in enumerate(anatomy.layers):
        for matrix in anatomy.matrices(index):
            if (index, matrix.path) in parts:
                yield index, shape, matrix, parts[index, matrix.path]


def per_unit(parts: Mapping[Any, Tensor], anatomy: Anatomy, reduction: str = "sum") -> Values:
    """Sum (or with ``mean`` average) values of channels over a unit's channels in all its matrices.

    A fused matrix counts as the matrices it holds. Experts' rows of channels are added up; what is
    at a place of units is their value already.
    """
    rows: dict[Place, list[Tensor]] = {}
    for index, shape, matrix, part in with_shapes(parts, anatomy):
        channels = part.double().reshape(-1, part.shape[-1]).sum(0)
        rows.setdefault((index, unit_of(matrix)), []).extend(fold(matrix, shape, channels))
    found: Values = {place: part for place, part in parts.items() if place[1] == "expert"}
    for place, folded in rows.items():
        total = torch.stack(folded).sum(0)
        found[place] = total / len(folded) if reduction == "mean" else total
    return found


def per_layer(parts: Mapping[Any, Tensor], anatomy: Anatomy) -> Float64[Tensor, " L"]:
    """Sum over all matrices of each layer that units own, each once."""
    totals = torch.zeros(anatomy.num_layers, dtype=torch.float64)
    for index, _, _, part in with_shapes(parts, anatomy):
        totals[index] += part.double().sum()
    return totals
