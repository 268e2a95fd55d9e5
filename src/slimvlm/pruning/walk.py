"""Fit the matrices of a model layer by layer, on what the repaired layers before them give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import NumericalError
from slimvlm.core.progress import progress
from slimvlm.models.anatomy import decoder_layers
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.hidden import layer_input, layer_output
from slimvlm.planning.plan import Plan
from slimvlm.pruning.least_squares import Moments, refit
from slimvlm.pruning.matrices import MLP, SEAM, Fitted, assign_, kept_channels, kind_of, writers
from slimvlm.scoring.batches import BackbonePass, Batch, TokenWeights


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


@dataclass
class Record:
    """What it takes to run one batch through the decoder layer by layer.

    Attributes:
        hidden: Input of the first layer.
        weights: Of its tokens.
        calls: Other arguments of each layer.
        added: What the model adds to the output of a layer before the next one reads it.
    """

    weights: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    added: dict[int, Tensor] = field(default_factory=dict)

    def through(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one layer on hidden states."""
        args, kwargs = self.calls[index]
        output = layer_output(layer(hidden, *args, **kwargs))
        return output + self.added[index] if index in self.added else output


def recorded(
    model: PreTrainedModel, batches: Sequence[Batch], token_weights: TokenWeights | None
) -> list[Record]:
    """Run the original model once and write down how its layers are called for each batch."""
    records: list[Record] = []
    seen, last = BackbonePass(), dict[str, Tensor]()

    def before(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = layer_input(args, kwargs)
        if index == 0:
            records.append(Record(seen.weights, hidden.clone()))
        elif not torch.equal(hidden, last["output"]):
            records[-1].added[index - 1] = hidden - last["output"]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        records[-1].calls.append((args[1:], others))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        last["output"] = layer_output(output).clone()

    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            hook = partial(before, index)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        seen.run(model, progress(batches, "calibrate"), token_weights)
    return records


def adds_plainly(
    record: Record, layer: nn.Module, index: int, hidden: Tensor, mlp_output: nn.Module
) -> bool:
    """Whether what a layer's last matrix gives is added to the hidden states as it is."""
    seen: list[Tensor] = []

    def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return 2 * output

    once = record.through(layer, index, hidden)
    handle = mlp_output.register_forward_hook(twice)
    try:
        change = (record.through(layer, index, hidden) - once).double()
    finally:
        handle.remove()
    share = (change * seen[0]).sum() / seen[0].double().square().sum()
    return bool((share - 1).abs() < 0.25)
