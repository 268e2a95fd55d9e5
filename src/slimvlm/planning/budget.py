"""How much to remove and where: the arguments of `make_plan`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from slimvlm.core.errors import ConfigError, ImpossiblePlanError, NumericalError
from slimvlm.models.anatomy import WIDTH_UNITS, Anatomy
from slimvlm.models.cost import TILE_MULTIPLE, WIDTH_MULTIPLE
from slimvlm.models.hidden import all_finite
from slimvlm.planning.plan import AXES, Plan
from slimvlm.scoring.unit_scores import Scores

ALLOCATIONS = ("uniform", "protect")
COUNTINGS = ("parameters", "per_layer")

_PROTECTED_OF_32 = (4, 2)
"""First and last layers that the study's code leaves whole."""


@dataclass(frozen=True)
class Budget:
    """How much to remove and where; the arguments of `make_plan`, checked.

    Raises:
        ConfigError: If one is out of range; the message names it.
    """

    anatomy: Anatomy
    ratio: float
    axis: str
    protect: tuple[int, int] = (0, 0)
    counting: str = "parameters"
    round_to: int | None = None
    depth_share: float = 0.5
    allocation: str = "uniform"
    units: tuple[str, ...] = WIDTH_UNITS
    kv_heads: int | None = None
    experts: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio} must be at least 0 and below 1")
        words = {"axis": AXES, "allocation": ALLOCATIONS, "counting": COUNTINGS}
        for name, allowed in words.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} must be one of: {', '.join(allowed)}")
        first, last = self.protected
        if min(first, last) < 0 or first + last >= self.anatomy.num_layers:
            raise ConfigError(
                f"protect {(first, last)} must leave at least one of "
                f"{self.anatomy.num_layers} layers"
            )
        if self.round_to is not None and self.round_to < 1:
            raise ConfigError(f"round_to {self.round_to} must be at least 1")
        if not 0 <= self.depth_share <= 1:
            raise ConfigError(f"depth_share {self.depth_share} must be between 0 and 1")
        self._check_units()
        self._check_experts()

    def _check_units(self) -> None:
        if not self.units or not set(self.units) <= set(WIDTH_UNITS):
            raise ConfigError(f"units {self.units} must be some of: {', '.join(WIDTH_UNITS)}")
        if self.kv_heads is None:
            return
        legal = self.anatomy.legal_kv_heads()
        if self.kv_heads not in legal:
            raise ConfigError(f"kv_heads {self.kv_heads} must be one of: {legal}")
        if self.counting == "per_layer":
            raise ConfigError(f"kv_heads {self.kv_heads} needs counting 'parameters'")
        if "kv_group" not in self.units and self.kv_heads != legal[-1]:
            raise ConfigError(f"kv_heads {self.kv_heads} needs 'kv_group' among units")

    def _check_experts(self) -> None:
        if not 0 <= self.experts < 1:
            raise ConfigError(f"experts {self.experts} must be at least 0 and below 1")
        if self.experts and not self.anatomy.expert_counts:
            raise ConfigError(
                f"experts {self.experts}: {self.anatomy.model_type!r} has none that can go"
            )
        taken, left = self.anatomy.experts_per_token, self.left_experts
        if left < taken:
            raise ImpossiblePlanError(
                f"experts {self.experts} leaves {left} in a layer, but each token takes {taken}: "
                f"at most {1 - taken / self.anatomy.expert_counts[0]:g}"
            )

    @property
    def left_experts(self) -> int:
        """Experts that stay in every layer that has some."""
        count = max(self.anatomy.expert_counts, default=0)
        return count - round(count * self.experts)

    @property
    def params(self) -> float:
        """Parameters to remove."""
        return self.ratio * self.anatomy.backbone_params

    def left(self, plan: Plan) -> float:
        """Parameters to remove beside those that a plan removes already."""
        return self.params - plan.ratio * self.anatomy.backbone_params

    @property
    def multiple(self) -> int:
        """Multiple for the number of kept neurons; a larger one if the model needs it."""
        wanted = self.round_to or default_multiple(self.anatomy)
        return math.lcm(wanted, self.anatomy.backbone.neuron_multiple)

    def can_shrink(self, unit: str) -> bool:
        """Whether units of a kind may become fewer where all layers stay equally wide."""
        return unit == "kv_group" or len(self.anatomy.legal_neurons()) > 1

    @property
    def protected(self) -> tuple[int, int]:
        """How many first and last layers stay whole."""
        first, last = self.protect
        if self.allocation != "protect" or first or last:
            return first, last
        scaled = [max(round(n * self.anatomy.num_layers / 32), 1) for n in _PROTECTED_OF_32]
        return scaled[0], scaled[1]

    @property
    def removable_layers(self) -> list[int]:
        """Layers that may go."""
        open_ones = range(self.protected[0], self.anatomy.num_layers - self.protected[1])
        return [index for index in open_ones if index not in self.anatomy.pinned_layers]

    def is_open(self, layer: int) -> bool:
        """Whether a layer's widths may shrink."""
        return self.protected[0] <= layer < self.anatomy.num_layers - self.protected[1]


def channels_to_remove(channels: int, ratio: float) -> int:
    """``C - floor(C (1 - ratio))`` in exact decimal arithmetic.

    LLM-Pruner computes ``int(C * (1 - ratio))`` in floating point, which removes one channel too
    many for, say, 640 channels at 0.9.
    """
    return channels - math.floor(channels * (1 - Fraction(str(ratio))))


def default_multiple(anatomy: Anatomy) -> int:
    """128 where one step of all layers' widths is at most 1 % of the backbone, else less.

    Kernels for 4-bit and 8-bit weights want multiples of 128. In a model too small for it, 64 is
    halved until a step is at most 0.5 %.
    """
    step = sum(shape.neuron_params for shape in anatomy.layers) / anatomy.backbone_params
    if WIDTH_MULTIPLE * step <= 0.01:
        return WIDTH_MULTIPLE
    multiple = TILE_MULTIPLE
    while multiple > 1 and multiple * step > 0.005:
        multiple //= 2
    return multiple


def scores_for(unit: str, given: list[Scores], budget: Budget) -> Scores:
    """The first scores that cover a unit, checked against the model.

    Raises:
        ConfigError: If none does, or they are for another model.
        NumericalError: If one is not finite.
    """
    shapes = budget.anatomy.layers
    for scores in given:
        values = scores.of(unit)
        if values is None:
            continue
        rows = [values] if unit == "layer" else list(values)
        found = [len(row) for row in rows]
        expected = [len(shapes)] if unit == "layer" else [shape.units(unit) for shape in shapes]
        if found != expected:
            raise ConfigError(
                f"scores {scores.criterion!r} are for another model: {unit} counts {found[:3]}..., "
                f"expected {expected[:3]}..."
            )
        if not all(map(all_finite, rows)):
            raise NumericalError(
                f"scores {scores.criterion!r}: NaN or infinity among {unit} scores"
            )
        return scores
    names = ", ".join(repr(scores.criterion) for scores in given) or "none"
    asking = f"experts {budget.experts}" if unit == "expert" else f"axis {budget.axis!r}"
    raise ConfigError(f"{asking} needs scores of {unit}; given: {names}")
