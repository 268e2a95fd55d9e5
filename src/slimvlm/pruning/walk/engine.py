"""One pass through the decoder layers, of a model in memory or in files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from slimvlm.core.progress import progress
from slimvlm.models.anatomy import WIDTH_UNITS
from slimvlm.models.parts import Parts
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import cut_layer_
from slimvlm.pruning.repair import REPAIRS, SEAM, writers_of_layer
from slimvlm.pruning.walk.layer import LayerOutcome, LayerWalk, Steps
from slimvlm.pruning.walk.result import (
    LayerReport,
    MatrixReport,
    StoredWeights,
    Walked,
    WalkReport,
    assign_,
    entry_of,
)
from slimvlm.pruning.walk.streams import PREFIX, SLICED, Streams
from slimvlm.scoring.batches import Batch, TokenWeights
from slimvlm.scoring.layerwise.stores import Store
from slimvlm.scoring.obs import removal_order
from slimvlm.scoring.unit_scores import Scores

_TRIAL_PLAN = "trial-plan"
_TRIAL = "trial"
"""The stream of the trial: hidden states after whole layers."""
_TRIED = 2
"""Layers that are tried, spread evenly over those that lose units."""


@dataclass(frozen=True)
class WalkConfig:
    """The plans of a walk, and the batches that it fits and judges with."""

    plans: Sequence[Plan]  # to try; the one that costs a few layers least is walked
    chooses: bool  # whether the walk chooses units; the plans then only say how many stay
    batches: Sequence[Batch]  # for choices and fits
    held_out: Sequence[Batch]  # to confirm and judge
    steps: Steps
    token_weights: TokenWeights | None = None  # by role; None: all weigh 1


@dataclass
class Walk:
    """Walk all layers over stored batches; finished layers are stored, to resume a stopped run.

    If the hidden states are gone and the stored outcomes are not, the walked layers are run again,
    without choosing or fitting anything.
    """

    streams: Streams
    results: Store
    config: WalkConfig

    def __post_init__(self) -> None:
        steps, can_judge = self.config.steps, len(self.streams.held_out) > 0
        self._depth = len(Parts(self.streams.runner.model).layers)
        # Held-out answers decide between the new weights and plain slices.
        self._is_judged = steps.repair == "auto" and can_judge and not self.streams.has_several

    @torch.no_grad()
    def run(self) -> Walked:
        """Walk all layers that are not walked yet."""
        if not self.results.has(_TRIAL_PLAN):
            chosen = cheapest_plan(self.streams, self.config.plans)
            self.results.write(_TRIAL_PLAN, 0, {}, chosen.to_dict())
            self.results.finish(_TRIAL_PLAN)
        plan = Plan.from_dict(self.results.about(_TRIAL_PLAN, 0))
        outcomes: list[LayerOutcome] = []
        for index in progress(plan.layers, "walk"):
            if not self.results.has(entry_of(index)):
                self._replay(plan, outcomes)
                self._walk(plan, index)
            outcomes.append(self._recall(index))
            plan = plan.with_units(index, outcomes[-1].kept)
        notes = []
        if idle := sorted(set(plan.layers) - self.streams.layers_run):
            numbers = ", ".join(map(str, idle))
            notes.append(f"no calibration batch runs layer {numbers}: it stays as it is")
        if SEAM in self.config.steps.kinds and plan.layers[0] > 0:
            notes.append("the first layers are gone: no layer before them could be repaired")
        notes += [note for outcome in outcomes for note in outcome.notes]
        report = WalkReport([outcome.report for outcome in outcomes], notes=notes)
        weights = StoredWeights(self.results, plan.layers)
        walked = Walked(plan, report, weights, _scores(plan, outcomes))
        if not self._is_judged:
            return walked
        self._replay(plan, outcomes)
        sliced, loss = (self.streams.answer_loss(s, self._depth) for s in (SLICED, PREFIX))
        report = replace(report, loss_sliced=sliced, loss=min(sliced, loss))
        if loss <= sliced:
            return replace(walked, report=report)
        note = f"held-out loss {loss:.4f} with new weights: they were dropped"
        report = replace(report, layers=(), notes=(*notes, note))
        return replace(walked, report=report, weights={})

    @contextmanager
    def _layer(self, plan: Plan, index: int) -> Iterator[tuple[nn.Module, int]]:
        """Load a layer, to be changed, and yield it with the number of the next layer that stays.

        The original's hidden states around it come first if the walk aims at them. At the end the
        states that the layer has read are dropped.
        """
        place = plan.layers.index(index)
        begin = index if place else 0  # the original runs the layers that go before it, too
        end = (*plan.layers, self._depth)[place + 1]
        steps, removes_layers = self.config.steps, len(plan.layers) < self._depth
        if aims_at_original(steps.repair, steps.local.count, removes_layers):
            self.streams.advance_original(begin, end)
        layer, runner = Parts(self.streams.runner.model).layers[index], self.streams.runner
        with runner.source.layer(index, runner.device), _unchanged(layer):
            yield layer, end
        self.streams.forget(begin, end)

    def _replay(self, plan: Plan, outcomes: Sequence[LayerOutcome]) -> None:
        """Compute the hidden states after the walked layers, if a stopped walk has left none."""
        layers = [outcome.report.index for outcome in outcomes]
        after = (*plan.layers, self._depth)[len(layers)]
        if not layers or self.streams.runner.store.has(f"{PREFIX}-{after}"):
            return
        weights = StoredWeights(self.results, layers)
        for index in progress(layers, "walked layers"):
            with self._layer(plan, index) as (layer, end):
                cut_layer_(self.streams.runner.model, plan, index)
                if self._is_judged:
                    self.streams.pass_on(SLICED, index, end, self.streams.held_out)
                for place, path in weights:
                    if place == index:
                        assign_(layer, path, weights[place, path])
                self.streams.pass_on(PREFIX, index, end, self.streams.places)

    def _walk(self, plan: Plan, index: int) -> None:
        """Walk one layer, and store its outcome."""
        config = self.config
        with self._layer(plan, index) as (_, end):
            how = (config.chooses, config.steps, self._is_judged)
            outcome = LayerWalk(self.streams, plan, index, end, *how).go()
            scores = {f"scores.{unit}": values for unit, values in outcome.scores.items()}
            about = asdict(replace(outcome, scores={}, weights={}))
            about["weights"] = list(outcome.weights)
            self.results.write(entry_of(index), 0, {**outcome.weights, **scores}, about)
            self.results.finish(entry_of(index))

    def _recall(self, index: int) -> LayerOutcome:
        """The stored outcome of a walked layer; its new weights stay in the store."""
        about = self.results.about(entry_of(index), 0)
        stored = self.results.read(entry_of(index), 0, torch.device("cpu"))
        report, distilled = about["report"], about["report"]["distilled"]
        refits = {path: MatrixReport(**row) for path, row in report["refits"].items()}
        return LayerOutcome(
            LayerReport(index, refits, None if distilled is None else tuple(distilled)),
            {name: tuple(units) for name, units in about["kept"].items()},
            {unit: stored[f"scores.{unit}"] for unit in WIDTH_UNITS if f"scores.{unit}" in stored},
            {},
            about["notes"],
        )


def aims_at_original(repair: str, local_steps: int | None, removes_layers: bool) -> bool:
    """Whether a walk fits layers to the original's hidden states; ``local_steps`` None: unknown."""
    return local_steps != 0 or (SEAM in REPAIRS[repair] and removes_layers)


def _scores(plan: Plan, outcomes: Sequence[LayerOutcome]) -> Scores | None:
    """The scores that units were chosen by; layers without a choice have zeros."""
    found: dict[str, Any] = {}
    for unit in WIDTH_UNITS:
        if not any(unit in outcome.scores for outcome in outcomes):
            continue
        values = {each.report.index: each.scores[unit] for each in outcomes if unit in each.scores}
        found[unit] = [
            values.get(index, torch.zeros(shape.units(unit)))
            for index, shape in enumerate(plan.before.layers)
        ]
    return Scores("obs", **found) if found else None


@contextmanager
def _unchanged(layer: nn.Module) -> Iterator[None]:
    """Put parameters and attributes of a layer back at the end."""
    before = [
        (module, {**vars(module), "_parameters": dict(module._parameters)})
        for module in layer.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def cheapest_plan(streams: Streams, plans: Sequence[Plan]) -> Plan:
    """Choose the plan whose units cost some layers least when they go and the others are refitted.

    In a few layers of the original, all units that any plan removes are removed one after another,
    cheapest first (`slimvlm.scoring.obs`). A plan's cost there is the squared error of attention
    and MLP together when as many are gone as it says, as a share of their output.
    """
    if len(plans) == 1:
        return plans[0]
    first = plans[0]
    losing = [
        index
        for index in first.layers
        if any(len(first.kept(u)[index]) < first.before.layers[index].units(u) for u in WIDTH_UNITS)
    ]
    step = len(losing) / (_TRIED + 1)
    tried = sorted({losing[int(step * (place + 1))] for place in range(_TRIED)})
    costs, runner = [0.0] * len(plans), streams.runner
    for index in range(tried[-1] + 1):
        with runner.source.layer(index, runner.device):
            if index in tried:
                found = _costs(streams, plans, index)
                costs = [cost + more for cost, more in zip(costs, found, strict=True)]
            if index < tried[-1]:
                streams.pass_on(_TRIAL, index, index + 1, streams.fitted)
        runner.store.drop(f"{_TRIAL}-{index}")
    return plans[costs.index(min(costs))]


def _costs(streams: Streams, plans: Sequence[Plan], index: int) -> list[float]:
    """The error that each plan causes in a layer, as a share of what the layer writes."""
    before, total, written = plans[0].before, [0.0] * len(plans), 0.0
    layer = Parts(streams.runner.model).layers[index]
    for writer in writers_of_layer(layer, index, before.backbone):
        moments, weight = streams.moments(_TRIAL, writer, streams.fitted), writer.weight
        channels = torch.arange(weight.shape[1], device=weight.device)
        written += moments.square(weight.double(), channels, centred=False)
        units = before.layers[index].units(writer.unit)
        counts = [units - len(plan.kept(writer.unit)[index]) for plan in plans]
        costs = removal_order(weight, moments.gram, units, stop=max(counts)).costs.cpu()
        for place, count in enumerate(counts):
            total[place] += float(costs[:count].sum())
    return [cost / written for cost in total]
