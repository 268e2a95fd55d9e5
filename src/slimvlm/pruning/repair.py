"""One-shot repair: new weights for a pruned model from Gram matrices of the original one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import read_anatomy, segments
from slimvlm.planning.plan import Plan
from slimvlm.pruning.least_squares import Moments, Refit, refit
from slimvlm.pruning.walk.layer import Steps
from slimvlm.pruning.walk.result import LayerReport, MatrixReport, WalkReport
from slimvlm.pruning.writers import RIDGE, Writer, writers
from slimvlm.scoring.statistics import Grams, Statistics
from slimvlm.scoring.symmetric import SymmetricSum


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
        plan: What was removed.
        statistics: Of kind ``grams``, of the original model: those of criterion ``obs``, as
            `slimvlm.collect` gives them, or `slimvlm.Statistics.load` from a file that their
            ``save`` wrote.
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
        raise ConfigError(f"statistics of kind {statistics.kind!r} cannot repair; use 'grams'")
    if read_anatomy(model).layers != plan.after.layers:
        raise ConfigError("model: does not have the shape that the plan leaves; prune it first")
    fitted = [(w, _fitted_alone(w, plan, statistics, ridge)) for w in writers(model, plan.layers)]
    layers: dict[int, dict[str, MatrixReport]] = {}
    for writer, found in fitted:
        if found is not None:
            writer.assign_(found.weight, found.bias)
            row = MatrixReport(writer.kind, found.sliced_error, found.repaired_error, 1.0)
            layers.setdefault(writer.index, {})[writer.projection.path] = row
    return WalkReport([LayerReport(index, refits) for index, refits in layers.items()])


def _fitted_alone(writer: Writer, plan: Plan, statistics: Grams, ridge: float) -> Refit | None:
    """A matrix fitted as if only it had been pruned; None if it has lost no channel.

    Raises:
        ConfigError: If the statistics lack the matrix, or it had another shape there.
    """
    name, linear, device = writer.name, writer.linear, writer.weight.device
    part = statistics.parts.get((writer.index, writer.projection.path))
    if part is None:
        raise ConfigError(f"statistics 'grams': no {name!r} in them")
    whole = segments(writer.projection, plan.before.layers[writer.index])
    channels = sum(units * width for _, _, units, width in whole)
    if part.weight.shape != (linear.out_features, channels):
        raise ConfigError(f"statistics 'grams': {name!r} is of another model")
    keep = writer.kept_channels(plan)
    if len(keep) == channels:
        return None
    weight, count = part.weight.to(device), statistics.weight.to(device)
    pairs = SymmetricSum(part.gram.to(device))
    moments = Moments(pairs, part.sum.to(device).double(), count)
    return refit(weight, writer.bias, moments, keep, ridge)
