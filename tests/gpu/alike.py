"""What is done on two devices, and when two sets of tensors are the same but for rounding."""

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor

import slimvlm as sv
from tests import pretended_gpu
from tests import tiny_folder as folders

pretended = pytest.mark.skipif(
    pretended_gpu.REASON is not None, reason=f"needs the pretended card: {pretended_gpu.REASON}"
)
"""For tests of what only the pretended card counts, limits or refuses."""

ROUNDING = 1e-3
"""Largest difference of tensors, relative to their norm: Adam's first steps magnify rounding."""


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, and numbers that differ by rounding at most, wherever they are.

    What is infinite (runs of layers that are too long for a model, open bounds) is infinite in
    both.
    """
    assert found.keys() == expected.keys()
    for name in expected:
        ours, value = (each[name].cpu().float().nan_to_num() for each in (found, expected))
        apart, size = float((ours - value).norm()), float(value.norm())
        assert apart <= ROUNDING * size + 1e-6, f"{name} differs by {apart} of {size}"


def config(**changes: Any) -> sv.RecoverConfig:
    """A short training in float32 without dropout, in which devices agree."""
    how = {"train": "lora", "loss": "sft", "max_steps": 2, "batch_size": 2, "bf16": False}
    how |= {"learning_rate": 1e-3, "lora": {"lora_alpha": 8, "lora_dropout": 0.0}}
    return sv.RecoverConfig(**{**how, "trainer": {"logging_steps": 1}, **changes})


def llava(device: Any = "cpu") -> tuple[Any, Any]:
    """A tiny model that sees, on a device, and its processor."""
    return sv.load(str(folders.folder("llava")), device=device)
