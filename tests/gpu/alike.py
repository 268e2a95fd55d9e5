"""When two sets of tensors are the same but for rounding."""

from collections.abc import Mapping

from torch import Tensor

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
