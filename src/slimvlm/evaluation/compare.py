"""Two results answer by answer: what the second model lost and gained, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from slimvlm.core.errors import ConfigError
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation.ask import with_other_pictures
from slimvlm.evaluation.metrics import (
    LIKELIHOODS,
    Difference,
    metric_named,
    normalise,
    paired_difference,
    signed,
)
from slimvlm.evaluation.results import Result, TaskResult

Change = Literal["lost", "gained", "both wrong", "both right"]
CHANGES: tuple[Change, ...] = ("lost", "gained", "both wrong", "both right")
"""What can become of an answer, the most telling first."""
RIGHT = 0.5
"""A score from here on counts as right; only graded metrics have scores between 0 and 1."""


@dataclass(frozen=True)
class Pair:
    """One question and the replies of both models.

    Attributes:
        question: Id, prompt, answers and pictures; only the id if the task is not at hand.
        reply_a: What the first model said.
        reply_b: What the second model said.
        score_a: Score of the first reply in [0, 1].
        score_b: Score of the second.
    """

    question: Question
    reply_a: str
    reply_b: str
    score_a: float
    score_b: float

    @property
    def kind(self) -> Change:
        """What became of the answer."""
        if self.score_a >= RIGHT:
            return "both right" if self.score_b >= RIGHT else "lost"
        return "gained" if self.score_b >= RIGHT else "both wrong"

    @property
    def is_flip(self) -> bool:
        """Whether the second model says something else, right or wrong."""
        return normalise(self.reply_a) != normalise(self.reply_b)


@dataclass(frozen=True)
class TaskComparison:
    """One task answered by both models.

    Attributes:
        name: Of the task.
        metric: Name of the metric.
        score_a: Mean score of the first model, in percent.
        score_b: Mean score of the second.
        difference: Second minus first, in points.
        pairs: Every question, in the task's order.
        note: Why questions and pictures are missing; empty if they are there.
    """

    name: str
    metric: str
    score_a: float
    score_b: float
    difference: Difference
    pairs: tuple[Pair, ...]
    note: str = ""

    @property
    def counts(self) -> dict[Change, int]:
        """Questions of each kind; together they are all questions."""
        return _counts(self.pairs)

    @property
    def flips(self) -> int:
        """Answers that differ."""
        return sum(pair.is_flip for pair in self.pairs)


@dataclass(frozen=True)
class Comparison:
    """Two models, answer by answer.

    Attributes:
        name_a: Name or path of the first model.
        name_b: Of the second.
        params_a: Parameters of the first model.
        params_b: Of the second.
        tasks: What both answered, by name.
        difference: Second minus first over all questions of all tasks, in points.
        left_out: Why a task was not compared, by its name.
        note: Which model was asked blind, and what pictures are shown then; empty if none was.
    """

    name_a: str
    name_b: str
    params_a: int
    params_b: int
    tasks: Mapping[str, TaskComparison]
    difference: Difference
    left_out: Mapping[str, str]
    note: str = ""

    @property
    def counts(self) -> dict[Change, int]:
        """Questions of each kind over all tasks."""
        return _counts(tuple(chain(*(task.pairs for task in self.tasks.values()))))

    @property
    def flips(self) -> int:
        """Answers that differ, over all tasks."""
        return sum(task.flips for task in self.tasks.values())


def compare(a: Result, b: Result, tasks: Mapping[str, Task]) -> Comparison:
    """Set the answers of two models side by side.

    Perplexity has no right and wrong, and a task that only one model answered has no pairs: both
    are named in `Comparison.left_out`. If one model was asked blind, `Pair.question` has the
    pictures that the other one saw; if both were, those of other questions that both were shown.

    Args:
        a: Result of the first model, usually the original.
        b: Result of the second, usually a smaller one.
        tasks: Where questions and pictures come from, by name. A task that is not here is compared
            without them, and so is one whose questions have changed since.

    Raises:
        ConfigError: If they share no task, or a task asked other questions or was scored by
            another metric.
        DataError: If the questions of a task cannot be read.
    """
    left_out: dict[str, str] = {}
    found: dict[str, TaskComparison] = {}
    for name in dict.fromkeys([*a.tasks, *b.tasks]):
        reason = _reason_to_leave_out(name, a.tasks.get(name), b.tasks.get(name))
        if reason:
            left_out[name] = reason
        else:
            task = _as_asked(tasks.get(name), blind=a.blind and b.blind)
            found[name] = _compare_task(name, a.tasks[name], b.tasks[name], task)
    if not found:
        raise ConfigError(f"results of {a.model!r} and {b.model!r}: no task has answers of both")
    pairs = list(chain(*(task.pairs for task in found.values())))
    difference = paired_difference([p.score_a for p in pairs], [p.score_b for p in pairs])
    return Comparison(
        name_a=a.model,
        name_b=b.model,
        params_a=a.total_params,
        params_b=b.total_params,
        tasks=found,
        difference=difference,
        left_out=left_out,
        note=_blind_note(a.blind, b.blind),
    )


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A row for each task; a ``*`` marks a difference whose 95 % interval excludes 0."""
    rows = [
        [
            task.name,
            f"{task.score_a:.1f}",
            f"{task.score_b:.1f}",
            _interval(task.difference),
            str(task.flips),
            *_count_cells(task.counts),
        ]
        for task in comparison.tasks.values()
    ]
    both = [str(comparison.flips), *_count_cells(comparison.counts)]
    total = ["all", "", "", _interval(comparison.difference), *both]
    return ["task", "A", "B", "B - A [95 % interval]", "flips", *CHANGES], [*rows, total]


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The figures of `comparison_rows` as plain values, and the ids of what was lost and gained."""
    tasks = {
        name: {
            "n": len(task.pairs),
            "metric": task.metric,
            "a": task.score_a,
            "b": task.score_b,
            **_difference_json(task.difference),
            "flips": task.flips,
            "counts": task.counts,
            "lost": [pair.question.id for pair in task.pairs if pair.kind == "lost"],
            "gained": [pair.question.id for pair in task.pairs if pair.kind == "gained"],
        }
        for name, task in comparison.tasks.items()
    }
    return {
        "a": comparison.name_a,
        "b": comparison.name_b,
        "tasks": tasks,
        "all": {
            **_difference_json(comparison.difference),
            "flips": comparison.flips,
            "counts": comparison.counts,
        },
        "left_out": dict(comparison.left_out),
        "note": comparison.note,
    }


def _counts(pairs: Sequence[Pair]) -> dict[Change, int]:
    kinds = [pair.kind for pair in pairs]
    return {kind: kinds.count(kind) for kind in CHANGES}


def _reason_to_leave_out(name: str, a: TaskResult | None, b: TaskResult | None) -> str:
    """Why a task has no pairs of answers, or nothing if it has."""
    if a is None or b is None:
        return "only B answered it" if a is None else "only A answered it"
    _require_same(name, a, b)
    if a.metric in LIKELIHOODS:
        return f"{a.metric} {a.score:.2f} of A, {b.score:.2f} of B (lower is better)"
    return "" if a.ids else "it has no questions"


def _require_same(name: str, a: TaskResult, b: TaskResult) -> None:
    if a.ids != b.ids:
        raise ConfigError(
            f"task {name!r}: the two models were asked other questions "
            f"({len(a.ids)} and {len(b.ids)}; see --limit)"
        )
    if a.metric != b.metric:
        raise ConfigError(
            f"task {name!r}: scored by {a.metric!r} in one, {b.metric!r} in the other"
        )


def _compare_task(name: str, a: TaskResult, b: TaskResult, task: Task | None) -> TaskComparison:
    questions, note = _questions(task, a)
    replies = zip(a.replies, b.replies, strict=True)
    scores = zip(a.scores, b.scores, strict=True)
    answers = zip(a.ids, replies, scores, strict=True)
    pairs = tuple(
        Pair(questions.get(key, Question(key, "", ())), *said, *scored)
        for key, said, scored in answers
    )
    return TaskComparison(
        name, a.metric, a.score, b.score, paired_difference(a.scores, b.scores), pairs, note
    )


def _as_asked(task: Task | None, blind: bool) -> Task | None:
    """The task with the pictures that were shown."""
    if task is None or not blind:
        return task
    load = task.load
    return replace(task, load=lambda limit: with_other_pictures(load(limit)))


def _blind_note(a: bool, b: bool) -> str:
    if a and b:
        return "A and B were asked blind: pictures are those of other questions, as both saw them"
    if a or b:
        return (
            f"{'A' if a else 'B'} was asked blind, with the pictures of other questions; "
            f"pictures are those that {'B' if a else 'A'} saw"
        )
    return ""


def _questions(task: Task | None, result: TaskResult) -> tuple[dict[str, Question], str]:
    """The questions behind a result by id, or none of them and why."""
    if task is None:
        return {}, "questions and pictures are not shown: the task is not known here"
    questions = {question.id: question for question in task.load(len(result.ids))}
    try:
        score = metric_named(result.metric)
    except ConfigError:
        return {}, f"questions and pictures are not shown: {result.metric!r} is not at hand"
    same = all(
        key in questions and abs(score(reply, questions[key]) - noted) < 1e-6
        for key, reply, noted in zip(result.ids, result.replies, result.scores, strict=True)
    )
    changed = "questions and pictures are not shown: the task has changed since it was answered"
    return (questions, "") if same else ({}, changed)


def _interval(difference: Difference) -> str:
    mark = "*" if difference.significant else " "
    low, high = signed(difference.low), signed(difference.high)
    return f"{signed(difference.points)} [{low}, {high}] {mark}"


def _count_cells(counts: Mapping[Change, int]) -> list[str]:
    return [str(counts[kind]) for kind in CHANGES]


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {**vars(difference), "significant": difference.significant}
