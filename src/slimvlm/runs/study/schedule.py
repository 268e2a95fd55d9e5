"""The order of a study's stages, the work of each, and the engines that run them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from slimvlm.core.errors import ConfigError
from slimvlm.data.read import estimated_length
from slimvlm.models.load import anatomy
from slimvlm.runs.cost import Sizes, image_tokens, stage_flops
from slimvlm.runs.recipes import rules
from slimvlm.runs.stages import split
from slimvlm.runs.study.cache import CHECKPOINT, Cache, Outcome, Stage
from slimvlm.runs.study.config import Resources
from slimvlm.runs.study.stages import CellStages, samples_of

ENGINES = ("local", "ray")
PAUSE_S = 0.5
"""Seconds between looks at stages that other workers are doing."""


@dataclass(frozen=True)
class Schedule:
    """All stages of a study."""

    cells: Sequence[CellStages]  # in the order of the file
    keeps_checkpoints: bool = False  # also those that no open stage needs

    def stages(self) -> list[Stage]:
        """List every stage once, inputs before their readers."""
        return list({stage.name: stage for cell in self.cells for stage in cell.all()}.values())

    @cached_property
    def flops(self) -> dict[str, float]:
        """Estimated FLOP of each stage by its name, with some for each GB read or written."""
        counted: dict[str, float] = {}
        trusted = {cell.cell.model: cell.cell.prune.trust_remote_code for cell in self.cells}
        models = {
            name: (anatomy(name), image_tokens(name, trust)) for name, trust in trusted.items()
        }
        for cell in self.cells:
            shape, image = models[cell.cell.model]
            request = (cell.recover or cell.prune).request
            # The order changes no estimate, and shuffling a large file for each cell takes a while.
            in_order = replace(request, prune=replace(request.prune, seed=0))
            samples = split(samples_of(request)[0], in_order)
            lengths = [estimated_length(s, image) for s in samples.calibration]
            sizes = Sizes(
                shape=shape,
                tokens=fmean(lengths or [rules().constants.image_tokens]),
                samples=len(samples.training),
                calibration=len(samples.calibration),
            )
            disk = rules().constants.disk_flops * 2 * shape.total_params / 1e9
            smaller = 1 - (cell.cell.prune.ratio or 0.0)
            for stage in cell.all():
                kept = smaller if stage in (cell.recover, cell.evaluate) else 1.0
                work = stage_flops(stage.kind, stage.request, sizes, kept)
                counted[stage.name] = work + disk * (3 if stage.kind in ("prune", "recover") else 1)
        return counted

    @cached_property
    def ordered(self) -> list[CellStages]:
        """The cells in the order of work: those of one pruned model together, cheap ones first.

        So at most one pruned and one trained checkpoint of each worker are on disk at a time, and
        among cells that share a plan those without training answer first.
        """
        models = list(dict.fromkeys(cell.cell.model for cell in self.cells))
        own, of_plan = {}, dict.fromkeys((cell.prune.name for cell in self.cells), 0.0)
        for cell in self.cells:
            after = (stage for stage in (cell.recover, cell.evaluate) if stage is not None)
            own[cell.evaluate.name] = sum(self.flops[stage.name] for stage in after)
            of_plan[cell.prune.name] += own[cell.evaluate.name]

        def place(cell: CellStages) -> tuple[int, float, str, float, str]:
            plan, name = cell.prune.name, cell.evaluate.name
            return models.index(cell.cell.model), of_plan[plan], plan, own[name], name

        return sorted(self.cells, key=place)

    def missing(self, cache: Cache) -> list[Stage]:
        """List the open stages in order: those that lead to a missing evaluation."""
        wanted: dict[str, Stage] = {}

        def want(stage: Stage) -> None:
            if stage.name in wanted or cache.is_ready(stage):
                return
            for source in stage.inputs:
                want(source)
            wanted[stage.name] = stage

        for cell in self.ordered:
            want(cell.original)
            want(cell.evaluate)
        return list(wanted.values())

    def is_needed(self, stage: Stage, cache: Cache) -> bool:
        """Whether an open stage, or one to be done again, reads this one's checkpoint."""
        readers = [r for r in self._readers.get(stage.name, ()) if not cache.is_ready(r)]
        return any(not cache.is_done(r) or self.is_needed(r, cache) for r in readers)

    @cached_property
    def _readers(self) -> dict[str, list[Stage]]:
        """Stages that read an outcome, by its name."""
        readers: dict[str, list[Stage]] = {}
        for stage in self.stages():
            for source in stage.inputs:
                readers.setdefault(source.name, []).append(stage)
        return readers


@runtime_checkable
class Watcher(Protocol):
    """Receiver of the begin and end of stages."""

    def started(self, stage: Stage) -> None:
        """Note that a stage begins."""

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        """Note that a stage has ended."""


def run_local(schedule: Schedule, missing: Sequence[Stage], cache: Cache, watcher: Watcher) -> None:
    """Do stages one after another in this process, but not those that other workers are doing."""

    def is_needed(stage: Stage) -> bool:
        return schedule.is_needed(stage, cache)

    left, failed = {stage.name: stage for stage in missing}, set[str]()
    while left:
        for stage in left.values():
            flops = schedule.flops[stage.name]
            outcome = _attempt(
                stage, cache, flops, failed, left, is_needed=is_needed, started=watcher.started
            )
            if outcome is not None:
                break
        else:
            time.sleep(PAUSE_S)
            continue
        del left[stage.name]
        failed |= {stage.name} if outcome.error else set()
        clear_checkpoints(schedule, stage, cache)
        watcher.finished(stage, outcome)


def _attempt(
    stage: Stage,
    cache: Cache,
    flops: float,
    failed: Collection[str] = (),
    left: Collection[str] = (),
    wait: bool = False,
    is_needed: Callable[[Stage], bool] = lambda stage: True,
    started: Callable[[Stage], None] = lambda stage: None,
) -> Outcome | None:
    """Do a stage if its inputs are there; None if this worker must look again later.

    Other workers may change the cache at any moment. ``failed`` names stages that this worker saw
    fail, ``left`` those that it has still to do.
    """
    if cache.is_done(stage) and not is_needed(stage):
        return Outcome(stage.name)  # by another worker, and no open stage reads its checkpoint
    absent = {source.name for source in stage.inputs if not cache.is_ready(source)}
    if not absent:
        started(stage)
        return cache.run(stage, flops, wait, is_needed)
    if not absent.isdisjoint(failed):
        return Outcome(stage.name, error=f"{stage.inputs[0].kind} failed")
    if not absent.isdisjoint(left) or cache.is_done(stage):
        return None  # if done, then since the first look, and the next one sees it
    return Outcome(stage.name, error=f"{stage.inputs[0].kind} was removed meanwhile")


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

    The cache must be on storage that all nodes see under the same path. Without an address (also in
    ``RAY_ADDRESS``) Ray is started here, with so many ``workers`` if they are given.
    """
    if find_spec("ray") is None:
        raise ConfigError("engine 'ray' needs Ray: pip install 'slimvlm[ray]'")
    import ray

    options: dict[str, Any] = {"log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        options["address"] = address
    else:
        options["include_dashboard"] = False
        if workers is not None:
            options["num_cpus"] = max(round(workers * resources.cpus), 1)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"engine 'ray': cannot start or reach Ray ({error})") from error
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=3)(ray_task)
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


def ray_task(stage: Stage, root: str, flops: float, *inputs: Outcome) -> Outcome:
    """Do a stage on a Ray worker; Ray calls this when the outcomes of its inputs are there."""
    failed = {done.name for done in inputs if done.error}
    return _attempt(stage, Cache(root), flops, failed, wait=True) or Outcome(stage.name)


def clear_checkpoints(schedule: Schedule, stage: Stage, cache: Cache) -> None:
    """Remove the models that a finished stage has read, where no open stage needs them."""
    if schedule.keeps_checkpoints:
        return
    for source in stage.inputs:
        if source.output == CHECKPOINT and not schedule.is_needed(source, cache):
            cache.drop_checkpoint(source)
