"""Gradients of a gate on each unit's output."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimvlm.capture.batches import (
    Batch,
    TokenWeights,
    batches_with_targets,
    require_finite,
    sample_losses,
)
from slimvlm.capture.hooks import frozen, on_consumers
from slimvlm.families import Projection
from slimvlm.geometry import read_anatomy
from slimvlm.units import spread, unit_of
from slimvlm.values import Statistics


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
