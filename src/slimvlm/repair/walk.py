"""Fit the matrices of a model layer by layer, on what the repaired layers before them give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.capture.batches import Batch, TokenWeights
from slimvlm.errors import NumericalError
from slimvlm.families import INPUT_COLUMNS, Projection
from slimvlm.geometry import decoder_layers
from slimvlm.least_squares import Moments, refit
from slimvlm.plan import Plan
from slimvlm.progress import progress
from slimvlm.repair.matrices import (
    MLP,
    SEAM,
    Fitted,
    assign_,
    kept_channels,
    kind_of,
    writers,
)
from slimvlm.repair.records import adds_plainly, recorded


class Walk:
    """Goes through the decoder once and fits; the model is the same before and after."""

    def __init__(self, model: PreTrainedModel, plan: Plan, ridge: float) -> None:
        self.model, self.plan, self.ridge = model, plan, ridge
        self.layers = decoder_layers(model)
        self.fitted: dict[str, Fitted] = {}
        self.notes: list[str] = []

    def run(
        self, batches: Sequence[Batch], kinds: Sequence[str], weights: TokenWeights | None
    ) -> None:
        """Fill `fitted`, layer by layer."""
        self.records = recorded(self.model, batches, weights)
        self.hidden = [record.hidden for record in self.records]
        self.original, self.original_index = list(self.hidden), 0
        seams = self._seams() if SEAM in kinds else {}
        rows: dict[int, list[Any]] = {}
        for row in writers(self.model, range(len(self.layers))):
            rows.setdefault(row[1], []).append(row)
        for index in progress(self.plan.layers, "repair"):
            if index in seams:
                self._advance_original(seams[index])
            with _put_back([linear for *_, linear in rows[index]]):
                for name, _, projection, linear in rows[index]:
                    is_seam = index in seams and kind_of(projection) == MLP
                    kind = SEAM if is_seam else kind_of(projection)
                    self._fit(name, index, projection, linear, kind if kind in kinds else None)
                self.hidden = [
                    record.through(self.layers[index], index, hidden)
                    for record, hidden in zip(self.records, self.hidden, strict=True)
                ]

    def _seams(self) -> dict[int, int]:
        """The layer before each run of removed layers, and the first layer after it."""
        kept = self.plan.layers
        ends = [*kept[1:], len(self.layers)]
        seams = {a: b for a, b in zip(kept, ends, strict=True) if b > a + 1}
        if kept[0] > 0:
            self.notes.append("the first layers are gone: no layer before them could be repaired")
        record, hidden = self.records[0], self.hidden[0]
        for index in list(seams):
            if not adds_plainly(record, self.layers[index], index, hidden, self._mlp(index)):
                self.notes.append(f"layer {index} has a norm after its MLP: its seam stays")
                del seams[index]
        return seams

    def _mlp(self, index: int) -> nn.Module:
        paths = [p.path for p in self.plan.before.backbone.mlp if p.dim == INPUT_COLUMNS]
        return self.layers[index].get_submodule(paths[0])

    def _advance_original(self, end: int) -> None:
        """Bring the original hidden states to the input of a layer; its weights are still whole."""
        for index in range(self.original_index, end):
            self.original = [
                record.through(self.layers[index], index, hidden)
                for record, hidden in zip(self.records, self.original, strict=True)
            ]
        self.original_index = end

    def _fit(
        self, name: str, index: int, projection: Projection, linear: nn.Linear, kind: str | None
    ) -> None:
        keep = kept_channels(self.plan, index, projection).to(linear.weight.device)
        weight: Tensor = linear.weight[:, keep]
        bias: Tensor | None = linear.bias
        is_cut = len(keep) < linear.in_features
        if kind == SEAM or (kind is not None and is_cut):
            moments = self._gather(index, linear, kind)
            sums = [moments.gram] if moments.cross is None else [moments.gram, moments.cross]
            if not all(bool(torch.isfinite(values).all()) for values in sums):
                raise NumericalError(f"NaN or infinity in layer {name} during repair")
            fit = refit(linear.weight, bias, moments, keep, self.ridge)
            self.fitted[name] = Fitted(kind, fit)
            weight, bias = fit.weight, fit.bias
        if is_cut or name in self.fitted:
            whole = torch.zeros_like(linear.weight, dtype=weight.dtype)
            whole[:, keep] = weight
            assign_(name, linear, whole, bias)

    def _gather(self, index: int, linear: nn.Linear, kind: str) -> Moments:
        """Sums of a matrix's full input and, at a seam, of what the layer's output lacks."""
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        outputs = linear.out_features if kind == SEAM else None
        moments = Moments.zero(linear.in_features, outputs, dtype, linear.weight.device)
        inputs: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            for j, record in enumerate(self.records):
                output = record.through(self.layers[index], index, self.hidden[j])
                x, missing = inputs.pop().flatten(0, -2), None
                if kind == SEAM:
                    missing = (self.original[j].to(dtype) - output.to(dtype)).flatten(0, -2)
                moments.add(x, record.weights.flatten(), missing)
        finally:
            hook.remove()
        return moments


@contextmanager
def _put_back(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Weights and biases that are replaced inside come back."""
    parameters = [(linear.weight, linear.bias) for linear in linears]
    try:
        yield
    finally:
        for linear, (weight, bias) in zip(linears, parameters, strict=True):
            linear.weight, linear.bias = weight, bias
