"""How long stages will take: by those measured in the cache, else by a rough count of FLOP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from slimvlm.core.options import RecoverConfig
from slimvlm.data.read import estimated_length
from slimvlm.evaluation.tasks import builtin_tasks
from slimvlm.models.load import default_device
from slimvlm.runs.estimate import (
    DEFAULT_IMAGE_TOKENS,
    EFFICIENCY,
    device_flops,
    model_sizes,
    training_passes,
)
from slimvlm.runs.study.cache import Cache
from slimvlm.runs.study.stages import KINDS, Request, Stage
from slimvlm.runs.study.work import samples_of
from slimvlm.scoring.criteria import CRITERIA

Basis = Literal["measured", "rough"]
_DISK_FLOPS = 40e9
"""FLOP that a rough estimate counts for each GB that is read or written."""
_REPLY_COST = 1.5
"""Prompts' worth of work that writing the answer is counted as: it goes token by token."""
_QUESTIONS = {None: 4000, "own": 320}
"""Questions of a task where no limit is given: of a published benchmark, of one of our own."""


@dataclass(frozen=True)
class Sizes:
    """What the rough count needs to know of a model and its data.

    Attributes:
        backbone: Parameters of the backbone.
        total: Parameters of the model.
        tokens: Mean tokens of a sample.
        training: Samples to train on.
    """

    backbone: int
    total: int
    tokens: float
    training: int


def sizes_of(request: Request) -> Sizes:
    """Sizes for a request; no weights are read."""
    backbone, total, image_tokens = model_sizes(request.model, request.prune.trust_remote_code)
    samples = samples_of(request)
    shown = samples[: request.prune.samples]
    lengths = [estimated_length(sample, image_tokens) for sample in shown]
    training = len(samples) - len(shown) or len(samples)
    return Sizes(
        backbone=backbone,
        total=total,
        tokens=sum(lengths) / len(lengths) if lengths else float(DEFAULT_IMAGE_TOKENS),
        training=min(training, request.training_samples or training),
    )


def flops_of(stage: Stage, kept: float, sizes: Sizes) -> float:
    """A rough count of a stage's work.

    Args:
        stage: The stage.
        kept: Share of the backbone that the model it works on has.
        sizes: Of the model and its data.
    """
    request = stage.request
    pass_flops = 2 * sizes.backbone * sizes.tokens
    disk = _DISK_FLOPS * 2 * sizes.total / 1e9
    if stage.kind == "calibrate":
        row = CRITERIA[request.prune.criterion[0]]
        passes = (3 if row.capture == "gradients" else 1) * request.prune.samples
        return disk + pass_flops * passes * row.needs_data
    if stage.kind == "plan":
        return disk + pass_flops * request.prune.samples * _plan_passes(stage)
    if stage.kind == "prune":
        repairs = 3 * (request.prune.repair != "none")
        return 3 * disk + pass_flops * request.prune.samples * repairs
    if stage.kind == "recover":
        assert request.recover is not None
        config = request.recover
        learnt = max(round(sizes.training * config.fraction), 1)
        batches = optimizer_steps(config, learnt) * config.gradient_accumulation
        seen = batches * min(config.batch_size, learnt)
        return 3 * disk + pass_flops * seen * training_passes(config, kept)
    return disk + pass_flops * kept * _questions(stage) * _REPLY_COST


def optimizer_steps(config: RecoverConfig, samples: int) -> int:
    """Steps that training on so many samples takes."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-samples // config.batch_size)
    return math.ceil(config.epochs * -(-batches // config.gradient_accumulation))


def _plan_passes(stage: Stage) -> float:
    """Passes over all calibration samples; a quarter of them judges the plans of a search."""
    prune = stage.request.prune
    if prune.axis == "depth" or prune.allocation not in ("balanced", "search"):
        return prune.steps - 1
    return (prune.search_passes if prune.allocation == "search" else 8) / 4


def _questions(stage: Stage) -> float:
    asked = stage.request.asked
    assert asked is not None
    names = [name.strip() for name in asked.tasks.split(",")]
    own = builtin_tasks()
    total = 0
    for name in names:
        each = asked.limit or _QUESTIONS["own" if name in own or name == "demo" else None]
        total += each * (len(own) if name == "demo" else 1)
    return total * (2 if asked.floors else 1)


@dataclass
class Estimator:
    """Seconds that stages will take; learns from those that are done.

    Attributes:
        rates: Seconds and FLOP so far, by kind.
    """

    rates: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_cache(cls, cache: Cache) -> Estimator:
        """What the stages in a cache have measured."""
        made = cls()
        for kind in KINDS:
            for record in cache.records(kind):
                made.learn(kind, record["seconds"], record["flops"])
        return made

    def learn(self, kind: str, seconds: float, flops: float) -> None:
        """Count a stage that was done."""
        before = self.rates.get(kind, (0.0, 0.0))
        self.rates[kind] = (before[0] + seconds, before[1] + flops)

    def seconds(self, kind: str, flops: float) -> tuple[float, Basis]:
        """Expected seconds, and what they rest on."""
        seconds, done = self.rates.get(kind, (0.0, 0.0))
        if done:
            return flops * seconds / done, "measured"
        return flops / (EFFICIENCY * device_flops(default_device())), "rough"

    def total(self, work: Sequence[tuple[str, float]]) -> tuple[float, Mapping[str, Any]]:
        """Seconds of much work, and which kinds were measured."""
        parts = [(kind, *self.seconds(kind, flops)) for kind, flops in work]
        return sum(part[1] for part in parts), {kind: basis for kind, _, basis in parts}
