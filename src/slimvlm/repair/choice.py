"""Which repairs to keep: whole, by half or not at all, as held-out answers say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from slimvlm import losses
from slimvlm.capture.batches import Batch, on_device
from slimvlm.errors import DataError
from slimvlm.plan import Plan
from slimvlm.repair.matrices import Fitted, assign_, kinds_of, writers

_FACTORS = (1.0, 0.5, 0.0)


@torch.no_grad()
def answer_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy over all labelled tokens of some batches."""
    total, count = 0.0, 0
    for raw in batches:
        inputs = on_device(model, raw)
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        total += float(losses.token_cross_entropy(logits, labels).sum(dtype=torch.float64))
        count += int(losses.label_counts(labels).sum())
    if not count:
        raise DataError("held-out batches have no labelled token: nothing to judge a repair on")
    return total / count


class Choice:
    """A pruned model that can be set to any blend of its sliced and its repaired weights."""

    def __init__(self, model: PreTrainedModel, plan: Plan, fitted: Mapping[str, Fitted]) -> None:
        rows = [row for row in writers(model, plan.layers) if row[0] in fitted]
        self.model, self.fitted = model, fitted
        self.linears = {name: linear for name, _, _, linear in rows}
        self.kinds = kinds_of(fitted)
        self.factors = dict.fromkeys(self.kinds, 0.0)
        self.sliced = {
            name: (linear.weight.clone(), None if linear.bias is None else linear.bias.clone())
            for name, linear in self.linears.items()
        }

    def apply_(self, factors: Mapping[str, float]) -> None:
        """Set the weights to ``sliced + factor · (repaired - sliced)``, by kind."""
        for name, linear in self.linears.items():
            kind, fit = self.fitted[name].kind, self.fitted[name].fit
            if factors[kind] == self.factors[kind]:
                continue
            weight, bias = self.sliced[name]
            if factors[kind]:
                weight = torch.lerp(weight.double(), fit.weight, factors[kind])
                bias = bias if fit.bias is None else bias.double().lerp(fit.bias, factors[kind])
            assign_(name, linear, weight, bias)
        self.factors = dict(factors)

    def best_(self, batches: Sequence[Batch], loss_sliced: float) -> float:
        """Find the factors with the lowest loss, kind by kind from the full repair; set them."""
        losses_of = {tuple(self.factors.values()): loss_sliced}

        def loss(factors: dict[str, float]) -> float:
            key = tuple(factors.values())
            if key not in losses_of:
                self.apply_(factors)
                losses_of[key] = answer_loss(self.model, batches)
            return losses_of[key]

        best = min((dict.fromkeys(self.kinds, f) for f in (1.0, 0.0)), key=loss)
        for kind in self.kinds:
            best = min(({**best, kind: factor} for factor in _FACTORS), key=loss)
        self.apply_(best)
        return loss(best)
