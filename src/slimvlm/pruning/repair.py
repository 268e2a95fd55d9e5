"""One-shot repair: new weights for a pruned model from Gram matrices of the original one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import read_anatomy, segments
from slimvlm.models.parts import Parts
from slimvlm.planning.plan import Plan
from slimvlm.pruning.least_squares import Refit, refit
from slimvlm.pruning.walk.layer import Steps
from slimvlm.pruning.walk.result import LayerReport, MatrixReport, WalkReport
from slimvlm.pruning.writers import RIDGE, Writer, writers_of_layer
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.statistics import Grams, Statistics


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
    Steps(ridge=ridge)
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
