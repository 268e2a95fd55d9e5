"""What calibration collects, and how it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from slimvlm.core.errors import NumericalError
from slimvlm.core.files import new_file
from slimvlm.scoring.scores import suffixed


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
        with new_file(suffixed(Path(path), ".safetensors")) as file:
            save_file(tensors, file, metadata)
