"""Store a model's replies to a benchmark and their scores; compare the averages of two models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

from pydantic import Field

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import ConfigError, NumericalError, SlimError, shortened
from slimvlm.core.files import write_text
from slimvlm.evaluation import metrics


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task.

    Attributes:
        metric: Name of the metric.
        score: Mean in percent; of `slimvlm.evaluation.metrics.LIKELIHOODS` perplexity or loss
            itself (lower is better).
        chance: Score of guessing, in percent.
        in_average: Whether the task counts in AVG.
        ids: Question ids.
        replies: What the model said.
        scores: One score for each question, in [0, 1] but for MME, whose full score is above 100
            (of likelihoods: the mean loss of its answer).
        details: Further numbers of the metric, in percent.
        majority: Score of the best constant answer to these very questions, in percent; None for
            likelihoods, and where the scoring is not ours.
        blind_scores: The scores that the same model gets for the same questions when it is shown
            the pictures of other ones; empty where that was not measured or nothing is shown.
    """

    metric: str
    score: float
    chance: float
    in_average: bool
    ids: Annotated[tuple[str, ...], Field(min_length=1)]
    replies: tuple[str, ...]
    scores: tuple[float, ...]
    details: Mapping[str, float] = field(default_factory=dict)
    majority: float | None = None
    blind_scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.score, *self.scores, *self.blind_scores, *self.details.values())
        if not all(map(math.isfinite, numbers)):
            raise NumericalError(
                f"NaN or infinity in a score of {self.metric!r}: the model's weights or the metric "
                "gave no number"
            )

    @property
    def blind(self) -> float | None:
        """The blind floor: mean of `blind_scores` in percent; None where it was not measured."""
        return 100 * fmean(self.blind_scores) if self.blind_scores else None


@dataclass(frozen=True)
class Times:
    """What one question takes at batch size 1, in milliseconds.

    Attributes:
        prefill_ms: Median time to read it.
        decode_ms: Median time to write one token.
        prefill_range_ms: Fastest and slowest of the runs behind ``prefill_ms``: of six runs, a 97 %
            interval of the median.
        decode_range_ms: The same behind ``decode_ms``.
    """

    prefill_ms: float
    decode_ms: float
    prefill_range_ms: tuple[float, float]
    decode_range_ms: tuple[float, float]


TIMES = tuple(each.name for each in fields(Times))
"""Fields of a `Result` that are times."""


@dataclass(frozen=True)
class Result:
    """Scores of one model on some tasks.

    Attributes:
        model: Name or path of the model.
        total_params: Parameters of the whole model.
        backbone_params: Parameters of its language backbone.
        tasks: Results by task name.
        prefill_ms: See `Times`; in a run's folder measured beside the original, in turn.
        decode_ms: Likewise.
        blind: Whether every question was asked with the pictures of another one.
        limit: Only the first so many questions of each task were asked; None for all.
        batch_size: Questions that were answered at once; None if it is not known.
        dtype: Data type of the weights; empty if it is not known.
        weight_bytes: Bytes of all weights as they are in memory; None if it is not known.
        prefill_range_ms: See `Times`; None if it is not known.
        decode_range_ms: Likewise.
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

    def retention(self, baseline: Result, floors: Result | None = None) -> metrics.Retention:
        """AVG-% of this model relative to another one, over the tasks that both answered.

        The floor of a task, which `Retention.above_floor` takes off both models, is the highest of
        luck, the best constant answer, and the blind floor of the baseline where it was measured.

        Args:
            baseline: Result of the original model.
            floors: The original model evaluated blind, where ``baseline`` has no blind floors yet;
                see `with_blind_floors`.

        Raises:
            ConfigError: If they share no task, their questions differ, or only one was blind.
        """
        if floors is not None:
            baseline = baseline.with_blind_floors(floors)
        require_same_sight(self, baseline)
        shared = self._shared_tasks(baseline)
        return metrics.retention(
            {name: self.tasks[name].scores for name in shared},
            {name: baseline.tasks[name].scores for name in shared},
            {name: self.tasks[name].chance for name in shared},
            {name: _floor(name, self.tasks[name], baseline.tasks[name]) for name in shared},
        )

    def difference(self, baseline: Result) -> metrics.Difference:
        """AVG of this model minus that of another one, over the tasks that both answered.

        Raises:
            ConfigError: If they share no task, their questions differ, or only one was blind.
        """
        require_same_sight(self, baseline)
        shared = self._shared_tasks(baseline)
        return metrics.average_difference(
            {name: baseline.tasks[name].scores for name in shared},
            {name: self.tasks[name].scores for name in shared},
        )

    def with_blind_floors(self, blind: Result) -> Result:
        """Add the floors of the same model's result from ``evaluate(..., blind=True)``.

        Raises:
            ConfigError: If that result was not blind or this one was, or the questions differ.
        """
        if self.blind or not blind.blind:
            raise ConfigError("floors: must be a blind result of a model that was not blind")
        found = {}
        for name, task in self.tasks.items():
            other = blind.tasks.get(name, task)
            if other.ids != task.ids:
                raise ConfigError(f"floors: task {name!r} asked other questions (see --limit)")
            found[name] = replace(task, blind_scores=other.blind_scores)
        return replace(self, tasks=found)

    def timed_as(self, other: Result) -> Result:
        """Take over the times of a result whose model has the same shape.

        Equal shapes take equally long, and a second measurement only adds noise between them. A
        result of another size or type of weights leaves this one as it is.
        """
        facts = ("total_params", "backbone_params", "weight_bytes", "dtype")
        if any(getattr(self, name) != getattr(other, name) for name in facts):
            return self
        return replace(self, **{name: getattr(other, name) for name in TIMES})

    def _shared_tasks(self, baseline: Result) -> list[str]:
        shared = [
            name for name, task in self.tasks.items() if task.in_average and name in baseline.tasks
        ]
        if not shared:
            raise ConfigError("baseline: it shares no task with this result")
        for name in shared:
            if self.tasks[name].ids != baseline.tasks[name].ids:
                raise ConfigError(f"baseline: task {name!r} asked other questions (see --limit)")
        return shared

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, answers included."""
        values = {**asdict(self), "average": self.average}
        write_text(Path(path), json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            ConfigError: If the file is missing or is not a result.
        """
        where, values = f"result {str(path)!r}", read_object(path, "result")
        values.pop("average", None)
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


def require_same_sight(result: Result, baseline: Result) -> None:
    """Refuse to compare a blind result with one that is not."""
    if result.blind != baseline.blind:
        blind, other = ("this", "that") if result.blind else ("that", "this")
        raise ConfigError(
            f"baseline: {blind} result was asked blind, with the pictures of other questions, and "
            f"{other} one was not; their scores do not measure the same"
        )


def read_baseline(path: str | Path, blind: bool = False, floors: bool = False) -> Result:
    """Read a result file to compare a new result with; refuse what would fail after the questions.

    ``blind`` says whether the new result is; ``floors`` whether the baseline must have blind ones.
    """
    baseline = Result.load(path)
    if baseline.blind != blind:
        which = "blind, the new result is not" if baseline.blind else "not blind, the new result is"
        raise ConfigError(f"baseline {str(path)!r}: it is {which}; their scores do not compare")
    if floors and all(task.blind is None for task in baseline.tasks.values()):
        raise ConfigError(
            f"baseline {str(path)!r}: it has no blind floors; evaluate that model with --floors"
        )
    return baseline


def _floor(name: str, task: TaskResult, baseline: TaskResult) -> float | tuple[float, ...]:
    """Find the highest floor of a task: in percent, or a score for each question if it is blind."""
    known = [task.chance, *(m for m in (task.majority, baseline.majority) if m is not None)]
    blind = baseline.blind
    if blind is not None and metrics.average({name: blind}) > max(known):
        return baseline.blind_scores
    return max(known)
