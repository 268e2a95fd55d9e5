"""Fit the matrices of a model layer by layer, on what the repaired layers before them give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import NumericalError
from slimvlm.core.progress import progress
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.parts import decoder_layers
from slimvlm.models.units import unit_of
from slimvlm.planning.mask import kept_channels
from slimvlm.planning.plan import Plan
from slimvlm.pruning.layer_calls import LayerCalls, record_calls
from slimvlm.pruning.least_squares import Moments, Refit, refit
from slimvlm.scoring.batches import Batch, TokenWeights
from slimvlm.scoring.inputs import writing_matrices

ATTENTION, MLP, SEAM = "attention", "mlp", "seam"
"""Kinds of repair: of attention outputs, of MLP outputs, of seams of removed layers."""


@dataclass(frozen=True)
class Writer:
    """A matrix that writes to the residual stream: what repair can change.

    Attributes:
        index: The number of its layer in the original model.
        projection: Its row of data.
        linear: The module.
    """

    index: int
    projection: Projection
    linear: nn.Linear

    @property
    def name(self) -> str:
        """``<original layer>.<path>``."""
        return f"{self.index}.{self.projection.path}"

    @property
    def kind(self) -> str:
        """The kind of its repair where it is not at a seam."""
        return ATTENTION if unit_of(self.projection) == "kv_group" else MLP

    def kept_channels(self, plan: Plan) -> Tensor:
        """The input channels that a plan keeps, on the module's device."""
        keep = kept_channels(plan, self.index, self.projection)
        return keep.to(self.linear.weight.device)

    def assign_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the module new parameters of its own data type.

        Raises:
            NumericalError: If a value is not finite in it.
        """
        for part, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            old = getattr(self.linear, part)
            new = value.to(old.dtype)
            if not torch.isfinite(new).all():
                raise NumericalError(f"NaN or infinity in the repaired {part} of layer {self.name}")
            setattr(self.linear, part, nn.Parameter(new, old.requires_grad))


@dataclass(frozen=True)
class MatrixRepair:
    """What was fitted for one matrix.

    Attributes:
        kind: The kind of repair.
        refit: Its new weights.
    """

    kind: str
    refit: Refit


def writers(model: nn.Module, layers: Sequence[int]) -> Iterator[Writer]:
    """All matrices that write to the residual stream.

    Args:
        model: The model.
        layers: The original numbers of its layers.
    """
    for position, projection, linear in writing_matrices(model):
        yield Writer(layers[position], projection, linear)


def kinds_of(repairs: Mapping[str, MatrixRepair]) -> list[str]:
    """The kinds of repair that were fitted, in the order in which they are judged."""
    found = {repair.kind for repair in repairs.values()}
    return [kind for kind in (ATTENTION, MLP, SEAM) if kind in found]


class SequentialRepair:
    """Goes through the decoder once and fits; the model is the same before and after.

    Attributes:
        repairs: What was fitted, by the matrix's name.
        notes: What was left alone, and why.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, ridge: float) -> None:
        self.repairs: dict[str, MatrixRepair] = {}
        self.notes: list[str] = []
        self._model, self._plan, self._ridge = model, plan, ridge
        self._layers = decoder_layers(model)

    def run(
        self, batches: Sequence[Batch], kinds: Sequence[str], token_weights: TokenWeights | None
    ) -> None:
        """Fill `repairs`, layer by layer."""
        self._calls, self._weights = record_calls(self._model, batches, token_weights)
        self._hidden = [calls.hidden for calls in self._calls]
        self._original, self._original_index = list(self._hidden), 0
        idle = [i for i in self._plan.layers if not any(i in c.arguments for c in self._calls)]
        if idle:
            numbers = ", ".join(map(str, idle))
            self.notes.append(f"no calibration batch runs layer {numbers}: it stays as it is")
        seams = self._seams(idle) if SEAM in kinds else {}
        in_layer: dict[int, list[Writer]] = {}
        for writer in writers(self._model, range(len(self._layers))):
            in_layer.setdefault(writer.index, []).append(writer)
        for index in progress(self._plan.layers, "repair"):
            if index in seams and self._adds_plainly(index):
                self._advance_original(seams[index])
            else:
                seams.pop(index, None)
            with _put_back(writer.linear for writer in in_layer[index]):
                for writer in in_layer[index]:
                    kind = SEAM if index in seams and writer.kind == MLP else writer.kind
                    self._fit(writer, kind if kind in kinds and index not in idle else None)
                self._hidden = self._through(index, self._hidden)

    def _through(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """All batches through one layer."""
        pairs = zip(self._calls, hidden, strict=True)
        return [calls.through(self._layers[index], index, states) for calls, states in pairs]

    def _seams(self, idle: Sequence[int]) -> dict[int, int]:
        """The layer before each run of removed layers, and the first layer after it."""
        kept = self._plan.layers
        ends = [*kept[1:], len(self._layers)]
        seams = {a: b for a, b in zip(kept, ends, strict=True) if b > a + 1 and a not in idle}
        if kept[0] > 0:
            self.notes.append("the first layers are gone: no layer before them could be repaired")
        return seams

    def _adds_plainly(self, index: int) -> bool:
        """Whether a seam can be repaired in a layer; the layers that it reads from have run."""
        batches = zip(self._calls, self._hidden, strict=True)
        calls, hidden = next(pair for pair in batches if index in pair[0].arguments)
        if adds_plainly(calls, self._layers[index], index, hidden, self._mlp(index)):
            return True
        self.notes.append(f"layer {index} has a norm after its MLP: its seam stays")
        return False

    def _mlp(self, index: int) -> nn.Module:
        """The matrix with which the MLP of a layer ends."""
        paths = [p.path for p in self._plan.before.backbone.mlp if p.dim == INPUT_COLUMNS]
        return self._layers[index].get_submodule(paths[0])

    def _advance_original(self, end: int) -> None:
        """Bring the original hidden states to the input of a layer; its weights are still whole."""
        for index in range(self._original_index, end):
            self._original = self._through(index, self._original)
        self._original_index = end

    def _fit(self, writer: Writer, kind: str | None) -> None:
        """Give a matrix what it will have: only kept channels, repaired if a kind is named."""
        linear, keep = writer.linear, writer.kept_channels(self._plan)
        weight: Tensor = linear.weight[:, keep]
        bias: Tensor | None = linear.bias
        is_cut = len(keep) < linear.in_features
        if kind == SEAM or (kind is not None and is_cut):
            moments = self._gather(writer, kind)
            sums = [moments.gram] if moments.cross is None else [moments.gram, moments.cross]
            if not all(bool(torch.isfinite(values).all()) for values in sums):
                raise NumericalError(f"NaN or infinity in layer {writer.name} during repair")
            found = refit(linear.weight, bias, moments, keep, self._ridge)
            self.repairs[writer.name] = MatrixRepair(kind, found)
            weight, bias = found.weight, found.bias
        if is_cut or writer.name in self.repairs:
            whole = torch.zeros_like(linear.weight, dtype=weight.dtype)
            whole[:, keep] = weight
            writer.assign_(whole, bias)

    def _gather(self, writer: Writer, kind: str) -> Moments:
        """Sums of a matrix's full input and, at a seam, of what the layer's output lacks."""
        linear, index = writer.linear, writer.index
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        outputs = linear.out_features if kind == SEAM else None
        moments = Moments.zero(linear.in_features, outputs, dtype, linear.weight.device)
        inputs: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            for j, calls in enumerate(self._calls):
                if index not in calls.arguments:
                    continue
                output = calls.through(self._layers[index], index, self._hidden[j])
                x, missing = inputs.pop().flatten(0, -2), None
                if kind == SEAM:
                    missing = (self._original[j].to(dtype) - output.to(dtype)).flatten(0, -2)
                moments.add(x, self._weights[j].flatten(), missing)
        finally:
            hook.remove()
        return moments


@contextmanager
def _put_back(linears: Iterator[nn.Linear]) -> Iterator[None]:
    """Weights and biases that are replaced inside come back."""
    before = [(linear, linear.weight, linear.bias) for linear in linears]
    try:
        yield
    finally:
        for linear, weight, bias in before:
            linear.weight, linear.bias = weight, bias


def adds_plainly(
    calls: LayerCalls, layer: nn.Module, index: int, hidden: Tensor, mlp_output: nn.Module
) -> bool:
    """Whether what a layer's last matrix gives is added to the hidden states as it is."""
    seen: list[Tensor] = []

    def twice(module: nn.Module, args: object, output: Tensor) -> Tensor:
        seen.append(output)
        return 2 * output

    once = calls.through(layer, index, hidden)
    handle = mlp_output.register_forward_hook(twice)
    try:
        change = (calls.through(layer, index, hidden) - once).double()
    finally:
        handle.remove()
    share = (change * seen[0]).sum() / seen[0].double().square().sum()
    return bool((share - 1).abs() < 0.25)
