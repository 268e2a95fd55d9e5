"""Sums over tokens or samples that calibration collects, never the activations themselves.

C input channel, E expert, L layer, O output of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from slimvlm.core.errors import NumericalError
from slimvlm.models.anatomy import Anatomy, LayerShape, fold, unit_of
from slimvlm.models.families import Projection
from slimvlm.models.hidden import all_finite
from slimvlm.models.load import with_float64
from slimvlm.scoring.moments import Moments

Place = tuple[int, str]
"""A layer's index, and the path of one of its matrices or the name of one of its kinds of unit."""

Part = TypeVar("Part")

UnitValues = Iterator[tuple[Place, Float[Tensor, " _"]]]
"""A value for each unit of a layer and kind."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Collected by calibration: values of kinds of unit, or in subclasses of matrices.

    Attributes:
        parts: Values of one matrix or kind of unit, by its place.
        num_samples: Samples seen.
        num_tokens: Valid tokens seen; of losses, the predictions that count.
        weight: Sum of the weights of these tokens.

    Raises:
        NumericalError: If a number is not finite.
    """

    parts: Mapping[Place, Any] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0
    weight: Float64[Tensor, ""] = field(default_factory=lambda: torch.zeros(()).double())

    def __post_init__(self) -> None:
        for name, tensor in _named("", self):
            if not all_finite(tensor):
                raise NumericalError(
                    f"calibration: NaN or infinity at {name!r}. Use --dtype float32, or look at "
                    "the calibration data"
                )


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors within a value, each with a name such as ``3.mlp.down_proj.total``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for (index, path), part in value.items():
            yield from _named(f"{index}.{path}", part)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _named(f"{name}.{each.name}".lstrip("."), getattr(value, each.name))


def with_shapes(
    parts: Mapping[Place, Part], anatomy: Anatomy
) -> Iterator[tuple[int, LayerShape, Projection, Part]]:
    """Parts that belong to matrices, in order: (layer index, the layer, the matrix, the part)."""
    for index, shape in enumerate(anatomy.layers):
        for matrix in anatomy.matrices(index):
            if (index, matrix.path) in parts:
                yield index, shape, matrix, parts[index, matrix.path]


@dataclass(frozen=True, kw_only=True)
class ChannelSums(Statistics):
    """A sum for each channel of every matrix that units own, and for each expert.

    The sums of experts are at ``(layer, "expert")``.
    """

    parts: Mapping[Place, Float64[Tensor, " _"]]

    def per_unit(self, anatomy: Anatomy, reduction: str = "sum") -> UnitValues:
        """Sum (or with ``mean`` average) over each unit's channels in all its matrices.

        A fused matrix counts as the matrices it holds; experts have their sum already.
        """
        rows: dict[Place, list[Tensor]] = {}
        for index, shape, matrix, part in with_shapes(self.parts, anatomy):
            folded = fold(matrix, shape, part.double())
            rows.setdefault((index, unit_of(matrix)), []).extend(folded)
        for place, parts in rows.items():
            total = torch.stack(parts).sum(0)
            yield place, total / len(parts) if reduction == "mean" else total
        yield from ((place, part) for place, part in self.parts.items() if place[1] == "expert")

    def per_layer(self, anatomy: Anatomy) -> Float64[Tensor, " L"]:
        """Sum over all matrices of each layer that units own, each once."""
        totals = torch.zeros(anatomy.num_layers, dtype=torch.float64)
        for index, _, _, part in with_shapes(self.parts, anatomy):
            totals[index] += part.double().sum()
        return totals


@dataclass
class InputMoments:
    """Moments of the input channels ``x`` of a matrix ``W``, and sizes of its columns; on a CPU."""

    sum: Float64[Tensor, "*E C"]  # sum_t w_t x_t
    square: Float64[Tensor, "*E C"]  # sum_t w_t x_t²
    column_l1: Float64[Tensor, "*E C"]  # sum_i |W_ij|
    column_square: Float64[Tensor, "*E C"]  # sum_i W_ij²

    @classmethod
    def of(cls, weight: Float[Tensor, "*E O C"]) -> InputMoments:
        """Start the sums of a matrix."""
        matrix = with_float64(weight).double()
        sizes = matrix.abs().sum(-2).cpu(), matrix.square().sum(-2).cpu()
        return cls(torch.zeros_like(sizes[0]), torch.zeros_like(sizes[0]), *sizes)

    def add(
        self, inputs: Float[Tensor, "T C"], weights: Float[Tensor, "T 1"], expert: int | None
    ) -> None:
        """Add tokens, of one expert where there are some."""
        rows: Any = ... if expert is None else expert
        weighted = inputs * weights
        self.sum[rows] += with_float64(weighted).sum(0, dtype=torch.float64).cpu()
        self.square[rows] += with_float64(weighted * inputs).sum(0, dtype=torch.float64).cpu()


@dataclass(frozen=True, kw_only=True)
class ChannelMoments(Statistics):
    """First and second moments of each input channel of ``o_proj`` and ``down_proj``."""

    parts: Mapping[Place, InputMoments]

    def per_unit(self, anatomy: Anatomy, channels: Callable[[InputMoments], Tensor]) -> UnitValues:
        """Sum ``channels(moments)`` over a unit's channels in all matrices, of experts too."""
        units: dict[Place, Any] = {}
        for index, shape, matrix, part in with_shapes(self.parts, anatomy):
            values, place = channels(part), (index, unit_of(matrix))
            (total,) = fold(matrix, shape, values.reshape(-1, values.shape[-1]).sum(0))
            units[place] = units.get(place, 0) + total
        yield from units.items()


@dataclass(frozen=True, kw_only=True)
class Grams(Statistics):
    """Moments of the inputs of ``o_proj`` and ``down_proj``: all that a refit needs."""

    parts: Mapping[Place, Moments]
    matrices: Mapping[Place, Float[Tensor, "_ _"]]  # no copies: pruning makes new parameters


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Statistics):
    """How much layers, and runs of them, change the hidden states.

    Block influence of each layer is summed over tokens by weight. Entry ``[n - 1, i]`` of
    ``angular_sum`` is the angular distance over the run of ``n`` layers that begins at layer ``i``,
    summed over the last tokens of samples. With ``postnorm`` the last layer has the final norm.
    """

    influence_sum: Float64[Tensor, " L"]
    influence_sum_postnorm: Float64[Tensor, ""]
    angular_sum: Float64[Tensor, "L L"]
    angular_sum_postnorm: Float64[Tensor, " L"]
