"""Ask a model what it makes of samples of the user's own: no task, no question.

Every answer token is predicted from what stands before it, so loss, perplexity, agreement and
divergence need no other label than the answers themselves.

B batch, T token, N counted position, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.core.progress import progress
from slimvlm.data.chat import encode_samples, process, tokenizer_of
from slimvlm.data.read import estimated_length
from slimvlm.data.roles import IGNORE
from slimvlm.data.samples import Sample
from slimvlm.evaluation.data_result import DataResult, OnSample
from slimvlm.evaluation.said import Said
from slimvlm.models.hidden import (
    evaluating,
    head_of,
    head_on,
    hidden_states,
    require_finite_values,
)
from slimvlm.models.losses import Head, Hidden, by_chunks, predictions
from slimvlm.scoring.batches import on_device

_SHARE = 4
"""Of the positions whose logits may exist at one time: here they exist seven times."""

Given = Sample | str
"""A conversation, or plain text."""


def evaluate_data(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Given],
    baseline: PreTrainedModel | Said | None = None,
    *,
    baseline_processor: Any = None,
    batch_size: int = 8,
    name: str = "",
    seed: int = 0,
) -> DataResult:
    """Loss and perplexity on samples, and beside a baseline: agreement and divergence.

    Answers count, and of plain text every token. Neither batch size nor padding changes a figure
    beyond rounding. Nothing holds the logits of a batch.

    Where the baseline has another vocabulary, agreement and divergence are over the tokens that
    both have, and a sample whose answers become other tokens is left out of the comparison;
    `DataResult.notes` says so.

    Args:
        model: The model.
        processor: Its processor or tokenizer.
        samples: Conversations, or plain texts.
        baseline: The model to compare with, usually the original; or what it said about the same
            samples, from `said_by`.
        baseline_processor: The baseline's, if it is another one.
        batch_size: Samples that run at once.
        name: Name of the model in the result.
        seed: Of the bootstrap over samples that gives the intervals.

    Raises:
        ConfigError: If the batch size is no number above 0, or conversations and texts are mixed.
        DataError: If there are no samples, or nothing in one counts.
        NumericalError: If a model says what is no number.
    """
    if isinstance(baseline, PreTrainedModel):
        with evaluating(baseline):
            baseline = said_by(baseline, baseline_processor or processor, samples, batch_size)
    with evaluating(model):
        states = states_of(model, processor, samples, batch_size)
        title, names = name or str(model.config._name_or_path), names_of(samples)
        result = compared(title, states, head_of(model), names, words_of(processor), baseline)
    return replace(result, seed=seed)


States = tuple[Sequence[int], Hidden, Int[Tensor, "B T"]]
"""A batch: places of its samples, final hidden states, tokens to predict."""


@torch.no_grad()
def said_by(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Given],
    batch_size: int = 8,
    name: str = "",
    head: Head | None = None,
) -> Said:
    """What a model predicts where samples count: two bytes a channel and token in bfloat16.

    Args:
        model: The model, usually the original of the one that follows.
        processor: Its processor or tokenizer.
        samples: Conversations, or plain texts.
        batch_size: Samples that run at once.
        name: Its name in results.
        head: Its head, if it must outlive the model (`head_weights_of`).

    Raises:
        SlimError: As `evaluate_data`.
    """
    states = states_of(model, processor, samples, batch_size)
    if head is None:
        own, home = head_of(model), model.device
        head = lambda rows: own(rows.to(home)).to(rows.device)  # noqa: E731
    with evaluating(model):
        return kept(name or str(model.config._name_or_path), states, head, words_of(processor))


def kept(model: str, states: Iterable[States], head: Head, words: Mapping[str, int]) -> Said:
    """What a model said, batch by batch, in the order of the samples; all of it on the CPU."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for places, hidden, labels in states:
        rows, wanted, counted = predictions(hidden, labels)
        counts = counted.sum(1).tolist()
        pieces = zip(rows.cpu().split(counts), wanted.cpu().split(counts), strict=True)
        found |= dict(zip(places, pieces, strict=True))
    ordered = [found[place] for place in sorted(found)]
    head = head_on(torch.device("cpu"), head)
    return Said(model, tuple(s for s, _ in ordered), tuple(w for _, w in ordered), head, words)


@torch.no_grad()
def alone(said: Said, names: Sequence[str], device: torch.device) -> DataResult:
    """The result of a model from what it said, beside no other.

    Args:
        said: What it said.
        names: Of the samples.
        device: Where the head runs.
    """
    losses = partial(_losses, head_on(device, said.head))
    samples: list[OnSample] = []
    for name, *kept_there in zip(names, said.states, said.wanted, strict=True):
        rows, wanted = (part.to(device) for part in kept_there)
        spoken = _Spoken([name], [len(wanted)], rows, wanted)
        samples += spoken.summed(by_chunks(losses, rows, wanted, share=_SHARE), [False])
    return DataResult(said.model, tuple(samples))


@torch.no_grad()
def compared(
    model: str,
    states: Iterable[States],
    head: Head,
    names: Sequence[str],
    words: Mapping[str, int],
    baseline: Said | None,
) -> DataResult:
    """The result of a model from its final hidden states.

    Args:
        model: Its name.
        states: Batch by batch.
        head: Its head.
        names: Of the samples.
        words: The number of each token of its tokenizer.
        baseline: What it is compared with.

    Raises:
        SlimError: As `evaluate_data`.
    """
    if baseline is not None and len(baseline.states) != len(names):
        count = len(baseline.states)
        raise ConfigError(f"baseline: it spoke about {count} samples, not these {len(names)}")
    shared = None if baseline is None else _shared(words, baseline.words)
    beside: _Beside | None = None
    found: dict[int, OnSample] = {}
    for places, hidden, labels in states:
        spoken = _Spoken.of(hidden, labels, [names[place] for place in places])
        if baseline is None:
            numbers = by_chunks(partial(_losses, head), spoken.rows, spoken.wanted, share=_SHARE)
            found |= zip(places, spoken.summed(numbers, [False] * len(places)), strict=True)
        else:
            beside = beside or _Beside.on(hidden.device, head, baseline, shared)
            found |= zip(places, beside.of(spoken, places), strict=True)
    samples = tuple(found[place] for place in sorted(found))
    if baseline is None:
        return DataResult(model, samples)
    return DataResult(model, samples, baseline.model, tuple(_notes(samples, shared)))


def states_of(
    model: PreTrainedModel, processor: Any, samples: Sequence[Given], batch_size: int
) -> Iterator[States]:
    """Final hidden states of samples, those of similar length together."""
    for places, inputs in batches_of(processor, samples, batch_size):
        batch = on_device(model, inputs)
        labels = batch.pop("labels")
        (hidden,) = hidden_states(model, batch)
        yield places, hidden, labels


def batches_of(
    processor: Any, samples: Sequence[Given], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Places of samples, and their model inputs with labels.

    Raises:
        ConfigError: If the batch size is no number above 0, or conversations and texts are mixed.
        DataError: If there are no samples, or one cannot be read.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size} must be at least 1")
    if not samples:
        raise DataError("no sample was given")
    if len({isinstance(sample, str) for sample in samples}) > 1:
        raise ConfigError("samples must be conversations or plain texts, not both")
    order = sorted(range(len(samples)), key=lambda place: _likeness(samples[place]))
    for start in progress(range(0, len(order), batch_size), "evaluate samples"):
        places = order[start : start + batch_size]
        yield places, _encoded(processor, [samples[place] for place in places])


def names_of(samples: Sequence[Given]) -> list[str]:
    """The names of samples; of plain texts their numbers."""
    return [str(i) if isinstance(each, str) else each.id for i, each in enumerate(samples)]


def words_of(processor: Any) -> dict[str, int]:
    """The number of each token of a processor's tokenizer."""
    words: dict[str, int] = tokenizer_of(processor).get_vocab()
    return words


def _encoded(processor: Any, samples: Sequence[Given]) -> dict[str, Tensor]:
    texts = [sample for sample in samples if isinstance(sample, str)]
    if not texts:
        return encode_samples(processor, [s for s in samples if isinstance(s, Sample)])
    inputs = process(processor, texts, [[] for _ in texts], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    return {**inputs, "labels": labels}


def _likeness(sample: Given) -> tuple[int, int]:
    """Samples with as many pictures and a similar length run together."""
    if isinstance(sample, str):
        return 0, len(sample)
    return len(sample.images), estimated_length(sample, 0)


@dataclass(frozen=True)
class _Shared:
    """The tokens that two vocabularies have, where they are not the same.

    Attributes:
        ours: Their numbers in the model's.
        theirs: In the baseline's, in the same order.
    """

    ours: Int[Tensor, " W"]
    theirs: Int[Tensor, " W"]

    @cached_property
    def as_theirs(self) -> dict[int, int]:
        """Numbers of the model's vocabulary → the baseline's."""
        return dict(zip(self.ours.tolist(), self.theirs.tolist(), strict=True))


def _shared(ours: Mapping[str, int], theirs: Mapping[str, int]) -> _Shared | None:
    """The tokens that both have; None if they are the same vocabulary."""
    if ours == theirs:
        return None
    both = [(number, theirs[word]) for word, number in ours.items() if word in theirs]
    ours_too, theirs_too = zip(*sorted(both), strict=True) if both else ((), ())
    return _Shared(torch.tensor(ours_too, dtype=torch.long), torch.tensor(theirs_too).long())


@dataclass(frozen=True)
class _Spoken:
    """The positions of a batch that count.

    Attributes:
        names: Of its samples.
        counts: How many positions each has.
        rows: Final hidden states there.
        wanted: The tokens that follow.
    """

    names: Sequence[str]
    counts: Sequence[int]
    rows: Float[Tensor, "N D"]
    wanted: Int[Tensor, " N"]

    @classmethod
    def of(cls, hidden: Hidden, labels: Int[Tensor, "B T"], names: Sequence[str]) -> _Spoken:
        """From final hidden states and labels."""
        rows, wanted, counted = predictions(hidden, labels)
        counts = counted.sum(1).tolist()
        if not all(counts):
            raise DataError(f"sample {names[counts.index(0)]!r} has no token that counts")
        return cls(names, counts, rows, wanted)

    def summed(self, numbers: Float[Tensor, "N K"], which: Sequence[bool]) -> Iterator[OnSample]:
        """Each sample from what is known of its tokens; ``which`` are compared."""
        require_finite_values(numbers, f"what is said about sample {self.names[0]!r}")
        sums = [part.double().sum(0).tolist() for part in numbers.cpu().split(self.counts)]
        for name, count, total, is_compared in zip(
            self.names, self.counts, sums, which, strict=True
        ):
            loss, theirs, same, divergence = (total + [0.0] * 4)[:4]
            if is_compared:
                means = loss / count, theirs / count, round(same), divergence / count
                yield OnSample(name, count, *means)
            else:
                yield OnSample(name, count, loss / count)


@dataclass(frozen=True)
class _Beside:
    """Compares a model's predictions with its baseline's.

    Attributes:
        head: The model's head.
        baseline: The baseline's hidden states, and its head on the model's device.
        shared: The tokens that both vocabularies have; None if these are the same.
    """

    head: Head
    baseline: Said
    shared: _Shared | None

    @classmethod
    def on(
        cls, device: torch.device, head: Head, baseline: Said, shared: _Shared | None
    ) -> _Beside:
        """With what the baseline needs for every batch on a device."""
        if shared is not None:
            shared = _Shared(shared.ours.to(device), shared.theirs.to(device))
        return cls(head, replace(baseline, head=head_on(device, baseline.head)), shared)

    def of(self, spoken: _Spoken, places: Sequence[int]) -> Iterator[OnSample]:
        """Each sample of a batch, as far as its answers are the same tokens for both models."""
        device, counts = spoken.rows.device, list(spoken.counts)
        which = [
            self._same_tokens(ours, self.baseline.wanted[place])
            for place, ours in zip(places, spoken.wanted.cpu().split(counts), strict=True)
        ]
        both = torch.tensor(which).repeat_interleave(torch.tensor(counts)).to(device)
        numbers = torch.zeros(len(spoken.rows), 4, device=device)
        if not all(which):
            left = spoken.rows[~both], spoken.wanted[~both]
            numbers[~both, :1] = by_chunks(partial(_losses, self.head), *left, share=_SHARE)
        if any(which):
            picked = [
                place for place, is_compared in zip(places, which, strict=True) if is_compared
            ]
            said = (self.baseline.states, self.baseline.wanted)
            theirs = [torch.cat([part[place] for place in picked]).to(device) for part in said]
            part = partial(_both, self.head, self.baseline.head, self.shared)
            ours = spoken.rows[both], spoken.wanted[both]
            numbers[both] = by_chunks(part, *ours, *theirs, share=_SHARE)
        return spoken.summed(numbers, which)

    def _same_tokens(self, ours: Tensor, theirs: Tensor) -> bool:
        numbers = ours.tolist()
        if self.shared is not None:
            numbers = [self.shared.as_theirs.get(number, IGNORE) for number in numbers]
        return bool(numbers == theirs.tolist())


def _losses(
    head: Head, rows: Float[Tensor, "N D"], wanted: Int[Tensor, " N"]
) -> Float[Tensor, "N 1"]:
    return F.cross_entropy(head(rows).float(), wanted, reduction="none")[:, None]


def _both(
    head: Head,
    their_head: Head,
    shared: _Shared | None,
    rows: Float[Tensor, "N D"],
    wanted: Int[Tensor, " N"],
    their_rows: Float[Tensor, "N E"],
    their_wanted: Int[Tensor, " N"],
) -> Float[Tensor, "N 4"]:
    ours, theirs = head(rows).float(), their_head(their_rows).float()
    losses = [
        F.cross_entropy(logits, tokens, reduction="none")
        for logits, tokens in ((ours, wanted), (theirs, their_wanted))
    ]
    if shared is not None:
        ours, theirs = ours[:, shared.ours], theirs[:, shared.theirs]
    same = (ours.argmax(-1) == theirs.argmax(-1)).float()
    log_p, log_q = F.log_softmax(theirs, dim=-1), F.log_softmax(ours, dim=-1)
    return torch.stack([*losses, same, (log_p.exp() * (log_p - log_q)).sum(-1)], dim=-1)


def _notes(samples: Sequence[OnSample], shared: _Shared | None) -> Iterator[str]:
    left_out = sum(sample.baseline_loss is None for sample in samples)
    if left_out:
        yield (
            f"{left_out} of {len(samples)} samples have other tokens than the baseline's and are "
            "not compared"
        )
    if shared is not None and left_out < len(samples):
        yield (
            f"the vocabularies differ: agreement and divergence are over the {len(shared.ours):,} "
            "tokens that both have"
        )
