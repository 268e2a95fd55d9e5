"""Losses of calibration and recovery: functions of tensors.

B batch, T token, V vocabulary, D hidden, N counted positions, K likeliest tokens. ``labels[t]`` is
the token at position t; the prediction at position t - 1 is scored against it, as in transformers.
-100 marks positions that do not count.

Logits are large: 4,096 positions of 150,000 tokens are 2.5 GB in float32. So nothing here takes or
makes those of a batch: losses take hidden states and the head, which runs over the positions that
count, a chunk at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimvlm.core.options import Divergence
from slimvlm.data.roles import IGNORE
from slimvlm.models.devices import free_memory

Hidden = Float[Tensor, "B T D"]
Rows = Float[Tensor, "N V"]
Mask = Int[Tensor, "B T"] | Bool[Tensor, "B T"]
Reduction = Literal["token_mean", "paper"]
Head = Callable[[Tensor], Tensor]
"""Hidden states → logits, position by position; the same values whenever it is called."""

_AS_IS = nn.Identity()
CHUNK = 128  # positions whose logits exist at once on a CPU: 134 MB in float32 with 262,144 tokens
_LARGEST = 2**20  # bytes of one position's logits in float32 with 262,144 tokens


def rows_at_once(device: torch.device, free: int | None = None) -> int:
    """Return the number of positions whose logits exist at one time, by ``free`` or free bytes."""
    if device.type == "cpu":
        return CHUNK
    free = free_memory(device) if free is None else free
    return min(max(free // 16 // _LARGEST, CHUNK // 4), 4 * CHUNK)


def label_counts(labels: Int[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Count the tokens of each sample that are predicted."""
    return (labels[:, 1:] != IGNORE).sum(1)


def predictions(
    hidden: Hidden, labels: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"], Bool[Tensor, "B T-1"]]:
    """Return the hidden states that predict tokens that count, these tokens, and their mask."""
    targets = labels[:, 1:].to(hidden.device)
    counted = targets != IGNORE
    return hidden[:, :-1][counted], targets[counted], counted


def token_cross_entropy(
    hidden: Hidden, head: Head, labels: Int[Tensor, "B T"]
) -> Float[Tensor, "B T-1"]:
    """Compute the cross-entropy of each next token in float32; 0 where it does not count."""
    rows, wanted, counted = predictions(hidden, labels)
    losses = torch.zeros(counted.shape, dtype=torch.float32, device=hidden.device)
    return losses.masked_scatter(counted, by_chunks(partial(_cross_entropies, head), rows, wanted))


def cross_entropy(hidden: Hidden, head: Head, labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Compute the mean cross-entropy over the tokens that count (SFT loss); the head also learns.

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eq. 6.
    """
    rows, wanted, _ = predictions(hidden, labels)
    return by_chunks(partial(_cross_entropies, head), rows, wanted).sum() / max(len(rows), 1)


def divergence(
    student: Hidden,
    teacher: Float[Tensor, "B T E"],
    head: Head = _AS_IS,
    teacher_head: Head = _AS_IS,
    mask: Mask | None = None,
    kind: Divergence = "kl",
    temperature: float = 2.0,
    reduction: Reduction = "token_mean",
) -> Float[Tensor, ""]:
    """Compute a divergence of the softened next-token distributions of two models.

    - ``kl``: ``temperature² · KL(teacher ‖ student)``.
    - ``rkl``: ``temperature² · KL(student ‖ teacher)``.
    - ``jsd``, the Jensen-Shannon divergence: ``temperature² · (½ KL(teacher ‖ M) + ½ KL(student ‖
      M))`` with the mixture ``M = ½ teacher + ½ student``; at most ``temperature² · log 2``.

    ``student`` and ``teacher`` are final hidden states, or without heads logits already. No
    gradient flows into the teacher's or its head. ``mask`` says which positions count; all if None.
    The reduction ``token_mean`` averages over these; ``paper`` is what the paper's trainer
    computes: the sum over *all* positions, divided by the batch size. The paper of ``jsd`` has no
    factor of temperature².

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eqs. 7 and 8; Agarwal et al. 2024, arXiv:2306.13649,
        Eq. 1 with β = 0.5 (``jsd``).
    """
    rows = _counted(mask, reduction, student, teacher.detach())

    def part(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N E"]) -> Float[Tensor, " N"]:
        ours = F.log_softmax(head(student).float() / temperature, dim=-1)
        with torch.no_grad():
            theirs = F.log_softmax(teacher_head(teacher).float() / temperature, dim=-1)
        if kind == "kl":
            found = _row_kl(theirs, ours)
        elif kind == "rkl":
            found = _row_kl(ours, theirs)
        else:
            half = torch.tensor(0.5, device=ours.device).log()
            mixture = torch.logaddexp(theirs + half, ours + half)
            found = 0.5 * _row_kl(theirs, mixture) + 0.5 * _row_kl(ours, mixture)
        return found * temperature**2

    divisor = len(student) if reduction == "paper" else max(len(rows[0]), 1)
    return by_chunks(part, *rows).sum() / divisor


def by_chunks(part: Callable[..., Tensor], *rows: Tensor, share: int = 1) -> Tensor:
    """Compute ``part(*rows)`` a chunk of rows at a time, with gradient checkpointing.

    The last chunk is not recomputed: its backward pass comes first, when no other chunk exists.
    Chunks are ``share`` times smaller than `rows_at_once`, for a part that copies the logits.
    """
    size = max(rows_at_once(rows[0].device) // share, 1)
    *earlier, last = zip(*(row.split(size) for row in rows), strict=True)
    again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([*(again(*piece) for piece in earlier), part(*last)])


def hidden_l2(
    student: Hidden, teacher: Hidden, mask: Mask | None = None, reduction: Reduction = "token_mean"
) -> Float[Tensor, ""]:
    """Compute the squared distance of hidden states, a mean over channels and positions that count.

    No gradient flows into the teacher's. ``mask`` says which positions count; the reduction
    ``paper`` averages over *all* of them, padding included, as the paper's trainer does.

    Reference:
        Huang et al. 2025, arXiv:2507.20749, Eq. 9 (its code also takes the mean over channels).
    """
    ours, theirs = _counted(mask, reduction, student, teacher.detach())
    return (ours.float() - theirs.float()).square().mean(-1).sum() / max(len(ours), 1)


def hidden_cosine(
    student: Hidden, teacher: Hidden, mask: Mask | None = None, reduction: Reduction = "token_mean"
) -> Float[Tensor, ""]:
    """Compute ``1 - cos`` of hidden states, averaged over the positions that count.

    Between 0 and 2; the length of the vectors does not matter. It is half the squared distance of
    the unit vectors, which is never below 0. Arguments as in `hidden_l2`.
    """
    ours, theirs = _counted(mask, reduction, student, teacher.detach())
    apart = F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)
    return (apart.square().sum(-1) / 2).sum() / max(len(ours), 1)


def layer_map(kept_layers: Sequence[int], num_original_layers: int) -> tuple[int, ...]:
    """Map each kept layer to the original layer whose output it should give.

    A kept layer stands for itself and the run of layers that was removed after it, since the next
    kept layer expects the output of that run. Without removed layers every layer is compared with
    itself. ``kept_layers`` are ascending indices in the original model, as are the returned ones.
    """
    return tuple(following - 1 for following in (*kept_layers[1:], num_original_layers))


def _cross_entropies(
    head: Head, rows: Float[Tensor, "N D"], wanted: Int[Tensor, " N"]
) -> Float[Tensor, " N"]:
    return F.cross_entropy(head(rows).float(), wanted, reduction="none")


def _row_kl(log_p: Rows, log_q: Rows) -> Float[Tensor, " N"]:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _counted(mask: Mask | None, reduction: Reduction, *values: Tensor) -> list[Tensor]:
    """Select the positions that count, as rows."""
    if mask is None or reduction == "paper":
        return [value.flatten(0, 1) for value in values]
    return [value[mask.bool()] for value in values]
