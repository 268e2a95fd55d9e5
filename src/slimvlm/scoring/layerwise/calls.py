"""How a model calls its decoder layers, so that they can be run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.models.hidden import layer_output, replaced_forward
from slimvlm.models.parts import decoder_layers

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer without its hidden states."""


@dataclass(frozen=True)
class LayerCalls:
    """What it takes to run one batch through the decoder layer by layer.

    Attributes:
        arguments: Other arguments of each layer, by its number; a layer that the batch skips (one
            of Mllama's that read pictures, in a batch without) has none.
        added: What the model adds to the hidden states before a layer reads them (deepstack
            features), by that layer's number.
    """

    arguments: dict[int, Arguments]
    added: dict[int, Tensor]

    def with_own_dictionaries(self) -> LayerCalls:
        """The same calls, with copies of what layers hand on to each other in dictionaries."""
        own: dict[int, dict[Any, Any]] = {}

        def copied(value: Any) -> Any:
            return own.setdefault(id(value), dict(value)) if type(value) is dict else value

        arguments = {
            index: (args, {name: copied(value) for name, value in kwargs.items()})
            for index, (args, kwargs) in self.arguments.items()
        }
        return replace(self, arguments=arguments)

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What leaves one layer."""
        if index not in self.arguments:
            return hidden
        args, kwargs = self.arguments[index]
        return layer_output(layer(hidden, *args, **kwargs))

    def after(self, index: int, output: Tensor) -> Tensor:
        """What the layer behind one reads, or the final norm, given what leaves that one."""
        added = self.added.get(index + 1)
        return output if added is None else output + added.to(output.device)

    def through(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one layer; what comes out is what the next one reads."""
        return self.after(index, self.run(layer, index, hidden))


@contextmanager
def noted_calls(model: PreTrainedModel) -> Iterator[Callable[[], tuple[Tensor, LayerCalls]]]:
    """Inside, decoder layers compute nothing: they note their arguments and answer with zeros.

    What enters a layer after the first is then what the model adds between the two.

    Yields:
        A function that gives the input of the first layer and the calls of the batch that ran last.
    """
    noted: list[tuple[int, Tensor, Arguments]] = []

    def note(index: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        noted.append((index, hidden_states, (args, kwargs)))
        return torch.zeros_like(hidden_states)

    def take() -> tuple[Tensor, LayerCalls]:
        (_, hidden, _), *later = noted
        arguments = {index: given for index, _, given in noted}
        added = {index: entering for index, entering, _ in later if bool(entering.any())}
        noted.clear()
        return hidden, LayerCalls(arguments, added)

    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            stack.enter_context(replaced_forward(layer, partial(note, index)))
        yield take
