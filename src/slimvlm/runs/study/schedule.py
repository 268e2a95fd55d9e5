"""Which stages of a study are still to do, and in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from slimvlm.runs.study.cache import Cache
from slimvlm.runs.study.cells import Cell
from slimvlm.runs.study.config import StudyConfig
from slimvlm.runs.study.estimate import flops_of, sizes_of
from slimvlm.runs.study.stages import CellStages, Stage, stages_of


@dataclass
class Schedule:
    """All stages of a study.

    Attributes:
        cells: The stages of each cell, in the order of the file.
        ordered: The same in the order in which they are done.
        flops: Estimated work by stage name.
        readers: Stages that read an outcome, by its name.
        keeps_checkpoints: Whether models stay that no open stage needs.
    """

    cells: list[CellStages]
    ordered: list[CellStages] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=dict)
    readers: dict[str, list[Stage]] = field(default_factory=dict)
    keeps_checkpoints: bool = False

    def stages(self) -> list[Stage]:
        """Every stage once, inputs before their readers."""
        found: dict[str, Stage] = {}
        for cell in self.cells:
            for stage in cell.all():
                found.setdefault(stage.name, stage)
        return list(found.values())

    def missing(self, cache: Cache) -> list[Stage]:
        """Stages to do, in order: those that lead to an evaluation that is not there."""
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
        """Whether a stage that is not done reads this one's checkpoint."""
        return any(not cache.is_done(reader) for reader in self.readers.get(stage.name, ()))


def make_schedule(study: StudyConfig, cells: Iterable[Cell]) -> Schedule:
    """Order the cells: those of one pruned model together, cheap ones first.

    So at most one pruned and one trained checkpoint of each worker are on disk at a time, and the
    cells without training answer first among those that share a plan.
    """
    found = [stages_of(study, cell) for cell in cells]
    schedule = Schedule(found, keeps_checkpoints=study.keep_checkpoints)
    for cell in found:
        _count(cell, schedule.flops)
    for stage in schedule.stages():
        for source in stage.inputs:
            schedule.readers.setdefault(source.name, []).append(stage)
    group: dict[str, float] = {}
    for cell in found:
        group[cell.prune.name] = group.get(cell.prune.name, 0.0) + _own(cell, schedule)
    models = list(dict.fromkeys(cell.cell.model for cell in found))
    schedule.ordered = sorted(
        found,
        key=lambda c: (
            models.index(c.cell.model),
            group[c.prune.name],
            c.prune.name,
            _own(c, schedule),
            c.evaluate.name,
        ),
    )
    return schedule


def _count(cell: CellStages, flops: dict[str, float]) -> None:
    """Estimate the work of a cell's stages."""
    sizes = sizes_of(cell.prune.request)
    kept = 1 - (cell.cell.prune.ratio or 0.0)
    if cell.recover is not None:
        trained = sizes_of(cell.recover.request)
        flops[cell.recover.name] = flops_of(cell.recover, kept, trained)
    flops[cell.original.name] = flops_of(cell.original, 1.0, sizes)
    flops[cell.evaluate.name] = flops_of(cell.evaluate, kept, sizes)
    for stage in (*cell.calibrations, cell.plan, cell.prune):
        flops[stage.name] = flops_of(stage, 1.0, sizes)


def _own(cell: CellStages, schedule: Schedule) -> float:
    """Work of what a cell shares with few others."""
    stages = [cell.evaluate, *([cell.recover] if cell.recover else [])]
    return sum(schedule.flops[stage.name] for stage in stages)
