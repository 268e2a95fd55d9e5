"""Where stages run: in this process, or on a Ray cluster. Both leave the same outcomes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from slimvlm.core.errors import ConfigError
from slimvlm.runs.study.cache import Cache, Outcome
from slimvlm.runs.study.config import Resources
from slimvlm.runs.study.schedule import Schedule
from slimvlm.runs.study.stages import Stage
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


def run_local(schedule: Schedule, missing: Sequence[Stage], cache: Cache, watcher: Watcher) -> None:
    """Do stages one after another in this process.

    Stages that another worker on the same folder is at are left to it; this worker goes on with
    the next one that it can do.
    """
    open_stages = list(missing)
    failed: set[str] = set()
    while open_stages:
        stage, outcome = _next_done(open_stages, failed, schedule, cache, watcher)
        if stage is None:
            time.sleep(PAUSE_S)
            continue
        open_stages.remove(stage)
        if outcome.error:
            failed.add(stage.name)
        clear_checkpoints(schedule, stage, cache)
        watcher.finished(stage, outcome)


def _next_done(
    stages: Sequence[Stage],
    failed: set[str],
    schedule: Schedule,
    cache: Cache,
    watcher: Watcher,
) -> tuple[Stage | None, Outcome]:
    """Do the first stage whose inputs are there and that nobody else is at."""
    names = {stage.name for stage in stages}
    for stage in stages:
        if cache.is_done(stage) and not schedule.is_needed(stage, cache):
            return stage, Outcome(stage.name)  # by another worker, who needs it no more either
        absent = [source for source in stage.inputs if not cache.is_ready(source)]
        if any(source.name in failed for source in absent):
            return stage, Outcome(stage.name, error=f"{absent[0].kind} failed")
        if absent:
            if names.isdisjoint(source.name for source in absent):
                if cache.is_done(stage):  # since the look above: its inputs are needed no more
                    continue
                return stage, Outcome(stage.name, error=f"{absent[0].kind} was removed meanwhile")
            continue
        watcher.started(stage)
        needed = partial(schedule.is_needed, stage, cache)
        outcome = cache.run(stage, work, schedule.flops[stage.name], False, needed)
        if outcome is not None:
            return stage, outcome
    return None, Outcome("")


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
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3)(_do)
    stages: dict[Any, Stage] = {}
    references: dict[str, Any] = {}
    for stage in missing:
        inputs = [references[s.name] for s in stage.inputs if s.name in references]
        reference = task.remote(stage, str(cache.root), schedule.flops[stage.name], *inputs)
        references[stage.name] = reference
        stages[reference] = stage
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


def _do(stage: Stage, root: str, flops: float, *inputs: Outcome) -> Outcome:
    """A Ray task; Ray starts it when the outcomes of its inputs are there."""
    kinds = {source.name: source.kind for source in stage.inputs}
    for done in inputs:
        if done.error:
            return Outcome(stage.name, error=f"{kinds[done.name]} failed")
    outcome = Cache(root).run(stage, work, flops, wait=True)
    assert outcome is not None
    return outcome


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
