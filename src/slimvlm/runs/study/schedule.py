"""Which stages of a study are still to do, in which order, and how much work each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from slimvlm.data.read import estimated_length
from slimvlm.evaluation.tasks import builtin_tasks
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.load import anatomy
from slimvlm.pruning.walk.distil import PASSES
from slimvlm.runs.estimate import Sizes, image_tokens
from slimvlm.runs.recipes import rules
from slimvlm.runs.request import Request
from slimvlm.runs.stages import split
from slimvlm.runs.study.cache import Cache
from slimvlm.runs.study.graph import CellStages, Stage
from slimvlm.runs.study.work import samples_of
from slimvlm.scoring.criteria import CRITERIA

_WALK_PASSES = 3
"""What a walk without local steps takes, in forward passes over its samples; see
docs/results.md."""


@dataclass(frozen=True)
class Schedule:
    """All stages of a study.

    Attributes:
        cells: The stages of each cell, in the order of the file.
        keeps_checkpoints: Whether models stay that no open stage needs.
    """

    cells: Sequence[CellStages]
    keeps_checkpoints: bool = False

    def stages(self) -> list[Stage]:
        """Every stage once, inputs before their readers."""
        return list({stage.name: stage for cell in self.cells for stage in cell.all()}.values())

    @cached_property
    def flops(self) -> dict[str, float]:
        """A rough count of each stage's work, by its name."""
        counted: dict[str, float] = {}
        trusted = {cell.cell.model: cell.cell.prune.trust_remote_code for cell in self.cells}
        models = {
            name: (anatomy(name), image_tokens(name, trust)) for name, trust in trusted.items()
        }
        for cell in self.cells:
            sizes = _sizes_of((cell.recover or cell.prune).request, *models[cell.cell.model])
            smaller = 1 - (cell.cell.prune.ratio or 0.0)
            for stage in cell.all():
                kept = smaller if stage in (cell.recover, cell.evaluate) else 1.0
                counted[stage.name] = _flops_of(stage, kept, sizes)
        return counted

    @cached_property
    def ordered(self) -> list[CellStages]:
        """The cells in the order in which they are done: those of one pruned model together.

        Cheap ones come first, so at most one pruned and one trained checkpoint of each worker are
        on disk at a time, and the cells without training answer first among those that share a
        plan.
        """
        models = list(dict.fromkeys(cell.cell.model for cell in self.cells))
        shared: dict[str, float] = {}
        for cell in self.cells:
            shared[cell.prune.name] = shared.get(cell.prune.name, 0.0) + self._own(cell)

        def place(cell: CellStages) -> tuple[int, float, str, float, str]:
            plan = cell.prune.name
            model = models.index(cell.cell.model)
            return model, shared[plan], plan, self._own(cell), cell.evaluate.name

        return sorted(self.cells, key=place)

    def _own(self, cell: CellStages) -> float:
        """Work of what a cell shares with few others."""
        return sum(self.flops[s.name] for s in (cell.evaluate, cell.recover) if s is not None)

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
        """Whether a stage that is still to do, or to do again, reads this one's checkpoint."""
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


def _sizes_of(request: Request, shape: Anatomy, image: int) -> Sizes:
    """Sizes for a request to a model whose pictures have so many tokens."""
    # The order changes no estimate, and to shuffle a large file for each cell would take a while.
    in_order = replace(request, prune=replace(request.prune, seed=0))
    found = split(samples_of(request), in_order)
    return Sizes(
        shape=shape,
        tokens=fmean(
            [estimated_length(s, image) for s in found.calibration]
            or [rules().constants.image_tokens]
        ),
        samples=len(found.training),
    )


def _flops_of(stage: Stage, kept: float, sizes: Sizes) -> float:
    """A rough count of a stage's work, reading and writing of models included.

    Args:
        stage: The stage.
        kept: Share of the backbone that the model it works on has.
        sizes: Of the model and its data.
    """
    request, constants = stage.request, rules().constants
    prune, recover = request.prune, request.recover
    disk = constants.disk_flops * 2 * sizes.shape.total_params / 1e9
    shown = sizes.pass_flops * prune.samples
    match stage.kind:
        case "calibrate":
            row = CRITERIA[prune.criterion[0]]
            return disk + shown * row.capture.passes
        case "prune":
            if prune.data is None:
                return 3 * disk
            learnt = PASSES * (prune.ratio or 0.0) if prune.local_steps is None else 0.0
            return 3 * disk + shown * (_WALK_PASSES + 3 * learnt)
        case "recover":
            assert recover is not None
            return 3 * disk + sizes.training_flops(recover, kept)
    return disk + sizes.pass_flops * kept * _questions(stage) * constants.reply_passes


def _questions(stage: Stage) -> int:
    """Questions that a model is asked, those without their pictures included."""
    asked, constants, own = stage.request.questions, rules().constants, builtin_tasks()
    assert asked is not None
    total = 0
    for name in (part.strip() for part in asked.tasks.split(",")):
        ours = name == "demo" or name in own
        each = asked.limit or (constants.own_questions if ours else constants.benchmark_questions)
        total += each * (len(own) if name == "demo" else 1)
    return total * (2 if asked.floors else 1)
