"""What calibration collects: sums over tokens or samples, never the activations themselves.

One class for each kind of statistics: its parts add batches up, its methods give what scores are
made of, and it can be stored. C input channel, O output of a matrix, L layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.core.files import new_file
from slimvlm.models.anatomy import Anatomy, LayerShape, fold, unit_of
from slimvlm.models.families import Projection
from slimvlm.models.hidden import all_finite
from slimvlm.models.load import with_float64
from slimvlm.scoring.symmetric import SymmetricSum
from slimvlm.scoring.unit_scores import read_tensors, suffixed

Place = tuple[int, str]
"""A layer's index, and the path of one of its matrices or the name of one of its kinds of unit."""

Part = TypeVar("Part")

UnitValues = Iterator[tuple[int, str, Float[Tensor, " _"]]]
"""Layer, kind of unit, and a value for each unit."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What calibration collected; this class itself for criteria that look at nothing.

    A kind of statistics is a subclass ``class Name(Statistics, kind="name")`` whose fields are
    tensors, and ``parts``. If these are no tensors themselves but values with several, their class
    is given, too: ``part=Class``.

    Attributes:
        parts: What belongs to one matrix or kind of unit, by its place.
        num_samples: Samples seen.
        num_tokens: Valid tokens seen; of losses, the predictions that count.

    Raises:
        NumericalError: If a number is not finite.
    """

    kind: ClassVar[str] = "nothing"
    _part: ClassVar[type | None] = None
    _kinds: ClassVar[dict[str, type[Statistics]]] = {}

    parts: Mapping[Place, Any] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0

    def __init_subclass__(cls, kind: str | None = None, part: type | None = None) -> None:
        if kind is not None:
            cls.kind, cls._part = kind, part
            Statistics._kinds[kind] = cls

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            if not all_finite(tensor):
                raise NumericalError(
                    f"statistics {self.kind!r}: NaN or infinity at {name!r}. Use --dtype float32, "
                    "or look at the calibration data"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by the names they have in a file, such as ``3.mlp.down_proj.gram``."""
        return dict(_named("", self))

    def save(self, path: str | Path) -> None:
        """Write ``<path>.safetensors``; kind and counts are kept in its metadata."""
        about = {name: str(getattr(self, name)) for name in ("kind", "num_samples", "num_tokens")}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        with new_file(suffixed(Path(path), ".safetensors")) as file:
            save_file(tensors, file, about)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote, bit for bit, on the CPU.

        Raises:
            ConfigError: If the file is missing, holds no statistics, or, called on a kind of
                statistics, those of another kind.
        """
        try:
            tensors, about = read_tensors(suffixed(Path(path), ".safetensors"))
            kind = Statistics if about["kind"] == Statistics.kind else cls._kinds[about["kind"]]
            given = _fields_from(tensors, kind._part)
            given |= {name: int(about[name]) for name in ("num_samples", "num_tokens")}
            found = kind(**given)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"statistics {str(path)!r}: cannot be read ({error})") from error
        if not isinstance(found, cls):
            raise ConfigError(f"statistics {str(path)!r}: of kind {found.kind!r}, not {cls.kind!r}")
        return found


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors within a value, each with its name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for (index, path), part in value.items():
            yield from _named(f"{index}.{path}", part)
    elif is_dataclass(value):
        for each in fields(value):
            yield from _named(f"{name}.{each.name}".lstrip("."), getattr(value, each.name))


def _fields_from(tensors: Mapping[str, Tensor], part: type | None) -> dict[str, Any]:
    """The fields that `_named` was given: names of parts have dots."""
    found: dict[str, Any] = {}
    parts: dict[Place, Any] = {}
    for name, tensor in tensors.items():
        index, _, rest = name.partition(".")
        path, _, what = rest.rpartition(".")
        if not rest:
            found[name] = tensor
        elif part is None:
            parts[int(index), rest] = tensor
        else:
            parts.setdefault((int(index), path), {})[what] = tensor
    if part is not None:
        parts = {place: part(**values) for place, values in parts.items()}
    return {"parts": parts, **found}


def require_finite(values: Tensor, what: str) -> None:
    """Raise `NumericalError` where calibration meets NaN or infinity."""
    if not all_finite(values):
        raise NumericalError(f"NaN or infinity in {what} during calibration")


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
    """A sum for each channel that units own, in every matrix along its divided dimension."""

    parts: Mapping[Place, Float64[Tensor, " _"]]

    def per_unit(self, anatomy: Anatomy, reduction: str = "sum") -> UnitValues:
        """The sums over each unit's channels in all its matrices.

        Args:
            anatomy: The model's.
            reduction: ``sum`` over the unit's matrices, or their ``mean`` (a fused matrix counts
                as the matrices it holds).
        """
        for index, shape in enumerate(anatomy.layers):
            rows: dict[str, list[Tensor]] = {}
            for matrix in anatomy.matrices(index):
                folded = fold(matrix, shape, self.parts[index, matrix.path].double())
                rows.setdefault(unit_of(matrix), []).extend(folded)
            for unit, parts in rows.items():
                total = torch.stack(parts).sum(0)
                yield index, unit, total / len(parts) if reduction == "mean" else total

    def per_layer(self, anatomy: Anatomy) -> Float64[Tensor, " L"]:
        """The sums over all matrices of each layer that units own, each once."""
        totals = torch.zeros(anatomy.num_layers, dtype=torch.float64)
        for index in range(anatomy.num_layers):
            for matrix in anatomy.matrices(index):
                totals[index] += self.parts[index, matrix.path].double().sum()
        return totals


@dataclass(frozen=True, kw_only=True)
class Weights(ChannelSums, kind="weights"):
    """Sums of ``|w|^p`` for each channel of each matrix, and for each expert.

    The place of the latter is the kind of unit, ``expert``.
    """

    def per_unit(self, anatomy: Anatomy, reduction: str = "sum") -> UnitValues:
        """As `ChannelSums.per_unit`; experts by their sum."""
        yield from super().per_unit(anatomy, reduction)
        for index in range(anatomy.num_layers):
            if (index, "expert") in self.parts:
                yield index, "expert", self.parts[index, "expert"]


@dataclass(frozen=True, kw_only=True)
class Gradients(ChannelSums, kind="gradients"):
    """Taylor terms of the weights, summed for each channel of each matrix."""


@dataclass(frozen=True, kw_only=True)
class UnitSums(Statistics):
    """A sum for each unit."""

    parts: Mapping[Place, Float64[Tensor, " _"]]

    @property
    def count(self) -> float:
        """What was summed over."""
        return float(max(self.num_samples, 1))

    def means(self) -> UnitValues:
        """The sums divided by what they were summed over."""
        for (index, unit), values in self.parts.items():
            yield index, unit, values.float() / self.count


@dataclass(frozen=True, kw_only=True)
class Gates(UnitSums, kind="gates"):
    """``sum_j |dL_j / dm_u|`` over samples for a gate ``m_u`` on each unit's output."""


@dataclass(frozen=True, kw_only=True)
class Activations(UnitSums, kind="activations"):
    """Weighted sums over tokens of the size of each unit's output.

    Attributes:
        weight: ``sum_t w_t`` over all tokens.
    """

    weight: Float64[Tensor, ""]

    @property
    def count(self) -> float:
        """The weight of all tokens."""
        return float(self.weight)


@dataclass
class Taken:
    """What the experts of a layer did, by expert; float64 on the CPU.

    Attributes:
        count: ``sum_t w_t`` over the tokens that take the expert.
        size: ``sum_t w_t ‖g_t f(x_t)‖`` over them: the expert's output times the router's weight.
    """

    count: Float64[Tensor, " E"]
    size: Float64[Tensor, " E"]

    @classmethod
    def of(cls, experts: int) -> Taken:
        """Of no tokens yet."""
        return cls(*torch.zeros(2, experts, dtype=torch.float64))

    def add(
        self,
        expert: int,
        sizes: Float[Tensor, " T"],
        weights: Float[Tensor, " T"],
    ) -> None:
        """Add the tokens that take an expert.

        Args:
            expert: The expert.
            sizes: Of what it adds to each.
            weights: What each counts.
        """
        weights = with_float64(weights).double()
        self.count[expert] += weights.sum().cpu()
        self.size[expert] += (weights * with_float64(sizes).double()).sum().cpu()


@dataclass(frozen=True, kw_only=True)
class Routing(Statistics, kind="routing", part=Taken):
    """Which experts tokens take, and how much these give them.

    Attributes:
        parts: By layer, at the place of the kind of unit, ``expert``.
        weight: ``sum_t w_t`` over all tokens.
    """

    parts: Mapping[Place, Taken]
    weight: Float64[Tensor, ""]

    def per_unit(self, value: Callable[[Taken], Tensor]) -> UnitValues:
        """A value for each expert."""
        for (index, unit), part in self.parts.items():
            yield index, unit, value(part)


@dataclass
class InputMoments:
    """Moments of the input channels ``x`` of a matrix ``W``, and the sizes of its columns.

    All are float64 on the CPU; of experts there is a row for each.

    Attributes:
        sum: ``sum_t w_t x_t``.
        square: ``sum_t w_t x_t²``.
        column_l1: ``sum_i |W_ij|``.
        column_square: ``sum_i W_ij²``.
    """

    sum: Float64[Tensor, "*E C"]
    square: Float64[Tensor, "*E C"]
    column_l1: Float64[Tensor, "*E C"]
    column_square: Float64[Tensor, "*E C"]

    @classmethod
    def of(cls, weight: Float[Tensor, "*E O C"]) -> InputMoments:
        """Of no tokens yet."""
        matrix = with_float64(weight).double()
        sizes = matrix.abs().sum(-2).cpu(), matrix.square().sum(-2).cpu()
        return cls(torch.zeros_like(sizes[0]), torch.zeros_like(sizes[0]), *sizes)

    def of_expert(self, expert: int) -> InputMoments:
        """Those of one expert, in the same memory."""
        return InputMoments(*(getattr(self, each.name)[expert] for each in fields(self)))

    def add(self, inputs: Float[Tensor, "T C"], weights: Float[Tensor, "T 1"]) -> None:
        """Add tokens."""
        weighted = inputs * weights
        self.sum += with_float64(weighted).sum(0, dtype=torch.float64).cpu()
        self.square += with_float64(weighted * inputs).sum(0, dtype=torch.float64).cpu()


@dataclass(frozen=True, kw_only=True)
class ChannelMoments(Statistics, kind="moments", part=InputMoments):
    """First and second moments of each input channel of ``o_proj`` and ``down_proj``.

    Attributes:
        parts: By matrix.
        weight: ``sum_t w_t`` over all tokens.
    """

    parts: Mapping[Place, InputMoments]
    weight: Float64[Tensor, ""]

    def per_unit(self, anatomy: Anatomy, channels: Callable[[InputMoments], Tensor]) -> UnitValues:
        """The sum of ``channels(moments of a matrix's inputs)`` over each unit's channels.

        That is over all matrices that read the unit, those of all experts among them.
        """
        units: dict[Place, Any] = {}
        for index, shape, matrix, part in with_shapes(self.parts, anatomy):
            values = channels(part)
            (total,) = fold(matrix, shape, values.reshape(-1, values.shape[-1]).sum(0))
            units[index, unit_of(matrix)] = units.get((index, unit_of(matrix)), 0) + total
        for (index, unit), total in units.items():
            yield index, unit, total


@dataclass(frozen=True)
class Gram:
    """All of the inputs ``x`` of a matrix ``W`` that a refit needs, where ``W`` is.

    Attributes:
        gram: ``sum_t w_t x_t x_tᵀ``, float32, or float64 for a matrix in float64.
        sum: ``sum_t w_t x_t``.
        weight: ``W`` itself, not a copy. Pruning makes new parameters, so it stays what it was.
    """

    gram: Float[Tensor, "C C"]
    sum: Float[Tensor, " C"]
    weight: Float[Tensor, "O C"]


class GramSums:
    """Adds up what a `Gram` holds; of no tokens yet."""

    def __init__(self, weight: Float[Tensor, "O C"]) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        channels = weight.shape[1]
        self._weight, self._sum = weight, weight.new_zeros(channels, dtype=dtype)
        self._pairs = SymmetricSum(weight.new_zeros(channels, channels, dtype=dtype))

    def add_(self, inputs: Float[Tensor, "T C"], weights: Float[Tensor, "T 1"]) -> None:
        """Add tokens."""
        self._pairs.add_(inputs, weights[:, 0])
        self._sum += (inputs.to(self._sum.dtype) * weights).sum(0)

    def value(self) -> Gram:
        """The sums so far."""
        return Gram(self._pairs.value(), self._sum, self._weight)


@dataclass(frozen=True, kw_only=True)
class Grams(Statistics, kind="grams", part=Gram):
    """Gram matrices of what enters ``o_proj`` and ``down_proj``: all that a refit needs.

    Attributes:
        parts: By matrix.
        weight: ``sum_t w_t`` over all tokens.
    """

    parts: Mapping[Place, Gram]
    weight: Float64[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Statistics, kind="hidden_states"):
    """How much layers, and runs of them, change the hidden states.

    Attributes:
        influence_sum: Block influence of each layer, summed over tokens by weight.
        influence_sum_postnorm: That of the last layer with the final norm.
        angular_sum: Entry ``[n - 1, i]``: angular distance over the run of ``n`` layers that begins
            at layer ``i``, summed over the last tokens of samples.
        angular_sum_postnorm: ``[n - 1]``: that of the last ``n`` layers with the final norm.
        weight: ``sum_t w_t`` over all tokens.
    """

    influence_sum: Float64[Tensor, " L"]
    influence_sum_postnorm: Float64[Tensor, ""]
    angular_sum: Float64[Tensor, "L L"]
    angular_sum_postnorm: Float64[Tensor, " L"]
    weight: Float64[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class Removals(Statistics, kind="greedy"):
    """An order of removing layers.

    Attributes:
        order: Layers in order of removal, then the others by what their removal would have cost in
            the last round, then pinned ones.
        divergence: The cost of each layer when it was last measured (pinned layers have the
            largest of all).
    """

    order: Int[Tensor, " L"]
    divergence: Float64[Tensor, " L"]
