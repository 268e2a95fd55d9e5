"""Batches on the model's device, weights of their tokens, passes over them. B batch, T token."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.core.errors import DataError, NumericalError
from slimvlm.data.roles import IGNORE, role_masks, valid_tokens
from slimvlm.data.roles import token_weights as weights_by_role
from slimvlm.models.devices import with_float64
from slimvlm.models.hidden import (
    all_finite,
    as_inputs,
    head_of,
    hidden_states,
    layer_output,
    require_finite_values,
)
from slimvlm.models.losses import Head, Hidden, label_counts, token_cross_entropy
from slimvlm.models.parts import Parts

Batch = dict[str, Any]
TokenWeights = Mapping[str, float]
Targets = tuple[Int[Tensor, "B T"], Float[Tensor, "B T-1"]]
"""Labels, `IGNORE` where the prediction does not count, and the weight of each prediction."""


@dataclass
class Pass:
    """One pass over the calibration batches; hooks read the batch in flight from it."""

    mask: Tensor = field(init=False)  # [B, T] its valid tokens
    weights: Tensor = field(init=False)
    """``[B, T]`` of its tokens, 0 for padding; in `backward` ``[B, T - 1]`` of its predictions."""
    num_samples: int = 0
    num_tokens: int = 0
    weight: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def forward(
        self,
        model: Any,
        batches: Iterable[Batch],
        token_weights: TokenWeights | None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Run everything but the head."""
        for batch in _all_on_device(model, batches):
            self.mask = valid_tokens(batch)
            self.weights = weights_by_role(model.config, batch, token_weights)
            forward_backbone(model, batch)
            after_batch()
            self.num_samples += len(self.mask)
            self.num_tokens += int(self.mask.sum())
            self.weight += with_float64(self.weights).sum(dtype=torch.float64).cpu()
        if not bool(self.weight):
            raise DataError("no calibration token has a token weight above 0")

    def backward(
        self,
        model: Any,
        data: Iterable[tuple[Batch, Targets]],
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Run each sample's loss, the weighted mean of its cross-entropies, and its gradient."""
        for batch, (labels, self.weights) in data:
            (hidden,) = hidden_states(model, batch)
            losses = token_cross_entropy(hidden, head_of(model), labels)
            weights = self.weights.to(losses)
            means = (losses * weights).sum(1) / weights.sum(1)
            require_finite_values(means, "the calibration loss")
            means.sum().backward()
            after_batch()
            self.num_samples += len(labels)
            self.num_tokens += int((self.weights > 0).sum())
            self.weight += float(self.weights.sum(1).sum())

    @property
    def totals(self) -> dict[str, Any]:
        """The fields of statistics that every pass fills."""
        return {n: getattr(self, n) for n in ("weight", "num_samples", "num_tokens")}


def batches_with_targets(
    model: Any, batches: Iterable[Batch], token_weights: TokenWeights | None
) -> Iterator[tuple[Batch, Targets]]:
    """Yield each batch without its labels, and the tokens whose predictions count.

    Without ``token_weights`` labelled tokens count 1 each (without labels all of the text). With
    them a prompt or answer token counts the weight of its role, labelled or not; image tokens
    are never predicted, nor are any by padding.
    """
    for batch in _all_on_device(model, batches):
        if token_weights is None:
            labels = labels_of(model.config, batch)
            weights = (labels[:, 1:] != IGNORE).float()
        else:
            if "input_ids" not in batch:
                raise DataError("token_weights need batches with input_ids for this criterion")
            masks, ids = role_masks(model.config, batch), batch["input_ids"]
            given: Any = batch.get("labels", ids)
            labels = torch.where(masks["answer"], given, ids)
            weights = weights_by_role(model.config, batch, token_weights)
            weights = weights.masked_fill(masks["image"], 0.0) * valid_tokens(batch).roll(1, 1)
            labels, weights = labels.masked_fill(weights == 0, IGNORE), weights[:, 1:]
        if not bool(weights.sum(1).all()):
            why = "labelled token" if token_weights is None else "text token of a weight above 0"
            raise DataError(f"a calibration sample has no {why}: nothing to take a loss of")
        yield without_labels(batch), (labels, weights)


def forward_backbone(model: Any, batch: Batch) -> None:
    """Run everything but the head; labels are left out."""
    model.base_model(**without_labels(batch), use_cache=False)


@torch.no_grad()
def mean_answer_loss(
    states: Iterable[tuple[Hidden, Tensor]], head: Head, counts: Iterable[Tensor] | None = None
) -> float:
    """Average the samples' mean cross-entropies, by their labels' or another tokenizer's counts."""
    means, given = list[float](), None if counts is None else iter(counts)
    for hidden, labels in states:
        found = with_float64(token_cross_entropy(hidden, head, labels)).sum(1, dtype=torch.float64)
        counted = (label_counts(labels) if given is None else next(given)).to(found.device)
        means += (found / counted)[counted > 0].tolist()
    if not means:
        raise DataError("validation batches have no labelled token to take a loss of")
    return sum(means) / len(means)


def answer_loss(model: Any, batches: Iterable[Batch], like: Iterable[Batch] | None = None) -> float:
    """`mean_answer_loss` of some batches; by the label counts of others, if ``like`` is given."""
    states = (
        (hidden_states(model, without_labels(batch))[0], labels_of(model.config, batch))
        for batch in _all_on_device(model, batches)
    )
    counts = None if like is None else (label_counts(labels_of(model.config, b)) for b in like)
    return mean_answer_loss(states, head_of(model), counts)


def _all_on_device(model: Any, batches: Iterable[Batch]) -> Iterator[Batch]:
    empty = True
    for batch in batches:
        empty = False
        yield as_inputs(model, batch)
    if empty:
        raise DataError("no calibration batch was given")


def without_labels(batch: Batch) -> Batch:
    """Return the inputs of the model itself."""
    return {name: value for name, value in batch.items() if name != "labels"}


def labels_of(config: Any, batch: Batch) -> Tensor:
    """Return the given labels or the whole text, without images and what padding would predict."""
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        if "input_ids" not in batch:
            raise DataError("a batch of inputs_embeds needs labels for this criterion")
        is_image = role_masks(config, batch)["image"]
        labels = batch["input_ids"].masked_fill(is_image, IGNORE)
    mask = valid_tokens(batch)  # of tokens, and of those that predict them
    return labels.masked_fill(mask * mask.roll(1, 1) == 0, IGNORE)


@torch.no_grad()
def first_spoilt_layer(model: PreTrainedModel, batch: Batch) -> int | None:
    """Find the first decoder layer that makes NaN or infinity of a batch, if any."""
    spoilt: list[int] = []

    def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if not all_finite(layer_output(output)):
            spoilt.append(index)

    with ExitStack() as stack:
        for index, layer in enumerate(Parts(model).layers):
            stack.enter_context(layer.register_forward_hook(partial(look, index)))
        stack.enter_context(suppress(NumericalError))  # of a model that looks itself
        forward_backbone(model, as_inputs(model, batch))
    return min(spoilt, default=None)
