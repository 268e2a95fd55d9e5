"""Repair a pruned model in closed form: new weights for the matrices that lost their inputs.

Pruning leaves ``o_proj`` and ``down_proj`` (or what a family calls them) with fewer inputs. Their
remaining columns can make up for much of it, by least squares on calibration data, without any
training. Likewise the last matrix before removed layers can do a linear part of their work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.hidden import evaluating
from slimvlm.models.units import segments
from slimvlm.planning.mask import masked
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_
from slimvlm.pruning.least_squares import Moments, refit
from slimvlm.pruning.sequential import (
    ATTENTION,
    MLP,
    SEAM,
    MatrixRepair,
    SequentialRepair,
    Writer,
    kinds_of,
    writers,
)
from slimvlm.scoring.batches import Batch, TokenWeights, answer_loss
from slimvlm.scoring.statistics import Grams, Statistics
from slimvlm.scoring.symmetric import SymmetricSum

REPAIRS: dict[str, tuple[str, ...]] = {
    "none": (),
    "width": (ATTENTION, MLP),
    "depth": (SEAM,),
    "both": (ATTENTION, MLP, SEAM),
    "auto": (ATTENTION, MLP, SEAM),
}
"""What each form of repair may change: attention outputs, MLP outputs, seams of removed layers."""

RIDGE = 1e-2
"""Ridge as a share of the mean diagonal of the Gram matrix; see ``docs/results.md``."""


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        form: ``one-shot`` or ``sequential``.
        errors: For each matrix, named ``<original layer>.<path>``, its squared error on the
            calibration data as a share of what it should give: sliced, and repaired.
        kept: How much of each kind of repair was kept: 1 all, 0.5 half of the change, 0 none.
        loss_sliced: Mean answer loss on the held-out batches without repair; None if not measured.
        loss_repaired: The same of the model as it is left.
        notes: What was left alone, and why.
    """

    form: str
    errors: Mapping[str, tuple[float, float]]
    kept: Mapping[str, float]
    loss_sliced: float | None = None
    loss_repaired: float | None = None
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: what was repaired and what it gained."""
        parts = [f"{kind} {factor:g}" for kind, factor in self.kept.items() if factor]
        line = f"repair ({self.form}): {', '.join(parts) or 'nothing kept'}"
        if self.errors:
            sliced, repaired = (fmean(e[i] for e in self.errors.values()) for i in (0, 1))
            line += f"; mean output error {sliced:.2%} -> {repaired:.2%}"
        if self.loss_sliced is not None and self.loss_repaired is not None:
            line += f"; held-out loss {self.loss_sliced:.4f} -> {self.loss_repaired:.4f}"
        return "; ".join([line, *self.notes])


@torch.no_grad()
def repair_(
    model: PreTrainedModel, plan: Plan, statistics: Statistics, ridge: float = RIDGE
) -> RepairReport:
    """Repair the widths of a pruned model from Gram matrices of the original one, in place.

    Every matrix is fitted to the original inputs, as if only it had been pruned. This needs one
    pass over the data and no model but the pruned one. `prune_and_repair_` is slower and better,
    since it takes each layer's inputs from the already repaired layers before it, and it alone can
    repair the seams of removed layers.

    Args:
        model: After ``prune_(model, plan)``.
        plan: What was removed.
        statistics: Of kind ``grams``, of the original model: those of criterion ``obs``, as
            `slimvlm.collect` gives them, or `slimvlm.Statistics.load` from a file that their
            ``save`` wrote.
        ridge: See `slimvlm.pruning.least_squares.refit`.

    Raises:
        ConfigError: If the statistics are of another kind or another model, or the model was not
            pruned by this plan.
        NumericalError: If a new weight is not finite.
    """
    _check_ridge(ridge)
    if not isinstance(statistics, Grams):
        raise ConfigError(f"statistics of kind {statistics.kind!r} cannot repair; use 'grams'")
    if read_anatomy(model).layers != plan.after.layers:
        raise ConfigError("model: does not have the shape that the plan leaves; prune it first")
    fitted = {w: _fitted_alone(w, plan, statistics, ridge) for w in writers(model, plan.layers)}
    repairs = {w.name: repair for w, repair in fitted.items() if repair is not None}
    for writer in fitted:
        if writer.name in repairs:
            found = repairs[writer.name].refit
            writer.assign_(found.weight, found.bias)
    return RepairReport("one-shot", _errors(repairs), dict.fromkeys(kinds_of(repairs), 1.0))


def _fitted_alone(
    writer: Writer, plan: Plan, statistics: Grams, ridge: float
) -> MatrixRepair | None:
    """A matrix fitted as if only it had been pruned; None if it has lost no channel.

    Raises:
        ConfigError: If the statistics lack the matrix, or it had another shape there.
    """
    name, linear, device = writer.name, writer.linear, writer.linear.weight.device
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
    return MatrixRepair(writer.kind, refit(weight, linear.bias, moments, keep, ridge))


@torch.no_grad()
def prune_and_repair_(
    model: PreTrainedModel,
    plan: Plan,
    batches: Iterable[Batch],
    repair: str = "auto",
    *,
    token_weights: TokenWeights | None = None,
    ridge: float = RIDGE,
    held_out: Iterable[Batch] | None = None,
) -> RepairReport:
    """Prune a model and repair it layer by layer, in place.

    The decoder is gone through once. Each layer reads what the already pruned and repaired layers
    before it give. Its attention output is fitted first, then its MLP output behind the repaired
    attention, both to what the whole layer would give on these inputs. In the layer before removed
    ones, the MLP output is fitted to what brings the hidden states to where the original model has
    them after the removed layers; nothing is added to the model for that.

    Needs, beyond the model: the hidden states of all batches once (twice with removed layers), the
    new weights, and one matrix's sums at a time.

    Args:
        model: The original model.
        plan: What to remove.
        batches: Calibration data: model inputs with ``labels``.
        repair: ``none``, ``width`` (attention and MLP outputs), ``depth`` (seams), ``both``, or
            ``auto``: both, judged on held-out answers. There, each kind of repair is kept whole,
            by half or not at all, whatever gives the lowest loss; the result is never worse there
            than without repair.
        token_weights: Weight in the fit of ``image``, ``prompt`` and ``answer`` tokens; all 1 if
            None.
        ridge: See `slimvlm.pruning.least_squares.refit`.
        held_out: Batches that repairs are judged on. For ``auto`` without any, every fifth batch
            is set aside.

    Raises:
        ConfigError: If an argument is unknown or the plan is for another model.
        DataError: If there are no batches, or too few to set some aside.
        NumericalError: If NaN or infinity appears; the message says in which layer. The model is
            not changed then.
    """
    _check_ridge(ridge)
    if repair not in REPAIRS:
        raise ConfigError(f"repair {repair!r} must be one of: {', '.join(REPAIRS)}")
    given, judges = _split(list(batches), held_out, repair == "auto")
    with evaluating(model):
        with masked(model, plan):
            loss_sliced = answer_loss(model, judges) if judges else None
        fitting = SequentialRepair(model, plan, ridge)
        if REPAIRS[repair]:
            fitting.run(given, REPAIRS[repair], token_weights)
        prune_(model, plan)
        blend = Blend(model, plan, fitting.repairs)
        loss: float | None
        if repair == "auto" and loss_sliced is not None:
            loss = blend.set_best_(judges, loss_sliced)
        else:
            blend.set_(dict.fromkeys(blend.kinds, 1.0))
            loss = answer_loss(model, judges) if judges else None
    errors, notes = _errors(fitting.repairs), tuple(fitting.notes)
    return RepairReport("sequential", errors, blend.factors, loss_sliced, loss, notes)


def _errors(repairs: Mapping[str, MatrixRepair]) -> dict[str, tuple[float, float]]:
    return {n: (r.refit.sliced_error, r.refit.repaired_error) for n, r in repairs.items()}


def _check_ridge(ridge: float) -> None:
    if not 0 <= ridge < float("inf"):
        raise ConfigError(f"ridge {ridge} must be a finite number of 0 or more")


def _split(
    batches: list[Batch], held_out: Iterable[Batch] | None, needs_judges: bool
) -> tuple[list[Batch], list[Batch]]:
    """Calibration batches, and those to judge on."""
    judges = list(held_out) if held_out is not None else []
    if needs_judges and not judges:
        batches, judges = [b for i, b in enumerate(batches) if i % 5 != 4], batches[4::5]
        if not judges:
            raise DataError("repair 'auto' needs held_out batches, or 5 calibration batches")
    if not batches:
        raise DataError("no calibration batch was given")
    return batches, judges


_FACTORS = (1.0, 0.5, 0.0)


class Blend:
    """A pruned model that can be set to any blend of its sliced and its repaired weights.

    Args:
        model: The model, with its sliced weights.
        plan: What it was pruned by.
        repairs: What was fitted, by the matrix's name.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, repairs: Mapping[str, MatrixRepair]
    ) -> None:
        self.kinds = kinds_of(repairs)
        self.factors = dict.fromkeys(self.kinds, 0.0)
        self._model, self._repairs = model, repairs
        self._writers = [w for w in writers(model, plan.layers) if w.name in repairs]
        self._sliced = [
            (w.linear.weight.clone(), None if w.linear.bias is None else w.linear.bias.clone())
            for w in self._writers
        ]

    def set_(self, factors: Mapping[str, float]) -> None:
        """Set the weights to ``sliced + factor · (repaired - sliced)``, by kind."""
        for writer, (weight, bias) in zip(self._writers, self._sliced, strict=True):
            repair = self._repairs[writer.name]
            factor, found = factors[repair.kind], repair.refit
            if factor == self.factors[repair.kind]:
                continue
            if factor:
                weight = torch.lerp(weight.double(), found.weight, factor)
                bias = bias if found.bias is None else bias.double().lerp(found.bias, factor)
            writer.assign_(weight, bias)
        self.factors = dict(factors)

    def set_best_(self, batches: Sequence[Batch], loss_sliced: float) -> float:
        """Find the factors with the lowest loss, kind by kind from the full repair; set them."""
        losses_of = {tuple(self.factors.values()): loss_sliced}

        def loss(factors: dict[str, float]) -> float:
            key = tuple(factors.values())
            if key not in losses_of:
                self.set_(factors)
                losses_of[key] = answer_loss(self._model, batches)
            return losses_of[key]

        best = min((dict.fromkeys(self.kinds, f) for f in (1.0, 0.0)), key=loss)
        for kind in self.kinds:
            best = min(({**best, kind: factor} for factor in _FACTORS), key=loss)
        self.set_(best)
        return loss(best)
