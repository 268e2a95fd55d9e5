"""What a model says about samples of the user's own, as numbers: alone, or beside a baseline."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import ConfigError, NumericalError, SlimError
from slimvlm.core.files import write_text
from slimvlm.evaluation.metrics import perplexity

RESAMPLES = 1000
"""Bootstrap draws behind an interval."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, from a bootstrap over samples.

    Attributes:
        value: The figure.
        low: Lower end; None of fewer than two samples.
        high: Upper end, likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def perplexity(self) -> Estimate:
        """The estimate of the perplexity that belongs to a loss; the interval goes along."""
        return Estimate(
            perplexity(self.value),
            *(perplexity(v) for v in (self.low, self.high) if v is not None),
        )


@dataclass(frozen=True)
class OnSample:
    """What a model says about one sample; what is compared is None if it cannot be.

    Attributes:
        id: The sample's name.
        tokens: Tokens that count: those of answers, or of plain text all but the first.
        loss: Their mean cross-entropy, in nats.
        baseline_loss: The baseline's, of the same tokens.
        same: Tokens before which both models find the same token likeliest.
        divergence: Mean KL(baseline ‖ model) of their predictions, in nats.
    """

    id: str
    tokens: Annotated[int, Field(ge=1)]
    loss: float
    baseline_loss: float | None = None
    same: int | None = None
    divergence: float | None = None

    def __post_init__(self) -> None:
        numbers = [self.loss, self.baseline_loss, self.divergence]
        if not all(math.isfinite(value) for value in numbers if value is not None):
            raise NumericalError(f"NaN or infinity in what is said about sample {self.id!r}")


@dataclass(frozen=True)
class Figures:
    """What all samples say together; every token counts the same.

    Attributes:
        loss: Mean cross-entropy of a token, in nats.
        perplexity: Its exponential.
        increase: Loss above the baseline's, on the same samples; None without a baseline.
        agreement: Share of tokens before which both models find the same token likeliest, in
            percent; what is missing of 100 are flips.
        divergence: Mean KL(baseline ‖ model), in nats.
    """

    loss: Estimate
    perplexity: Estimate
    increase: Estimate | None = None
    agreement: Estimate | None = None
    divergence: Estimate | None = None


@dataclass(frozen=True)
class DataResult:
    """What a model says about some samples, alone or beside a baseline.

    Attributes:
        model: Its name.
        samples: Sample by sample.
        baseline: Name of the baseline; empty without one.
        notes: What could not be compared, and why.
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
        as_perplexity = loss.perplexity()
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
        """Read what `save` wrote.

        Raises:
            ConfigError: If the file is missing or is not such a result.
        """
        values = read_object(path, "result")
        values.pop("figures", None)
        try:
            return built(cls, values)
        except SlimError as error:
            raise ConfigError(f"result {str(path)!r}: cannot be read ({error})") from error


def _ratio(numbers: Any, tokens: Any, seed: int) -> Estimate:
    """A sum over samples, divided by their tokens; samples are drawn again for the interval."""
    value = float(numbers.sum() / tokens.sum())
    if len(tokens) < 2:
        return Estimate(value)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, len(tokens), len(tokens)) for _ in range(RESAMPLES))
    low, high = np.percentile([numbers[d].sum() / tokens[d].sum() for d in draws], [2.5, 97.5])
    return Estimate(value, float(low), float(high))
