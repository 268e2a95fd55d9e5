"""Walk the decoder layers: choose from, cut, refit, distil each. B batch, T token, D hidden."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimvlm.core.documents import built
from slimvlm.core.errors import NumericalError, raised_as
from slimvlm.core.options import AT_LEAST_0, Options, Repair
from slimvlm.core.progress import progress
from slimvlm.models.anatomy import WIDTH_UNITS
from slimvlm.models.parts import part_at
from slimvlm.planning.plan import Kept, Plan
from slimvlm.pruning import repair as repairs
from slimvlm.pruning.cut import cut_layer_, kept_channels
from slimvlm.pruning.repair import MLP, REPAIRS, RIDGE, SEAM, writers_of_layer
from slimvlm.pruning.walk import result
from slimvlm.pruning.walk.result import LayerReport, MatrixReport, Walked, WalkReport, entry_of
from slimvlm.pruning.walk.streams import ORIGINAL, PREFIX, SLICED, Streams
from slimvlm.scoring.batches import Batch, TokenWeights
from slimvlm.scoring.obs import DAMPING, removal_order
from slimvlm.scoring.stores import Store
from slimvlm.scoring.unit_scores import Scores

PASSES, RATE = 10.0, 0.02
"""Epochs, and Adam's peak learning rate as a share of a parameter's root mean square, if the whole
decoder were removed: both grow with the removed share. The rate rises for a third of the steps,
then falls. Measured in ``docs/results.md``."""


def steps_for(plan: Plan, batches: int) -> int:
    """Return the default number of local steps for a plan."""
    return math.ceil(PASSES * plan.decoder_ratio * batches)


class Lesson(NamedTuple):
    """One batch that a layer learns from."""

    run: Callable[[], Float[Tensor, "B T D"]]  # the layer after the smaller layers before it
    target: Callable[[], Float[Tensor, "B T D"]]  # what the original's next layer reads
    weights: Float[Tensor, " BT"]  # of each token


def relative_error(
    output: Float[Tensor, "*S T D"],
    target: Float[Tensor, "*S T D"],
    weights: Float[Tensor, " BT"],
) -> Float[Tensor, ""]:
    """``Σ_t w_t h(‖y_t - y'_t‖ / ‖y_t‖)`` over ``Σ_t w_t``; ``h(r) = r²``, from 1 on ``2 r - 1``.

    Relative to each token's size, and linear in large errors, so that the few tokens whose
    activations are a thousand times larger than the others' do not rule, nor those that the
    original makes small again. Several residual streams count alike.
    """
    given = output.flatten(0, -2).float()
    wanted = target.flatten(0, -2).to(given.device).float()
    weights = weights.repeat(len(wanted) // len(weights))
    squares = (wanted - given).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)
    bounded = torch.where(squares <= 1, squares, 2 * squares.clamp_min(1).sqrt() - 1)
    return (weights * bounded).sum() / weights.sum()


def distil_(
    layer: nn.Module, lessons: Sequence[Lesson], exams: Sequence[Lesson], count: int, rate: float
) -> tuple[float, float]:
    """Train one layer alone; return its `relative_error` on validation batches before and after.

    A step of Adam changes an entry by about the learning rate, whatever the gradient. So the peak
    learning rate of a parameter is ``rate`` times its root mean square, of a bias that of its
    module's weight. Validation batches (``exams``) choose between the trained layer, the one
    halfway to it and the one before. The layer gets new parameters; the old ones do not change.
    """
    is_half = any(p.dtype in (torch.bfloat16, torch.float16) for p in layer.parameters())
    judges = exams or lessons
    before = dict(layer.named_parameters())
    peaks: dict[nn.Parameter, float] = {}
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(module, name, copied)
            like = getattr(module, "weight", copied) if name == "bias" else copied
            peaks[copied] = rate * float(like.detach().float().square().mean().sqrt())
    for parameter in peaks:  # half precision learns in float32, and multiplies in bfloat16
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    kind = next(iter(peaks)).device.type  # without a cache: the weights change from step to step
    with torch.autocast(kind, torch.bfloat16, cache_enabled=False) if is_half else nullcontext():
        groups = [{"params": [parameter], "lr": peak} for parameter, peak in peaks.items()]
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, list(peaks.values()), total_steps=count + 1, cycle_momentum=False
        )
        draw, waiting = random.Random(0), list[Lesson]()
        for _ in range(count):
            waiting = waiting or draw.sample(lessons, len(lessons))
            with torch.enable_grad():
                run, target, weights = waiting.pop()
                relative_error(run(), target(), weights).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for name, parameter in layer.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(before[name].requires_grad)
        parameter.data = parameter.data.to(before[name].dtype)
    after = {name: p.detach().clone() for name, p in layer.named_parameters()}
    errors: dict[float, float] = {}
    totals = torch.stack([lesson.weights.sum() for lesson in judges]).tolist()
    for share in (0.0, 1.0, 0.5) if exams else (0.0, 1.0):
        _blend_(layer, before, after, share)
        with torch.no_grad():
            found = [relative_error(run(), target(), weights) for run, target, weights in judges]
        pairs = zip(torch.stack(found).tolist(), totals, strict=True)
        errors[share] = sum(error * total for error, total in pairs) / sum(totals)
    finite = [share for share in errors if math.isfinite(errors[share])]
    if not finite:
        raise NumericalError("its outputs are NaN or infinite, before its local steps and after")
    best = min(finite, key=errors.__getitem__)
    _blend_(layer, before, after, best)
    return errors[0.0], errors[best]


@torch.no_grad()
def _blend_(
    layer: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float
) -> None:
    for name, parameter in layer.named_parameters():
        parameter.copy_(before[name].lerp(after[name], share) if share else before[name])


class Steps(Options):
    """Steps of a walk in one layer; a `ConfigError` if a value is not allowed."""

    repair: Repair = "auto"
    """With ``auto`` the loss on validation batches at the end decides whether the new weights are
    kept: they are dropped if plain slices do better."""
    ridge: Annotated[float, AT_LEAST_0] = RIDGE  # see `slimvlm.pruning.repair.refit`
    count: Annotated[int, AT_LEAST_0] = 0  # optimizer steps on each layer alone


@dataclass(frozen=True)
class WalkConfig:
    """The plans of a walk, and the batches that it fits and judges with."""

    plans: Sequence[Plan]  # to try; the one that costs a few layers least is walked
    chooses: bool  # whether the walk chooses units; the plans then only say how many stay
    batches: Sequence[Batch]  # for choices and fits
    held_out: Sequence[Batch]  # to confirm and judge
    steps: Steps
    token_weights: TokenWeights | None = None  # by role; None: all weigh 1

    @property
    def aims_at_original(self) -> bool:
        """Whether layers are fitted to the original's hidden states."""
        removes_layers = any(len(plan.layers) < plan.before.num_layers for plan in self.plans)
        return aims_at_original(self.steps.repair, self.steps.count, removes_layers)


@dataclass
class LayerWalk:
    """Make one layer smaller, whose weights are loaded."""

    streams: Streams
    config: WalkConfig
    plan: Plan  # the kept units; if the walk chooses, only how many
    index: int  # the layer's original number
    end: int  # the layer whose input is to be made; more than one further at a seam
    judged: bool  # whether validation states also pass through plain slices, for comparison
    _kept: dict[str, Kept] = field(default_factory=dict, init=False)
    _scores: dict[str, Tensor] = field(default_factory=dict, init=False)
    _refits: dict[str, MatrixReport] = field(default_factory=dict, init=False)
    _sliced: list[tuple[nn.Linear, dict[str, Any]]] = field(default_factory=list, init=False)

    def go(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Choose, cut, refit, distil, and pass the states on; return what is stored of it."""
        streams, steps, index, end = self.streams, self.config.steps, self.index, self.end
        repairable = REPAIRS[steps.repair]
        model, is_idle = streams.model, index not in streams.layers_run
        layer, notes = streams.layers[index], list[str]()
        writers = list(writers_of_layer(layer, index, self.plan.before.backbone))
        # the last matrix is fitted for the removed layers behind this one
        mlp = [writer.linear for writer in writers if writer.kind == MLP]
        is_seam = end > index + 1 and not is_idle and SEAM in repairable and bool(mlp)
        if is_seam and not streams.adds_plainly(index, mlp[-1]):
            is_seam = False
            notes.append(
                f"layer {index} has a norm or a scale after its MLP: its seam is not repaired"
            )
        for writer in writers:
            kind = SEAM if is_seam and writer.kind == MLP else writer.kind
            self._work_on(writer, kind if kind in repairable and not is_idle else None)
        cut_layer_(model, self.plan, index)
        if self.judged:  # refitted matrices are plain slices for a while
            walked = [dict(linear._parameters) for linear, _ in self._sliced]
            for linear, sliced in self._sliced:
                linear._parameters.update(sliced)
            streams.pass_on(SLICED, index, end, streams.held_out)
            for (linear, _), parameters in zip(self._sliced, walked, strict=True):
                linear._parameters.update(parameters)
        distilled = None
        if steps.count:
            streams.kept.clear()
            lessons: dict[bool, list[Lesson]] = {False: [], True: []}  # True: of validation
            for place in streams.places:
                of_tokens = streams.weights[place].to(streams.devices[index])
                if index in streams.layers_of(place) and of_tokens.any():
                    run = partial(streams.output, PREFIX, index, place)
                    target = partial(streams.state, ORIGINAL, end, place)
                    lessons[place in streams.held_out].append(Lesson(run, target, of_tokens))
            if lessons[False]:
                rate = RATE * self.plan.decoder_ratio
                with raised_as(NumericalError, NumericalError, f"layer {index}:"):
                    distilled = distil_(layer, lessons[False], lessons[True], steps.count, rate)
        streams.pass_on(PREFIX, index, end, streams.places)
        refitted = tuple(f"{path}." for path, row in self._refits.items() if row.share)
        weights = {  # that are no plain slices
            name: parameter.detach().clone()
            for name, parameter in layer.named_parameters()
            if distilled is not None or name.startswith(refitted)
        }
        report = asdict(LayerReport(index, self._refits, distilled))
        about = {"report": report, "kept": self._kept, "weights": list(weights), "notes": notes}
        scores = {f"scores.{unit}": values for unit, values in self._scores.items()}
        return {**weights, **scores}, about

    def _work_on(self, writer: repairs.Writer, kind: str | None) -> None:
        """Choose the inputs of a matrix, cut it, and refit it if a kind of repair is named."""
        streams, unit, ridge = self.streams, writer.unit, self.config.steps.ridge
        total = self.plan.before.layers[self.index].units(unit)
        count = len(self.plan.kept(unit)[self.index])
        if count == total and kind != SEAM:
            return
        weight, bias = writer.weight, writer.bias
        end, fitted = self.end if kind == SEAM else None, None
        must_choose = self.config.chooses and count < total
        if kind is not None or must_choose:
            streams.keep_inputs(writer)
            moments = streams.moments(PREFIX, writer, streams.fitted, end)
        if must_choose:  # the units stay whose removal costs most
            gram = moments.gram / moments.count.clamp_min(1e-12)
            costly = weight  # rows as they reach the residual stream
            path = self.plan.before.backbone.scaled_by
            factors = None if path is None else part_at(streams.layers[self.index], path)
            if isinstance(factors, Tensor):
                costly = weight * factors.to(weight)[:, None]
            found = removal_order(costly, gram, total, total - count, ridge or DAMPING)
            self._scores[unit] = found.scores()
            self._kept[unit] = tuple(found.left.tolist())
            self.plan = self.plan.with_units(self.index, {unit: self._kept[unit]})
        keep = kept_channels(self.plan, self.index, writer.projection).to(weight.device)
        if kind is not None:  # refit as far as validation tokens confirm
            new: tuple[Tensor, Tensor | None]
            is_found = must_choose and bias is None and costly is weight
            if is_found and kind != SEAM and ridge > 0 and streams.held_out:
                new = found.weights, None
            else:
                fit = repairs.refit(weight, bias, moments, keep, ridge)
                new = fit.weight, fit.bias
                row = MatrixReport(kind, fit.sliced_error, fit.repaired_error, 1.0)
            if streams.held_out:
                rows = streams.rows(PREFIX, writer, streams.held_out, end)
                row = MatrixReport(kind, *repairs.confirmed(new, weight, bias, rows, keep))
            self._refits[writer.projection.path] = row
            if row.share:
                matrix, shift = new
                if bias is not None and shift is not None:
                    shift = bias.to(shift).lerp(shift, row.share)
                fitted = weight[:, keep].to(matrix).lerp(matrix, row.share), shift
        cut_layer_(streams.model, self.plan, self.index, [unit])
        for inputs in streams.kept:
            if inputs.linear is writer.linear:
                for place, x in inputs.values.items():
                    inputs.values[place] = inputs.held(x.to(keep.device)[..., keep])
        self._sliced.append((writer.linear, dict(writer.linear._parameters)))
        if fitted is not None:
            writer.linear._parameters.update(writer.parameters(*fitted))


_TRIAL_PLAN = "trial-plan"
_TRIAL = "trial"  # the stream of the trial: hidden states after whole layers
_TRIED = 2  # layers that are tried, spread evenly over those with the most kinds of cuts


@dataclass
class Walk:
    """Walk all layers over stored batches; finished layers are stored, to resume a stopped run."""

    streams: Streams
    results: Store
    config: WalkConfig

    @torch.no_grad()
    def run(self) -> Walked:
        """Walk all layers that are not walked yet."""
        streams, results = self.streams, self.results
        self._depth = len(streams.layers)
        # The validation loss decides between the new weights and plain slices, unless hidden
        # states hold several residual streams, which only the model merges.
        can_judge = streams.judges and len(streams.held_out) > 0
        can_judge = can_judge and streams.state(PREFIX, 0, 0).ndim < 4
        self._is_judged = self.config.steps.repair == "auto" and can_judge
        if results.about(_TRIAL_PLAN, 0) is None:
            chosen = cheapest_plan(streams, self.config.plans)
            results.write(_TRIAL_PLAN, 0, {}, chosen.to_dict())
        plan = Plan.from_dict(results.about(_TRIAL_PLAN, 0))
        reports: list[LayerReport] = []
        of_layers: list[str] = []  # notes
        scored: dict[str, dict[int, Tensor]] = {}  # where the walk chose, by kind of unit
        for index in progress(plan.layers, streams.what):
            if results.about(entry_of(index), 0) is None:
                self._replay(plan, len(reports))
                with self._layer(plan, index) as end:
                    how = (self.config, plan, index, end, self._is_judged)
                    results.write(entry_of(index), 0, *LayerWalk(streams, *how).go())
            about = results.about(entry_of(index), 0)
            stored = results.read(entry_of(index), 0, torch.device("cpu"), "scores.")
            reports.append(built(LayerReport, about["report"], f"layer {index} of the walk"))
            of_layers += about["notes"]
            for name, values in stored.items():
                scored.setdefault(name.removeprefix("scores."), {})[index] = values
            plan = plan.with_units(index, {u: tuple(units) for u, units in about["kept"].items()})
        notes = []
        if idle := sorted(set(plan.layers) - streams.layers_run):
            numbers = ", ".join(map(str, idle))
            by = "by the size of their weights" if self.config.chooses else "as planned"
            notes.append(f"no calibration batch runs layer {numbers}: units removed {by}, no refit")
        if SEAM in REPAIRS[self.config.steps.repair] and plan.layers[0] > 0:
            notes.append("the first layers are removed: no layer before them could be repaired")
        notes += of_layers
        report = WalkReport(reports, notes=notes)
        scores: dict[str, Any] = {}  # layers without a choice have zeros
        for unit in WIDTH_UNITS:
            if found := scored.get(unit):
                none = [torch.zeros(shape.units(unit)) for shape in plan.before.layers]
                scores[unit] = [found.get(index, zeros) for index, zeros in enumerate(none)]
        weights = result.StoredWeights(results, plan.layers)
        walked = Walked(plan, report, weights, Scores("obs", **scores) if scores else None)
        if not self._is_judged:
            return walked
        self._replay(plan, len(reports))
        sliced, loss = (streams.answer_loss(s, self._depth) for s in (SLICED, PREFIX))
        report = replace(report, loss_sliced=sliced, loss=min(sliced, loss))
        if loss <= sliced:
            return replace(walked, report=report)
        note = f"validation loss {loss:.4f} with new weights: they were dropped"
        report = replace(report, layers=(), notes=(*notes, note))
        return replace(walked, report=report, weights={})

    @contextmanager
    def _layer(self, plan: Plan, index: int) -> Iterator[int]:
        """Load a layer, to be changed inside; yield the number of the next kept one."""
        streams, place = self.streams, plan.layers.index(index)
        begin = index if place else 0  # the original also runs removed layers before the first
        end = (*plan.layers, self._depth)[place + 1]
        for i in range(begin, end) if self.config.aims_at_original else ():
            if not streams.has(ORIGINAL, i + 1, streams.places):
                with streams.source.loaded(i, streams.device):
                    streams.pass_on(ORIGINAL, i, i + 1, streams.places)
        with streams.source.loaded(index, streams.device):
            before = [
                (module, {**vars(module), "_parameters": dict(module._parameters)})
                for module in streams.layers[index].modules()
            ]
            try:
                yield end
            finally:  # the layer is as it was
                for module, attributes in before:
                    vars(module).clear()
                    vars(module).update(attributes)
        streams.kept.clear()
        for i in range(begin, end):  # states that nothing will read again
            for stream in (PREFIX, ORIGINAL, SLICED):
                streams.store.drop(f"{stream}-{i}")

    def _replay(self, plan: Plan, count: int) -> None:
        """Compute the hidden states after the walked layers, if a stopped walk has left none."""
        streams, layers = self.streams, plan.layers[:count]
        after = (*plan.layers, self._depth)[count]
        needed = {PREFIX: streams.places}
        needed |= {ORIGINAL: streams.places} if self.config.aims_at_original else {}
        needed |= {SLICED: streams.held_out} if self._is_judged else {}
        if not layers or all(streams.has(name, after, needed[name]) for name in needed):
            return
        weights = result.StoredWeights(self.results, layers)
        for index in progress(layers, "walked layers"):
            with self._layer(plan, index) as end:
                cut_layer_(streams.model, plan, index)
                if self._is_judged:
                    streams.pass_on(SLICED, index, end, streams.held_out)
                for place, path in weights:
                    if place == index:
                        result.assign_(streams.layers[index], path, weights[place, path])
                streams.pass_on(PREFIX, index, end, streams.places)


def aims_at_original(repair: str, local_steps: int | None, removes_layers: bool) -> bool:
    """Whether a walk fits layers to the original's hidden states; ``local_steps`` None: unknown."""
    return local_steps != 0 or (SEAM in REPAIRS[repair] and removes_layers)


def cheapest_plan(streams: Streams, plans: Sequence[Plan]) -> Plan:
    """Choose the plan with the least squared error when a few of the layers lose its units."""
    first, *others = plans
    if not others:
        return first
    kinds = {
        i: sum(len(first.kept(u)[i]) < first.before.layers[i].units(u) for u in WIDTH_UNITS)
        for i in first.layers
    }
    losing = [index for index, count in kinds.items() if count == max(kinds.values())]
    # in hybrid models few layers have attention that can be pruned: it counts for so much less
    having = {u: sum(first.before.layers[i].units(u) > 0 for i in kinds) for u in WIDTH_UNITS}
    step = len(losing) / (_TRIED + 1)
    tried = sorted({losing[int(step * (place + 1))] for place in range(_TRIED)})
    costs, before = [0.0] * len(plans), first.before
    for index in range(tried[-1] + 1):
        with streams.source.loaded(index, streams.device):
            layer, written, total = streams.layers[index], 0.0, [0.0] * len(plans)
            for writer in writers_of_layer(layer, index, before.backbone) if index in tried else ():
                moments, weight = streams.moments(_TRIAL, writer, streams.fitted), writer.weight
                channels = torch.arange(weight.shape[1], device=weight.device)
                written += moments.square(weight.double(), channels, centred=False)
                units = before.layers[index].units(writer.unit)
                counts = [units - len(plan.kept(writer.unit)[index]) for plan in plans]
                found = removal_order(weight, moments.gram, units, stop=max(counts)).costs.cpu()
                share = having[writer.unit] / max(having.values())
                for place, count in enumerate(counts):
                    total[place] += share * float(found[:count].sum())
            if index in tried:
                if not written > 0:
                    raise NumericalError(f"layer {index}: its output is zero for all samples")
                costs = [cost + more / written for cost, more in zip(costs, total, strict=True)]
            if index < tried[-1]:
                streams.pass_on(_TRIAL, index, index + 1, streams.fitted)
        streams.store.drop(f"{_TRIAL}-{index}")
    return plans[costs.index(min(costs))]
