"""Losses of calibration and recovery: functions of tensors.

B batch, T token, V vocabulary, D hidden, N counted positions, K likeliest tokens. ``labels[t]`` is
the token at position t; the prediction at position t - 1 is scored against it, as in transformers.
-100 marks positions that do not count.

Logits are large: 4,096 positions of 150,000 tokens are 2.5 GB in float32. So the divergences run
over chunks of positions that are computed again in the backward pass, and the ``chunked_``
functions take hidden states and the head instead of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimvlm.core.options import Divergence
from slimvlm.data.roles import IGNORE

Logits = Float[Tensor, "B T V"]
Hidden = Float[Tensor, "B T D"]
Rows = Float[Tensor, "N V"]
Mask = Int[Tensor, "B T"] | Bool[Tensor, "B T"]
Reduction = Literal["token_mean", "paper"]
Head = Callable[[Tensor], Tensor]
"""Hidden states → logits, position by position; the same values whenever it is called."""

CHUNK = 512
"""Positions whose logits exist at one time."""


def _as_is(logits: Tensor) -> Tensor:
    return logits


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
        F.cross_entropy(picked[i : i + CHUNK].float(), wanted[i : i + CHUNK], reduction="none")
        for i in range(0, len(wanted), CHUNK)
    ]
    return losses.masked_scatter(counted, torch.cat(parts)) if parts else losses


def cross_entropy(logits: Logits, labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the tokens that count (SFT loss).

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eq. 6.
    """
    count = label_counts(labels).sum().clamp_min(1)
    return token_cross_entropy(logits, labels).sum() / count


def chunked_cross_entropy(
    hidden: Hidden, head: Head, labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """`cross_entropy` of ``head(hidden)``, without logits of more than one chunk of positions.

    A head that is an ``nn.Linear`` in the data type of the hidden states goes through Liger's
    fused kernel on a CUDA device, where that package is installed.

    Args:
        hidden: Final hidden states.
        head: The language-model head, with any soft cap in it.
        labels: Tokens to predict.

    Reference:
        Hsu et al. 2024, arXiv:2410.10989, for the fused kernel.
    """
    targets = labels[:, 1:].to(hidden.device)
    counted = targets != IGNORE
    rows, wanted = hidden[:, :-1][counted], targets[counted]
    if len(rows) and _fits_liger(head, rows):
        assert isinstance(head, nn.Linear)
        fused = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        loss: Tensor = fused(head.weight, rows, wanted, head.bias)
        return loss.float()
    return _chunked_sum(partial(_cross_entropy_sum, head), rows, wanted) / max(len(rows), 1)


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
    part = partial(_divergence_sum, "kl", _as_is, _as_is, temperature, 0.5)
    return _reduced(part, mask, reduction, student_logits, teacher_logits.detach())


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
    part = partial(_divergence_sum, "rkl", _as_is, _as_is, temperature, 0.5)
    return _reduced(part, mask, reduction, student_logits, teacher_logits.detach())


def jsd(
    student_logits: Logits,
    teacher_logits: Logits,
    mask: Mask | None = None,
    beta: float = 0.5,
    temperature: float = 2.0,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """Generalised Jensen-Shannon divergence of the softened next-token distributions.

    ``temperature² · (β KL(teacher ‖ M) + (1-β) KL(student ‖ M))`` with the mixture
    ``M = β teacher + (1-β) student``. Divided by β it tends to `kl` as β → 0; divided by 1-β it
    tends to `reverse_kl` as β → 1. At 0.5 it is symmetric. Unlike those two it is bounded, by
    ``temperature² · log 2``.

    Args:
        student_logits: The student's.
        teacher_logits: The teacher's; no gradient flows into them.
        mask: Positions that count; all if None.
        beta: The teacher's weight, between 0 and 1.
        temperature: Softens both sides. The paper has no factor of temperature².
        reduction: As in `kl`.

    Reference:
        Agarwal et al. 2024, arXiv:2306.13649, Eq. 1.
    """
    part = partial(_divergence_sum, "jsd", _as_is, _as_is, temperature, beta)
    return _reduced(part, mask, reduction, student_logits, teacher_logits.detach())


def chunked_divergence(
    student_hidden: Hidden,
    teacher_hidden: Float[Tensor, "B T E"],
    head: Head = _as_is,
    teacher_head: Head = _as_is,
    mask: Mask | None = None,
    kind: Divergence = "kl",
    temperature: float = 2.0,
    beta: float = 0.5,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """`kl`, `reverse_kl` or `jsd` of two models, without logits of more than one chunk.

    Args:
        student_hidden: The student's final hidden states.
        teacher_hidden: The teacher's; no gradient flows into them or the teacher's head.
        head: The student's head; it runs over the positions that count only. By default hidden
            states are logits already.
        teacher_head: The teacher's head; it may be the same one.
        mask: Positions that count; all if None.
        kind: Which divergence.
        temperature: As in `kl`.
        beta: As in `jsd`.
        reduction: As in `kl`.
    """
    part = partial(_divergence_sum, kind, head, teacher_head, temperature, beta)
    return _reduced(part, mask, reduction, student_hidden, teacher_hidden.detach())


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
    ours, theirs = _counted(mask, reduction, student, teacher.detach())
    return _mean((ours.float() - theirs.float()).square().mean(-1))


def hidden_cosine(
    student: Hidden,
    teacher: Hidden,
    mask: Mask | None = None,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """``1 - cos`` of hidden states, averaged over the positions that count.

    Between 0 and 2, and blind to the length of the vectors. It is computed as half the squared
    distance of the unit vectors, which is the same and never below 0. Arguments as in `hidden_l2`.
    """
    ours, theirs = _counted(mask, reduction, student, teacher.detach())
    apart = F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)
    return _mean(apart.square().sum(-1) / 2)


def mean_over_layers(
    distance: Callable[..., Tensor],
    student: Sequence[Hidden],
    teacher: Sequence[Hidden],
    mask: Mask | None = None,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """Mean of `hidden_l2` or `hidden_cosine` over pairs of layers.

    Args:
        distance: One of the two.
        student: The student's hidden states, one for each layer that is compared.
        teacher: The teacher's at the layers that `layer_map` names.
        mask: Positions that count; all if None.
        reduction: As in `hidden_l2`.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([distance(ours, theirs, mask, reduction) for ours, theirs in pairs]).mean()


def layer_map(kept_layers: Sequence[int], num_original_layers: int) -> tuple[int, ...]:
    """The original layer whose output each layer of a shortened model should give.

    What the next kept layer was made to read is what stood before it in the original model: the
    output of the last layer of the run that was removed between the two. So a kept layer learns to
    do the work of the removed run behind it, and the last one that of the removed end. Nothing can
    learn the work of layers that were removed before the first kept one, but the first itself.
    Without removed layers every layer is compared with itself.

    The study compares the same index in both models, which only fits the end (-1) once layers are
    gone.

    Args:
        kept_layers: Indices in the original model, ascending.
        num_original_layers: Layers of the original model.

    Returns:
        For each kept layer an index in the original model.
    """
    return tuple(following - 1 for following in (*kept_layers[1:], num_original_layers))


def _fits_liger(head: Head, rows: Tensor) -> bool:
    """Whether Liger's fused kernel computes the same: CUDA, a plain head, one data type."""
    return (
        rows.is_cuda
        and isinstance(head, nn.Linear)
        and head.weight.dtype == rows.dtype
        and find_spec("liger_kernel") is not None
    )


def _cross_entropy_sum(head: Head, rows: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), wanted, reduction="sum")


def _divergence_sum(
    kind: Divergence,
    head: Head,
    teacher_head: Head,
    temperature: float,
    beta: float,
    student: Tensor,
    teacher: Tensor,
) -> Tensor:
    """Sum of a divergence over a chunk of positions; only that of ``jsd`` depends on beta."""
    student_logits = head(student)
    with torch.no_grad():
        teacher_logits = teacher_head(teacher)
    return _row_divergence(student_logits, teacher_logits, kind, temperature, beta).sum()


def _row_divergence(
    student_logits: Rows, teacher_logits: Rows, kind: Divergence, temperature: float, beta: float
) -> Float[Tensor, " N"]:
    """``temperature²`` times the divergence of each row."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    if kind == "kl":
        rows = _row_kl(teacher, student)
    elif kind == "rkl":
        rows = _row_kl(student, teacher)
    else:
        shares = torch.tensor([beta, 1 - beta], device=student.device).log()
        mixture = torch.logaddexp(teacher + shares[0], student + shares[1])
        rows = beta * _row_kl(teacher, mixture) + (1 - beta) * _row_kl(student, mixture)
    return rows * temperature**2


def _row_kl(log_p: Rows, log_q: Rows) -> Float[Tensor, " N"]:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _counted(mask: Mask | None, reduction: Reduction, *values: Tensor) -> list[Tensor]:
    """The positions that count, as rows."""
    if mask is None or reduction == "paper":
        return [value.flatten(0, 1) for value in values]
    return [value[mask.bool()] for value in values]


def _reduced(
    part: Callable[..., Tensor], mask: Mask | None, reduction: Reduction, *values: Tensor
) -> Float[Tensor, ""]:
    """A sum over the positions that count, divided as the reduction says."""
    rows = _counted(mask, reduction, *values)
    divisor = values[0].shape[0] if reduction == "paper" else max(len(rows[0]), 1)
    return _chunked_sum(part, *rows) / divisor


def _chunked_sum(part: Callable[..., Tensor], *rows: Tensor) -> Float[Tensor, ""]:
    """``part(*rows)`` as a sum over chunks, computed again in the backward pass.

    The last one is not: its backward pass comes first, before any other chunk exists again.
    """
    total = rows[0][:0].float().sum()  # 0, but the gradient flows
    again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    for start in range(0, len(rows[0]), CHUNK):
        piece = [row[start : start + CHUNK] for row in rows]
        is_last = start + CHUNK >= len(rows[0])
        total = total + (part(*piece) if is_last else again(*piece))
    return total


def _mean(values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """The mean; 0 of nothing."""
    return values.sum() / max(len(values), 1)
