"""Batches that go through the decoder layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.capture.batches import BackbonePass, Batch, TokenWeights
from slimvlm.geometry import decoder_layers
from slimvlm.layers import layer_input, layer_output
from slimvlm.progress import progress


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
