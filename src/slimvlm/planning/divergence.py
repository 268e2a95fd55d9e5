"""How differently a pruned model answers: a mask in place of a plan, no weight touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import DataError
from slimvlm.data.roles import IGNORE
from slimvlm.models import losses
from slimvlm.planning.mask import masked
from slimvlm.planning.plan import Plan
from slimvlm.scoring.batches import on_device

Batch = Mapping[str, Any]


class Divergence:
    """Mean KL(original ‖ candidate) over the positions that predict labelled tokens.

    The original's logits there are computed once and kept in the model's data type: positions
    times vocabulary, about 100 kB for a position in bfloat16 with 50,000 tokens.

    Args:
        model: The original; it stays as it is.
        batches: Model inputs with ``labels``; without them the whole text counts.

    Raises:
        DataError: If there is no batch, or no labelled token.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = [on_device(model, batch) for batch in batches]
        self._counted = [_predicts_label(batch) for batch in self._batches]
        if not any(bool(counted.any()) for counted in self._counted):
            raise DataError("no labelled token in the batches to measure on")
        self._original: list[Tensor] = []

    @torch.no_grad()
    def of(self, plan: Plan) -> float:
        """The divergence of what a plan leaves, in nats for each position."""
        self._original = self._original or list(self._logits())
        total, positions = 0.0, 0
        with masked(self._model, plan):
            for original, candidate in zip(self._original, self._logits(), strict=True):
                if len(original):
                    mean = losses.kl(candidate[None], original[None], temperature=1.0)
                    total += float(mean) * len(original)
                    positions += len(original)
        return total / positions

    @torch.no_grad()
    def _logits(self) -> Iterator[Tensor]:
        """Logits of each batch at the counted positions."""
        was_training = self._model.training
        self._model.eval()
        try:
            for batch, counted in zip(self._batches, self._counted, strict=True):
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                yield self._model(**inputs, use_cache=False).logits[counted]
        finally:
            self._model.train(was_training)


def _predicts_label(batch: Batch) -> Tensor:
    """Positions whose next token is labelled and no padding."""
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    counted = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    counted[:, :-1] = labels[:, 1:] != IGNORE
    if "attention_mask" in batch:
        counted[:, :-1] &= batch["attention_mask"][:, 1:].bool()
    return counted
