"""Measure loss, perplexity, agreement and divergence on a user's own samples: no task is needed.

B batch, T token, N counted position, D hidden, V vocabulary.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.documents import parse_json
from slimvlm.core.errors import ConfigError, DataError, NumericalError
from slimvlm.core.files import new_file
from slimvlm.core.progress import progress
from slimvlm.data.chat import batches_by_kind, encode_samples, process, tokenizer_of
from slimvlm.data.read import estimated_length
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Sample
from slimvlm.evaluation.metrics import Estimate, perplexity, ratio_interval, share_interval
from slimvlm.evaluation.results import Stored, digest_of_pictures
from slimvlm.models.hidden import (
    HeadWeights,
    as_inputs,
    evaluating,
    head_of,
    head_on,
    hidden_states,
    require_finite_values,
)
from slimvlm.models.losses import Head, Hidden, by_chunks, predictions

_SHARE = 4
"""Divides the number of positions whose logits exist at one time: here they exist several times."""
Given = Sample | str  # a conversation, or plain text
States = tuple[Sequence[int], Hidden, Int[Tensor, "B T"]]
"""A batch: places of its samples, final hidden states, labels."""


def evaluate_data(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Given],
    baseline: "PreTrainedModel | Predictions | None" = None,
    *,
    baseline_processor: Any = None,
    batch_size: int = 8,
    name: str = "",
) -> "DataResult":
    """Compute loss and perplexity on samples, and agreement and divergence with a baseline.

    Answers count, and of plain text every token. Neither batch size nor padding changes a figure
    beyond rounding. Nothing holds the logits of a batch.

    Where the baseline has another vocabulary, agreement and divergence are over the tokens that
    both have, and of samples whose answers become the same tokens. Loss, perplexity and increase
    are of all samples, for each token of the baseline. `DataResult.notes` says so.

    ``baseline`` is the model to compare with, usually the original, with a processor of its own if
    ``baseline_processor`` is given; or its predictions on the same samples, from `predictions_of`.
    The result calls the model ``name``. Intervals are over samples; those of the same images
    count as one.

    Raises:
        ConfigError: If the batch size is not above 0, or conversations and texts are mixed.
        DataError: If there are no samples, or nothing in one counts.
        NumericalError: If a model computes NaN or infinity.
    """
    if isinstance(baseline, PreTrainedModel):
        baseline = predictions_of(baseline, baseline_processor or processor, samples, batch_size)
    if baseline is not None and (count := len(baseline.states)) != len(samples):
        told = f"its predictions are of {count} samples, not of {len(samples)}"
        raise ConfigError(f"baseline: {told}")
    ours = predictions_of(model, processor, samples, batch_size, name)
    return result_of(ours, samples, model.device, baseline)


@torch.no_grad()
def result_of(
    ours: "Predictions",
    samples: Sequence[Given],
    device: torch.device,
    baseline: "Predictions | None" = None,
) -> "DataResult":
    """Compute the result of a model from its predictions and a baseline's, on a device."""
    head, shared, results = head_on(device, ours.head), None, list[OnSample]()
    theirs_of: dict[int, int] | None = None  # numbers of the tokens that both vocabularies have
    their_head: Head | None = None
    if baseline is not None:
        their_head, known = head_on(device, baseline.head), baseline.vocabulary
        if known != ours.vocabulary:
            theirs_of = {n: known[word] for word, n in ours.vocabulary.items() if word in known}
            pairs = sorted(theirs_of.items())
            shared = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).to(device)
    for place, sample in enumerate(samples):
        name = str(place) if isinstance(sample, str) else sample.id
        rows, wanted = (part[place].to(device) for part in (ours.states, ours.wanted))
        if not len(wanted):
            raise DataError(f"sample {name!r} has no token that counts")
        compared: dict[str, Any] = {}
        if baseline is None or their_head is None:
            (loss,) = _sums(name, partial(row_losses, head), rows, wanted)
        else:
            others, tokens = (part[place].to(device) for part in (baseline.states, baseline.wanted))
            own = wanted.tolist()
            if theirs_of is not None:
                own = [theirs_of.get(token, IGNORE) for token in own]
            if own == tokens.tolist():
                compare = partial(_compared, head, their_head, shared)
                loss, theirs, same, apart = _sums(name, compare, rows, wanted, others, tokens)
                compared |= {"same": round(same), "divergence": apart / len(tokens)}
            else:
                (loss,) = _sums(name, partial(row_losses, head), rows, wanted)
                (theirs,) = _sums(name, partial(row_losses, their_head), others, tokens)
            compared |= {"baseline_tokens": len(tokens), "baseline_loss": theirs / len(tokens)}
        picture = "" if isinstance(sample, str) else digest_of_pictures(sample.images)
        number = len(wanted)
        results.append(OnSample(name, number, loss / number, picture=picture, **compared))
    if baseline is None:
        return DataResult(ours.model, tuple(results))
    notes, left_out = [], sum(sample.same is None for sample in results)
    if left_out:
        told = f"{left_out} of {len(results)} samples have other tokens than the baseline's"
        notes.append(f"{told}: agreement and divergence leave them out; losses, of all samples,")
        notes[-1] += " are for each token of the baseline, so that they compare"
    if shared is not None and left_out < len(results):
        told = "the vocabularies differ: agreement and divergence are over"
        notes.append(f"{told} the {len(shared):,} tokens that both have")
    return DataResult(ours.model, tuple(results), baseline.model, tuple(notes))


def _sums(name: str, part: Callable[..., Tensor], *rows: Tensor) -> list[float]:
    """Sum what a function gives for the rows of a sample, a share of them at a time."""
    numbers = by_chunks(part, *rows, share=_SHARE)
    require_finite_values(numbers, f"the losses of sample {name!r}")
    found: list[float] = numbers.cpu().double().sum(0).tolist()
    return found


def _compared(
    head: Head,
    their_head: Head,
    shared: Int[Tensor, "W 2"] | None,
    rows: Float[Tensor, "N D"],
    wanted: Int[Tensor, " N"],
    their_rows: Float[Tensor, "N E"],
    their_wanted: Int[Tensor, " N"],
) -> Float[Tensor, "N 4"]:
    """Compute for each token the loss of both models, agreement, and KL(baseline ‖ model)."""
    ours, theirs = head(rows).float(), their_head(their_rows).float()
    pairs = (ours, wanted), (theirs, their_wanted)
    losses = [F.cross_entropy(*pair, reduction="none") for pair in pairs]
    if shared is not None:
        ours, theirs = ours[:, shared[:, 0]], theirs[:, shared[:, 1]]
    elif ours.shape != theirs.shape:  # rows beyond the vocabulary are no tokens
        least = min(ours.shape[-1], theirs.shape[-1])
        ours, theirs = ours[:, :least], theirs[:, :least]
    same = (ours.argmax(-1) == theirs.argmax(-1)).float()
    log_p, log_q = F.log_softmax(theirs, dim=-1), F.log_softmax(ours, dim=-1)
    return torch.stack([*losses, same, (log_p.exp() * (log_p - log_q)).sum(-1)], dim=-1)


@dataclass(frozen=True)
class OnSample:
    """Losses on one sample; agreement and divergence are None where tokens differ."""

    id: str
    tokens: Annotated[int, Field(ge=1)]  # of answers, or of plain text all but the first
    loss: float  # mean cross-entropy of a token, in nats
    baseline_loss: float | None = None
    same: int | None = None  # positions at which both models have the same likeliest token
    divergence: float | None = None  # mean KL(baseline ‖ model) at these positions, in nats
    baseline_tokens: Annotated[int, Field(ge=1)] | None = None  # as many where None
    picture: str = ""  # a digest of its images

    def __post_init__(self) -> None:
        numbers = [self.loss, self.baseline_loss, self.divergence]
        if not all(math.isfinite(value) for value in numbers if value is not None):
            raise NumericalError(f"NaN or infinity in the losses of sample {self.id!r}")


@dataclass(frozen=True)
class Figures:
    """Figures over all samples; every token of the baseline, if there is one, counts the same."""

    loss: Estimate  # cross-entropy for each token, in nats
    perplexity: Estimate
    increase: Estimate | None = None  # loss above the baseline's, on the same samples
    agreement: Estimate | None = None  # positions with the same likeliest token, in percent
    divergence: Estimate | None = None  # mean KL(baseline ‖ model), in nats


@dataclass(frozen=True)
class DataResult(Stored):
    """Losses of a model on some samples, alone or compared with a baseline."""

    derived: ClassVar = ("figures",)
    model: str  # its name
    samples: Annotated[tuple[OnSample, ...], Field(min_length=1)]
    baseline: str = ""  # name of the baseline; empty without one
    notes: tuple[str, ...] = ()  # why some of it could not be compared

    @property
    def tokens(self) -> int:
        """Tokens that count, of all samples."""
        return sum(sample.tokens for sample in self.samples)

    @cached_property
    def figures(self) -> Figures:
        """Loss, perplexity and the comparison, each with an interval."""
        rows = [[s.tokens * s.loss, s.baseline_tokens or s.tokens] for s in self.samples]
        (nats, tokens), pictures = np.array(rows, float).T, [s.picture for s in self.samples]
        loss = ratio_interval(nats, tokens, pictures, positive=True)
        bounds = (perplexity(v) for v in (loss.low, loss.high) if v is not None)
        as_perplexity = Estimate(perplexity(loss.value), *bounds)
        increase: Estimate | None = None
        theirs = [s.baseline_loss for s in self.samples if s.baseline_loss is not None]
        if len(theirs) == len(self.samples):
            increase = ratio_interval(nats - np.array(theirs) * tokens, tokens, pictures)
        alike = [s for s in self.samples if s.same is not None]
        if not alike:
            return Figures(loss, as_perplexity, increase)
        pictures = [s.picture for s in alike]
        tokens, same, apart = np.array([[s.tokens, s.same, s.divergence] for s in alike], float).T
        agreement = share_interval(same, tokens, pictures)
        divergence = ratio_interval(apart * tokens, tokens, pictures, positive=True)
        return Figures(loss, as_perplexity, increase, agreement, divergence)


# Final hidden states at the tokens that count, and losses there.


def _final(model: PreTrainedModel, encoded: Mapping[str, Any]) -> tuple[Hidden, Int[Tensor, "B T"]]:
    inputs = as_inputs(model, encoded)
    labels = inputs.pop("labels")
    (hidden,) = hidden_states(model, inputs)
    return hidden, labels


@torch.no_grad()
def answer_losses(
    model: PreTrainedModel, encoded: Mapping[str, Any], where: str
) -> tuple[Float[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Compute the cross-entropy of labelled tokens, 0 elsewhere, and the mask of labels."""
    hidden, labels = _final(model, encoded)
    rows, wanted, counted = predictions(hidden, labels)
    found = torch.zeros(counted.shape, device=hidden.device)
    found[counted] = by_chunks(partial(row_losses, head_of(model)), rows, wanted)[:, 0]
    require_finite_values(found, where)
    return found, counted


def row_losses(
    head: Head, rows: Float[Tensor, "N D"], wanted: Int[Tensor, " N"]
) -> Float[Tensor, "N 1"]:
    """Compute the cross-entropy of each wanted token."""
    return F.cross_entropy(head(rows).float(), wanted, reduction="none")[:, None]


@dataclass(frozen=True)
class Predictions:
    """Final hidden states of samples at the tokens that count, on the CPU."""

    model: str
    states: Sequence[Float[Tensor, "_ D"]]  # of each sample
    wanted: Sequence[Int[Tensor, " _"]]  # the tokens that follow
    head: Head  # a function that takes states of any device, or weights
    vocabulary: Mapping[str, int] = field(repr=False)

    @classmethod
    def of(cls, model: str, batches: Iterable[States], head: Head, processor: Any) -> "Predictions":
        """Take them out of batches, to compare models that are not loaded together."""
        found = dict[int, list[Tensor]]()
        for places, hidden, labels in batches:
            rows, wanted, counted = predictions(hidden, labels)
            counts = counted.sum(1).tolist()
            parts = (part.cpu().split(counts) for part in (rows, wanted))
            found |= {place: pair for place, *pair in zip(places, *parts, strict=True)}
        states, tokens = zip(*(found[place] for place in sorted(found)), strict=True)
        head = head_on(torch.device("cpu"), head)
        return cls(model, states, tokens, head, tokenizer_of(processor).get_vocab())

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the head must be `HeadWeights`."""
        assert isinstance(self.head, HeadWeights)
        tensors = {"states": torch.cat(list(self.states)), "wanted": torch.cat(list(self.wanted))}
        tensors["weight"] = self.head.weight.contiguous()
        if self.head.bias is not None:
            tensors["bias"] = self.head.bias.contiguous()
        about: dict[str, Any] = {"model": self.model, "counts": list(map(len, self.wanted))}
        about |= {"bends": [self.head.scale, self.head.cap], "words": dict(self.vocabulary)}
        with new_file(Path(path)) as partial_file:
            save_file(tensors, partial_file, {"about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "Predictions":
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        states, wanted = (tensors[name].split(about["counts"]) for name in ("states", "wanted"))
        head = HeadWeights(tensors["weight"], tensors.get("bias"), *about["bends"])
        return cls(about["model"], states, wanted, head, about["words"])


@torch.no_grad()
def predictions_of(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Given],
    batch_size: int = 8,
    name: str = "",
    head: Head | None = None,
) -> Predictions:
    """Run a model over samples; ``head`` is for predictions that outlive it (`head_weights_of`)."""
    if head is None:
        own, home = head_of(model), model.device
        head = lambda rows: own(rows.to(home)).to(rows.device)  # noqa: E731
    with evaluating(model):
        batches = batches_of(processor, samples, batch_size)
        states = ((places, *_final(model, inputs)) for places, inputs in batches)
        name = name or str(model.config._name_or_path)
        return Predictions.of(name, states, head, processor)


def batches_of(
    processor: Any, samples: Sequence[Given], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Encode samples with labels; those of like length run together, with images or without."""
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} must be at least 1")
    if not samples:
        raise DataError("no sample was given")
    texts = [sample for sample in samples if isinstance(sample, str)]
    conversations = [sample for sample in samples if isinstance(sample, Sample)]
    if texts and conversations:
        raise ConfigError("samples must be chat samples or plain texts, not both")
    lengths = [(0, len(text)) for text in texts]
    lengths += [(len(each.images), estimated_length(each, 0)) for each in conversations]
    order = sorted(range(len(samples)), key=lambda place: lengths[place])
    kinds = [count > 0 for count, _ in lengths]
    for places in progress(batches_by_kind(order, kinds, batch_size), "evaluate samples"):
        if conversations:
            yield places, encode_samples(processor, [conversations[place] for place in places])
            continue
        inputs = process(processor, [texts[i] for i in places], [[] for _ in places], "right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
        yield places, {**inputs, "labels": labels}
