"""Two results answer by answer: what the second model lost and gained, as a table and as HTML."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import escape
from PIL import Image

from slimvlm.chat import open_image
from slimvlm.errors import ConfigError
from slimvlm.evaluation import PERPLEXITY, Result, TaskResult, with_other_pictures
from slimvlm.metrics import METRICS, Difference, paired_difference
from slimvlm.samples import Question, Task

Kind = Literal["lost", "gained", "both wrong", "both right"]
KINDS: tuple[Kind, ...] = ("lost", "gained", "both wrong", "both right")
"""What can become of an answer, the most telling first."""
RIGHT = 0.5
"""A score from here on counts as right; only graded metrics have scores between 0 and 1."""

MAX_BYTES = 4_700_000
"""How large a report may grow before it leaves out pictures."""
MAX_CARDS: Mapping[Kind, int] = {"both wrong": 40, "both right": 12}
"""Cards of one task at most. Answers that were lost or gained are always shown."""
CARD_BYTES = 850
"""Markup of a card without its words and pictures, rounded up."""
SMALL, SMALL_SHOWN, LARGE = 64, 128, 256
"""Pictures up to the first size are enlarged to the second; those above the third are reduced."""
TEMPLATE = Path(__file__).with_name("comparison.html.jinja")


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
    def kind(self) -> Kind:
        """What became of the answer."""
        if self.score_a >= RIGHT:
            return "both right" if self.score_b >= RIGHT else "lost"
        return "gained" if self.score_b >= RIGHT else "both wrong"


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
    def counts(self) -> dict[Kind, int]:
        """Questions of each kind; together they are all questions."""
        return _counts(self.pairs)


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
    def counts(self) -> dict[Kind, int]:
        """Questions of each kind over all tasks."""
        return _counts(tuple(chain(*(task.pairs for task in self.tasks.values()))))


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
            *_count_cells(task.counts),
        ]
        for task in comparison.tasks.values()
    ]
    total = ["all", "", "", _interval(comparison.difference), *_count_cells(comparison.counts)]
    return ["task", "A", "B", "B - A [95 % interval]", *KINDS], [*rows, total]


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The figures of `comparison_rows` as plain values, and the ids of what was lost and gained."""
    tasks = {
        name: {
            "n": len(task.pairs),
            "metric": task.metric,
            "a": task.score_a,
            "b": task.score_b,
            **_difference_json(task.difference),
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
        "all": {**_difference_json(comparison.difference), "counts": comparison.counts},
        "left_out": dict(comparison.left_out),
        "note": comparison.note,
    }


def comparison_html(comparison: Comparison, title: str) -> str:
    """One HTML file with a table and every answer that was lost or gained, pictures included.

    It needs no network and works without scripts. Answers that did not change are shown up to
    `MAX_CARDS` for each task, and pictures until the file reaches `MAX_BYTES`: those of lost
    answers come first.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"points": _points, "plot": _plot_positions(comparison)}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    cards, pictures_left_out = _cards(comparison)
    return template.render(
        title=title,
        comparison=comparison,
        cards=cards,
        kinds=KINDS,
        right=RIGHT,
        hidden={name: _hidden(task) for name, task in comparison.tasks.items()},
        pictures_left_out=pictures_left_out,
        graded=any(s not in (0, 1) for task in comparison.tasks.values() for s in _scores(task)),
    )


@dataclass(frozen=True)
class _Picture:
    """A picture as the report shows it."""

    uri: str
    width: int
    height: int
    enlarged: bool


@dataclass(frozen=True)
class _Card:
    """An answer as the report shows it; without pictures once the file is full."""

    pair: Pair
    pictures: tuple[_Picture, ...]


def _counts(pairs: Sequence[Pair]) -> dict[Kind, int]:
    kinds = [pair.kind for pair in pairs]
    return {kind: kinds.count(kind) for kind in KINDS}


def _scores(task: TaskComparison) -> Iterator[float]:
    for pair in task.pairs:
        yield from (pair.score_a, pair.score_b)


def _reason_to_leave_out(name: str, a: TaskResult | None, b: TaskResult | None) -> str:
    """Why a task has no pairs of answers, or nothing if it has."""
    if a is None or b is None:
        return "only B answered it" if a is None else "only A answered it"
    _require_same(name, a, b)
    if a.metric == PERPLEXITY:
        return f"perplexity {a.score:.2f} of A, {b.score:.2f} of B (lower is better)"
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
    score = METRICS.get(result.metric)
    same = score is not None and all(
        key in questions and abs(score(reply, questions[key]) - noted) < 1e-6
        for key, reply, noted in zip(result.ids, result.replies, result.scores, strict=True)
    )
    changed = "questions and pictures are not shown: the task has changed since it was answered"
    return (questions, "") if same else ({}, changed)


def _points(value: float) -> str:
    """A signed number with one digit, where what rounds to zero has no sign."""
    rounded = round(value, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def _interval(difference: Difference) -> str:
    mark = "*" if difference.significant else " "
    low, high = _points(difference.low), _points(difference.high)
    return f"{_points(difference.points)} [{low}, {high}] {mark}"


def _count_cells(counts: Mapping[Kind, int]) -> list[str]:
    return [str(counts[kind]) for kind in KINDS]


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {**vars(difference), "significant": difference.significant}


def _plot_positions(comparison: Comparison) -> Any:
    """A function from a value to its place on an axis from 0 to 100 that all tasks share."""
    drawn = [*(task.difference for task in comparison.tasks.values()), comparison.difference]
    reach = max(max(abs(d.low), abs(d.high), 1.0) for d in drawn)
    return lambda value: round(50 + 48 * value / reach, 1)


def _shown(task: TaskComparison, kind: Kind) -> list[Pair]:
    """Pairs of one kind that get a card; replies that differ most come first."""
    pairs = [pair for pair in task.pairs if pair.kind == kind]
    if kind not in MAX_CARDS:
        return pairs
    pairs.sort(key=lambda p: (-abs(p.score_a - p.score_b), p.reply_a == p.reply_b))
    return pairs[: MAX_CARDS[kind]]


def _hidden(task: TaskComparison) -> dict[Kind, int]:
    """How many answers of each kind get no card."""
    left = {kind: n - len(_shown(task, kind)) for kind, n in task.counts.items()}
    return {kind: n for kind, n in left.items() if n}


def _cards(comparison: Comparison) -> tuple[dict[str, list[_Card]], int]:
    """Cards by task, and how many of them had to go without their pictures."""
    queue = [
        (rank, turn, task.name, pair)
        for rank, kind in enumerate(KINDS)
        for task in comparison.tasks.values()
        for turn, pair in enumerate(_shown(task, kind))
    ]
    queue.sort(key=lambda entry: entry[:2])  # tasks take turns, so that all get some pictures
    room = MAX_BYTES - sum(CARD_BYTES + _text_bytes(pair) for *_, pair in queue)
    cards: dict[str, list[_Card]] = {name: [] for name in comparison.tasks}
    left_out = 0
    for *_, name, pair in queue:
        pictures = tuple(map(_picture, pair.question.images)) if room > 0 else ()
        size = sum(len(picture.uri) for picture in pictures)
        if size > room:
            pictures, room = (), 0
        room -= size
        left_out += bool(pair.question.images) and not pictures
        cards[name].append(_Card(pair, pictures))
    return cards, left_out


def _text_bytes(pair: Pair) -> int:
    asked = pair.question
    words = (asked.id, asked.prompt, *asked.answers, pair.reply_a, pair.reply_b)
    return sum(len(str(escape(text)).encode()) for text in words)


def _picture(image: Image.Image | Path) -> _Picture:
    """A PNG data URI: small pictures as they are, large ones reduced, in 256 colours."""
    shown = open_image(image)
    if max(shown.size) > SMALL_SHOWN:
        shown.thumbnail((LARGE, LARGE))
        shown = shown.quantize(256)
    buffer = BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    enlarged = max(shown.size) <= SMALL
    scale = SMALL_SHOWN / max(shown.size) if enlarged else 1
    width, height = (max(1, round(side * scale)) for side in shown.size)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return _Picture(f"data:image/png;base64,{encoded}", width, height, enlarged)
