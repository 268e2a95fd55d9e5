"""Statistics of the residual stream between decoder layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.capture.batches import BackbonePass, Batch, TokenWeights, require_finite
from slimvlm.geometry import decoder_layers, final_norm
from slimvlm.layers import layer_input, layer_output, main_stream
from slimvlm.scores.layers import angular_distance, block_influence
from slimvlm.values import Statistics


class _Comparison:
    """Compares the hidden states of a pass layer by layer, as they appear."""

    final: Tensor
    last_input: Tensor

    def __init__(self, seen: BackbonePass, num_layers: int) -> None:
        self.seen, self.num_layers = seen, num_layers
        self.influence = torch.zeros(num_layers, dtype=torch.float64)
        self.influence_postnorm = torch.zeros((), dtype=torch.float64)
        self.angular = torch.zeros(num_layers, num_layers, dtype=torch.float64)
        self.angular_postnorm = torch.zeros(num_layers, dtype=torch.float64)
        self.last_tokens: list[Tensor] = []

    def on_layer(self, index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden_in = main_stream(layer_input(args, kwargs))
        hidden_out = main_stream(layer_output(output))
        require_finite(hidden_out, f"the output of layer {index}")
        self.influence[index] += self._influence(hidden_in, hidden_out)
        self.last_tokens.append(_at_last_token(hidden_in, self.seen.mask))
        if index == self.num_layers - 1:
            self.last_input = hidden_in
            self.last_tokens.append(_at_last_token(hidden_out, self.seen.mask))

    def on_norm(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.influence_postnorm += self._influence(self.last_input, output)
        self.final = _at_last_token(output, self.seen.mask)

    def after_batch(self) -> None:
        """Compare the last tokens at both ends of every run of layers."""
        for length in range(1, self.num_layers + 1):
            for start in range(self.num_layers - length + 1):
                distance = angular_distance(
                    self.last_tokens[start], self.last_tokens[start + length]
                )
                self.angular[length - 1, start] += distance.sum(dtype=torch.float64)
            to_final = angular_distance(self.last_tokens[self.num_layers - length], self.final)
            self.angular_postnorm[length - 1] += to_final.sum(dtype=torch.float64)
        self.last_tokens.clear()

    def _influence(self, hidden_in: Tensor, hidden_out: Tensor) -> Tensor:
        values = block_influence(hidden_in, hidden_out, self.seen.mask) * self.seen.weights
        return values.sum(dtype=torch.float64).cpu()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for index, layer in enumerate(decoder_layers(model)):
                hook = layer.register_forward_hook(partial(self.on_layer, index), with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(final_norm(model).register_forward_hook(self.on_norm).remove)
            yield


@torch.no_grad()
def capture_hidden_states(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Block influence and angular distances, compared layer by layer as they appear.

    At any time only one layer's input and, for the angular distance, one vector for each sample
    and layer are held.

    Block influence is summed over tokens by weight. Angular distances look at the last token of a
    sample only, so that token weights do not touch them.
    """
    seen = BackbonePass()
    comparison = _Comparison(seen, len(decoder_layers(model)))
    with comparison.watching(model):
        seen.run(model, batches, token_weights, comparison.after_batch)
    return seen.statistics(
        "hidden_states",
        {
            "influence_sum": comparison.influence,
            "influence_sum_postnorm": comparison.influence_postnorm,
            "angular_sum": comparison.angular,
            "angular_sum_postnorm": comparison.angular_postnorm,
        },
    )


def _at_last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each sample's last valid token."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].cpu()
