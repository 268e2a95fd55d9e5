"""Measure loss, perplexity, agreement and divergence on a user's own samples: no task is needed.

N counted position, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import ConfigError, DataError, NumericalError, SlimError
from slimvlm.core.files import write_text
from slimvlm.data.chat import tokenizer_of
from slimvlm.data.roles import IGNORE
from slimvlm.evaluation.metrics import perplexity
from slimvlm.evaluation.predictions import (
    Given,
    Predictions,
    States,
    predictions_of,
    row_losses,
    states_of,
)
from slimvlm.models.hidden import evaluating, head_of, head_on, require_finite_values
from slimvlm.models.losses import Head, by_chunks, predictions

_SHARE = 4
"""Divides the number of positions whose logits exist at one time: here they exist seven times."""
RESAMPLES = 1000
"""Bootstrap draws behind an interval."""


def evaluate_data(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Given],
    baseline: PreTrainedModel | Predictions | None = None,
    *,
    baseline_processor: Any = None,
    batch_size: int = 8,
    name: str = "",
    seed: int = 0,
) -> DataResult:
    """Compute loss and perplexity on samples, and agreement and divergence with a baseline.

    Answers count, and of plain text every token. Neither batch size nor padding changes a figure
    beyond rounding. Nothing holds the logits of a batch.

    Where the baseline has another vocabulary, agreement and divergence are over the tokens that
    both have, and a sample whose answers become other tokens is left out of the comparison;
    `DataResult.notes` says so.

    Args:
        model: The model.
        processor: Its processor or tokenizer.
        samples: Conversations, or plain texts.
        baseline: The model to compare with, usually the original; or its predictions on the same
            samples, from `predictions_of`.
        baseline_processor: The baseline's, if it is another one.
        batch_size: Samples that run at once.
        name: Name of the model in the result.
        seed: Of the bootstrap over samples that gives the intervals.

    Raises:
        ConfigError: If the batch size is not above 0, or conversations and texts are mixed.
        DataError: If there are no samples, or nothing in one counts.
        NumericalError: If a model computes NaN or infinity.
    """
    if isinstance(baseline, PreTrainedModel):
        baseline = predictions_of(baseline, baseline_processor or processor, samples, batch_size)
    with evaluating(model):
        states = states_of(model, processor, samples, batch_size)
        name = name or str(model.config._name_or_path)
        result = paired_result(name, states, head_of(model), samples, processor, baseline)
    return replace(result, seed=seed)


def _names_of(samples: Sequence[Given]) -> list[str]:
    return [str(i) if isinstance(each, str) else each.id for i, each in enumerate(samples)]


@torch.no_grad()
def single_result(found: Predictions, samples: Sequence[Given], device: torch.device) -> DataResult:
    """Compute the result of a model from its predictions; its head runs on the device."""
    head = head_on(device, found.head)
    results: list[OnSample] = []
    for name, *stored in zip(_names_of(samples), found.states, found.wanted, strict=True):
        rows, wanted = (part.to(device) for part in stored)
        results += _samples([name], [len(wanted)], _losses(head, rows, wanted), [False])
    return DataResult(found.model, tuple(results))


@torch.no_grad()
def paired_result(
    model: str,
    batches: Iterable[States],
    head: Head,
    samples: Sequence[Given],
    processor: Any,
    baseline: Predictions | None,
) -> DataResult:
    """Compute the result of a model from its final hidden states and a baseline's predictions."""
    shared: Tensor | None = None  # [W, 2]: numbers of the tokens that both vocabularies have
    theirs_of: dict[int, int] | None = None
    if baseline is not None:
        if len(baseline.states) != len(samples):
            raise ConfigError(
                f"baseline: its predictions are of {len(baseline.states)} samples, "
                f"not of {len(samples)}"
            )
        known, vocabulary = baseline.vocabulary, tokenizer_of(processor).get_vocab()
        if known != vocabulary:
            both = [(number, known[word]) for word, number in vocabulary.items() if word in known]
            theirs_of = dict(both)
            shared = torch.tensor(sorted(both), dtype=torch.long).reshape(-1, 2)
    names, their_head = _names_of(samples), None if baseline is None else baseline.head
    found: dict[int, OnSample] = {}
    for places, hidden, labels in batches:
        rows, wanted, counted = predictions(hidden, labels)
        counts, titles = counted.sum(1).tolist(), [names[place] for place in places]
        if not all(counts):
            raise DataError(f"sample {titles[counts.index(0)]!r} has no token that counts")
        device = rows.device
        which: list[bool] = []  # samples that are compared: their answers tokenise alike
        for place, tokens in zip(places, wanted.cpu().split(counts), strict=True):
            ours = tokens.tolist()
            if theirs_of is not None:
                ours = [theirs_of.get(token, IGNORE) for token in ours]
            which.append(baseline is not None and ours == baseline.wanted[place].tolist())
        compared = torch.tensor(which).repeat_interleave(torch.tensor(counts)).to(device)
        numbers = torch.zeros(len(rows), 4, device=device)
        if not all(which):
            numbers[~compared, :1] = _losses(head, rows[~compared], wanted[~compared])
        if baseline is not None and their_head is not None and any(which):
            their_head = head_on(device, their_head)
            shared = None if shared is None else shared.to(device)
            picked = [place for place, same in zip(places, which, strict=True) if same]
            stored = baseline.states, baseline.wanted
            theirs = [torch.cat([part[place] for place in picked]).to(device) for part in stored]
            part = partial(_compared, head, their_head, shared)
            given = rows[compared], wanted[compared], *theirs
            numbers[compared] = by_chunks(part, *given, share=_SHARE)
        found |= zip(places, _samples(titles, counts, numbers, which), strict=True)
    results = tuple(found[place] for place in sorted(found))
    if baseline is None:
        return DataResult(model, results)
    notes, left_out = [], sum(sample.baseline_loss is None for sample in results)
    if left_out:
        notes.append(
            f"{left_out} of {len(results)} samples have other tokens than the baseline's and "
            "are not compared"
        )
    if shared is not None and left_out < len(results):
        notes.append(
            f"the vocabularies differ: agreement and divergence are over the {len(shared):,} "
            "tokens that both have"
        )
    return DataResult(model, results, baseline.model, tuple(notes))


def _losses(head: Head, rows: Float[Tensor, "N D"], wanted: Tensor) -> Float[Tensor, "N 1"]:
    return by_chunks(partial(row_losses, head), rows, wanted, share=_SHARE)[:, :1]


def _samples(
    names: Sequence[str],
    counts: Sequence[int],
    numbers: Float[Tensor, "N K"],
    which: Sequence[bool],
) -> Iterator[OnSample]:
    """Average the numbers of each sample's tokens; ``which`` samples are compared."""
    require_finite_values(numbers, f"the losses of sample {names[0]!r}")
    sums = [part.double().sum(0).tolist() for part in numbers.cpu().split(counts)]
    for name, count, total, is_compared in zip(names, counts, sums, which, strict=True):
        if is_compared:
            loss, theirs, same, divergence = total
            means = loss / count, theirs / count, round(same), divergence / count
            yield OnSample(name, count, *means)
        else:
            yield OnSample(name, count, total[0] / count)


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
    losses = [
        F.cross_entropy(logits, tokens, reduction="none")
        for logits, tokens in ((ours, wanted), (theirs, their_wanted))
    ]
    if shared is not None:
        ours, theirs = ours[:, shared[:, 0]], theirs[:, shared[:, 1]]
    same = (ours.argmax(-1) == theirs.argmax(-1)).float()
    log_p, log_q = F.log_softmax(theirs, dim=-1), F.log_softmax(ours, dim=-1)
    return torch.stack([*losses, same, (log_p.exp() * (log_p - log_q)).sum(-1)], dim=-1)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, from a bootstrap over samples."""

    value: float
    low: float | None = None  # None of fewer than two samples
    high: float | None = None


@dataclass(frozen=True)
class OnSample:
    """Losses on one sample; the comparison is None where tokens differ."""

    id: str
    tokens: Annotated[int, Field(ge=1)]  # of answers, or of plain text all but the first
    loss: float  # mean cross-entropy of a token, in nats
    baseline_loss: float | None = None
    same: int | None = None  # positions at which both models have the same likeliest token
    divergence: float | None = None  # mean KL(baseline ‖ model) at these positions, in nats

    def __post_init__(self) -> None:
        numbers = [self.loss, self.baseline_loss, self.divergence]
        if not all(math.isfinite(value) for value in numbers if value is not None):
            raise NumericalError(f"NaN or infinity in the losses of sample {self.id!r}")


@dataclass(frozen=True)
class Figures:
    """Figures over all samples; every token counts the same."""

    loss: Estimate  # mean cross-entropy of a token, in nats
    perplexity: Estimate
    increase: Estimate | None = None  # loss above the baseline's, on the same samples
    agreement: Estimate | None = None  # positions with the same likeliest token, in percent
    divergence: Estimate | None = None  # mean KL(baseline ‖ model), in nats


@dataclass(frozen=True)
class DataResult:
    """Losses of a model on some samples, alone or compared with a baseline.

    Attributes:
        model: Its name.
        samples: Sample by sample.
        baseline: Name of the baseline; empty without one.
        notes: Why some of it could not be compared.
        seed: Of the bootstrap.
    """

    model: str
    samples: Annotated[tuple[OnSample, ...], Field(min_length=1)]
    baseline: str = ""
    notes: tuple[str, ...] = ()
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that count, of all samples."""
        return sum(sample.tokens for sample in self.samples)

    @cached_property
    def figures(self) -> Figures:
        """Loss, perplexity and the comparison, each with an interval."""
        tokens = np.array([s.tokens for s in self.samples], float)
        loss = _ratio([s.loss for s in self.samples] * tokens, tokens, self.seed)
        bounds = (perplexity(v) for v in (loss.low, loss.high) if v is not None)
        as_perplexity = Estimate(perplexity(loss.value), *bounds)
        both = [s for s in self.samples if s.baseline_loss is not None]
        if not both:
            return Figures(loss, as_perplexity)
        rows = [[s.tokens, s.loss, s.baseline_loss, s.same, s.divergence] for s in both]
        tokens, ours, theirs, same, divergence = np.array(rows, float).T
        return Figures(
            loss,
            as_perplexity,
            increase=_ratio((ours - theirs) * tokens, tokens, self.seed),
            agreement=_ratio(100 * same, tokens, self.seed),
            divergence=_ratio(divergence * tokens, tokens, self.seed),
        )

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        values = {**asdict(self), "figures": asdict(self.figures)}
        write_text(Path(path), json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> DataResult:
        """Read what `save` wrote."""
        values = read_object(path, "result")
        values.pop("figures", None)
        try:
            return built(cls, values)
        except SlimError as error:
            raise ConfigError(f"result {str(path)!r}: cannot be read ({error})") from error


def _ratio(numbers: Any, tokens: Any, seed: int) -> Estimate:
    """Divide sums over samples; the interval is a bootstrap over samples."""
    value = float(numbers.sum() / tokens.sum())
    if len(tokens) < 2:
        return Estimate(value)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, len(tokens), len(tokens)) for _ in range(RESAMPLES))
    low, high = np.percentile([numbers[d].sum() / tokens[d].sum() for d in draws], [2.5, 97.5])
    return Estimate(value, float(low), float(high))
