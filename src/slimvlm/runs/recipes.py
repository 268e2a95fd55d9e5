"""Which recipe for which budget, and what was measured with it: ``recipes.yaml`` as values.

Reference:
    Huang et al. 2025, arXiv:2507.20749, Fig. 1 and Sec. 5; extended in arXiv:2604.24380.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Axis, Train

RULES = Path(__file__).with_name("recipes.yaml")
NEAR = 0.03
"""How far a measured ratio may be from the one in question, outside the measured range."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do up to some ratio.

    Attributes:
        up_to: Largest ratio that the row is for.
        axis: Where to prune.
        train: What learns afterwards, None for no recovery.
        loss: Loss of the recovery.
        why: The finding behind it, for people.
        source: Where that finding stands.
    """

    up_to: float
    axis: Axis
    train: Train | None
    loss: str
    why: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What was measured of one model over the ratio.

    Attributes:
        model: The model that was measured.
        axis: Where it was pruned.
        values: AVG-% or a share of the time, by ratio.
        source: Where the numbers stand.
        train: What learned, None for no recovery.
        loss: From which loss.
        ours: Whether this project measured it.
    """

    model: str
    axis: Axis
    values: Mapping[float, float]
    source: str
    train: Train | None = None
    loss: str = ""
    ours: bool = False

    def at(self, ratio: float) -> float | None:
        """The value at a ratio, on a straight line between measured ones; None too far outside."""
        ratios = sorted(self.values)
        if not ratios[0] - NEAR <= ratio <= ratios[-1] + NEAR:
            return None
        return float(np.interp(ratio, ratios, [self.values[known] for known in ratios]))


@dataclass(frozen=True, kw_only=True)
class Fraction:
    """The share of the study's training data that suffices up to some ratio."""

    up_to: float
    fraction: float
    why: str


@dataclass(frozen=True, kw_only=True)
class TokensFirst:
    """Where tokens go first.

    Attributes:
        from_share: From which share of embeddings and head in the backbone on.
        one_of: One token of so many stays.
        why: The finding behind it, for people.
        source: Where that finding stands.
    """

    from_share: float
    one_of: int
    why: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What estimates rest on; ``recipes.yaml`` says of each number what it is."""

    text_tokens: int
    image_tokens: int
    process_bytes: float
    gram_copies: int
    walk_source: str
    walk_passes: float
    activation_source: str
    learning_bytes: int
    efficiency: Mapping[str, float]
    gpu: str
    gpu_flops: float
    gpu_source: str
    max_hours_without_gpu: int
    disk_flops: float
    reply_passes: float
    benchmark_questions: int
    own_questions: int


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The whole file.

    Attributes:
        with_training: Recipes, in the order of their ratios, where there is data.
        without_training: The same where there is none.
        tokens_first: Where tokens go before layers lose something.
        full_set: Conversations that the study trained on.
        fractions: The share of these that suffices, in the order of the ratios.
        fractions_source: Where that stands.
        subjects: Values of the anatomy of each measured model.
        backbone_params: How large each one's backbone is.
        alike_within: How many times as large or as small a model like it is at most.
        decoder_shares: Share of each one's backbone that its decoder layers are.
        retention: Everything that is known of AVG-%; where two curves fit, the first one counts.
        latency: Time to read a question as a share of the unpruned model's.
        constants: What estimates rest on.
    """

    with_training: tuple[Recipe, ...]
    without_training: tuple[Recipe, ...]
    tokens_first: TokensFirst
    full_set: int
    fractions: tuple[Fraction, ...]
    fractions_source: str
    subjects: Mapping[str, Mapping[str, str | int]]
    backbone_params: Mapping[str, float]
    alike_within: float
    decoder_shares: Mapping[str, float]
    retention: tuple[Curve, ...]
    latency: tuple[Curve, ...]
    constants: Constants


@cache
def rules() -> Rules:
    """``recipes.yaml``, which pydantic checks against `Rules`."""
    values = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return TypeAdapter(Rules).validate_python(values, extra="forbid")


def recipe_for(ratio: float, has_data: bool) -> Recipe:
    """The study's choice for a ratio.

    Args:
        ratio: Share of the backbone to remove.
        has_data: Whether there is data to train on, and something to train with.

    Raises:
        ConfigError: If the ratio is not in [0, 1).
    """
    _require_share(ratio)
    rows = rules().with_training if has_data else rules().without_training
    return next(row for row in rows if ratio <= row.up_to)


def fraction_for(ratio: float) -> tuple[float, str]:
    """The share of the study's training data that suffices for a ratio, and why.

    Raises:
        ConfigError: If the ratio is not in [0, 1).
    """
    _require_share(ratio)
    row = next(row for row in rules().fractions if ratio <= row.up_to)
    return row.fraction, f"{row.why} ({rules().fractions_source})"


def published(axis: str, train: str | None, loss: str, ratio: float) -> list[tuple[Curve, float]]:
    """AVG-% that the study gives for an axis, a recovery and a ratio, one value for each model.

    Training all weights stands beside the study's LoRA.
    """
    return [found for found in expected(axis, train, loss, ratio) if not found[0].ours]


def expected(axis: str, train: str | None, loss: str, ratio: float) -> list[tuple[Curve, float]]:
    """AVG-% that was measured for an axis, a recovery and a ratio, one value for each model."""
    learns = {train, "lora"} if train == "full" else {train}
    found: dict[str, tuple[Curve, float]] = {}
    for row in rules().retention:
        fits = row.axis == axis and row.train in learns and (train is None or row.loss == loss)
        if fits and (value := row.at(ratio)) is not None:
            found.setdefault(row.model, (row, value))
    return list(found.values())


def expected_of_layers(
    axis: str, train: str | None, loss: str, share: float
) -> list[tuple[Curve, float]]:
    """AVG-% that was measured where such a share of the decoder layers went.

    Ratios count embeddings, too, of which some models have many: the same ratio takes more of their
    layers.
    """
    found: dict[str, tuple[Curve, float]] = {}
    for name, layers in rules().decoder_shares.items():
        for row, value in expected(axis, train, loss, share * layers):
            if row.model == name:
                found[name] = row, value
    return list(found.values())


def subject_of(shape: Mapping[str, Any]) -> str | None:
    """The measured model that a model's anatomy agrees with, if any.

    Args:
        shape: Values of the anatomy by name, such as ``hidden_size``.
    """
    for name, wanted in rules().subjects.items():
        if all(shape[key] == value for key, value in wanted.items()):
            return name
    return None


def are_alike(subject: str, backbone_params: int) -> bool:
    """Whether a measured model is so near in size that its numbers say something of another one.

    Args:
        subject: The measured model.
        backbone_params: Parameters of the other one's backbone.
    """
    measured, within = rules().backbone_params[subject], rules().alike_within
    return measured / within <= backbone_params <= measured * within


def _require_share(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio {ratio} must be at least 0 and below 1")
