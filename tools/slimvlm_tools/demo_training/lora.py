"""Low-rank additions to frozen linear layers, and their merge: the demo's delta."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from slimvlm.demo.build import SCALE

RANK = 32


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: y = x W' + scale (x A') B'."""

    def __init__(self, linear: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the layer in the frozen weight's precision."""
        x = x.to(self.weight.dtype)
        low = functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return functional.linear(x, self.weight) + SCALE * low


def add_lora_(model: nn.Module, rank: int = RANK, dtype: torch.dtype = torch.bfloat16) -> None:
    """Replaces every linear layer inside `model` by a `LoraLinear`."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, rank, dtype))


def lora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the low-rank tensors by name: ``<layer>.lora_a`` and ``<layer>.lora_b``."""
    state: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.lora_a"] = module.a.detach()
            state[f"{name}.lora_b"] = module.b.detach()
    return state


def load_lora_(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Puts low-rank tensors from `lora_state` back into `LoraLinear` layers."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            module.a.data.copy_(state[f"{name}.lora_a"])
            module.b.data.copy_(state[f"{name}.lora_b"])
