"""How fast a smaller model is beside its original: both in memory, asked in turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from slimvlm.core.documents import built, read_object
from slimvlm.core.files import write_text
from slimvlm.data import chat
from slimvlm.data.samples import Question
from slimvlm.evaluation.measure import Timing, timed_runs
from slimvlm.evaluation.results import Times
from slimvlm.models.hidden import as_inputs, evaluating

REPEATS, NEW_TOKENS = 6, 8
"""Runs of each model, and tokens that one writes after its first."""


@dataclass(frozen=True)
class Share:
    """A time as a share of the original's.

    Attributes:
        value: Median over the rounds, in each of which both models ran.
        low: Smallest share of a round: of six, the lower end of a 97 % interval of the median.
        high: Largest one.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float], original: Sequence[float]) -> Share:
        """The shares of the rounds together."""
        shares = [ours / theirs for ours, theirs in zip(times, original, strict=True)]
        return cls(median(shares), min(shares), max(shares))

    def __str__(self) -> str:
        """For people: the share and its interval."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class PairedTimes:
    """An original and a smaller model, which took turns: what slows the machine slows both.

    Attributes:
        original: Times of the original.
        pruned: Times of the smaller model.
        prefill: The smaller one's time to read as a share of the original's.
        decode: The same of writing.
    """

    original: Times
    pruned: Times
    prefill: Share
    decode: Share

    def __str__(self) -> str:
        """What comes after "the smaller model", for people; in brackets all rounds."""
        return (
            f"reads a question in {self.prefill} of the original's time "
            f"({self.pruned.prefill_ms:.1f} ms), writes a token in {self.decode} "
            f"({self.pruned.decode_ms:.1f} ms)"
        )

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_text(Path(path), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PairedTimes:
        """Read what `save` wrote.

        Raises:
            ConfigError: If the file is missing or holds anything else.
        """
        return built(cls, read_object(path, "times"), f"times {str(path)!r}")


def plain_question(processor: Any) -> Question:
    """A question about a grey picture, or about none where the model sees none."""
    shown = (Image.new("RGB", (336, 336), "grey"),) if chat.can_see(processor) else ()
    return Question("latency", "What is shown here?", ("",), shown)


def times_of(model: PreTrainedModel, processor: Any, question: Question) -> Times:
    """The times of one model by itself."""
    (runs,) = _runs([(model, processor)], question)
    return _summary(runs)


def paired_times(
    model: PreTrainedModel, processor: Any, original: PreTrainedModel, original_processor: Any
) -> PairedTimes:
    """Time a smaller model and its original in turn, each with its own processor.

    Raises:
        SlimError: If the processor cannot ask a question.
    """
    pairs = [(original, original_processor), (model, processor)]
    theirs, ours = _runs(pairs, plain_question(original_processor))
    return PairedTimes(
        original=_summary(theirs),
        pruned=_summary(ours),
        prefill=Share.of([r.prefill_ms for r in ours], [r.prefill_ms for r in theirs]),
        decode=Share.of([r.decode_ms for r in ours], [r.decode_ms for r in theirs]),
    )


def _runs(pairs: Sequence[tuple[PreTrainedModel, Any]], question: Question) -> list[list[Timing]]:
    models = [model for model, _ in pairs]
    inputs = [as_inputs(m, chat.encode_questions(p, [question])) for m, p in pairs]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        return timed_runs(models, inputs, 1 + NEW_TOKENS, REPEATS)


def _summary(runs: Sequence[Timing]) -> Times:
    reading, writing = [run.prefill_ms for run in runs], [run.decode_ms for run in runs]
    return Times(
        prefill_ms=median(reading),
        decode_ms=median(writing),
        prefill_range_ms=(min(reading), max(reading)),
        decode_range_ms=(min(writing), max(writing)),
    )
