"""Symmetric matrices by their upper blocks: against the plain products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimvlm.scoring import symmetric
from slimvlm.scoring.symmetric import add_product_, invert_, mirror_
from tests.tolerances import SOLVE, assert_close

SIZES = (1, 7, 24, 61)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "BLOCK", 8)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_whole_once_it_is_mirrored(size: int) -> None:
    left, right = drawn(2, 10, size)
    sides = torch.cat([left, right]), torch.cat([right, left])
    start = drawn(size, size)
    matrix = start + start.T
    add_product_(matrix, *sides, -1)
    mirror_(matrix)
    assert_close(matrix, start + start.T - left.T @ right - right.T @ left, SOLVE)
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_is_one(size: int) -> None:
    x = drawn(size + 5, size)
    matrix = x.T @ x
    inverse = matrix.clone()
    assert invert_(inverse)
    assert_close(inverse, torch.linalg.inv(matrix), SOLVE)
    assert torch.equal(inverse, inverse.T)


def test_an_indefinite_matrix_is_refused() -> None:
    assert not invert_(torch.diag(torch.tensor([1.0, 2.0, -1e-3])))
