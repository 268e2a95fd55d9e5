"""Conversations, questions and tasks as plain values.

Data files become `Sample`s (:mod:`slimvlm.data.read`), benchmarks become `Task`s
(:mod:`slimvlm.evaluation.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

Message = dict[str, Any]
"""One turn in Hugging Face chat form: ``{"role": "user", "content": [{"type": "image"}, {"type":
"text", "text": "..."}]}``. An image entry is a placeholder; the pictures are in `Sample.images`, in
order."""


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from or to calibrate on.

    Attributes:
        id: Name used in messages about bad data and in per-sample results.
        messages: Turns in chat form; the last one is the assistant's.
        images: The pictures (or their paths), one per ``{"type": "image"}`` entry, in order.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Image | Path, ...] = ()


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: Unique within its task.
        prompt: The user's text. Pictures come before it.
        answers: Accepted answers; the first is the one shown.
        images: The pictures (or their paths).
        choices: Letters or words to choose from, where the metric needs them.
        group: A label that a metric may report on separately (for example ``"adversarial"``).
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    images: tuple[Image | Path, ...] = ()
    choices: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark: questions, how they are scored and what luck alone would give.

    Attributes:
        name: Unique name, used on the command line.
        metric: A name that `slimvlm.evaluation.metrics.metric_named` knows; or ``perplexity`` or
            ``loss`` of the first answer.
        chance: Score of guessing, in percent.
        load: Returns the first ``limit`` questions (all if None), always in the same order.
        max_new_tokens: Longest answer.
        like: The published benchmark that this one stands for, if any.
        in_average: Whether it counts in AVG. Text perplexity does not.
        by_likelihood: The reply is the one of a question's choices that the model finds likeliest,
            instead of what it generates.
    """

    name: str
    metric: str
    chance: float
    load: Callable[[int | None], Sequence[Question]] = field(compare=False)
    max_new_tokens: int = 8
    like: str = ""
    in_average: bool = True
    by_likelihood: bool = False
