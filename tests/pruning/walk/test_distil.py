"""Local distillation of one layer."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from slimvlm.models.anatomy import read_anatomy
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.walk.distil import (
    PASSES,
    RATE,
    Lesson,
    distil_,
    rate_for,
    relative_error,
    steps_for,
)
from slimvlm.scoring.score_model import score
from tests import tiny
from tests.handmade import assert_equal


def lessons(layer, target, seeds):
    """A layer is to give what another one gives."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        dtype = next(layer.parameters()).dtype
        x = torch.randn(2, 8, 16, generator=generator).to(dtype)
        with torch.no_grad():
            goal = target(x)
        found.append(Lesson(partial(layer, x), partial(Tensor.clone, goal), torch.ones(16)))
    return found


def pair(dtype):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)).to(dtype)
    target = copy.deepcopy(layer)
    with torch.no_grad():
        layer[2].weight.mul_(0.5)
    return layer, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_learns_in_any_precision_and_keeps_its_own(dtype):
    layer, target = pair(dtype)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    known = list(layer.parameters())
    old, new = distil_(
        layer,
        lessons(layer, target, range(4)),
        lessons(layer, target, range(4, 6)),
        count=60,
        learning_rate=1e-2,
    )
    assert new < 0.3 * old
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(known, before, strict=True))


@pytest.mark.parametrize("is_too_fast", [False, True], ids=["nothing to learn", "destroyed"])
def test_held_out_tokens_refuse_what_does_not_help_them(is_too_fast):
    layer, target = pair(torch.float32)
    before = copy.deepcopy(layer.state_dict())
    exams = lessons(layer, target if is_too_fast else layer, range(4, 6))
    rate = 1e30 if is_too_fast else 1e-2
    old, new = distil_(layer, lessons(layer, target, range(4)), exams, 20, rate)
    assert old == new
    assert (old == 0) == (not is_too_fast)
    assert_equal(layer.state_dict(), before)


def test_errors_count_relative_to_each_token_and_linearly_where_they_are_large():
    target = torch.tensor([[[1.0, 0.0], [0.0, 1000.0], [0.0, 1.0]]])
    output = torch.tensor([[[0.5, 0.0], [0.0, 500.0], [0.0, 11.0]]])
    weights = torch.tensor([1.0, 1.0, 0.0])
    assert float(relative_error(output, target, weights)) == pytest.approx(0.25)
    assert float(relative_error(output, target, torch.tensor([0.0, 0.0, 1.0]))) == pytest.approx(19)


def test_more_steps_and_larger_ones_the_more_goes():
    model = tiny.build("llama")
    anatomy = read_anatomy(model)
    scores = score(model, (), "spacing")
    plans = [make_plan(anatomy, [scores], ratio, "depth") for ratio in (0.1, 0.3)]
    decoder = sum(shape.params for shape in anatomy.layers)
    for plan in plans:
        kept = sum(shape.params for shape in plan.after.layers)
        assert plan.decoder_ratio == pytest.approx(1 - kept / decoder)
        assert steps_for(plan, batches=100) == math.ceil(100 * PASSES * plan.decoder_ratio)
        assert rate_for(plan) == RATE * plan.decoder_ratio
    assert plans[0].decoder_ratio < plans[1].decoder_ratio
    assert steps_for(Plan.everything(anatomy), batches=100) == 0
