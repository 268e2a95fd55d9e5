"""Symmetric matrices by their upper blocks: against the plain products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimvlm.scoring import symmetric
from slimvlm.scoring.symmetric import SymmetricSum, add_product_, invert_, mirror_
from tests.tolerances import SOLVE, Tolerance, assert_close

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


def test_what_is_not_positive_definite_has_none() -> None:
    assert not invert_(torch.diag(torch.tensor([1.0, 2.0, -1e-3])))


ROWS = drawn(90, 24)
WEIGHTS = {
    "ones": torch.ones(90),
    "ones and zeros": (torch.arange(90) % 3 > 0).float(),
    "any": torch.linspace(0, 2, 90),
}


def summed(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Of tokens that come in two parts, the second of which is looked at between."""
    found = SymmetricSum(torch.zeros(24, 24, dtype=dtype))
    for part in (slice(0, 31), slice(31, None)):
        found.add_(rows[part], weights[part])
        found.value()
    return found.value()


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_sum_is_the_product_in_float64(dtype: torch.dtype, weights: Tensor) -> None:
    rows = ROWS.to(dtype)
    found = summed(rows, weights, torch.promote_types(dtype, torch.float32))
    expected = rows.double().T @ (rows.double() * weights[:, None])
    assert_close(found, expected, Tolerance(torch.float64, 1e-5 * float(expected.max()), 0))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_of_weight_zero_change_no_bit(dtype: torch.dtype) -> None:
    weights = WEIGHTS["ones and zeros"]
    rows, counted = ROWS.to(dtype), weights > 0
    found = SymmetricSum(torch.zeros(24, 24))
    found.add_(rows.masked_fill(~counted[:, None], torch.nan), weights)
    expected = SymmetricSum(torch.zeros(24, 24))
    expected.add_(rows[counted], weights[counted])
    assert torch.equal(found.value(), expected.value())


def test_only_what_bfloat16_holds_is_multiplied_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    products, seen = torch.backends.mkldnn.matmul, []
    monkeypatch.setattr(symmetric, "add_product_", lambda *_: seen.append(products.fp32_precision))
    before = products.fp32_precision
    summed(ROWS.bfloat16(), WEIGHTS["ones and zeros"], torch.float32)
    summed(ROWS.bfloat16(), WEIGHTS["any"], torch.float32)
    summed(ROWS.half(), WEIGHTS["ones"], torch.float32)
    assert seen == ["bf16"] * 2 + [before] * 4
    assert products.fp32_precision == before != "bf16"
