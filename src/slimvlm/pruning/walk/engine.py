"""One pass through the decoder layers, of a model in memory or in files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from slimvlm.core.progress import progress
from slimvlm.models.anatomy import WIDTH_UNITS
from slimvlm.models.parts import decoder_layers
from slimvlm.planning.plan import Plan
from slimvlm.pruning.cut import cut_layer_
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
from slimvlm.pruning.walk.trial import cheapest_plan
from slimvlm.pruning.writers import REPAIRS, SEAM
from slimvlm.scoring.layerwise.stores import Store
from slimvlm.scoring.unit_scores import Scores

_TRIAL = "trial-plan"


@dataclass
class Walk:
    """A walk over stored batches. What is done is stored, so that it can go on.

    Attributes:
        streams: The original's layers and the states between them.
        results: Keeps what came of each layer. Where the states are gone and these are not, the
            walked layers are run again, without choosing or fitting anything.
        plans: What stays; with ``chooses`` how much does, one or more plans to choose from.
        chooses: Whether the units of layers that lose some are to be chosen.
        steps: What is done in a layer.
    """

    streams: Streams
    results: Store
    plans: Sequence[Plan]
    chooses: bool
    steps: Steps

    @torch.no_grad()
    def run(self) -> Walked:
        """Walk all layers that are not walked yet.

        Raises:
            NumericalError: If NaN or infinity appears; the message says in which layer.
        """
        plan = self._settled()
        outcomes: list[LayerOutcome] = []
        for index in progress(plan.layers, "walk"):
            if not self.results.has(entry_of(index)):
                self._replay(plan, outcomes)
                self._walk(plan, index)
            outcomes.append(self._recall(index))
            plan = plan.with_units(index, outcomes[-1].kept)
        if self._is_judged:
            self._replay(plan, outcomes)
        notes = [*self._notes(plan), *(note for each in outcomes for note in each.notes)]
        report = WalkReport([each.report for each in outcomes], notes=notes)
        walked = Walked(
            plan, report, StoredWeights(self.results, plan.layers), _scores(plan, outcomes)
        )
        return self._judgement(walked) if self._is_judged else walked

    @property
    def _is_judged(self) -> bool:
        """Whether held-out answers decide between what was walked and plain slices."""
        can_tell = not self.streams.has_several
        return self.steps.repair == "auto" and len(self.streams.held_out) > 0 and can_tell

    @cached_property
    def _depth(self) -> int:
        return len(decoder_layers(self.streams.runner.model))

    def _settled(self) -> Plan:
        """The one plan that is walked."""
        if not self.results.has(_TRIAL):
            chosen = cheapest_plan(self.streams, self.plans)
            self.results.write(_TRIAL, 0, {}, chosen.to_dict())
            self.results.finish(_TRIAL)
        return Plan.from_dict(self.results.about(_TRIAL, 0))

    def _notes(self, plan: Plan) -> Iterator[str]:
        if idle := sorted(set(plan.layers) - self.streams.layers_run):
            numbers = ", ".join(map(str, idle))
            yield f"no calibration batch runs layer {numbers}: it stays as it is"
        if SEAM in self.steps.kinds and plan.layers[0] > 0:
            yield "the first layers are gone: no layer before them could be repaired"

    @contextmanager
    def _layer(self, plan: Plan, index: int) -> Iterator[tuple[nn.Module, int]]:
        """Load a layer, with the original's states around it where these are aimed at.

        Yields:
            The layer, which may be changed, and the number of the next layer that stays. At the
            end, the states that it has read are dropped.
        """
        place = plan.layers.index(index)
        begin = index if place else 0  # the original runs the layers that go before it, too
        end = (*plan.layers, self._depth)[place + 1]
        loses_layers = len(plan.layers) < plan.before.num_layers
        if aims_at_original(self.steps.repair, self.steps.local.count, loses_layers):
            self.streams.advance_original(begin, end)
        layer, runner = decoder_layers(self.streams.runner.model)[index], self.streams.runner
        with runner.source.layer(index, runner.device), unchanged(layer):
            yield layer, end
        self.streams.forget(begin, end)

    def _replay(self, plan: Plan, outcomes: Sequence[LayerOutcome]) -> None:
        """Compute the states behind the walked layers, if a stopped walk has left none."""
        layers = [outcome.report.index for outcome in outcomes]
        behind = (*plan.layers, self._depth)[len(layers)]
        if not layers or self.streams.runner.store.has(f"{PREFIX}-{behind}"):
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
        """Walk one layer, and store what came of it."""
        with self._layer(plan, index) as (_, end):
            outcome = LayerWalk(
                self.streams,
                plan,
                index,
                end,
                chooses=self.chooses,
                steps=self.steps,
                judged=self._is_judged,
            ).go()
            scores = {f"scores.{unit}": values for unit, values in outcome.scores.items()}
            about = asdict(replace(outcome, scores={}, weights={}))
            about["weights"] = list(outcome.weights)
            self.results.write(entry_of(index), 0, {**outcome.weights, **scores}, about)
            self.results.finish(entry_of(index))

    def _recall(self, index: int) -> LayerOutcome:
        """What came of a walked layer; its new weights stay in the store."""
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

    def _judgement(self, walked: Walked) -> Walked:
        """What held-out answers leave of the new weights: all, or none."""
        sliced, loss = (self.streams.answer_loss(s, self._depth) for s in (SLICED, PREFIX))
        report = replace(walked.report, loss_sliced=sliced, loss=min(sliced, loss))
        if loss <= sliced:
            return replace(walked, report=report)
        note = f"held-out loss {loss:.4f} with new weights: they were dropped"
        report = replace(report, layers=(), notes=(*report.notes, note))
        return replace(walked, report=report, weights={})


def aims_at_original(repair: str, local_steps: int | None, loses_layers: bool) -> bool:
    """Whether a walk fits layers to the original's own hidden states.

    Args:
        repair: A key of `REPAIRS`.
        local_steps: Optimizer steps on each layer; None for a number that the plan decides.
        loses_layers: Whether the plan removes layers.
    """
    return local_steps != 0 or (SEAM in REPAIRS[repair] and loses_layers)


def _scores(plan: Plan, outcomes: Sequence[LayerOutcome]) -> Scores | None:
    """What units were chosen by; layers without a choice have zeros."""
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
def unchanged(layer: nn.Module) -> Iterator[None]:
    """Parameters and attributes of a layer come back, whatever is done to it inside."""
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
