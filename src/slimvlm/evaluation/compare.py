"""Compare two results answer by answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation import metrics
from slimvlm.evaluation.metrics import LIKELIHOODS, MME_FULL_SCORES, Estimate, normalise
from slimvlm.evaluation.results import (
    Kind,
    Result,
    TaskResult,
    average_of,
    require_same_task,
    task_difference,
)

Change = Literal["lost", "gained", "both wrong", "both right"]
CHANGES: tuple[Change, ...] = get_args(Change)  # outcomes of an answer, the most telling first
RIGHT = 0.5  # a score from here on counts as right; only graded metrics have scores between 0 and 1


@dataclass(frozen=True)
class Pair:
    """One question, and the replies and scores in [0, 1] of both models."""

    question: Question  # only its id, if the task is not available
    reply_a: str
    reply_b: str
    score_a: float
    score_b: float

    @property
    def kind(self) -> Change:
        """Outcome of the answer."""
        if self.score_a >= RIGHT:
            return "both right" if self.score_b >= RIGHT else "lost"
        return "gained" if self.score_b >= RIGHT else "both wrong"


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """Questions of one task, or of all, that both models answered, in the task's order."""

    pairs: tuple[Pair, ...]
    difference: Estimate  # B - A, in points; of several tasks that of AVG
    metric: str = ""
    score_a: float | None = None  # mean, in percent; of several tasks unknown
    score_b: float | None = None
    note: str = ""  # why questions and images are missing

    @property
    def counts(self) -> dict[Change, int]:
        """Questions of each kind; together they are all questions."""
        kinds = [pair.kind for pair in self.pairs]
        return {kind: kinds.count(kind) for kind in CHANGES}

    @property
    def flips(self) -> int:
        """Answers that differ: lost, gained, or as right as before in other words."""
        return sum(
            pair.kind in ("lost", "gained") or normalise(pair.reply_a) != normalise(pair.reply_b)
            for pair in self.pairs
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models, answer by answer."""

    name_a: str  # or path
    name_b: str
    params_a: int
    params_b: int
    tasks: Mapping[str, TaskComparison]
    total: TaskComparison  # of all tasks
    left_out: Mapping[str, str]  # why a task is not compared, by its name
    kept: Mapping[Kind, metrics.Retention]  # AVG-% of B


def compare(a: Result, b: Result, tasks: Mapping[str, Task]) -> Comparison:
    """Pair the answers of two models; ``tasks`` give questions and images where unchanged.

    Likelihoods, and tasks that only one model answered, have no pairs: `Comparison.left_out` names
    them.
    """
    left_out: dict[str, str] = {}
    found: dict[str, TaskComparison] = {}
    for name in dict.fromkeys([*a.tasks, *b.tasks]):
        ours, theirs = a.tasks.get(name), b.tasks.get(name)
        if ours is None or theirs is None:
            left_out[name] = f"only {'B' if ours is None else 'A'} has results of it"
            continue
        require_same_task(name, theirs, ours)
        if ours.metric in LIKELIHOODS:
            scores = f"{ours.metric} {ours.score:.2f} of A, {theirs.score:.2f} of B"
            left_out[name] = f"{scores} (lower is better)"
            continue
        questions, why = _questions_of(tasks.get(name), ours)
        asked = [questions.get(key, Question(key, "", ())) for key in ours.ids]
        full = MME_FULL_SCORES.get(name, 100.0) / 100
        right_a, right_b = ([s / full for s in each.scores] for each in (ours, theirs))
        found[name] = TaskComparison(
            metric=ours.metric,
            score_a=ours.score,
            score_b=theirs.score,
            difference=task_difference(name, theirs, ours),
            pairs=tuple(map(Pair, asked, ours.replies, theirs.replies, right_a, right_b)),
            note=why and f"questions and images are not shown: {why}",
        )
    if not found:
        raise ConfigError(f"results of {a.model!r} and {b.model!r}: no task has answers of both")
    return Comparison(
        name_a=a.model,
        name_b=b.model,
        params_a=a.total_params,
        params_b=b.total_params,
        tasks=found,
        total=TaskComparison(
            pairs=tuple(chain(*(task.pairs for task in found.values()))),
            difference=average_of(b.tasks, a.tasks, found),
        ),
        left_out=left_out,
        kept=b.retention_by_kind(a),
    )


def _questions_of(task: Task | None, answered: TaskResult) -> tuple[Mapping[str, Question], str]:
    """Load a task's questions by id, as they were shown; or none, and why."""
    if task is None:
        return {}, "the task is not known here"
    if task.metric != answered.metric:
        return {}, f"the task is now scored by {task.metric!r}"
    try:  # its files may be missing
        known = {question.id: question for question in task.load(len(answered.ids))}
        score = metrics.metric_named(task.metric)
        stored = zip(answered.ids, answered.replies, answered.scores, strict=True)
        if all(n in known and abs(score(r, known[n]) - value) < 1e-6 for n, r, value in stored):
            return known, ""
    except SlimError as error:
        return {}, str(error)
    return {}, "the task has changed since it was evaluated"


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Give the figures of a comparison as plain values, and the ids lost and gained."""

    def figures(task: TaskComparison) -> dict[str, Any]:
        apart = {**task.difference.as_points(), "significant": task.difference.significant}
        return {**apart, "flips": task.flips, "counts": task.counts}

    rows: dict[str, dict[str, Any]] = {}
    for name, task in comparison.tasks.items():
        about = {"n": len(task.pairs), "metric": task.metric, "a": task.score_a, "b": task.score_b}
        rows[name] = {**about, **figures(task), "lost": [], "gained": []}
        for pair in task.pairs:
            rows[name].get(pair.kind, []).append(pair.question.id)
    return {
        **{"a": comparison.name_a, "b": comparison.name_b, "tasks": rows},
        "all": figures(comparison.total),
        "retention_by_kind": {kind: kept.as_json() for kind, kept in comparison.kept.items()},
        "left_out": dict(comparison.left_out),
    }


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Make a row for each task; a ``*`` marks a difference whose 95 % interval excludes 0."""
    rows = []
    for name, task in [*comparison.tasks.items(), ("all", comparison.total)]:
        scores = ["" if score is None else f"{score:.1f}" for score in (task.score_a, task.score_b)]
        change = f"{task.difference:+z.1f} {'*' if task.difference.significant else ' '}"
        counts, flips = task.counts, task.flips
        reworded = flips - counts["lost"] - counts["gained"]
        parts = f"{flips} = {counts['lost']} + {counts['gained']} + {reworded}"
        rows.append([name, *scores, change, parts, *map(str, counts.values())])
    for kind, kept in comparison.kept.items():
        label, blank = f"AVG-% {kind}, floor {kept.floor:.1f}", [""] * (2 + len(CHANGES))
        rows.append([label, "100.0", str(kept), *blank])
    flips_are = "flips = lost + gained + reworded"
    return ["task", "A", "B", "B - A [95 % interval]", flips_are, *CHANGES], rows
