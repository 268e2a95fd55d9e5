"""Losses of predictions without logits of more than one chunk of positions, for calibration.

B batch, T token, D hidden, N counted positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from slimvlm.losses import IGNORE, Head, Hidden

_CHUNK = 256


def predicted_cross_entropy(
    hidden: Hidden, head: Head, labels: Int[Tensor, "B T"]
) -> Float[Tensor, "B T-1"]:
    """Cross-entropy of each next token in float32; 0 where it does not count.

    Only positions that count go through the head, a chunk at a time. The gradient is taken along
    with the loss, so that nothing is computed twice and no logits are kept. Parameters of the head
    get none.

    Args:
        hidden: Final hidden states.
        head: The language-model head; it treats every position alone.
        labels: Tokens to predict.
    """
    targets = labels[:, 1:].to(hidden.device)
    counted = targets != IGNORE
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    rows = hidden[:, :-1][counted]
    if not len(rows):
        return losses
    found: Tensor = _RowLosses.apply(rows, targets[counted], head)  # type: ignore[no-untyped-call]
    return losses.masked_scatter(counted, found)


class _RowLosses(torch.autograd.Function):
    """One loss for each row; a row's loss depends on no other row."""

    @staticmethod
    def forward(
        ctx: Any, rows: Float[Tensor, "N D"], wanted: Int[Tensor, " N"], head: Head
    ) -> Float[Tensor, " N"]:
        losses, gradients = [], []
        for part, tokens in zip(rows.split(_CHUNK), wanted.split(_CHUNK), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = part.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = F.cross_entropy(head(leaf).float(), tokens, reduction="none")
                if ctx.needs_input_grad[0]:
                    gradients += torch.autograd.grad(loss.sum(), leaf)
            losses.append(loss.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad_outputs[0][:, None]).to(gradients.dtype), None, None
