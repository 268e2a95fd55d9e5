"""What a model predicted where samples count, kept so that another model can be set beside it.

N counted position, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimvlm.core.documents import parse_json
from slimvlm.core.files import new_file
from slimvlm.models.hidden import HeadWeights
from slimvlm.models.losses import Head


@dataclass(frozen=True)
class Said:
    """What a model predicts where samples count, kept to set another model beside it.

    Attributes:
        model: Its name.
        states: Final hidden states at these positions, by sample, on the CPU.
        wanted: The tokens that follow, likewise.
        head: Its head: a function that takes states of any device, or kept on the CPU, too
            (`slimvlm.models.hidden.head_on` moves it).
        words: The number of each token of its tokenizer.
    """

    model: str
    states: tuple[Float[Tensor, "_ D"], ...]
    wanted: tuple[Int[Tensor, " _"], ...]
    head: Head
    words: Mapping[str, int] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file; the head must be `HeadWeights`."""
        head = self.head
        assert isinstance(head, HeadWeights)
        tensors = {"states": torch.cat(self.states), "wanted": torch.cat(self.wanted)}
        tensors["weight"] = head.weight.contiguous()
        if head.bias is not None:
            tensors["bias"] = head.bias.contiguous()
        about = {
            "model": self.model,
            "counts": [len(wanted) for wanted in self.wanted],
            "bends": [head.scale, head.cap],
            "words": dict(self.words),
        }
        with new_file(Path(path)) as partial_file:
            save_file(tensors, partial_file, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Said:
        """Read what `save` wrote in the same run."""
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counts = about["counts"]
        head = HeadWeights(tensors["weight"], tensors.get("bias"), *about["bends"])
        return cls(
            about["model"],
            tensors["states"].split(counts),
            tensors["wanted"].split(counts),
            head,
            about["words"],
        )
