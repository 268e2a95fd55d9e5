"""Which recipe for which budget, and what was measured with it: ``recipes.yaml`` as values.

Reference:
    Huang et al. 2025, arXiv:2507.20749, Fig. 1 and Sec. 5; extended in arXiv:2604.24380.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

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
class Measured:
    """A measured curve over the ratio.

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
        known = sorted(self.values.items())
        (low, first), (high, last) = known[0], known[-1]
        if not low - NEAR <= ratio <= high + NEAR:
            return None
        if ratio <= low:
            return first
        for (a, before), (b, after) in pairwise(known):
            if ratio <= b:
                return before + (after - before) * (ratio - a) / (b - a)
        return last


def recipe_for(ratio: float, has_data: bool) -> Recipe:
    """The study's choice for a ratio.

    Args:
        ratio: Share of the backbone to remove.
        has_data: Whether there is data to train on, and something to train with.

    Raises:
        ConfigError: If the ratio is not in [0, 1).
    """
    _require_share(ratio)
    rows = rules()["recipes"]["with_training" if has_data else "without_training"]
    return next(Recipe(**row) for row in rows if ratio <= row["up_to"])


def fraction_for(ratio: float) -> tuple[float, str]:
    """The share of the study's training data that suffices for a ratio, and why.

    Raises:
        ConfigError: If the ratio is not in [0, 1).
    """
    _require_share(ratio)
    data = rules()["data"]
    row = next(row for row in data["fractions"] if ratio <= row["up_to"])
    return row["fraction"], f"{row['why']} ({data['source']})"


def retentions() -> list[Measured]:
    """Everything that is known of AVG-%; where two curves fit, the first one counts."""
    return [_measured(row, "percent") for row in rules()["retention"]]


def latencies() -> list[Measured]:
    """Time to read a question as a share of the unpruned model's."""
    return [_measured(row, "share") for row in rules()["latency"]]


def published(
    axis: str, train: str | None, loss: str, ratio: float
) -> list[tuple[Measured, float]]:
    """AVG-% that the study gives for an axis, a recovery and a ratio, one value for each model.

    Training all weights stands beside the study's LoRA.
    """
    return [found for found in expected(axis, train, loss, ratio) if not found[0].ours]


def expected(axis: str, train: str | None, loss: str, ratio: float) -> list[tuple[Measured, float]]:
    """AVG-% that was measured for an axis, a recovery and a ratio, one value for each model."""
    found: dict[str, tuple[Measured, float]] = {}
    for row in retentions():
        value = row.at(ratio)
        if value is not None and _fits(row, axis, train, loss):
            found.setdefault(row.model, (row, value))
    return list(found.values())


def subject_of(shape: Mapping[str, Any]) -> str | None:
    """The measured model that a model's anatomy agrees with, if any.

    Args:
        shape: Values of the anatomy by name, such as ``hidden_size``.
    """
    for name, wanted in rules()["subjects"].items():
        if all(shape[key] == value for key, value in wanted.items()):
            return str(name)
    return None


@cache
def rules() -> dict[str, Any]:
    """The whole file."""
    values: dict[str, Any] = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return values


def _require_share(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio {ratio} must be at least 0 and below 1")


def _fits(row: Measured, axis: str, train: str | None, loss: str) -> bool:
    learns = {train, "lora"} if train == "full" else {train}
    return row.axis == axis and row.train in learns and (train is None or row.loss == loss)


def _measured(row: Mapping[str, Any], name: str) -> Measured:
    return Measured(values=row[name], **{key: value for key, value in row.items() if key != name})
