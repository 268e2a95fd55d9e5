"""One pass through the decoder layers: each is chosen from, cut, refitted and distilled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.core.errors import ConfigError
from slimvlm.core.progress import progress
from slimvlm.models.anatomy import WIDTH_UNITS
from slimvlm.models.parts import Parts
from slimvlm.planning.plan import Kept, Plan
from slimvlm.pruning.cut import cut_layer_
from slimvlm.pruning.least_squares import blended, confirmed, refit
from slimvlm.pruning.repair import (
    MLP,
    REPAIRS,
    RIDGE,
    SEAM,
    Writer,
    require_ridge,
    writers_of_layer,
)
from slimvlm.pruning.walk.distil import NO_LOCAL_STEPS, Lesson, LocalSteps, distil_
from slimvlm.pruning.walk.result import (
    LayerReport,
    MatrixReport,
    StoredWeights,
    Walked,
    WalkReport,
    assign_,
    entry_of,
)
from slimvlm.pruning.walk.streams import ORIGINAL, PREFIX, SLICED, KeptInputs, Streams
from slimvlm.scoring.batches import Batch, TokenWeights
from slimvlm.scoring.layerwise.stores import Store
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.obs import DAMPING, removal_order
from slimvlm.scoring.unit_scores import Scores


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps of a walk in one layer; a `ConfigError` if a value is not allowed."""

    repair: str = "auto"
    """One of `REPAIRS`. With ``auto`` the walk is judged by the answers of held-out batches at its
    end, and its new weights are dropped if plain slices do better."""
    ridge: float = RIDGE
    """See `slimvlm.pruning.least_squares.refit`."""
    local: LocalSteps = NO_LOCAL_STEPS
    """Local distillation."""

    def __post_init__(self) -> None:
        if self.repair not in REPAIRS:
            raise ConfigError(f"repair {self.repair!r} must be one of: {', '.join(REPAIRS)}")
        require_ridge(self.ridge)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of repair that are allowed."""
        return REPAIRS[self.repair]


@dataclass(frozen=True)
class LayerOutcome:
    """The result of walking one layer."""

    report: LayerReport
    kept: Mapping[str, Kept]  # the units that stay, by kind, where the walk chose them
    scores: Mapping[str, Tensor]  # that they were chosen by
    weights: Mapping[str, Tensor]  # by path: parameters that are no slices of the original's
    notes: Sequence[str]


@dataclass
class LayerWalk:
    """Make one layer smaller, whose weights are loaded."""

    streams: Streams
    plan: Plan  # the units that stay; with ``chooses`` only how many
    index: int  # the layer's original number
    end: int  # the layer whose input is to be made; more than one further at a seam
    chooses: bool  # whether units are to be chosen
    steps: Steps
    judged: bool  # whether held-out states also pass through plain slices, for comparison

    def __post_init__(self) -> None:
        self._model = self.streams.runner.model
        self._layer = Parts(self._model).layers[self.index]
        self._is_idle = self.index not in self.streams.layers_run
        self._kept: dict[str, Kept] = {}
        self._scores: dict[str, Tensor] = {}
        self._refits: dict[str, MatrixReport] = {}
        self._notes: list[str] = []
        self._inputs: list[KeptInputs] = []
        self._sliced: list[tuple[nn.Linear, dict[str, nn.Parameter | None]]] = []

    def go(self) -> LayerOutcome:
        """Choose, cut, refit, distil, and pass the states on."""
        row = self.plan.before.backbone
        writers = list(writers_of_layer(self._layer, self.index, row))
        is_seam = self._is_seam(writers)
        for writer in writers:
            kind = SEAM if is_seam and writer.kind == MLP else writer.kind
            self._work_on(writer, kind if kind in self.steps.kinds and not self._is_idle else None)
        cut_layer_(self._model, self.plan, self.index)
        if self.judged:
            with self._only_cut():
                self.streams.pass_on(SLICED, self.index, self.end, self.streams.held_out)
        distilled, local = None, self.steps.local
        if local.count:
            sets = (self.streams.fitted, self.streams.held_out)
            lessons, exams = (list(self._lessons(places)) for places in sets)
            if lessons:
                rate = local.rate(self.plan)
                distilled = distil_(self._layer, lessons, exams, local.count, rate)
            self._inputs.clear()
        places = self.streams.places
        self.streams.pass_on(PREFIX, self.index, self.end, places, self._inputs)
        return LayerOutcome(
            LayerReport(self.index, self._refits, distilled),
            self._kept,
            self._scores,
            self._changed(everything=distilled is not None),
            self._notes,
        )

    def _work_on(self, writer: Writer, kind: str | None) -> None:
        """Choose the inputs of a matrix, cut it, and refit it if a kind of repair is named."""
        unit, linear = writer.unit, writer.linear
        total = self.plan.before.layers[self.index].units(unit)
        count = len(self.plan.kept(unit)[self.index])
        if count == total and kind != SEAM:
            return
        moments = None
        must_choose = self.chooses and count < total
        if kind is not None or must_choose:
            inputs = self.streams.keep_inputs(writer, self._inputs)
            self._inputs += [] if inputs is None else [inputs]
            end = self.end if kind == SEAM else None
            places = self.streams.fitted
            moments = self.streams.moments(PREFIX, writer, places, end, self._inputs)
        refitted = None
        if moments is not None and must_choose:
            refitted = self._choose(writer, moments, total, count)
        fitted = None
        if moments is not None and kind is not None:
            fitted = self._fitted(writer, kind, moments, refitted)
        keep = writer.kept_channels(self.plan)
        cut_layer_(self._model, self.plan, self.index, [unit])
        for inputs in self._inputs:
            if inputs.linear is linear:
                inputs.cut_(keep)
        self._sliced.append((linear, dict(linear._parameters)))
        if fitted is not None:
            writer.assign_(*fitted)

    def _choose(self, writer: Writer, moments: Moments, total: int, count: int) -> Tensor:
        """Keep the units whose removal costs most; return their columns, refitted without bias."""
        unit = writer.unit
        gram = moments.gram / moments.count.clamp_min(1e-12)
        damping = self.steps.ridge or DAMPING
        found = removal_order(writer.weight, gram, total, total - count, damping)
        self._scores[unit] = found.scores()
        self._kept[unit] = tuple(found.left.tolist())
        self.plan = self.plan.with_units(self.index, {unit: self._kept[unit]})
        return found.weights

    def _fitted(
        self, writer: Writer, kind: str, moments: Moments, refitted: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Refit a matrix as far as held-out tokens confirm; None if they confirm nothing."""
        weight, bias = writer.weight, writer.bias
        keep = writer.kept_channels(self.plan)
        places, end = self.streams.held_out, self.end if kind == SEAM else None
        new: tuple[Tensor, Tensor | None]
        is_done = bias is None and kind != SEAM and self.steps.ridge > 0
        if refitted is not None and is_done and places:
            new = refitted, None
        else:
            fit = refit(weight, bias, moments, keep, self.steps.ridge)
            new = fit.weight, fit.bias
            row = MatrixReport(kind, fit.sliced_error, fit.repaired_error, 1.0)
        if places:
            rows = self.streams.rows(PREFIX, writer, places, end, self._inputs)
            found = confirmed(new, weight, bias, rows, keep)
            row = MatrixReport(kind, found.sliced, found.error, found.share)
        self._refits[writer.projection.path] = row
        if not row.share:
            return None
        new_bias = None if bias is None or new[1] is None else blended(bias, new[1], row.share)
        return blended(weight[:, keep], new[0], row.share), new_bias

    def _is_seam(self, writers: Sequence[Writer]) -> bool:
        """Whether layers are gone behind this one and its last matrix can be fitted for them."""
        is_last = self.end == self.index + 1
        mlp = [writer.linear for writer in writers if writer.kind == MLP]
        if is_last or self._is_idle or SEAM not in self.steps.kinds or not mlp:
            return False
        if self.streams.adds_plainly(self.index, mlp[-1]):
            return True
        self._notes.append(f"layer {self.index} has a norm after its MLP: its seam stays")
        return False

    @contextmanager
    def _only_cut(self) -> Iterator[None]:
        """Make the refitted matrices plain slices for a while."""
        linears = [linear for linear, _ in self._sliced]
        walked = [dict(linear._parameters) for linear in linears]
        try:
            for linear, sliced in self._sliced:
                linear._parameters.update(sliced)
            yield
        finally:
            for linear, parameters in zip(linears, walked, strict=True):
                linear._parameters.update(parameters)

    def _lessons(self, places: Sequence[int]) -> Iterator[Lesson]:
        """Make lessons of batches that run the layer and have a token that counts."""
        streams = self.streams
        for place in places:
            weights = streams.weights[place].to(streams.runner.devices[self.index])
            if self.index in streams.runner.layers_of(place) and weights.any():
                yield Lesson(
                    partial(streams.output, PREFIX, self.index, place),
                    partial(streams.state, ORIGINAL, self.end, place),
                    weights,
                )

    def _changed(self, everything: bool) -> dict[str, Tensor]:
        """The parameters that are no plain slices, by their paths."""
        refitted = tuple(f"{path}." for path, row in self._refits.items() if row.share)
        return {
            name: parameter.detach().clone()
            for name, parameter in self._layer.named_parameters()
            if everything or name.startswith(refitted)
        }


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
    """Walk all layers over stored batches; finished layers are stored, to resume a stopped run."""

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
        """Load a layer, to be changed; yield it with the number of the next one that stays."""
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
    """Choose the plan with the least squared error when its units go from a few of the layers."""
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
