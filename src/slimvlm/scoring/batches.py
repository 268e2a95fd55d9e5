"""What captures read: batches on the model's device, and what each of their tokens counts.

B batch, T token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slimvlm.core.errors import DataError
from slimvlm.data.roles import IGNORE, role_masks, valid_tokens
from slimvlm.data.roles import token_weights as weights_by_role
from slimvlm.models.hidden import all_finite, device_of, head_of, hidden_states, layer_output
from slimvlm.models.load import with_float64
from slimvlm.models.losses import Head, Hidden, label_counts, token_cross_entropy
from slimvlm.models.parts import decoder_layers
from slimvlm.scoring.statistics import require_finite

Batch = dict[str, Any]
TokenWeights = Mapping[str, float]


@dataclass(frozen=True)
class Targets:
    """The tokens whose predictions count.

    Attributes:
        labels: The token at each position; ``IGNORE`` where its prediction does not count.
        weights: What the prediction of each token counts, from the second token on.
    """

    labels: Int[Tensor, "B T"]
    weights: Float[Tensor, "B T-1"]

    @property
    def totals(self) -> Float[Tensor, " B"]:
        """The sum of the weights of each sample."""
        return self.weights.sum(1)

    @property
    def num_tokens(self) -> int:
        """How many predictions count at all."""
        return int((self.weights > 0).sum())

    def sample_losses(self, hidden: Hidden, head: Head) -> Float[Tensor, " B"]:
        """The weighted mean cross-entropy of each sample, from its final hidden states."""
        token_losses = token_cross_entropy(hidden, head, self.labels)
        weights = self.weights.to(token_losses)
        means = (token_losses * weights).sum(1) / weights.sum(1)
        require_finite(means, "the calibration loss")
        return means


class BackbonePass:
    """One pass of everything but the head over all batches.

    Hooks read what the batch in flight weighs; afterwards the totals are there.

    Attributes:
        weights: ``[B, T]`` weight of each token of the batch in flight; padding weighs 0.
        mask: ``[B, T]`` which of them are valid.
        num_samples: Samples seen.
        num_tokens: Valid tokens seen.
        weight: Sum of all weights seen.
    """

    weights: Tensor
    mask: Tensor

    def __init__(self) -> None:
        self.num_samples = self.num_tokens = 0
        self.weight = torch.zeros((), dtype=torch.float64)

    def run(
        self,
        model: Any,
        batches: Iterable[Batch],
        token_weights: TokenWeights | None,
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all batches.

        Raises:
            DataError: If there is no batch, or no token with a weight above 0.
        """
        for batch in _all_on_device(model, batches):
            self.mask = valid_tokens(batch)
            self.weights = weights_by_role(model.config, batch, token_weights)
            forward_backbone(model, without_labels(batch))
            after_batch()
            self.num_samples += len(self.mask)
            self.num_tokens += int(self.mask.sum())
            self.weight += with_float64(self.weights).sum(dtype=torch.float64).cpu()
        if not bool(self.weight):
            raise DataError("no calibration token has a token weight above 0")

    def row_weights(self, x: Tensor) -> Tensor:
        """``[B * T, 1]``: the weight of each row of ``x``, flattened to tokens."""
        return self.weights.flatten()[:, None].to(x.device)

    @property
    def totals(self) -> dict[str, Any]:
        """What statistics of this pass say of it."""
        return {n: getattr(self, n) for n in ("weight", "num_samples", "num_tokens")}


class LossPass:
    """One pass of every sample's loss, forward and backward. Samples do not mix.

    Hooks read what the predictions of the batch in flight count; afterwards the totals are there.

    Attributes:
        targets: Of the batch in flight.
        num_samples: Samples seen.
        num_tokens: Predictions seen that count.
        weight: Sum of all their weights.
    """

    targets: Targets

    def __init__(self) -> None:
        self.num_samples, self.num_tokens, self.weight = 0, 0, 0.0

    def run(
        self,
        model: nn.Module,
        data: Iterable[tuple[Batch, Targets]],
        after_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all batches, as `batches_with_targets` gives them."""
        for batch, self.targets in data:
            sample_losses(model, batch, self.targets).sum().backward()
            after_batch()
            self.num_samples += len(self.targets.labels)
            self.num_tokens += self.targets.num_tokens
            self.weight += float(self.targets.totals.sum())

    @property
    def totals(self) -> dict[str, Any]:
        """What statistics of this pass say of it."""
        return {"num_samples": self.num_samples, "num_tokens": self.num_tokens}


def batches_with_targets(
    model: Any, batches: Iterable[Batch], token_weights: TokenWeights | None
) -> Iterator[tuple[Batch, Targets]]:
    """Model inputs without labels, and the tokens whose predictions count.

    Args:
        model: The model.
        batches: Model inputs.
        token_weights: None: the labelled tokens count 1 each; without labels all valid tokens.
            Otherwise the prediction of a prompt or answer token counts the weight of its role,
            whether it is labelled or not; tokens of pictures are never predicted.

    Raises:
        DataError: If there is no batch, or a sample in which nothing counts.
    """
    for batch in _all_on_device(model, batches):
        targets = _targets(model.config, batch, token_weights)
        if not bool(targets.totals.all()):
            why = "labelled token" if token_weights is None else "text token of a weight above 0"
            raise DataError(f"a calibration sample has no {why}: nothing to take a loss of")
        yield without_labels(batch), targets


def forward_backbone(model: Any, batch: Batch) -> None:
    """Run everything but the head."""
    model.base_model(**batch, use_cache=False)


def sample_losses(model: Any, batch: Batch, targets: Targets) -> Float[Tensor, " B"]:
    """The loss of each sample of a batch, with a graph.

    A model that is only a part of one (`slimvlm.scoring.layerwise.runner`) has a method of this
    name, which gives something with the same gradients.
    """
    if hasattr(model, "sample_losses"):
        own: Tensor = model.sample_losses(**batch)
        return own
    (hidden,) = hidden_states(model, batch)
    return targets.sample_losses(hidden, head_of(model))


@torch.no_grad()
def mean_answer_loss(states: Iterable[tuple[Hidden, Tensor]], head: Head) -> float:
    """Mean cross-entropy over all labelled tokens of some batches.

    Args:
        states: Final hidden states and labels, by batch.
        head: The language-model head.

    Raises:
        DataError: If no token is labelled.
    """
    total, count = 0.0, 0
    for hidden, labels in states:
        found = with_float64(token_cross_entropy(hidden, head, labels))
        total += float(found.sum(dtype=torch.float64))
        count += int(label_counts(labels).sum())
    if not count:
        raise DataError("held-out batches have no labelled token: nothing to judge by")
    return total / count


def answer_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy over the labelled tokens of some batches, as `mean_answer_loss`."""
    states = (
        (hidden_states(model, without_labels(batch))[0], labels_of(batch))
        for batch in _all_on_device(model, batches)
    )
    return mean_answer_loss(states, head_of(model))


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> Batch:
    """A batch where the model's inputs go."""
    device = device_of(model)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _all_on_device(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    empty = True
    for batch in batches:
        empty = False
        yield on_device(model, batch)
    if empty:
        raise DataError("no calibration batch was given")


def without_labels(batch: Batch) -> Batch:
    """What the model itself reads."""
    return {name: value for name, value in batch.items() if name != "labels"}


def _targets(config: Any, batch: Batch, token_weights: TokenWeights | None) -> Targets:
    if token_weights is None:
        labels = labels_of(batch)
        return Targets(labels, (labels[:, 1:] != IGNORE).float())
    if "input_ids" not in batch:
        raise DataError("token_weights need batches with input_ids for this criterion")
    masks = role_masks(config, batch)
    ids = batch["input_ids"]
    labels = torch.where(masks["answer"], batch["labels"], ids) if "labels" in batch else ids
    weights = weights_by_role(config, batch, token_weights).masked_fill(masks["image"], 0.0)
    return Targets(labels.masked_fill(weights == 0, IGNORE), weights[:, 1:])


def labels_of(batch: Batch) -> Tensor:
    """Given labels or the whole text, never padding."""
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        if "input_ids" not in batch:
            raise DataError("a batch of inputs_embeds needs labels for this criterion")
        labels = batch["input_ids"]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORE)


class Watched:
    """Batches that remember which of them is in flight; some captures read one ahead."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._last: list[tuple[int, Batch]] = []

    def __iter__(self) -> Iterator[Batch]:
        first = 1
        for batch in self._batches:
            self._last = [*self._last[-1:], (first, batch)]
            yield batch
            first += _num_samples(batch)

    def place(self, model: nn.Module) -> str:
        """The samples in flight by their number, and the first layer whose output is not finite."""
        for first, batch in self._last:
            layer = first_spoilt_layer(model, batch)
            if layer is not None:
                last = first + _num_samples(batch) - 1
                told = f"sample {last}" if last == first else f"samples {first} to {last}"
                return f" (calibration {told}, from layer {layer} on)"
        return ""


def _num_samples(batch: Batch) -> int:
    return len(valid_tokens(batch))


@torch.no_grad()
def first_spoilt_layer(model: nn.Module, batch: Batch) -> int | None:
    """The first decoder layer that makes NaN or infinity of a batch; None if none does."""
    spoilt: list[int] = []

    def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if not all_finite(layer_output(output)):
            spoilt.append(index)

    inputs = on_device(model, batch)
    inputs.pop("labels", None)
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            stack.enter_context(layer.register_forward_hook(partial(look, index)))
        forward_backbone(model, inputs)
    return min(spoilt, default=None)
