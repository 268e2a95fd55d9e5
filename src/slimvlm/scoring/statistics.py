"""Sums over tokens or samples that calibration collects, never the activations themselves.

C input channel, E expert, O output of a matrix, L layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

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

UnitValues = Iterator[tuple[int, str, Float[Tensor, " _"]]]
"""Layer, kind of unit, and a value for each unit."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Collected by calibration; this class itself for criteria that look at nothing.

    A kind of statistics is a subclass ``class Name(Statistics, kind="name")`` whose fields are
    tensors, and ``parts``: tensors, or values with several.

    Attributes:
        parts: Values of one matrix or kind of unit, by its place.
        num_samples: Samples seen.
        num_tokens: Valid tokens seen; of losses, the predictions that count.

    Raises:
        NumericalError: If a number is not finite.
    """

    kind: ClassVar[str] = "nothing"

    parts: Mapping[Place, Any] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0

    def __init_subclass__(cls, kind: str = "nothing") -> None:
        cls.kind = kind

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if not all_finite(tensor):
                raise NumericalError(
                    f"statistics {self.kind!r}: NaN or infinity at {name!r}. Use --dtype float32, "
                    "or look at the calibration data"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by name, such as ``3.mlp.down_proj.total``."""
        return dict(_named("", self))


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors within a value, each with its name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for (index, path), part in value.items():
            yield from _named(f"{index}.{path}", part)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _named(f"{name}.{each.name}".lstrip("."), getattr(value, each.name))


def require_finite(values: Tensor, where: str) -> None:
    """Raise `NumericalError` where calibration meets NaN or infinity."""
    if not all_finite(values):
        raise NumericalError(f"NaN or infinity in {where} during calibration")


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
        for (index, unit), parts in rows.items():
            total = torch.stack(parts).sum(0)
            yield index, unit, total / len(parts) if reduction == "mean" else total
        for (index, unit), values in self.parts.items():
            if unit == "expert":
                yield index, unit, values

    def per_layer(self, anatomy: Anatomy) -> Float64[Tensor, " L"]:
        """Sum over all matrices of each layer that units own, each once."""
        totals = torch.zeros(anatomy.num_layers, dtype=torch.float64)
        for index, _, _, part in with_shapes(self.parts, anatomy):
            totals[index] += part.double().sum()
        return totals


@dataclass(frozen=True, kw_only=True)
class Weights(ChannelSums, kind="weights"):
    """Sums of ``|w|^p`` for each channel of each matrix, and for each expert."""


@dataclass(frozen=True, kw_only=True)
class Gradients(ChannelSums, kind="gradients"):
    """Taylor terms of the weights, summed for each channel of each matrix."""


@dataclass(frozen=True, kw_only=True)
class UnitMeans(Statistics):
    """A mean for each unit."""

    parts: Mapping[Place, Float[Tensor, " _"]]

    def per_unit(self) -> UnitValues:
        """Yield the means, in order."""
        for (index, unit), values in self.parts.items():
            yield index, unit, values


@dataclass(frozen=True, kw_only=True)
class Gates(UnitMeans, kind="gates"):
    """``mean_j |dL_j / dm_u|`` over samples for a gate ``m_u`` on each unit's output."""


@dataclass(frozen=True, kw_only=True)
class Activations(UnitMeans, kind="activations"):
    """Weighted means over tokens of the size of each unit's output."""


@dataclass(frozen=True, kw_only=True)
class Routing(Statistics, kind="routing"):
    """Tokens that take each expert and the size of its output, at ``(layer, "expert")``.

    The two rows are ``sum_t w_t`` over the tokens that take it, and ``sum_t w_t ‖g_t f(x_t)‖`` with
    the router's weight ``g_t``.
    """

    parts: Mapping[Place, Float64[Tensor, "2 E"]]
    weight: Float64[Tensor, ""]  # sum_t w_t over all tokens


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

    def of_expert(self, expert: int) -> InputMoments:
        """Select one expert, in the same memory."""
        return InputMoments(*(getattr(self, each.name)[expert] for each in fields(self)))

    def add(self, inputs: Float[Tensor, "T C"], weights: Float[Tensor, "T 1"]) -> None:
        """Add tokens."""
        weighted = inputs * weights
        self.sum += with_float64(weighted).sum(0, dtype=torch.float64).cpu()
        self.square += with_float64(weighted * inputs).sum(0, dtype=torch.float64).cpu()


@dataclass(frozen=True, kw_only=True)
class ChannelMoments(Statistics, kind="moments"):
    """First and second moments of each input channel of ``o_proj`` and ``down_proj``."""

    parts: Mapping[Place, InputMoments]
    weight: Float64[Tensor, ""]  # sum_t w_t over all tokens

    def per_unit(self, anatomy: Anatomy, channels: Callable[[InputMoments], Tensor]) -> UnitValues:
        """Sum ``channels(moments)`` over a unit's channels in all matrices, of experts too."""
        units: dict[Place, Any] = {}
        for index, shape, matrix, part in with_shapes(self.parts, anatomy):
            values = channels(part)
            (total,) = fold(matrix, shape, values.reshape(-1, values.shape[-1]).sum(0))
            units[index, unit_of(matrix)] = units.get((index, unit_of(matrix)), 0) + total
        for (index, unit), total in units.items():
            yield index, unit, total


@dataclass(frozen=True, kw_only=True)
class Grams(Statistics, kind="grams"):
    """Moments of the inputs of ``o_proj`` and ``down_proj``: all that a refit needs."""

    parts: Mapping[Place, Moments]
    matrices: Mapping[Place, Float[Tensor, "_ _"]]  # no copies: pruning makes new parameters
    weight: Float64[Tensor, ""]  # sum_t w_t over all tokens


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Statistics, kind="hidden_states"):
    """How much layers, and runs of them, change the hidden states.

    Block influence of each layer is summed over tokens by weight. Entry ``[n - 1, i]`` of
    ``angular_sum`` is the angular distance over the run of ``n`` layers that begins at layer ``i``,
    summed over the last tokens of samples. With ``postnorm`` the last layer has the final norm.
    """

    influence_sum: Float64[Tensor, " L"]
    influence_sum_postnorm: Float64[Tensor, ""]
    angular_sum: Float64[Tensor, "L L"]
    angular_sum_postnorm: Float64[Tensor, " L"]
    weight: Float64[Tensor, ""]
