"""What calibration collects (sums, never activations), values of units made of it, and `Scores`."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimvlm.core.documents import parse_json, read_object
from slimvlm.core.errors import ConfigError, NumericalError, raised_as
from slimvlm.core.files import new_file, write_text
from slimvlm.models.anatomy import LAYER_UNITS, Anatomy, LayerShape, fold, unit_of
from slimvlm.models.families import Projection
from slimvlm.models.hidden import all_finite

Place = tuple[int, str]
"""A layer's index, and the path of one of its matrices or the name of one of its kinds of unit."""

Values = dict[Place | str, Tensor]
"""A value for each unit of a layer and kind, at its place; or for all layers, by a field's name."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Collected by calibration: finite sums of matrices, of kinds of unit, or of all layers."""

    parts: Mapping[Any, Any] = field(default_factory=dict)
    """Sums by their place, or by name those of all layers."""
    num_samples: int = 0
    """Samples seen."""
    num_tokens: int = 0
    """Valid tokens seen; of losses, the predictions that count."""
    weight: Float64[Tensor, ""] = field(default_factory=lambda: torch.zeros(()).double())
    """Sum of the weights of these tokens."""
    matrices: Mapping[Place, Float[Tensor, "_ _"]] = field(default_factory=dict)
    """Weights that read the inputs of which `Moments` are collected, for a refit; no copies, since
    pruning makes new parameters."""

    def __post_init__(self) -> None:
        for name, tensor in _named("", self.parts, self.matrices, {"weight": self.weight}):
            if not all_finite(tensor):
                raise NumericalError(
                    f"calibration: NaN or infinity at {name!r}. Use --dtype float32, or look at "
                    "the calibration data"
                )


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


@dataclass(frozen=True)
class Scores:
    """One number per unit; higher means keep."""

    criterion: str
    """Name of the criterion."""
    layer: Float[Tensor, " layer"] | None = None
    """``[L]`` scores of decoder layers."""
    kv_group: Sequence[Float[Tensor, " _"]] | None = None
    """L tensors ``[G_l]``."""
    neuron: Sequence[Float[Tensor, " _"]] | None = None
    """L tensors ``[I_l]``."""
    layer_runs: Float[Tensor, "length layer"] | None = None
    """``[L, L]``: entry ``[n - 1, i]`` is the score of the run of ``n`` layers that begins at layer
    ``i`` (infinite where it does not fit). Only contiguous criteria fill it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that the scores were computed with."""
    expert: Sequence[Float[Tensor, " _"]] | None = None
    """L tensors ``[E_l]``."""

    @classmethod
    def of_units(
        cls,
        criterion: str,
        units: Iterable[str],
        num_layers: int,
        values: Mapping[Place | str, Tensor],
        options: Mapping[str, Any] = {},
    ) -> "Scores":
        """Gather values by layer and kind of unit, or of all layers; empty where there are none."""
        rows: dict[str, Any] = {u: [torch.zeros(0)] * num_layers for u in units if u != "layer"}
        for place, found in values.items():
            if isinstance(place, str):
                rows[place] = found.float()
            else:
                rows[place[1]][place[0]] = found.float()
        return cls(criterion, options=options, **rows)

    def of(self, unit: str) -> Any:
        """The scores of ``"layer"`` or one of `LAYER_UNITS`; None if not scored."""
        assert unit in ("layer", *LAYER_UNITS)
        return getattr(self, unit)

    def tensors(self) -> dict[str, Tensor]:
        """All numbers by name, such as ``neuron.3`` of layer 3."""
        found = {"layer": self.layer, "layer_runs": self.layer_runs}
        for unit in LAYER_UNITS:
            found |= {f"{unit}.{index}": v for index, v in enumerate(self.of(unit) or ())}
        return {name: values for name, values in found.items() if values is not None}

    def save(self, path: str | Path) -> None:
        """Write ``<path>.safetensors`` and ``<path>.json`` (criterion, options, units)."""
        path = Path(path)
        about = {"criterion": self.criterion, "options": dict(self.options)}
        metadata = {"about": json.dumps(about)}  # so that a kill cannot pair the two wrongly
        with new_file(suffixed(path, ".safetensors")) as file:
            stored = {name: values.contiguous() for name, values in self.tensors().items()}
            save_file(stored, file, metadata)
        write_text(Path(suffixed(path, ".json")), json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read what `save` wrote; raise ConfigError if a file is missing or is no score file."""
        path = Path(path)
        about = read_object(suffixed(path, ".json"), "scores")
        kinds = (OSError, ValueError, KeyError, TypeError, SafetensorError)
        with raised_as(ConfigError, kinds, f"scores {str(path)!r}: cannot be read"):
            with safe_open(suffixed(path, ".safetensors"), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            criterion, options = about["criterion"], about["options"]
            if parse_json(metadata["about"]) != about:
                raise ValueError("its two files are of different runs")
            if not isinstance(criterion, str) or not isinstance(options, dict):
                raise ValueError("criterion must be text, and options map names to values")
        rows: dict[str, Any] = {"layer_runs": tensors.get("layer_runs")}
        for unit in LAYER_UNITS:
            count = sum(name.startswith(f"{unit}.") for name in tensors)
            rows[unit] = [tensors[f"{unit}.{index}"] for index in range(count)] or None
        return cls(criterion, tensors.get("layer"), options=options, **rows)


def suffixed(path: Path, suffix: str) -> str:
    """The path with a suffix; a known one is replaced, any other dot is part of the name."""
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return f"{stem}{suffix}"


def strictly_increasing(costs: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """Return the smallest rising float32 numbers that never lie below the costs (at least 0).

    Costs are in order of removal. Greedy removal may find a unit cheaper than one before it; a plan
    would take that one first, so its score becomes the next larger float32 number.
    """
    steps = torch.arange(len(costs), device=costs.device)
    bits = costs.float().contiguous().view(torch.int32).long()  # ordered as the numbers are
    raised = (bits - steps).cummax(0).values + steps
    return raised.int().view(torch.float32)
