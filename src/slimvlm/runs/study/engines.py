"""Where stages run: in this process, or on a Ray cluster. Both leave the same outcomes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from slimvlm.core.errors import ConfigError
from slimvlm.runs.study.cache import Cache, Outcome
from slimvlm.runs.study.config import Resources
from slimvlm.runs.study.graph import Stage
from slimvlm.runs.study.schedule import Schedule
from slimvlm.runs.study.work import work

ENGINES = ("local", "ray")
PAUSE_S = 0.5
"""Seconds between looks at stages that other workers are at."""


@runtime_checkable
class Watcher(Protocol):
    """Is told what happens."""

    def started(self, stage: Stage) -> None:
        """A stage begins."""

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        """A stage has ended."""


class State(Enum):
    """How a stage stands, as a worker sees it."""

    WAITING = "this or another worker is to make its inputs"
    READY = "its inputs are there"
    DONE = "its outcome is there, and nobody needs more of it"
    BLOCKED = "an input failed"
    LOST = "an input was removed, and nobody is to make it again"


@dataclass
class Worker:
    """One of those who work on a study's folder: looks how a stage stands, and does it.

    Attributes:
        cache: The folder.
        left: Stages that this worker has still to bring to an end, by name, inputs first.
        failed: Names of those that it saw fail.
        is_needed: Whether anybody still reads a stage's model.
        started: Is told of every stage that it begins.
    """

    cache: Cache
    left: dict[str, Stage] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    is_needed: Callable[[Stage], bool] = lambda stage: True
    started: Callable[[Stage], None] = lambda stage: None

    def state(self, stage: Stage) -> State:
        """How a stage stands; other workers may change that at any moment."""
        if self.cache.is_done(stage) and not self.is_needed(stage):
            return State.DONE
        absent = {source.name for source in stage.inputs if not self.cache.is_ready(source)}
        if not absent:
            return State.READY
        if absent & self.failed:
            return State.BLOCKED
        if absent & self.left.keys() or self.cache.is_done(stage):
            return State.WAITING  # if done, then since the first look, and the next one sees it
        return State.LOST

    def end(self, stage: Stage, flops: float, wait: bool) -> Outcome | None:
        """Bring a stage to its end.

        Args:
            stage: The stage.
            flops: Estimated size of the work.
            wait: Whether to wait for another worker that is at it.

        Returns:
            How it ended; None if that cannot be said now.
        """
        match self.state(stage):
            case State.WAITING:
                return None
            case State.READY:
                self.started(stage)
                return self.cache.run(stage, work, flops, wait, partial(self.is_needed, stage))
            case State.DONE:
                return Outcome(stage.name)  # by another worker, who needs it no more either
            case State.BLOCKED:
                return Outcome(stage.name, error=f"{stage.inputs[0].kind} failed")
            case State.LOST:
                return Outcome(stage.name, error=f"{stage.inputs[0].kind} was removed meanwhile")

    def next_end(self, flops: Mapping[str, float]) -> tuple[Stage, Outcome] | None:
        """Bring the first stage that can be done to its end; None if all must be waited for."""
        for stage in self.left.values():
            outcome = self.end(stage, flops[stage.name], wait=False)
            if outcome is not None:
                del self.left[stage.name]
                self.failed |= {stage.name} if outcome.error else set()
                return stage, outcome
        return None


def run_local(schedule: Schedule, missing: Sequence[Stage], cache: Cache, watcher: Watcher) -> None:
    """Do stages one after another in this process.

    Stages that another worker on the same folder is at are left to it; this worker goes on with
    the next one that it can do.
    """
    worker = Worker(
        cache,
        {stage.name: stage for stage in missing},
        is_needed=lambda stage: schedule.is_needed(stage, cache),
        started=watcher.started,
    )
    while worker.left:
        ended = worker.next_end(schedule.flops)
        if ended is None:
            time.sleep(PAUSE_S)
            continue
        clear_checkpoints(schedule, ended[0], cache)
        watcher.finished(*ended)


def run_ray(
    schedule: Schedule,
    missing: Sequence[Stage],
    cache: Cache,
    watcher: Watcher,
    resources: Resources,
    workers: int | None = None,
    address: str | None = None,
) -> None:
    """Do stages as tasks of a Ray cluster, as many at once as its resources allow.

    Args:
        schedule: The study's stages.
        missing: Those to do, inputs first.
        cache: On storage that all nodes see under the same path.
        watcher: Is told what happens.
        resources: What one stage needs.
        workers: Stages at once, where Ray is started here; by default what the machine has.
        address: A running cluster; by default the one in ``RAY_ADDRESS``, else Ray is started here.

    Raises:
        ConfigError: If Ray is not installed or the cluster cannot be reached.
    """
    ray = _connected(resources, workers, address)
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3)(done_by_ray)
    references: dict[str, Any] = {}
    for stage in missing:
        inputs = [references[s.name] for s in stage.inputs if s.name in references]
        flops = schedule.flops[stage.name]
        references[stage.name] = task.remote(stage, str(cache.root), flops, *inputs)
    stages = {references[stage.name]: stage for stage in missing}
    waiting = list(stages)
    try:
        while waiting:
            (reference,), waiting = ray.wait(waiting, num_returns=1)
            stage = stages[reference]
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:  # its worker died, more often than Ray retries
                outcome = cache.failed(stage, error)
            clear_checkpoints(schedule, stage, cache)
            watcher.finished(stage, outcome)
    finally:
        ray.shutdown()


def done_by_ray(stage: Stage, root: str, flops: float, *inputs: Outcome) -> Outcome:
    """A task of Ray, which starts it when the outcomes of the stage's inputs are there."""
    worker = Worker(Cache(root), failed={done.name for done in inputs if done.error})
    return worker.end(stage, flops, wait=True) or Outcome(stage.name)


def _connected(resources: Resources, workers: int | None, address: str | None) -> Any:
    if find_spec("ray") is None:
        raise ConfigError("engine 'ray' needs Ray: pip install 'slimvlm[ray]'")
    import ray

    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        options = {"address": address, "log_to_driver": False}
    elif workers is not None:
        options["num_cpus"] = max(round(workers * resources.cpus), 1)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"engine 'ray': cannot start or reach Ray ({error})") from error
    return ray


def clear_checkpoints(schedule: Schedule, stage: Stage, cache: Cache) -> None:
    """Remove the models that a finished stage has read, where no open stage needs them."""
    if schedule.keeps_checkpoints:
        return
    for source in stage.inputs:
        if source.makes_checkpoint and not schedule.is_needed(source, cache):
            cache.drop_checkpoint(source)
