"""Run batches through a model and collect the statistics that criteria need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.models.anatomy import decoder_layers, final_norm, matrices, read_anatomy
from slimvlm.models.families import Projection
from slimvlm.models.hidden import layer_input, layer_output, main_stream
from slimvlm.models.units import spread, unit_of
from slimvlm.scoring.batches import (
    BackbonePass,
    Batch,
    TokenWeights,
    batches_with_targets,
    require_finite,
    sample_losses,
)
from slimvlm.scoring.gradients import capture_gradients
from slimvlm.scoring.greedy import capture_greedy
from slimvlm.scoring.hooks import consumers, frozen, on_consumers, weight_of
from slimvlm.scoring.layers import angular_distance, block_influence
from slimvlm.scoring.statistics import Statistics
from slimvlm.scoring.widths import channel_sums, magnitude


@torch.no_grad()
def capture_activations(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Weighted sums over tokens of ``|a|`` for neurons and of the L2 norm for KV groups."""
    anatomy = read_anatomy(model)
    sums: dict[str, Tensor] = {}
    seen = BackbonePass()

    def on_consumer(index: int, projection: Projection, x: Tensor) -> None:
        unit, weights = unit_of(projection), seen.row_weights(x)
        squares = x.float().square().flatten(0, -2) * (weights > 0)
        require_finite(squares, f"the input of layer {index} {projection.path}")
        if unit == "kv_group":
            squares = squares.view(len(squares), anatomy.layers[index].num_kv_heads, -1).sum(-1)
        total = (squares.sqrt() * weights).sum(0, dtype=torch.float64)
        sums[f"{index}.{unit}"] = sums.get(f"{index}.{unit}", 0) + total.cpu()

    with on_consumers(model, on_consumer):
        seen.run(model, batches, token_weights)
    return seen.statistics("activations", sums)


@torch.no_grad()
def capture_moments(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """First and second moments of each input channel of ``o_proj`` and ``down_proj``.

    For each such matrix ``W`` with inputs ``x``, named ``<layer index>.<path>``:

    - ``<name>.sum`` ``[C]``: ``sum_t w_t x_t``;
    - ``<name>.square`` ``[C]``: ``sum_t w_t x_t²``;
    - ``<name>.column_l1`` ``[C]``: ``sum_i |W_ij|``;
    - ``<name>.column_square`` ``[C]``: ``sum_i W_ij²``;

    and ``weight`` ``[]``: ``sum_t w_t`` over all tokens. All are float64 on the CPU.
    """
    sums: dict[str, Tensor] = {}
    seen = BackbonePass()

    def on_consumer(index: int, projection: Projection, x: Tensor) -> None:
        name, weights = f"{index}.{projection.path}", seen.row_weights(x)
        values = x.float().flatten(0, -2)
        require_finite(values, f"the input of layer {index} {projection.path}")
        weighted = values * weights
        for what, terms in (("sum", weighted), ("square", weighted * values)):
            total = terms.sum(0, dtype=torch.float64).cpu()
            sums[f"{name}.{what}"] = sums.get(f"{name}.{what}", 0) + total

    with on_consumers(model, on_consumer):
        seen.run(model, batches, token_weights)
    for index, projection, linear in consumers(model):
        name, matrix = f"{index}.{projection.path}", weight_of(linear).double()
        sums[f"{name}.column_l1"] = matrix.abs().sum(0).cpu()
        sums[f"{name}.column_square"] = matrix.square().sum(0).cpu()
    return seen.statistics("moments", sums)


def capture_gates(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Sums over samples of ``|dL_j / dm_u|`` for a gate on each unit's output.

    One backward pass gives the gradients of all samples of a batch, since each has its own gates.

    Args:
        model: The model.
        batches: Model inputs with ``labels``.
        token_weights: None: ``L_j`` is the mean cross-entropy of the sample's labelled tokens.
            Otherwise it is the weighted mean over its prompt and answer tokens.
    """
    anatomy = read_anatomy(model)
    sums: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    samples = tokens = 0

    def on_consumer(index: int, projection: Projection, x: Tensor) -> Tensor:
        shape = anatomy.layers[index]
        units = shape.block(projection.segments[0])[0]
        gate = torch.ones(len(x), 1, units, device=x.device, requires_grad=True)
        gates[f"{index}.{unit_of(projection)}"] = gate
        return x * spread(projection, shape, gate).to(x.dtype)

    with frozen(model), on_consumers(model, on_consumer):
        for batch, targets in batches_with_targets(model, batches, token_weights):
            sample_losses(model, batch, targets).sum().backward()
            for name, gate in gates.items():
                assert gate.grad is not None
                require_finite(gate.grad, f"the gate gradient of {name}")
                sums[name] = sums.get(name, 0) + gate.grad.abs().double().sum((0, 1)).cpu()
            gates.clear()
            samples += len(targets.labels)
            tokens += targets.num_tokens
    return Statistics("gates", sums, samples, tokens)


@torch.no_grad()
def capture_grams(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    layers: Collection[int] | None = None,
) -> Statistics:
    """Gram matrices of what enters ``o_proj`` and ``down_proj``: all that a refit needs.

    For each such matrix ``W`` ``[O, C]`` with inputs ``x``, named ``<layer index>.<path>``:

    - ``<name>.gram`` ``[C, C]``: ``sum_t w_t x_t x_tᵀ``;
    - ``<name>.sum`` ``[C]``: ``sum_t w_t x_t``;
    - ``<name>.weight`` ``[O, C]``: ``W`` itself, not a copy. Pruning makes new parameters, so it
      stays what it was;

    and ``weight`` ``[]``: ``sum_t w_t`` over all tokens.

    Memory: ``sum C²`` float32 numbers over all these matrices, on the model's device, whatever the
    amount of data (11,008 neurons: 485 MB a layer). Sums are float32, or float64 for a model in
    float64. No activation outlives its hook. With ``layers``, only these layers' matrices.
    """
    sums: dict[str, Tensor] = {}
    seen = BackbonePass()

    def on_consumer(index: int, projection: Projection, x: Tensor) -> None:
        name = f"{index}.{projection.path}"
        if f"{name}.gram" not in sums:
            return
        values = x.to(_sum_dtype(x)).flatten(0, -2)
        weighted = values * seen.row_weights(x)
        sums[f"{name}.gram"].addmm_(weighted.mT, values)
        sums[f"{name}.sum"] += weighted.sum(0)
        require_finite(sums[f"{name}.sum"], f"the input of layer {index} {projection.path}")

    for index, projection, linear in consumers(model):
        if layers is not None and index not in layers:
            continue
        weight = weight_of(linear)
        zero = weight.new_zeros((), dtype=_sum_dtype(weight))
        channels, name = linear.in_features, f"{index}.{projection.path}"
        sums[f"{name}.gram"] = zero.new_zeros(channels, channels)
        sums[f"{name}.sum"] = zero.new_zeros(channels)
        sums[f"{name}.weight"] = weight
    with on_consumers(model, on_consumer):
        seen.run(model, batches, token_weights)
    return seen.statistics("grams", sums)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def capture_nothing(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Statistics for criteria that look at neither weights nor data."""
    return Statistics("nothing", {})


def capture_weights(model: nn.Module, batches: Iterable[Batch], p: int = 1) -> Statistics:
    """Sums of ``|w|^p`` for each channel of each matrix."""
    sums = {
        f"{index}.{matrix.projection.path}": channel_sums(
            magnitude(weight_of(matrix.owner, matrix.name).float(), p), matrix.projection.axis
        )
        for index, matrix in matrices(model)
    }
    return Statistics("weights", sums)


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


CAPTURES: dict[str, Callable[..., Statistics]] = {
    "nothing": capture_nothing,
    "weights": capture_weights,
    "hidden_states": capture_hidden_states,
    "activations": capture_activations,
    "moments": capture_moments,
    "grams": capture_grams,
    "gates": capture_gates,
    "gradients": capture_gradients,
    "greedy": capture_greedy,
}
"""How each kind of statistics that a criterion may ask for is collected."""
