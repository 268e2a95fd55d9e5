"""Store a model's replies to a benchmark and their scores; compare the averages of two models."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import ConfigError, NumericalError, SlimError, shortened
from slimvlm.core.files import write_text
from slimvlm.evaluation import metrics

Kind = Literal["chosen", "free"]
KINDS: tuple[Kind, ...] = ("chosen", "free")
"""Answers chosen out of given ones, and answers in the model's own words."""
CHOICE_BENCHMARKS = ("pope", "scienceqa_img", "mmmu_val", "ai2d", "mme_cognition", "mme_perception")
"""Published benchmarks whose answers are chosen from a few (arXiv:2604.24380, Fig. 2)."""


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
    blind_scores: tuple[float, ...] = ()  # with the pictures of other questions; empty if unknown
    offered: bool = False  # every question gives the answers to choose from
    cut: int = 0  # replies that reached the token limit

    def __post_init__(self) -> None:
        numbers = (self.score, *self.scores, *self.blind_scores, *self.details.values())
        if not all(map(math.isfinite, numbers)):
            raise NumericalError(
                f"NaN or infinity in a score of {self.metric!r}: the model's weights or the metric "
                "gave no number"
            )

    @property
    def blind(self) -> float | None:
        """The blind floor: mean of `blind_scores` in percent; None if not measured."""
        return 100 * fmean(self.blind_scores) if self.blind_scores else None


def kind_of(name: str, task: TaskResult) -> Kind:
    """Say whether the answers of a task are chosen or free."""
    is_chosen = task.offered or task.metric in ("letter", "yes_no") or name in CHOICE_BENCHMARKS
    return "chosen" if is_chosen else "free"


@dataclass(frozen=True)
class Times:
    """Median times of one question at batch size 1, with the fastest and slowest of six runs.

    These two are a 97 % interval of the median.
    """

    prefill_ms: float
    decode_ms: float
    prefill_range_ms: tuple[float, float]
    decode_range_ms: tuple[float, float]


TIMES = tuple(each.name for each in fields(Times))  # fields of a `Result` that are times


@dataclass(frozen=True)
class Result:
    """Scores of one model on some tasks, by task name.

    Attributes:
        prefill_ms: Median time to the first new token of one question, in milliseconds.
        decode_ms: Median time of one further token.
        blind: Whether every question was asked with the pictures of another one.
        limit: Only the first so many questions of each task were asked; None for all.
        batch_size: Questions that were answered at once; None if unknown.
        weight_bytes: Bytes of all weights as they are in memory; None if unknown.
        prefill_range_ms: Fastest and slowest of the runs behind ``prefill_ms``; None if unknown.
        decode_range_ms: The same behind ``decode_ms``.
    """

    model: str
    total_params: int
    backbone_params: int
    tasks: Mapping[str, TaskResult]
    prefill_ms: float
    decode_ms: float
    blind: bool = False
    limit: int | None = None
    batch_size: int | None = None
    dtype: str = ""
    weight_bytes: int | None = None
    prefill_range_ms: tuple[float, float] | None = None
    decode_range_ms: tuple[float, float] | None = None

    @property
    def average(self) -> float:
        """AVG over the tasks that count."""
        counted = {name: task.score for name, task in self.tasks.items() if task.in_average}
        return metrics.average(counted) if counted else float("nan")

    def retention(self, baseline: "Result", floors: "Result | None" = None) -> metrics.Retention:
        """Compute AVG-% relative to another model, over the tasks that both answered.

        The floor of a task, which `Retention.above_floor` takes off both models, is the highest of
        chance, the best constant answer, and the baseline's blind floor: its own, or that of
        ``floors``, the original evaluated blind.

        Raises:
            ConfigError: If they share no task, their questions differ, or only one was blind.
        """
        if floors is not None:
            baseline = baseline.with_blind_floors(floors)
        ours, theirs = self._shared_tasks(baseline)
        floor_of: dict[str, float | Sequence[float]] = {}
        for name, other in theirs.items():
            majorities = [m for m in (ours[name].majority, other.majority) if m is not None]
            floor_of[name] = level = max([ours[name].chance, *majorities])
            if other.blind is not None and metrics.average({name: other.blind}) > level:
                floor_of[name] = other.blind_scores  # one for each question
        chance = {name: task.chance for name, task in ours.items()}
        return metrics.retention(_scores(ours), _scores(theirs), chance, floor_of)

    def by_kind(self) -> "dict[Kind, Result]":
        """Split the tasks that count: a result for each kind of answers that was asked for."""
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

    def difference(self, baseline: "Result") -> metrics.Difference:
        """Compute AVG minus that of another model, over the tasks that both answered."""
        ours, theirs = self._shared_tasks(baseline)
        return metrics.average_difference(_scores(theirs), _scores(ours))

    def with_blind_floors(self, blind: "Result") -> "Result":
        """Add the floors of the same model's result from ``evaluate(..., blind=True)``."""
        if self.blind or not blind.blind:
            raise ConfigError("floors: must be a blind result of a model that was not blind")
        found = {}
        for name, task in self.tasks.items():
            other = blind.tasks.get(name, task)
            if other.ids != task.ids:
                raise ConfigError(f"floors: task {name!r} asked other questions (see --limit)")
            found[name] = replace(task, blind_scores=other.blind_scores)
        return replace(self, tasks=found)

    def timed_as(self, other: "Result") -> "Result":
        """Take over the times of a result whose model is as large: measuring again adds noise."""
        facts = ("total_params", "backbone_params", "weight_bytes", "dtype")
        if any(getattr(self, name) != getattr(other, name) for name in facts):
            return self
        return replace(self, **{name: getattr(other, name) for name in TIMES})

    def _shared_tasks(self, baseline: "Result") -> list[dict[str, TaskResult]]:
        """Return the tasks that both answered; refuse other questions and other pictures."""
        if self.blind != baseline.blind:
            blind, other = ("this", "that") if self.blind else ("that", "this")
            raise ConfigError(
                f"baseline: {blind} result was asked blind, with the pictures of other questions, "
                f"and {other} one was not; their scores do not measure the same"
            )
        counted = [name for name, task in self.tasks.items() if task.in_average]
        shared = [name for name in counted if name in baseline.tasks]
        if not shared:
            raise ConfigError("baseline: it shares no task with this result")
        for name in shared:
            if self.tasks[name].ids != baseline.tasks[name].ids:
                raise ConfigError(f"baseline: task {name!r} asked other questions (see --limit)")
            if self.tasks[name].metric != baseline.tasks[name].metric:
                raise ConfigError(f"baseline: task {name!r} was scored by another metric")
        return [{name: of.tasks[name] for name in shared} for of in (self, baseline)]

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, answers included."""
        by_kind = {kind: part.average for kind, part in self.by_kind().items()}
        average = None if math.isnan(self.average) else self.average  # JSON has no NaN
        values = {**asdict(self), "average": average, "average_by_kind": by_kind}
        write_text(Path(path), json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read what `save` wrote; raise ConfigError if the file is missing or not a result."""
        where, values = f"result {str(path)!r}", read_object(path, "result")
        for derived in ("average", "average_by_kind"):
            values.pop(derived, None)
        try:
            result = built(cls, values)
        except SlimError as error:
            raise ConfigError(f"{where}: cannot be read ({error})") from error
        for name, task in result.tasks.items():
            counts = {len(task.ids), len(task.replies), len(task.scores)}
            if len(counts) > 1 or (task.blind_scores and len(task.blind_scores) not in counts):
                raise ConfigError(
                    f"{where}: task {shortened(name)} must have as many ids as replies and scores"
                )
        return result


def _scores(tasks: Mapping[str, TaskResult]) -> dict[str, Sequence[float]]:
    return {name: task.scores for name, task in tasks.items()}


def read_baseline(path: str | Path, blind: bool = False, floors: bool = False) -> Result:
    """Read a baseline result that must be a blind one (``blind``), or have blind ``floors``."""
    baseline = Result.load(path)
    if baseline.blind != blind:
        which = "blind, the new result is not" if baseline.blind else "not blind, the new result is"
        raise ConfigError(f"baseline {str(path)!r}: it is {which}; their scores do not compare")
    if floors and all(task.blind is None for task in baseline.tasks.values()):
        raise ConfigError(
            f"baseline {str(path)!r}: it has no blind floors; evaluate that model with --floors"
        )
    return baseline
