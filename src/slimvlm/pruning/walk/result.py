"""The result of a walk: a plan, a report of every layer, new weights."""

from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.models.parts import Parts
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import prune_, tower_of
from slimvlm.scoring.stores import Store
from slimvlm.scoring.unit_scores import Scores

Weights = Mapping[tuple[int, str], Tensor]
"""Parameters by the original number of their layer and their path in the layer."""


@dataclass(frozen=True)
class MatrixReport:
    """How a matrix was refitted; errors are those on validation tokens, if there are some."""

    kind: str  # of repair
    sliced: float  # squared error of the output as a share of the target, if it is only cut
    repaired: float  # the same of the new weights
    share: float  # how much of the refit is kept: 1 all, 0 none


@dataclass(frozen=True)
class LayerReport:
    """Refits and local distillation of one layer."""

    index: int  # the original number of the layer
    refits: Mapping[str, MatrixReport] = field(default_factory=dict)  # by path
    # error of the layer's output before and after its local steps, as `distil_` measures it
    distilled: tuple[float, float] | None = None


@dataclass(frozen=True)
class WalkReport:
    """Report of a walk: its layers and its losses on validation batches."""

    layers: Sequence[LayerReport] = ()
    loss_sliced: float | None = None
    """Mean answer loss on the validation batches with plain slices; None if not measured."""
    loss: float | None = None
    """The same with the new weights."""
    notes: Sequence[str] = ()
    """Parts that were not repaired, and the reasons."""

    @property
    def refits(self) -> dict[str, MatrixReport]:
        """All refitted matrices, named ``<original layer>.<path>``."""
        return {f"{r.index}.{path}": row for r in self.layers for path, row in r.refits.items()}

    def summary(self) -> str:
        """Summarize in one line how much of each kind of repair is kept, and the errors."""
        rows = self.refits.values()
        kinds = dict.fromkeys(row.kind for row in rows)
        kept = {kind: fmean(row.share for row in rows if row.kind == kind) for kind in kinds}
        parts = [f"{kind} {share:.2g}" for kind, share in kept.items() if share]
        line = f"repair: {', '.join(parts) or 'nothing kept'}"
        if rows:
            sliced, repaired = fmean(r.sliced for r in rows), fmean(r.repaired for r in rows)
            line += f"; mean output error {sliced:.2%} -> {repaired:.2%}"
        distilled = [report.distilled for report in self.layers if report.distilled is not None]
        if distilled:
            before, after = (fmean(pair[i] for pair in distilled) for i in (0, 1))
            line += f"; local distillation {before:.2%} -> {after:.2%}"
        if self.loss_sliced is not None and self.loss is not None:
            line += f"; validation loss {self.loss_sliced:.4f} -> {self.loss:.4f}"
        return "; ".join([line, *self.notes])


@dataclass(frozen=True)
class Walked:
    """The outcome of a walk; nothing is changed until it is applied."""

    plan: Plan
    report: WalkReport = field(default_factory=WalkReport)
    weights: Weights = field(default_factory=dict)
    """Parameters that are not plain slices of the original's; cut already."""
    scores: Scores | None = None
    """The scores that units were chosen by; None if the walk chose none."""
    tower: "Walked | None" = None
    """The outcome for the vision tower."""

    def summary(self) -> str:
        """Summarize the plan and its repair, a line each."""
        lines = [self.plan.summary()]
        if self.plan.needs_retype:
            kind = self.plan.after.text_type
            lines.append(f"language model written as {kind!r}, which computes the same")
        if self.report.layers or self.report.notes:
            lines.append(self.report.summary())
        if self.tower is not None and (self.tower.report.layers or self.tower.report.notes):
            lines.append(f"vision tower: {self.tower.report.summary()}")
        return "\n".join(lines)

    def apply_(self, model: PreTrainedModel) -> None:
        """Cut the original to the plan and set the new weights; raise as `slimvlm.prune_`."""
        prune_(model, self.plan)
        given = [(Parts(model).layers, self)]
        if self.tower is not None:
            given.append((Parts(tower_of(model)).layers, self.tower))
        for layers, walked in given:
            for (index, path), value in walked.weights.items():
                assign_(layers[walked.plan.layers.index(index)], path, value)


def assign_(layer: nn.Module, path: str, value: Tensor) -> None:
    """Set a parameter of a layer, on the device of the old one; shapes may differ."""
    parent, _, name = path.rpartition(".")
    owner = layer.get_submodule(parent)
    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(value.to(old.device), old.requires_grad))


class StoredWeights(UserDict[tuple[int, str], Any]):
    """The new weights of walked layers, read from a store one at a time."""

    def __init__(self, store: Store, layers: Sequence[int]) -> None:
        self._store = store
        stored = ((index, store.about(entry_of(index), 0)["weights"]) for index in layers)
        self.data = dict.fromkeys((index, path) for index, paths in stored for path in paths)

    def __getitem__(self, key: tuple[int, str]) -> Tensor:
        index, path = key
        return self._store.read(entry_of(index), 0, torch.device("cpu"), path)[path]


def entry_of(index: int) -> str:
    """Name of a layer's outcome in a store."""
    return f"walked-{index}"
