"""Gram matrices of the inputs of the matrices that write to the residual stream."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from slimvlm.capture.batches import BackbonePass, Batch, TokenWeights, require_finite
from slimvlm.capture.hooks import consumers, on_consumers, weight_of
from slimvlm.families import Projection
from slimvlm.values import Statistics


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
