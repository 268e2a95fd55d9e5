"""Read ``recipes.yaml``: which recipe for which ratio, and what was measured with it.

Reference:
    Huang et al. 2025, arXiv:2507.20749, Fig. 1 and Sec. 5; extended in arXiv:2604.24380.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Axis, Train
from slimvlm.core.tables import read_table

NEAR = 0.03  # how far a measured ratio may be from the one in question, outside the measured range


@dataclass(frozen=True, kw_only=True)
class ChartRow:
    """The paper's choice up to a ratio: axis, training and loss, with the reason."""

    up_to: float
    axis: Axis
    train: Train | None
    loss: str
    why: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """AVG-%, or a share of the time, that was measured of a model at some ratios."""

    model: str
    axis: Axis
    values: Mapping[float, float]
    source: str
    train: Train | None = None
    loss: str = ""
    ours: bool = False
    repaired: bool = True  # whether the weights were repaired before training; of ours

    def at(self, ratio: float) -> float | None:
        """Interpolate the value at a ratio; None if it is too far outside the measured ones."""
        ratios = sorted(self.values)
        if not ratios[0] - NEAR <= ratio <= ratios[-1] + NEAR:
            return None
        return float(np.interp(ratio, ratios, [self.values[known] for known in ratios]))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The whole of ``recipes.yaml``, which explains each key and constant."""

    with_training: tuple[ChartRow, ...]
    without_training: tuple[ChartRow, ...]
    tokens_first: Any
    full_set: int
    fractions: tuple[Any, ...]
    fractions_source: str
    notes: Mapping[str, str]
    subjects: Mapping[str, Mapping[str, str | int]]
    backbone_params: Mapping[str, float]
    alike_within: float
    decoder_shares: Mapping[str, float]
    retention: tuple[Curve, ...]
    constants: Any


@cache
def rules() -> Rules:
    """Read ``recipes.yaml``, which pydantic checks against `Rules`."""
    values = read_table(__file__, "recipes.yaml")
    for name in ("tokens_first", "constants"):
        values[name] = SimpleNamespace(**values[name])
    values["fractions"] = [SimpleNamespace(**row) for row in values["fractions"]]
    return TypeAdapter(Rules).validate_python(values, extra="forbid")


def chart_row(ratio: float, has_data: bool, has_projector: bool = True) -> ChartRow:
    """Choose the paper's recipe: one that trains if there is data, a projector if there is one."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio {ratio} must be at least 0 and below 1")
    rows = rules().with_training if has_data else rules().without_training
    fits = (row for row in rows if has_projector or row.train != "projector")
    return next(row for row in fits if ratio <= row.up_to)


def expected(
    axis: str, train: str | None, loss: str, ratio: float, ours: bool = True
) -> list[tuple[Curve, float]]:
    """Collect the AVG-% measured for an axis, a recovery and a ratio, the first one of a model."""
    learns = {train, "lora"} if train == "full" else {train}
    found: dict[str, tuple[Curve, float]] = {}
    for row in rules().retention:
        fits = row.axis == axis and row.train in learns and (train is None or row.loss == loss)
        if fits and (ours or not row.ours) and (value := row.at(ratio)) is not None:
            found.setdefault(row.model, (row, value))
    return list(found.values())


def subject_of(shape: Mapping[str, Any]) -> str | None:
    """Name the measured model with the same anatomy, if any; ``shape`` maps names to values."""
    subjects = rules().subjects.items()
    return next((name for name, wanted in subjects if wanted.items() <= shape.items()), None)
