"""What a walk does to one layer: choose its units, cut it, refit it, distil it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from slimvlm.core.errors import ConfigError
from slimvlm.models.parts import decoder_layers
from slimvlm.planning.plan import Kept, Plan
from slimvlm.pruning.cut import cut_layer_
from slimvlm.pruning.least_squares import blended, confirmed, refit
from slimvlm.pruning.walk.distil import NO_LOCAL_STEPS, Lesson, LocalSteps, distil_
from slimvlm.pruning.walk.kept_inputs import KeptInputs
from slimvlm.pruning.walk.result import LayerReport, MatrixReport
from slimvlm.pruning.walk.streams import ORIGINAL, PREFIX, SLICED, Streams
from slimvlm.pruning.writers import MLP, REPAIRS, RIDGE, SEAM, Writer, writers_of_layer
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.obs import DAMPING, removal_order


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a walk does in a layer.

    Attributes:
        repair: One of `REPAIRS`. With ``auto`` the walk is judged by the answers of held-out
            batches at its end, and its new weights are dropped if plain slices do better.
        ridge: See `slimvlm.pruning.least_squares.refit`.
        local: Local distillation.

    Raises:
        ConfigError: If a value is not allowed.
    """

    repair: str = "auto"
    ridge: float = RIDGE
    local: LocalSteps = NO_LOCAL_STEPS

    def __post_init__(self) -> None:
        if self.repair not in REPAIRS:
            raise ConfigError(f"repair {self.repair!r} must be one of: {', '.join(REPAIRS)}")
        if not 0 <= self.ridge < float("inf"):
            raise ConfigError(f"ridge {self.ridge} must be a finite number of 0 or more")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What may be repaired."""
        return REPAIRS[self.repair]


@dataclass(frozen=True)
class LayerOutcome:
    """What came of a layer.

    Attributes:
        report: What was done.
        kept: The units that stay, by kind, where the walk chose them.
        scores: What they were chosen by.
        weights: The layer's parameters, by path, that are no plain slices of the original's.
        notes: What was left alone, and why.
    """

    report: LayerReport
    kept: Mapping[str, Kept]
    scores: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    notes: Sequence[str]


class LayerWalk:
    """Works on one layer, whose weights are there; afterwards it is smaller.

    Args:
        streams: The states that enter it.
        plan: What stays of it; with ``chooses`` only how much.
        index: Its original number.
        end: The layer whose input it has to make; more than one further at a seam.
        chooses: Whether its units are to be chosen.
        steps: What to do.
        judged: Whether held-out states also pass through plain slices, to be compared with.
    """

    def __init__(
        self,
        streams: Streams,
        plan: Plan,
        index: int,
        end: int,
        *,
        chooses: bool,
        steps: Steps,
        judged: bool,
    ) -> None:
        self.plan = plan
        self._streams, self._index, self._end = streams, index, end
        self._chooses, self._steps, self._judged = chooses, steps, judged
        self._model = streams.runner.model
        self._layer = decoder_layers(self._model)[index]
        self._is_idle = index not in streams.layers_run
        self._kept: dict[str, Kept] = {}
        self._scores: dict[str, Tensor] = {}
        self._refits: dict[str, MatrixReport] = {}
        self._notes: list[str] = []
        self._inputs: list[KeptInputs] = []
        self._sliced: list[tuple[nn.Linear, dict[str, nn.Parameter | None]]] = []

    def go(self) -> LayerOutcome:
        """Choose, cut, refit, distil, and pass the states on."""
        row = self.plan.before.backbone
        writers = list(writers_of_layer(self._layer, self._index, row))
        is_seam = self._is_seam(writers)
        for writer in writers:
            kind = SEAM if is_seam and writer.kind == MLP else writer.kind
            self._work_on(writer, kind if kind in self._steps.kinds and not self._is_idle else None)
        cut_layer_(self._model, self.plan, self._index)
        if self._judged:
            with self._only_cut():
                self._streams.pass_on(SLICED, self._index, self._end, self._streams.held_out)
        distilled = None
        if self._steps.local.count:
            distilled = self._distilled()
            self._inputs.clear()
        places = self._streams.places
        self._streams.pass_on(PREFIX, self._index, self._end, places, self._inputs)
        return LayerOutcome(
            LayerReport(self._index, self._refits, distilled),
            self._kept,
            self._scores,
            self._changed(everything=distilled is not None),
            self._notes,
        )

    def _must_choose(self, unit: str) -> bool:
        return self._chooses and self._count(unit) < self._total(unit)

    def _count(self, unit: str) -> int:
        """How many units of a kind stay."""
        return len(self.plan.kept(unit)[self._index])

    def _total(self, unit: str) -> int:
        return self.plan.before.layers[self._index].units(unit)

    def _work_on(self, writer: Writer, kind: str | None) -> None:
        """Choose what a matrix reads, cut it, and refit it if a kind of repair is named."""
        unit, linear = writer.unit, writer.linear
        if self._count(unit) == self._total(unit) and kind != SEAM:
            return
        moments = None
        if kind is not None or self._must_choose(unit):
            inputs = self._streams.keep_inputs(PREFIX, writer, self._inputs)
            self._inputs += [] if inputs is None else [inputs]
            end = self._end if kind == SEAM else None
            places = self._streams.fitted
            moments = self._streams.moments(PREFIX, writer, places, end, self._inputs)
        refitted = None
        if moments is not None and self._must_choose(unit):
            refitted = self._choose(writer, moments)
        fitted = None
        if moments is not None and kind is not None:
            fitted = self._fitted(writer, kind, moments, refitted)
        keep = writer.kept_channels(self.plan)
        cut_layer_(self._model, self.plan, self._index, [unit])
        for inputs in self._inputs:
            if inputs.linear is linear:
                inputs.cut_(keep)
        self._sliced.append((linear, dict(linear._parameters)))
        if fitted is not None:
            writer.assign_(*fitted)

    def _choose(self, writer: Writer, moments: Moments) -> Tensor:
        """Keep the units whose removal, with the others refitted, costs most.

        Returns:
            The columns that read them, refitted, as if the matrix had no bias.
        """
        unit = writer.unit
        total, count = self._total(unit), self._count(unit)
        gram = moments.gram / moments.count.clamp_min(1e-12)
        damping = self._steps.ridge or DAMPING
        found = removal_order(writer.weight, gram, total, total - count, damping)
        self._scores[unit] = found.scores()
        self._kept[unit] = tuple(found.left.tolist())
        self.plan = self.plan.with_units(self._index, {unit: self._kept[unit]})
        return found.weights

    def _fitted(
        self, writer: Writer, kind: str, moments: Moments, refitted: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """New weight and bias of a matrix as far as held-out tokens confirm; None if not.

        Args:
            writer: The matrix.
            kind: The kind of its repair.
            moments: Of its inputs.
            refitted: What choosing its units made of it.
        """
        weight, bias = writer.weight, writer.bias
        keep = writer.kept_channels(self.plan)
        places, end = self._streams.held_out, self._end if kind == SEAM else None
        new: tuple[Tensor, Tensor | None]
        is_done = bias is None and kind != SEAM and self._steps.ridge > 0
        if refitted is not None and is_done and places:
            new = refitted, None
        else:
            found = refit(weight, bias, moments, keep, self._steps.ridge)
            new = found.weight, found.bias
            row = MatrixReport(kind, found.sliced_error, found.repaired_error, 1.0)
        if places:
            rows = self._streams.rows(PREFIX, writer, places, end, self._inputs)
            told = confirmed(new, weight, bias, rows, keep)
            row = MatrixReport(kind, told.sliced, told.error, told.share)
        self._refits[writer.projection.path] = row
        if not row.share:
            return None
        new_bias = None if bias is None or new[1] is None else blended(bias, new[1], row.share)
        return blended(weight[:, keep], new[0], row.share), new_bias

    def _is_seam(self, writers: Sequence[Writer]) -> bool:
        """Whether layers are gone behind this one and its last matrix can do a part of their work.

        It can if what it gives is added to the hidden states as it is.
        """
        is_last = self._end == self._index + 1
        mlp = [writer.linear for writer in writers if writer.kind == MLP]
        if is_last or self._is_idle or SEAM not in self._steps.kinds or not mlp:
            return False
        if self._streams.adds_plainly(PREFIX, self._index, mlp[-1]):
            return True
        self._notes.append(f"layer {self._index} has a norm after its MLP: its seam stays")
        return False

    @contextmanager
    def _only_cut(self) -> Iterator[None]:
        """Inside, the refitted matrices are plain slices."""
        linears = [linear for linear, _ in self._sliced]
        walked = [dict(linear._parameters) for linear in linears]
        try:
            for linear, sliced in self._sliced:
                linear._parameters.update(sliced)
            yield
        finally:
            for linear, parameters in zip(linears, walked, strict=True):
                linear._parameters.update(parameters)

    def _distilled(self) -> tuple[float, float] | None:
        """Train the layer; its held-out error before and after, None if nothing teaches it."""
        lessons, exams = (
            list(self._lessons(places)) for places in (self._streams.fitted, self._streams.held_out)
        )
        local = self._steps.local
        if not lessons:
            return None
        return distil_(self._layer, lessons, exams, local.count, local.rate(self.plan))

    def _lessons(self, places: Sequence[int]) -> Iterator[Lesson]:
        """Of batches that run the layer and have a token that counts."""
        streams = self._streams
        for place in places:
            weights = streams.weights[place].to(streams.runner.devices[self._index])
            if self._index in streams.runner.layers_of(place) and weights.any():
                yield Lesson(
                    partial(streams.output, PREFIX, self._index, place),
                    partial(streams.state, ORIGINAL, self._end, place),
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
