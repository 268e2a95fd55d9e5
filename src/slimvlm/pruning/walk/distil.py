"""Local distillation: a few optimizer steps on one layer towards the original's hidden states.

B batch, T token, D hidden.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimvlm.planning.plan import Plan

PASSES, RATE = 10.0, 4e-3
"""Passes over the data and peak rate if all of the decoder went: both grow with the share that
goes. Measured in ``docs/results.md``."""


def steps_for(plan: Plan, batches: int) -> int:
    """Return as many steps as a plan needs."""
    return math.ceil(PASSES * plan.decoder_ratio * batches)


def rate_for(plan: Plan) -> float:
    """Return the peak rate of Adam for a plan; it rises for a third of the steps, then falls."""
    return RATE * plan.decoder_ratio


@dataclass(frozen=True)
class Lesson:
    """One batch that a layer learns from."""

    run: Callable[[], Float[Tensor, "B T D"]]
    """Runs the layer on the hidden states of the smaller layers before it."""
    target: Callable[[], Float[Tensor, "B T D"]]
    """Fetches the hidden states that the original's next layer reads."""
    weights: Float[Tensor, " BT"]  # of each token

    def error(self) -> Float[Tensor, ""]:
        """`relative_error` of the layer's output."""
        return relative_error(self.run(), self.target(), self.weights)


def relative_error(
    output: Float[Tensor, "*S B T D"],
    target: Float[Tensor, "*S B T D"],
    weights: Float[Tensor, " BT"],
) -> Float[Tensor, ""]:
    """``Σ_t w_t h(‖y_t - y'_t‖ / ‖y_t‖)`` over ``Σ_t w_t``; ``h(r) = r²``, from 1 on ``2 r - 1``.

    Relative to each token's size, and linear in large errors, so that the few tokens whose
    activations are a thousand times larger than the others' do not rule, nor those that the
    original makes small again. Several residual streams count alike.
    """
    given = output.flatten(0, -2).float()
    wanted = target.flatten(0, -2).to(given.device).float()
    weights = weights.repeat(len(wanted) // len(weights))
    squares = (wanted - given).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
    bounded = torch.where(squares <= 1, squares, 2 * squares.clamp_min(1).sqrt() - 1)
    return (weights * bounded).sum() / weights.sum()


def distil_(
    layer: nn.Module,
    lessons: Sequence[Lesson],
    exams: Sequence[Lesson],
    count: int,
    learning_rate: float,
) -> tuple[float, float]:
    """Train one layer alone; return its `relative_error` on held-out batches before and after.

    It gets new parameters; the old ones stay as they are. Held-out tokens choose among the trained
    layer, the one halfway to it and the one before; without any the trained layer stays.
    """
    is_half = any(p.dtype in (torch.bfloat16, torch.float16) for p in layer.parameters())
    judges = exams or lessons
    before = {name: p.detach() for name, p in layer.named_parameters()}
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(module, name, copied)
    old = _mean_error(judges)
    flags = {name: (p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
    parameters = list(layer.parameters())
    for parameter in parameters:  # half precision learns in float32, and multiplies in bfloat16
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    kind = parameters[0].device.type  # without a cache: the weights change from step to step
    with torch.autocast(kind, torch.bfloat16, cache_enabled=False) if is_half else nullcontext():
        optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=count + 1, cycle_momentum=False
        )
        draw, waiting = random.Random(0), list[Lesson]()
        for _ in range(count):
            waiting = waiting or draw.sample(lessons, len(lessons))
            with torch.enable_grad():
                waiting.pop().error().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for name, parameter in layer.named_parameters():
        dtype, flag = flags[name]
        parameter.grad = None
        parameter.requires_grad_(flag)
        parameter.data = parameter.data.to(dtype)
    after = {name: p.detach().clone() for name, p in layer.named_parameters()}
    errors = {0.0: old}
    for share in (1.0, 0.5) if exams else (1.0,):
        _blend_(layer, before, after, share)
        errors[share] = _mean_error(judges)
    best = min((share for share in errors if math.isfinite(errors[share])), key=errors.__getitem__)
    _blend_(layer, before, after, best)
    return old, errors[best]


@torch.no_grad()
def _mean_error(lessons: Sequence[Lesson]) -> float:
    totals = torch.stack([lesson.weights.sum() for lesson in lessons]).tolist()
    errors = torch.stack([lesson.error() for lesson in lessons]).tolist()
    mean: float = sum(e * n for e, n in zip(errors, totals, strict=True)) / sum(totals)
    return mean


@torch.no_grad()
def _blend_(
    layer: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], share: float
) -> None:
    for name, parameter in layer.named_parameters():
        parameter.copy_(before[name].lerp(after[name], share) if share else before[name])
