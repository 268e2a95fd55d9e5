"""Store a model's replies to a benchmark and their scores; compare the averages of two models."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from slimvlm.core.documents import built, digest, read_object
from slimvlm.core.errors import ConfigError, NumericalError, SlimError, raised_as, shortened
from slimvlm.core.files import write_text
from slimvlm.data.samples import Question, Task, identifying_bytes
from slimvlm.evaluation import metrics

Kind = Literal["chosen", "free"]
KINDS: tuple[Kind, ...] = ("chosen", "free")  # multiple-choice; open-ended
CHOICE_BENCHMARKS = ("pope", "scienceqa_img", "mmmu_val", "ai2d", "mme_cognition", "mme_perception")
"""Published benchmarks whose answers are chosen from a few (arXiv:2604.24380, Fig. 2)."""


T = TypeVar("T", bound="Stored")  # typing.Self is not read by beartype


class Stored:
    """A dataclass that is kept as a JSON file."""

    what: ClassVar[str] = "result"  # in messages
    derived: ClassVar[tuple[str, ...]] = ()  # properties that are written and not read

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, which has no NaN."""
        own: Any = self
        found = {name: getattr(self, name) for name in self.derived}
        values = asdict(own) | {n: None if value != value else value for n, value in found.items()}
        write_text(Path(path), json.dumps(values, indent=1, default=asdict) + "\n")

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Read what `save` wrote; raise ConfigError if the file is missing or broken."""
        values = read_object(path, cls.what)
        # files of version 0.2 have the seed of a bootstrap, and whether a result is blind
        unread = (*cls.derived, "seed", *(["blind"] if values.get("blind") is False else []))
        values = {name: value for name, value in values.items() if name not in unread}
        with raised_as(ConfigError, SlimError, f"{cls.what} {str(path)!r}: cannot be read"):
            return built(cls, values)


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task."""

    metric: str
    score: float  # mean in percent; of likelihoods perplexity or loss itself (lower is better)
    chance: float  # score of guessing, in percent
    in_average: bool  # whether the task counts in AVG
    ids: Annotated[tuple[str, ...], Field(min_length=1)]
    replies: tuple[str, ...]
    # one for each question, in [0, 1]; MME's full score is above 100, a likelihood has mean losses
    scores: tuple[float, ...]
    details: Mapping[str, float] = field(default_factory=dict)  # in percent
    majority: float | None = None  # the best constant answer, in percent; None if not ours to score
    blind_scores: tuple[float, ...] = ()  # with the images of other questions; empty if unknown
    offered: bool = False  # every question gives the answers to choose from
    asked: str = ""  # a digest of prompts and answers; empty if unknown
    pictures: tuple[str, ...] = ()  # a digest of those of each question; empty if unknown
    cut: int = 0  # replies that reached the token limit

    def __post_init__(self) -> None:
        numbers = (self.score, *self.scores, *self.blind_scores, *self.details.values())
        if not all(map(math.isfinite, numbers)):
            told = "the model's weights or the metric gave no number"
            raise NumericalError(f"NaN or infinity in a score of {self.metric!r}: {told}")

    @property
    def blind(self) -> float | None:
        """The blind floor: mean of `blind_scores` in percent; None if not measured."""
        return 100 * fmean(self.blind_scores) if self.blind_scores else None

    @property
    def floor(self) -> float:
        """The score of guessing or of the best constant answer, in percent."""
        return max(self.chance, self.majority or 0.0)


def digest_of_pictures(images: Sequence[Image.Image | Path]) -> str:
    """Identify the images of a question or sample; nothing for none."""
    shown = [identifying_bytes(image, may_move=True) for image in images]
    return digest(shown)[:12] if shown else ""


def asked_of(questions: Sequence[Question]) -> dict[str, Any]:
    """Identify questions: the fields ``ids``, ``asked`` and ``pictures`` of a `TaskResult`."""
    pictures = tuple(digest_of_pictures(question.images) for question in questions)
    rows = [[q.id, q.prompt, q.answers, q.choices] for q in questions]
    ids = tuple(question.id for question in questions)
    return {"ids": ids, "asked": digest(rows)[:16], "pictures": pictures}


def kind_of(name: str, task: TaskResult) -> Kind:
    """Say whether the answers of a task are chosen or free."""
    is_chosen = task.offered or task.metric in ("letter", "yes_no") or name in CHOICE_BENCHMARKS
    return "chosen" if is_chosen else "free"


@dataclass(frozen=True, kw_only=True)
class Times:
    """Median times of one question at batch size 1; fastest and slowest of six: 97 % intervals."""

    prefill_ms: float  # to the first new token
    decode_ms: float  # of one further token
    prefill_range_ms: tuple[float, float] | None = None  # None if unknown
    decode_range_ms: tuple[float, float] | None = None


TIMES = tuple(each.name for each in fields(Times))


@dataclass(frozen=True)
class Result(Stored, Times):
    """Scores of one model on some tasks."""

    derived: ClassVar = ("average", "average_by_kind")
    model: str  # name or path
    total_params: int
    backbone_params: int
    tasks: Mapping[str, TaskResult]
    limit: int | None = None  # only the first so many questions of each task; None for all
    batch_size: int | None = None  # questions answered at once; None if unknown
    dtype: str = ""  # of the weights; empty if unknown
    weight_bytes: int | None = None  # of all weights in memory; None if unknown

    @property
    def average(self) -> float:
        """AVG over the tasks that count."""
        counted = {name: task.score for name, task in self.tasks.items() if task.in_average}
        return metrics.average(counted) if counted else float("nan")

    @property
    def average_by_kind(self) -> "dict[Kind, float]":
        """AVG of each kind of answers that occurs."""
        return {kind: part.average for kind, part in self.by_kind().items()}

    def retention(self, baseline: "Result") -> metrics.Retention:
        """Compute AVG-% relative to another model, over the tasks that both answered.

        The floor of a task, which `Retention.above_floor` takes off both models, is the highest of
        chance, the best constant answer, and the baseline's blind floor.

        Raises:
            ConfigError: If they share no task, or their questions differ.
        """
        shared = comparable(self, baseline)
        return metrics.retention(answers_of(self.tasks, baseline.tasks, shared))

    def by_kind(self) -> "dict[Kind, Result]":
        """Split the tasks that count: a result for each kind of answers that occurs."""
        kinds = {n: kind_of(n, task) for n, task in self.tasks.items() if task.in_average}
        return {
            kind: replace(self, tasks={n: self.tasks[n] for n in kinds if kinds[n] == kind})
            for kind in sorted({*kinds.values()})
        }

    def retention_by_kind(self, baseline: "Result") -> dict[Kind, metrics.Retention]:
        """Compute `retention` for each kind of answers of which the baseline has some right."""
        return {
            kind: part.retention(baseline)
            for kind, part in self.by_kind().items()
            if any(any(baseline.tasks[n].scores) for n in part.tasks if n in baseline.tasks)
        }

    def timed_as(self, other: "Result") -> "Result":
        """Take over the times of a result whose model is as large: measuring again adds noise."""
        facts = ("total_params", "backbone_params", "weight_bytes", "dtype")
        if any(getattr(self, name) != getattr(other, name) for name in facts):
            return self
        return replace(self, **{name: getattr(other, name) for name in TIMES})

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read what `save` wrote; raise ConfigError if the file is missing or not a result."""
        result = super().load(path)
        for name, task in result.tasks.items():
            if why := _mistake(name, task):
                raise ConfigError(f"result {str(path)!r}: task {shortened(name)} {why}")
        return result


def _mistake(name: str, task: TaskResult) -> str:
    """Say what is wrong with the numbers of a task; nothing if they fit one another."""
    given = (task.ids, task.replies, task.scores)
    counts = {*map(len, given), *(len(each) for each in (task.blind_scores, task.pictures) if each)}
    is_loss, is_mme = task.metric in metrics.LIKELIHOODS, name in metrics.MME_FULL_SCORES
    scores, most = (*task.scores, *task.blind_scores), math.inf if is_loss or is_mme else 1.0
    if len(counts) > 1 or not 0 <= min(scores) <= max(scores) <= most:
        return "must have as many ids as replies and scores, and scores from 0 to 1"
    # losses are a mean over tokens, which are not stored; lmms-eval has averages of its own
    is_mean = is_mme or task.metric in metrics.METRICS or ":" in task.metric
    ends = [fmean(task.scores)] if is_mean else [min(task.scores), max(task.scores)]
    if not is_loss:
        ends = [100 * end for end in ends]
    elif task.metric == "perplexity":
        ends = [metrics.perplexity(end) for end in ends]
    if not 0.9999 * ends[0] - 0.01 <= task.score <= 1.0001 * ends[-1] + 0.01:
        return f"has the score {task.score:g}, which its scores do not give"
    return ""


def require_same_task(name: str, ours: TaskResult, theirs: TaskResult) -> None:
    """Refuse to compare a task with a baseline's of other questions, images or metric."""
    told = {"ids": "other questions", "metric": "another metric"}
    told |= {"asked": "other prompts or answers", "pictures": "other images"}
    for field_, what in told.items():
        one, other = getattr(ours, field_), getattr(theirs, field_)
        if one and other and one != other:  # neither is unknown
            raise ConfigError(f"task {shortened(name)}: the baseline has {what} (see --limit)")


def comparable(ours: Result, baseline: Result, names: Sequence[str] | None = None) -> Sequence[str]:
    """Refuse a baseline of other questions or metrics on these tasks, and return them.

    Without ``names`` they are the tasks of AVG that both answered.
    """
    tasks, known = ours.tasks, baseline.tasks
    if names is None:
        names = [name for name, task in tasks.items() if task.in_average and name in known]
    if not names:
        raise ConfigError("baseline: it shares no task with this result")
    for name in names:
        if name not in tasks or name not in known:
            raise ConfigError(f"baseline: only one of the two results has task {shortened(name)}")
        require_same_task(name, tasks[name], known[name])
    return names


def task_difference(
    name: str, ours: TaskResult, theirs: TaskResult | None = None
) -> metrics.Estimate:
    """Compute a score, minus the baseline's if given, on the task's scale; of losses 100 times."""
    found = average_of({name: ours}, None if theirs is None else {name: theirs})
    scale = metrics.MME_FULL_SCORES.get(name, 100.0) / 100
    return metrics.Estimate(*(scale * each for each in vars(found).values()))


def average_of(
    ours: Mapping[str, TaskResult],
    theirs: Mapping[str, TaskResult] | None = None,
    names: Iterable[str] | None = None,
) -> metrics.Estimate:
    """Compute AVG over tasks, all or the named ones, minus the baseline's if given."""
    named = list(names or ours)
    bounded = all(ours[name].metric not in metrics.LIKELIHOODS for name in named)
    return metrics.average_difference(answers_of(ours, theirs, named), bounded)


def answers_of(
    ours: Mapping[str, TaskResult], theirs: Mapping[str, TaskResult] | None, names: Iterable[str]
) -> pd.DataFrame:
    """Make a row for each question of tasks: task, picture, scores as shares of the full score."""
    parts = []
    for name in names:
        task, full = ours[name], metrics.MME_FULL_SCORES.get(name, 100.0) / 100
        rows = {"task": name, "picture": task.pictures or "", "ours": np.divide(task.scores, full)}
        if theirs is not None:
            other = theirs[name]
            floor: Any = max(task.floor, other.floor)
            if metrics.average({name: other.blind or 0.0}) > floor:
                floor = 100 * np.divide(other.blind_scores, full)
            rows |= {"theirs": np.divide(other.scores, full)}
            rows |= {"floor": floor / 100, "chance": task.chance / 100}
        parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)


def guessed(result: Result) -> dict[str, str]:
    """Name the tasks of AVG on which a model is not clearly above guessing, and give its score."""
    found = {}
    for name, task in result.tasks.items():
        level = max(task.floor, metrics.average({name: task.blind or 0.0}))
        if task.in_average and ((share := average_of({name: task})).low or 0.0) <= level:
            found[name] = f"{share.value:.1f} %, guessing {level:.1f} %"
    return found


def read_baseline(
    path: str | Path,
    floors: bool = False,
    tasks: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> Result:
    """Read a baseline result, with ``floors`` and of these questions of tasks, or refuse it."""
    baseline = Result.load(path)
    if floors and all(task.blind is None for task in baseline.tasks.values()):
        told = "it has no blind floors; evaluate that model with --floors"
        raise ConfigError(f"baseline {str(path)!r}: {told}")
    for name, task in (tasks or {}).items():
        if (theirs := baseline.tasks.get(name)) is not None and isinstance(task, Task):
            ours = replace(theirs, metric=task.metric, **asked_of(list(task.load(limit))))
            require_same_task(name, ours, theirs)
    return baseline
