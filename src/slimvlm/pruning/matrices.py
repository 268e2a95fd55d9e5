"""The matrices that repair changes, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimvlm.core.errors import NumericalError
from slimvlm.models.families import Projection
from slimvlm.models.units import channels_of, unit_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.least_squares import Fit
from slimvlm.scoring.hooks import consumers

ATTENTION, MLP, SEAM = "attention", "mlp", "seam"
"""Kinds of repair: of attention outputs, of MLP outputs, of seams of removed layers."""


@dataclass(frozen=True)
class Fitted:
    """What was fitted for one matrix.

    Attributes:
        kind: The kind of repair.
        fit: Its new weights.
    """

    kind: str
    fit: Fit


def writers(
    model: nn.Module, indices: Sequence[int]
) -> Iterator[tuple[str, int, Projection, nn.Linear]]:
    """The matrices that write to the residual stream: (name, original layer, row, module).

    ``indices`` are the original numbers of the model's layers.
    """
    for position, projection, linear in consumers(model):
        index = indices[position]
        yield f"{index}.{projection.path}", index, projection, linear


def kept_channels(plan: Plan, index: int, projection: Projection) -> Tensor:
    """The input channels of a layer's matrix that a plan keeps."""
    kept = plan.kv_groups if unit_of(projection) == "kv_group" else plan.neurons
    return channels_of(projection, plan.before.layers[index], kept[index])


def kind_of(projection: Projection) -> str:
    """The kind of repair of a matrix that is not at a seam."""
    return ATTENTION if unit_of(projection) == "kv_group" else MLP


def assign_(name: str, linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a module new parameters of its own data type."""
    for part, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        old = getattr(linear, part)
        new = value.to(old.dtype)
        if not torch.isfinite(new).all():
            raise NumericalError(f"NaN or infinity in the repaired {part} of layer {name}")
        setattr(linear, part, nn.Parameter(new, old.requires_grad))


def kinds_of(fitted: Mapping[str, Fitted]) -> list[str]:
    """The kinds of repair that were fitted, in the order in which they are judged."""
    found = {f.kind for f in fitted.values()}
    return [kind for kind in (ATTENTION, MLP, SEAM) if kind in found]
