"""The matrices that write to the residual stream: what repair can change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from slimvlm.core.errors import NumericalError
from slimvlm.models.anatomy import unit_of
from slimvlm.models.families import INPUT_COLUMNS, Backbone, Projection
from slimvlm.models.hidden import all_finite
from slimvlm.models.load import with_float64
from slimvlm.models.parts import layer_matrices
from slimvlm.planning.mask import kept_channels
from slimvlm.planning.plan import Plan

ATTENTION, MLP, SEAM = "attention", "mlp", "seam"
"""Kinds of repair: of attention outputs, of MLP outputs, of seams of removed layers."""

REPAIRS: dict[str, tuple[str, ...]] = {
    "none": (),
    "width": (ATTENTION, MLP),
    "depth": (SEAM,),
    "both": (ATTENTION, MLP, SEAM),
    "auto": (ATTENTION, MLP, SEAM),
}
"""Kinds of repair in each form of repair."""

RIDGE = 1e-2
"""Ridge as a share of the mean diagonal of the Gram matrix; see ``docs/results.md``."""


@dataclass(frozen=True)
class Writer:
    """A matrix that writes to the residual stream."""

    index: int  # the number of its layer in the original model
    projection: Projection
    linear: nn.Linear

    @property
    def name(self) -> str:
        """``<original layer>.<path>``."""
        return f"{self.index}.{self.projection.path}"

    @property
    def unit(self) -> str:
        """The kind of unit that owns its input channels."""
        return unit_of(self.projection)

    @property
    def kind(self) -> str:
        """The kind of its repair where it is not at a seam."""
        return ATTENTION if self.unit == "kv_group" else MLP

    @property
    def weight(self) -> Tensor:
        """The matrix where it is fitted: on its device, or on the CPU if that has no float64."""
        return with_float64(self.linear.weight)

    @property
    def bias(self) -> Tensor | None:
        """Its bias in the same place, if it has one."""
        return None if self.linear.bias is None else with_float64(self.linear.bias)

    def kept_channels(self, plan: Plan) -> Tensor:
        """The input channels that a plan keeps, where the matrix is fitted."""
        keep = kept_channels(plan, self.index, self.projection)
        return keep.to(self.weight.device)

    def assign_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set new parameters in the module's data type; refuse values that are not finite in it."""
        for part, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            old = getattr(self.linear, part)
            new = value.to(old)
            if not all_finite(new):
                raise NumericalError(f"NaN or infinity in the repaired {part} of layer {self.name}")
            setattr(self.linear, part, nn.Parameter(new, old.requires_grad))


def writers_of_layer(layer: nn.Module, index: int, row: Backbone) -> Iterator[Writer]:
    """Writers of one layer, in the order in which they run; experts are no modules and left out."""
    attention, mlp, _ = layer_matrices(layer, row)
    for matrix in (*attention, *mlp):
        if matrix.projection.dim == INPUT_COLUMNS and isinstance(matrix.owner, nn.Linear):
            yield Writer(index, matrix.projection, matrix.owner)
