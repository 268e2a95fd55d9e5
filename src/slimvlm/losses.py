"""Losses of calibration and recovery: functions of tensors.

B batch, T token, V vocabulary, D hidden. ``labels[t]`` is the token at position t; the prediction
at position t - 1 is scored against it, as in transformers. -100 marks positions that do not count.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORE = -100

Logits = Float[Tensor, "B T V"]
Hidden = Float[Tensor, "B T D"]
Mask = Int[Tensor, "B T"] | Bool[Tensor, "B T"]
Reduction = Literal["token_mean", "paper"]

_CHUNK = 1024


def label_counts(labels: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """How many tokens of each sample are predicted."""
    return (labels[:, 1:] != IGNORE).sum(1)


def token_cross_entropy(logits: Logits, labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T-1"]:
    """Cross-entropy of each next token in float32; 0 where it does not count."""
    targets = labels[:, 1:].to(logits.device)
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
    counted = targets != IGNORE
    picked, wanted = logits[:, :-1][counted], targets[counted]
    parts = [
        F.cross_entropy(picked[i : i + _CHUNK].float(), wanted[i : i + _CHUNK], reduction="none")
        for i in range(0, len(wanted), _CHUNK)
    ]
    return losses.masked_scatter(counted, torch.cat(parts)) if parts else losses


def cross_entropy(logits: Logits, labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the tokens that count (SFT loss).

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eq. 6.
    """
    count = label_counts(labels).sum().clamp_min(1)
    return token_cross_entropy(logits, labels).sum() / count


def kl(
    student_logits: Logits,
    teacher_logits: Logits,
    mask: Mask | None = None,
    temperature: float = 2.0,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """``temperature² · KL(teacher ‖ student)`` of the softened next-token distributions.

    Args:
        student_logits: The student's.
        teacher_logits: The teacher's; no gradient flows into them.
        mask: Positions that count; all if None.
        temperature: Softens both sides.
        reduction: ``token_mean`` averages over the positions that count. ``paper`` is what the
            study's trainer computes: the sum over *all* positions, divided by the batch size.

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eq. 7.
    """
    return _divergence(teacher_logits.detach(), student_logits, mask, temperature, reduction)


def reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    mask: Mask | None = None,
    temperature: float = 2.0,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """``temperature² · KL(student ‖ teacher)``; arguments as in `kl`.

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eq. 8.
    """
    return _divergence(student_logits, teacher_logits.detach(), mask, temperature, reduction)


def hidden_l2(
    student: Hidden,
    teacher: Hidden,
    mask: Mask | None = None,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """Squared distance of hidden states, averaged over channels and the positions that count.

    Args:
        student: The student's hidden states.
        teacher: The teacher's; no gradient flows into them.
        mask: Positions that count; all if None.
        reduction: ``paper`` averages over *all* positions, padding included, as the study's
            trainer does.

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eq. 9 (its code takes the mean over channels, too).
    """
    squared = (student.float() - teacher.detach().float()).square().mean(-1)
    return squared.mean() if reduction == "paper" else _masked_mean(squared, mask)


def _divergence(
    target_logits: Logits,
    other_logits: Logits,
    mask: Mask | None,
    temperature: float,
    reduction: Reduction,
) -> Float[Tensor, ""]:
    """``temperature² · KL(target ‖ other)``, reduced."""
    everything = torch.ones(target_logits.shape[:2], dtype=torch.bool, device=target_logits.device)
    counted = everything if reduction == "paper" or mask is None else mask.bool()
    target, other = target_logits[counted], other_logits[counted]
    total = target_logits.new_zeros((), dtype=torch.float32)
    for start in range(0, len(target), _CHUNK):
        log_p = F.log_softmax(target[start : start + _CHUNK].float() / temperature, dim=-1)
        log_q = F.log_softmax(other[start : start + _CHUNK].float() / temperature, dim=-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    divisor = target_logits.shape[0] if reduction == "paper" else max(len(target), 1)
    return total * temperature**2 / divisor


def _masked_mean(values: Float[Tensor, "B T"], mask: Mask | None) -> Float[Tensor, ""]:
    if mask is None:
        return values.mean()
    weight = mask.to(values)
    return (values * weight).sum() / weight.sum().clamp_min(1)
