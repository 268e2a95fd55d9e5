"""Where NaN or infinity came from: which sample was in flight, and which layer spoilt it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from slimvlm.data.roles import valid_tokens
from slimvlm.models.anatomy import decoder_layers
from slimvlm.models.hidden import layer_output
from slimvlm.scoring.batches import Batch, forward_backbone, on_device


class Watched:
    """Batches that remember which of them is in flight; some captures read one ahead."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._last: list[tuple[int, Batch]] = []

    def __iter__(self) -> Iterator[Batch]:
        first = 1
        for batch in self._batches:
            self._last = [*self._last[-1:], (first, batch)]
            yield batch
            first += _num_samples(batch)

    def place(self, model: nn.Module) -> str:
        """The samples in flight by their number, and the first layer whose output is not finite."""
        for first, batch in self._last:
            layer = first_spoilt_layer(model, batch)
            if layer is not None:
                last = first + _num_samples(batch) - 1
                told = f"sample {last}" if last == first else f"samples {first} to {last}"
                return f" (calibration {told}, from layer {layer} on)"
        return ""


def _num_samples(batch: Batch) -> int:
    return len(valid_tokens(batch))


@torch.no_grad()
def first_spoilt_layer(model: nn.Module, batch: Batch) -> int | None:
    """The first decoder layer that makes NaN or infinity of a batch; None if none does."""
    spoilt: list[int] = []

    def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if not bool(torch.isfinite(layer_output(output)).all()):
            spoilt.append(index)

    inputs = on_device(model, batch)
    inputs.pop("labels", None)
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            stack.callback(layer.register_forward_hook(partial(look, index)).remove)
        forward_backbone(model, inputs)
    return min(spoilt, default=None)
