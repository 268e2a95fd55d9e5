"""The values that calibration produces: `Statistics` and `Scores`, and how they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimvlm.errors import ConfigError, NumericalError
from slimvlm.outputs import new_file, write_text


@dataclass(frozen=True)
class Statistics:
    """What calibration collected: sums over tokens or samples, never the activations themselves.

    Attributes:
        kind: The capture that made them, for example ``"gradients"``.
        tensors: Named sums. Names are ``<layer index>.<path of the matrix>`` where a statistic
            belongs to a matrix.
        num_samples: Samples seen.
        num_tokens: Valid tokens seen.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    num_samples: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise NumericalError(
                    f"statistics {self.kind!r}: NaN or infinity at {name!r}. Use --dtype float32, "
                    "or look at the calibration data"
                )

    def save(self, path: str | Path) -> None:
        """Write ``<path>.safetensors``; counts are kept in its metadata."""
        metadata = {
            "kind": self.kind,
            "num_samples": str(self.num_samples),
            "num_tokens": str(self.num_tokens),
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with new_file(_suffixed(Path(path), ".safetensors")) as file:
            save_file(tensors, file, metadata)


@dataclass(frozen=True)
class Scores:
    """One number per unit; higher means keep.

    Attributes:
        criterion: Name of the criterion.
        layer: ``[L]`` scores of decoder layers.
        kv_group: L tensors ``[G_l]``.
        neuron: L tensors ``[I_l]``.
        layer_runs: ``[L, L]``: entry ``[n - 1, i]`` is the score of the run of ``n`` layers that
            begins at layer ``i`` (infinite where it does not fit). Only contiguous criteria fill
            it.
        options: Options that the scores were computed with.
    """

    criterion: str
    layer: Float[Tensor, " layer"] | None = None
    kv_group: Sequence[Float[Tensor, " _"]] | None = None
    neuron: Sequence[Float[Tensor, " _"]] | None = None
    layer_runs: Float[Tensor, "length layer"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def of(self, unit: str) -> Any:
        """The scores of ``"layer"``, ``"kv_group"`` or ``"neuron"``; None if not scored."""
        return {"layer": self.layer, "kv_group": self.kv_group, "neuron": self.neuron}[unit]

    def save(self, path: str | Path) -> None:
        """Write ``<path>.safetensors`` and ``<path>.json`` (criterion, options, units)."""
        tensors: dict[str, Tensor] = {}
        if self.layer is not None:
            tensors["layer"] = self.layer
        if self.layer_runs is not None:
            tensors["layer_runs"] = self.layer_runs
        for unit in ("kv_group", "neuron"):
            for index, values in enumerate(self.of(unit) or ()):
                tensors[f"{unit}.{index}"] = values
        path = Path(path)
        about = {"criterion": self.criterion, "options": dict(self.options)}
        metadata = {"about": json.dumps(about)}  # so that a kill cannot pair the two wrongly
        with new_file(_suffixed(path, ".safetensors")) as file:
            save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata)
        write_text(Path(_suffixed(path, ".json")), json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            ConfigError: If a file is missing or is not a score file.
        """
        path = Path(path)
        try:
            about = json.loads(Path(_suffixed(path, ".json")).read_text())
            tensors, metadata = _read(_suffixed(path, ".safetensors"))
            criterion, options = about["criterion"], about["options"]
            if json.loads(metadata["about"]) != about:
                raise ValueError("its two files are of different runs")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"scores {str(path)!r}: cannot be read ({error})") from error
        return cls(
            criterion=criterion,
            layer=tensors.get("layer"),
            kv_group=_numbered(tensors, "kv_group"),
            neuron=_numbered(tensors, "neuron"),
            layer_runs=tensors.get("layer_runs"),
            options=options,
        )


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _suffixed(path: Path, suffix: str) -> str:
    """The path with a suffix; a known one is replaced, any other dot is part of the name."""
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return f"{stem}{suffix}"


def _numbered(tensors: Mapping[str, Tensor], unit: str) -> list[Tensor] | None:
    count = sum(name.startswith(f"{unit}.") for name in tensors)
    return [tensors[f"{unit}.{index}"] for index in range(count)] or None
