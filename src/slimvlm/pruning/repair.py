"""The matrices that write to the residual stream, and their repair in one shot.

The walk (`slimvlm.pruning.walk`) repairs the same matrices, layer after layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, NumericalError
from slimvlm.models.anatomy import read_anatomy, segments, unit_of
from slimvlm.models.families import INPUT_COLUMNS, Backbone, Projection
from slimvlm.models.hidden import all_finite
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Parts, layer_matrices
from slimvlm.planning.mask import kept_channels
from slimvlm.planning.plan import Plan
from slimvlm.pruning.least_squares import Refit, refit
from slimvlm.pruning.walk.result import LayerReport, MatrixReport, WalkReport
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.statistics import Grams, Statistics

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


def require_ridge(ridge: float) -> None:
    """Refuse a ridge below 0 or without bounds."""
    if not 0 <= ridge < float("inf"):
        raise ConfigError(f"ridge {ridge} must be a finite number of 0 or more")


@torch.no_grad()
def repair_(
    model: PreTrainedModel, plan: Plan, statistics: Statistics, ridge: float = RIDGE
) -> WalkReport:
    """Repair the widths of a pruned model from Gram matrices of the original one, in place.

    Every matrix is fitted to the original inputs, as if only it had been pruned. This needs one
    pass over the data and no model but the pruned one. `slimvlm.walk_` is better, since it takes
    each layer's inputs from the already smaller layers before it, and it alone can repair the seams
    of removed layers.

    Args:
        model: After ``prune_(model, plan)``.
        plan: The plan.
        statistics: ``sv.collect(original, batches, "obs")``.
        ridge: See `slimvlm.pruning.least_squares.refit`.

    Returns:
        The report; its errors are those on the statistics.

    Raises:
        ConfigError: If the statistics are of another kind or another model, or the model was not
            pruned by this plan.
        NumericalError: If a new weight is not finite.
    """
    require_ridge(ridge)
    if not isinstance(statistics, Grams):
        raise ConfigError("statistics cannot repair: only those of criterion 'obs' can")
    if read_anatomy(model).layers != plan.after.layers:
        raise ConfigError("model: does not have the shape that the plan leaves; prune it first")
    fitted: list[tuple[Writer, Refit]] = []
    for index, layer in zip(plan.layers, Parts(model).layers, strict=True):
        for writer in writers_of_layer(layer, index, plan.before.backbone):
            place, device = (index, writer.projection.path), writer.weight.device
            if place not in statistics.parts:
                raise ConfigError(f"statistics: no {writer.name!r} in them")
            weight, part = statistics.matrices[place], statistics.parts[place]
            whole = segments(writer.projection, plan.before.layers[index])
            channels = sum(units * width for _, _, units, width in whole)
            if weight.shape != (writer.linear.out_features, channels):
                raise ConfigError(f"statistics: {writer.name!r} is of another model")
            keep = writer.kept_channels(plan)
            if len(keep) < channels:
                sums = (part.gram.to(device), part.total.to(device), part.count.to(device))
                found = refit(weight.to(device), writer.bias, Moments(*sums), keep, ridge)
                fitted.append((writer, found))
    layers: dict[int, dict[str, MatrixReport]] = {}
    for writer, found in fitted:
        writer.assign_(found.weight, found.bias)
        row = MatrixReport(writer.kind, found.sliced_error, found.repaired_error, 1.0)
        layers.setdefault(writer.index, {})[writer.projection.path] = row
    return WalkReport([LayerReport(index, refits) for index, refits in layers.items()])
