"""Closed-form repair, against the definition on explicit tokens."""

import pytest
import torch
from torch import Tensor

from slimvlm.pruning import least_squares
from slimvlm.pruning.least_squares import refit
from slimvlm.scoring.moments import Moments
from tests.tolerances import SOLVE, assert_close

TOKENS, CHANNELS, OUTPUTS = 80, 12, 5
KEEP = torch.tensor([0, 2, 3, 6, 7, 10, 11])
RIDGES = (0.0, 1e-4, 1e-2, 1.0)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS = drawn(OUTPUTS, CHANNELS, seed=1), drawn(OUTPUTS, seed=2)
INPUTS = drawn(TOKENS, CHANNELS, seed=3) @ drawn(CHANNELS, CHANNELS, seed=4) + 1
WEIGHTS = drawn(TOKENS, seed=5).abs()
RESIDUALS = drawn(TOKENS, OUTPUTS, seed=6)


def gathered(inputs: Tensor = INPUTS, weights: Tensor = WEIGHTS, *rest: Tensor) -> Moments:
    """Sums over tokens that come in two parts."""
    moments = Moments.zero(inputs.shape[1], OUTPUTS if rest else None, torch.float64)
    for part in (slice(0, 30), slice(30, None)):
        moments.add(inputs[part], weights[part], *(r[part] for r in rest))
    return moments


def error(weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The definition: weighted squared error of the kept channels."""
    output = INPUTS[:, KEEP] @ weight.T + (0 if bias is None else bias)
    return (WEIGHTS * (target - output).square().sum(1)).sum()


def whole(bias: Tensor | None, residuals: Tensor | None) -> Tensor:
    """What the matrix should give."""
    target = INPUTS @ WEIGHT.T + (0 if bias is None else bias)
    return target if residuals is None else target + residuals


CASES = [(b, r) for b in (None, BIAS) for r in (None, RESIDUALS)]


@pytest.mark.parametrize("ridge", RIDGES[1:])
@pytest.mark.parametrize(("bias", "residuals"), CASES)
def test_the_objective_has_no_slope_at_the_solution(bias, residuals, ridge):
    rest = () if residuals is None else (residuals,)
    fit = refit(WEIGHT, bias, gathered(INPUTS, WEIGHTS, *rest), KEEP, ridge)
    x = INPUTS[:, KEEP]
    if bias is not None:
        x = x - (WEIGHTS @ x) / WEIGHTS.sum()
    penalty = ridge * (WEIGHTS @ x.square()).mean()
    unknown = [t.clone().requires_grad_() for t in (fit.weight, fit.bias) if t is not None]
    value = error(unknown[0], unknown[1] if bias is not None else None, whole(bias, residuals))
    value = value + penalty * (unknown[0] - WEIGHT[:, KEEP]).square().sum()
    for slope in torch.autograd.grad(value, unknown):
        assert float(slope.abs().max() / value.detach()) < 1e-10


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize(("bias", "residuals"), CASES)
def test_errors_are_the_true_ones_and_never_above_slicing(bias, residuals, ridge, monkeypatch):
    monkeypatch.setattr(least_squares, "BLOCK", 5)
    rest = () if residuals is None else (residuals,)
    fit = refit(WEIGHT, bias, gathered(INPUTS, WEIGHTS, *rest), KEEP, ridge)
    target = whole(bias, residuals)
    mean = 0 if bias is None else (WEIGHTS @ target) / WEIGHTS.sum()
    scale = (WEIGHTS * (target - mean).square().sum(1)).sum()
    expected = [error(WEIGHT[:, KEEP], bias, target), error(fit.weight, fit.bias, target)]
    found = torch.tensor([fit.sliced_error, fit.repaired_error])
    assert_close(
        found, torch.stack(expected) / scale, SOLVE._replace(dtype=torch.float32, atol=1e-6)
    )
    assert fit.repaired_error < fit.sliced_error


@pytest.mark.parametrize("bias", [None, BIAS])
def test_nothing_removed_changes_no_bit(bias):
    fit = refit(WEIGHT, bias, gathered(), torch.arange(CHANNELS), ridge=1e-2)
    assert torch.equal(fit.weight, WEIGHT)
    assert bias is None or (fit.bias is not None and torch.equal(fit.bias, bias))
    assert (fit.sliced_error, fit.repaired_error) == (0, 0)


def test_a_constant_channel_goes_into_the_bias_exactly():
    inputs = INPUTS.clone()
    remove = [c for c in range(CHANNELS) if c not in KEEP]
    inputs[:, remove] = drawn(len(remove), seed=7)
    fit = refit(WEIGHT, BIAS, gathered(inputs), KEEP, ridge=1e-2)
    assert_close(fit.weight, WEIGHT[:, KEEP], SOLVE)
    assert_close(inputs[:, KEEP] @ fit.weight.T + fit.bias, inputs @ WEIGHT.T + BIAS, SOLVE)
    assert fit.repaired_error < 1e-12 < fit.sliced_error


@pytest.mark.parametrize("bias", [None, BIAS])
def test_channels_that_others_determine_are_replaced_exactly(bias):
    inputs = INPUTS.clone()
    remove = [c for c in range(CHANNELS) if c not in KEEP]
    inputs[:, KEEP[1]] = inputs[:, KEEP[0]]  # the kept ones alone are singular
    inputs[:, remove] = inputs[:, KEEP] @ drawn(len(KEEP), len(remove), seed=8)
    fit = refit(WEIGHT, bias, gathered(inputs), KEEP, ridge=0.0)
    shift = 0 if fit.bias is None or bias is None else fit.bias - bias
    expected = inputs @ WEIGHT.T
    assert_close(inputs[:, KEEP] @ fit.weight.T + shift, expected, SOLVE._replace(atol=1e-6))
    assert fit.repaired_error < 1e-12 < fit.sliced_error


def test_channels_that_are_always_zero_do_no_harm():
    inputs = torch.zeros_like(INPUTS)
    fit = refit(WEIGHT, None, gathered(inputs), KEEP, ridge=1e-2)
    assert torch.equal(fit.weight, WEIGHT[:, KEEP])


def test_sums_in_float32_give_nearly_the_same_weights():
    single = Moments.zero(CHANNELS)
    single.add(INPUTS.float(), WEIGHTS.float())
    fit = refit(WEIGHT, BIAS, single, KEEP, ridge=1e-3)
    expected = refit(WEIGHT, BIAS, gathered(), KEEP, ridge=1e-3)
    torch.testing.assert_close(fit.weight, expected.weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ridge", [1e-3, 1e-2])
@pytest.mark.parametrize(("bias", "residuals"), CASES)
def test_weights_in_half_precision_become_what_float64_gives(bias, residuals, ridge, dtype):
    rest = () if residuals is None else (residuals,)
    weight, moments = WEIGHT.to(dtype), gathered(INPUTS, WEIGHTS, *rest)
    fit = refit(weight, bias, moments, KEEP, ridge)
    expected = refit(weight.double(), bias, moments, KEEP, ridge)
    assert not torch.equal(fit.weight, expected.weight)
    size = torch.finfo(dtype).eps * expected.weight.abs()
    assert bool(((fit.weight - expected.weight).abs() <= size / 2 + 1e-5).all())
    assert (fit.weight.to(dtype) == expected.weight.to(dtype)).float().mean() > 0.9
    assert fit.sliced_error == pytest.approx(expected.sliced_error, rel=1e-4)
    assert fit.repaired_error == pytest.approx(expected.repaired_error, rel=1e-3)


def test_float64_solves_what_float32_cannot():
    inputs = INPUTS.clone()
    inputs[:, KEEP[1]] = inputs[:, KEEP[0]]
    weight, moments = WEIGHT.bfloat16(), gathered(inputs)
    fit = refit(weight, None, moments, KEEP, ridge=1e-12)
    expected = refit(weight.double(), None, moments, KEEP, ridge=1e-12)
    assert torch.equal(fit.weight, expected.weight)
    assert fit.repaired_error == expected.repaired_error
