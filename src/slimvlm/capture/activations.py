"""Sizes and moments of what units send to the matrices that write to the residual stream."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimvlm.capture.batches import BackbonePass, Batch, TokenWeights, require_finite
from slimvlm.capture.hooks import consumers, on_consumers, weight_of
from slimvlm.families import Projection
from slimvlm.geometry import read_anatomy
from slimvlm.units import unit_of
from slimvlm.values import Statistics


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
