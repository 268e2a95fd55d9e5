"""Walk one layer: choose its units, cut it, refit it, distil it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from slimvlm.core.errors import ConfigError
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
from slimvlm.pruning.walk.result import LayerReport, MatrixReport
from slimvlm.pruning.walk.streams import ORIGINAL, PREFIX, SLICED, KeptInputs, Streams
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.obs import DAMPING, removal_order


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
        """Whether layers are gone behind this one and its last matrix can be fitted for them.

        It can if its output is added to the hidden states as it is.
        """
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
