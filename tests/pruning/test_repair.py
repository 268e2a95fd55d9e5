"""One-shot repair of pruned models, from Gram matrices of the original one."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch

from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.parts import Parts
from slimvlm.pruning import repair
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.repair import refit, repair_
from slimvlm.pruning.walk.walk import walk_
from slimvlm.scoring.forward import capture_grams
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.obs import removal_order
from slimvlm.scoring.score_model import collect
from slimvlm.scoring.unit_scores import Statistics
from tests import tiny
from tests.handmade import assert_untouched, logits, plan_by_hand, snapshot
from tests.pruning.pruned import batches, build, narrow, sliced, with_determined_neurons_
from tests.tiers import tiered
from tests.tolerances import SOLVE, assert_close


@pytest.mark.parametrize(
    ("name", "in_one_shot"),
    tiered(
        product(["llama", "phi", "phi3", "qwen3_vl"], [True, False]),
        lambda name, in_one_shot: name == ("phi" if in_one_shot else "phi3"),
    ),
)
def test_neurons_that_others_determine_are_replaced_exactly(name, in_one_shot):
    """Copies of other neurons and, where there are biases, constant ones."""
    model = build(name)
    with_determined_neurons_(model)
    data = batches(model, 8)
    plan = plan_by_hand(read_anatomy(model), neurons=range(64))
    expected, student = logits(model, data[0]), sliced(model, plan)
    assert not torch.allclose(logits(student, data[0]), expected, atol=1e-2)
    if in_one_shot:
        repair_(student, plan, capture_grams(model, data), ridge=0.0)
    else:
        student = model
        walk_(student, data, plan=plan, repair="width", ridge=0.0)
    torch.testing.assert_close(logits(student, data[0]), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llava-phi"])
def test_one_shot_and_the_walk_agree_where_their_inputs_do(name):
    model = build(name)
    data, plan = batches(model), narrow(model)
    weights = {"image": 0.5, "prompt": 1.0, "answer": 2.0}
    one_shot = sliced(model, plan)
    report = repair_(one_shot, plan, capture_grams(model, data, weights), ridge=1e-2)
    walked = copy.deepcopy(model)
    walk_(walked, data, plan=plan, repair="width", token_weights=weights, ridge=1e-2)
    path = "self_attn.dense" if "phi" in name else "self_attn.o_proj"
    first, later = (
        [Parts(m).layers[i].get_submodule(path).weight for m in (one_shot, walked)] for i in (0, 1)
    )
    assert_close(first[0], first[1], SOLVE)
    assert (later[0] - later[1]).abs().max() > 1e-3
    assert len(report.refits) == 8
    assert all(row.repaired < row.sliced for row in report.refits.values())


def test_one_shot_refuses_what_does_not_fit():
    model, other = tiny.build("llama"), tiny.build("llava-llama")
    plan = narrow(model)
    statistics = collect(model, [tiny.batch(model)], "obs")
    gates = collect(other, [tiny.batch(other)], "gate")
    with pytest.raises(ConfigError, match="prune it first"):
        repair_(model, plan, statistics)
    prune_(model, plan)
    place, another = (0, "mlp.down_proj"), statistics.matrices[0, "self_attn.o_proj"]
    odd = replace(statistics, matrices={**statistics.matrices, place: another})
    for wrong, told in (
        (Statistics(), "only those of criterion 'obs' can"),
        (replace(statistics, parts={}), "o_proj"),
        (odd, r"'0.mlp.down_proj' is of another model"),
        (gates, "cannot repair"),
    ):
        with pytest.raises(ConfigError, match=told):
            repair_(model, plan, wrong)


# Closed-form repair, against the definition on explicit tokens.


TOKENS, CHANNELS, OUTPUTS = 80, 12, 5
KEEP = torch.tensor([0, 2, 3, 6, 7, 10, 11])
RIDGES = (0.0, 1e-4, 1e-2, 1.0)


def test_one_shot_repairs_every_matrix_or_none():
    """Half precision holds the new weights of the first layers, but not the last one."""
    model = build("llama")
    plan, path = narrow(model), "mlp.down_proj"
    student, statistics = sliced(model, plan).half(), capture_grams(model, batches(model))
    kept, gone = plan.neurons[3][0], min({*range(96)} - {*plan.neurons[3]})
    statistics.parts[3, path].gram[[gone, kept], [kept, gone]] = 1e9
    before = snapshot(student)
    with pytest.raises(NumericalError, match=rf"weight of layer 3\.{path}"):
        repair_(student, plan, statistics)
    assert_untouched(student, before)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS = drawn(OUTPUTS, CHANNELS, seed=1), drawn(OUTPUTS, seed=2)
INPUTS = drawn(TOKENS, CHANNELS, seed=3) @ drawn(CHANNELS, CHANNELS, seed=4) + 1
WEIGHTS = drawn(TOKENS, seed=5).abs()
RESIDUALS = drawn(TOKENS, OUTPUTS, seed=6)


def gathered(inputs=INPUTS, weights=WEIGHTS, *rest):
    """Sums over tokens that come in two parts."""
    moments = Moments.zero(inputs.shape[1], OUTPUTS if rest else None, torch.float64)
    for part in (slice(0, 30), slice(30, None)):
        moments.add(inputs[part], weights[part], *(r[part] for r in rest))
    return moments


def error(weight, bias, target):
    """The definition: weighted squared error of the kept channels."""
    output = INPUTS[:, KEEP] @ weight.T + (0 if bias is None else bias)
    return (WEIGHTS * (target - output).square().sum(1)).sum()


def whole(bias, residuals):
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


@pytest.mark.parametrize("ridge", RIDGES[1:])
def test_weights_of_a_choice_are_those_of_a_refit(ridge):
    """Both pull towards the sliced weights; a choice knows the mean of all channels only."""
    gram = gathered().gram
    found = removal_order(WEIGHT, gram, CHANNELS, CHANNELS - len(KEEP), ridge)
    own = ridge * gram.diagonal().mean() / gram.diagonal()[found.left].mean()
    torch.testing.assert_close(
        found.weights, refit(WEIGHT, None, gathered(), found.left, float(own)).weight
    )


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize(("bias", "residuals"), CASES)
def test_errors_are_the_true_ones_and_never_above_slicing(bias, residuals, ridge, monkeypatch):
    monkeypatch.setattr(repair, "BLOCK", 5)
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
def test_nothing_removed_changes_no_bit_and_determined_channels_are_exact(bias):
    fit = refit(WEIGHT, bias, gathered(), torch.arange(CHANNELS), ridge=1e-2)
    assert torch.equal(fit.weight, WEIGHT)
    assert bias is None or (fit.bias is not None and torch.equal(fit.bias, bias))
    assert (fit.sliced_error, fit.repaired_error) == (0, 0)
    inputs = INPUTS.clone()
    remove = [c for c in range(CHANNELS) if c not in KEEP]
    inputs[:, KEEP[1]] = inputs[:, KEEP[0]]  # the kept ones alone are singular
    inputs[:, remove] = inputs[:, KEEP] @ drawn(len(KEEP), len(remove), seed=8)
    fit = refit(WEIGHT, bias, gathered(inputs), KEEP, ridge=0.0)
    shift = 0 if fit.bias is None or bias is None else fit.bias - bias
    expected = inputs @ WEIGHT.T
    assert_close(inputs[:, KEEP] @ fit.weight.T + shift, expected, SOLVE._replace(atol=1e-6))
    assert fit.repaired_error < 1e-12 < fit.sliced_error


def test_a_constant_channel_goes_into_the_bias_and_a_zero_one_does_no_harm():
    inputs = INPUTS.clone()
    remove = [c for c in range(CHANNELS) if c not in KEEP]
    inputs[:, remove] = drawn(len(remove), seed=7)
    fit = refit(WEIGHT, BIAS, gathered(inputs), KEEP, ridge=1e-2)
    assert_close(fit.weight, WEIGHT[:, KEEP], SOLVE)
    assert_close(inputs[:, KEEP] @ fit.weight.T + fit.bias, inputs @ WEIGHT.T + BIAS, SOLVE)
    assert fit.repaired_error < 1e-12 < fit.sliced_error
    inputs = torch.zeros_like(INPUTS)
    fit = refit(WEIGHT, None, gathered(inputs), KEEP, ridge=1e-2)
    assert torch.equal(fit.weight, WEIGHT[:, KEEP])


def test_float32_gives_nearly_the_same_and_float64_solves_what_it_cannot():
    single = Moments.zero(CHANNELS)
    single.add(INPUTS.float(), WEIGHTS.float())
    fit = refit(WEIGHT, BIAS, single, KEEP, ridge=1e-3)
    expected = refit(WEIGHT, BIAS, gathered(), KEEP, ridge=1e-3)
    torch.testing.assert_close(fit.weight, expected.weight, atol=1e-4, rtol=1e-4)
    inputs = INPUTS.clone()
    inputs[:, KEEP[1]] = inputs[:, KEEP[0]]
    weight, moments = WEIGHT.bfloat16(), gathered(inputs)
    fit = refit(weight, None, moments, KEEP, ridge=1e-12)
    expected = refit(weight.double(), None, moments, KEEP, ridge=1e-12)
    assert torch.equal(fit.weight, expected.weight)
    assert fit.repaired_error == expected.repaired_error


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
