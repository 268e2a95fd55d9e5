"""Repair a pruned model in closed form: new weights for the matrices that lost their inputs.

Pruning leaves ``o_proj`` and ``down_proj`` (or what a family calls them) with fewer inputs. Their
remaining columns can make up for much of it, by least squares on calibration data, without any
training. Likewise the last matrix before removed layers can do a linear part of their work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm import losses
from slimvlm.capture.batches import BackbonePass, Batch, TokenWeights
from slimvlm.capture.hooks import consumers
from slimvlm.errors import ConfigError, DataError, NumericalError
from slimvlm.families import INPUT_COLUMNS, Projection
from slimvlm.geometry import decoder_layers, read_anatomy
from slimvlm.least_squares import Fit, Moments, refit
from slimvlm.plan import Plan
from slimvlm.progress import progress
from slimvlm.surgery import masked, prune_
from slimvlm.units import channels_of, unit_of
from slimvlm.values import Statistics

ATTENTION, MLP, SEAM = "attention", "mlp", "seam"
REPAIRS: dict[str, tuple[str, ...]] = {
    "none": (),
    "width": (ATTENTION, MLP),
    "depth": (SEAM,),
    "both": (ATTENTION, MLP, SEAM),
    "auto": (ATTENTION, MLP, SEAM),
}
"""What each form of repair may change: attention outputs, MLP outputs, seams of removed layers."""

RIDGE = 1e-2
"""Ridge as a share of the mean diagonal of the Gram matrix; see ``docs/results.md``."""

_FACTORS = (1.0, 0.5, 0.0)


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        form: ``one-shot`` or ``sequential``.
        errors: For each matrix, named ``<original layer>.<path>``, its squared error on the
            calibration data as a share of what it should give: sliced, and repaired.
        kept: How much of each kind of repair was kept: 1 all, 0.5 half of the change, 0 none.
        loss_sliced: Mean answer loss on the held-out batches without repair; None if not measured.
        loss_repaired: The same of the model as it is left.
        notes: What was left alone, and why.
    """

    form: str
    errors: Mapping[str, tuple[float, float]]
    kept: Mapping[str, float]
    loss_sliced: float | None = None
    loss_repaired: float | None = None
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line: what was repaired and what it gained."""
        parts = [f"{kind} {factor:g}" for kind, factor in self.kept.items() if factor]
        line = f"repair ({self.form}): {', '.join(parts) or 'nothing kept'}"
        if self.errors:
            sliced, repaired = (fmean(e[i] for e in self.errors.values()) for i in (0, 1))
            line += f"; mean output error {sliced:.2%} -> {repaired:.2%}"
        if self.loss_sliced is not None and self.loss_repaired is not None:
            line += f"; held-out loss {self.loss_sliced:.4f} -> {self.loss_repaired:.4f}"
        return "; ".join([line, *self.notes])


@torch.no_grad()
def repair_(
    model: PreTrainedModel, plan: Plan, statistics: Statistics, ridge: float = RIDGE
) -> RepairReport:
    """Repair the widths of a pruned model from Gram matrices of the original one, in place.

    Every matrix is fitted to the original inputs, as if only it had been pruned. This needs one
    pass over the data and no model but the pruned one. `prune_and_repair_` is slower and better,
    since it takes each layer's inputs from the already repaired layers before it, and it alone can
    repair the seams of removed layers.

    Args:
        model: After ``prune_(model, plan)``.
        plan: What was removed.
        statistics: Of kind ``grams``, of the original model.
        ridge: See `slimvlm.least_squares.refit`.

    Raises:
        ConfigError: If the statistics are of another kind or another model, or the model was not
            pruned by this plan.
        NumericalError: If a new weight is not finite.
    """
    _check_ridge(ridge)
    if statistics.kind != "grams":
        raise ConfigError(f"statistics of kind {statistics.kind!r} cannot repair; use 'grams'")
    if read_anatomy(model).layers != plan.after.layers:
        raise ConfigError("model: does not have the shape that the plan leaves; prune it first")
    fitted: dict[str, _Fitted] = {}
    for name, index, projection, linear in _consumers(model, plan.layers):
        keep = _kept_channels(plan, index, projection)
        try:
            names = (f"{name}.weight", f"{name}.gram", f"{name}.sum", "weight")
            sums = [statistics.tensors[name].to(linear.weight.device) for name in names]
        except KeyError as error:
            raise ConfigError(f"statistics 'grams': no {error} in them") from error
        weight, gram, total, count = sums
        if len(keep) < len(total):
            moments = Moments(gram, total.double(), count.double())
            fit = refit(weight, linear.bias, moments, keep.to(weight.device), ridge)
            fitted[name] = _Fitted(_kind_of(projection), fit)
    for name, _, _, linear in _consumers(model, plan.layers):
        if name in fitted:
            _assign(name, linear, fitted[name].fit.weight, fitted[name].fit.bias)
    return RepairReport("one-shot", _errors(fitted), dict.fromkeys(_kinds(fitted), 1.0))


@torch.no_grad()
def prune_and_repair_(
    model: PreTrainedModel,
    plan: Plan,
    batches: Iterable[Batch],
    repair: str = "auto",
    *,
    token_weights: TokenWeights | None = None,
    ridge: float = RIDGE,
    held_out: Iterable[Batch] | None = None,
) -> RepairReport:
    """Prune a model and repair it layer by layer, in place.

    The decoder is gone through once. Each layer reads what the already pruned and repaired layers
    before it give. Its attention output is fitted first, then its MLP output behind the repaired
    attention, both to what the whole layer would give on these inputs. In the layer before removed
    ones, the MLP output is fitted to what brings the hidden states to where the original model has
    them after the removed layers; nothing is added to the model for that.

    Needs, beyond the model: the hidden states of all batches once (twice with removed layers), the
    new weights, and one matrix's sums at a time.

    Args:
        model: The original model.
        plan: What to remove.
        batches: Calibration data: model inputs with ``labels``.
        repair: ``none``, ``width`` (attention and MLP outputs), ``depth`` (seams), ``both``, or
            ``auto``: both, judged on held-out answers. There, each kind of repair is kept whole,
            by half or not at all, whatever gives the lowest loss; the result is never worse there
            than without repair.
        token_weights: Weight in the fit of ``image``, ``prompt`` and ``answer`` tokens; all 1 if
            None.
        ridge: See `slimvlm.least_squares.refit`.
        held_out: Batches that repairs are judged on. For ``auto`` without any, every fifth batch
            is set aside.

    Raises:
        ConfigError: If an argument is unknown or the plan is for another model.
        DataError: If there are no batches, or too few to set some aside.
        NumericalError: If NaN or infinity appears; the message says in which layer. The model is
            not changed then.
    """
    _check_ridge(ridge)
    if repair not in REPAIRS:
        raise ConfigError(f"repair {repair!r} must be one of: {', '.join(REPAIRS)}")
    given, judges = _split(list(batches), held_out, repair == "auto")
    was_training = model.training
    model.eval()
    try:
        with masked(model, plan):
            loss_sliced = answer_loss(model, judges) if judges else None
        walk = _Walk(model, plan, ridge)
        if REPAIRS[repair]:
            walk.run(given, REPAIRS[repair], token_weights)
        prune_(model, plan)
        choice = _Choice(model, plan, walk.fitted)
        loss: float | None
        if repair == "auto" and loss_sliced is not None:
            loss = choice.best_(judges, loss_sliced)
        else:
            choice.apply_(dict.fromkeys(choice.kinds, 1.0))
            loss = answer_loss(model, judges) if judges else None
    finally:
        model.train(was_training)
    errors = _errors(walk.fitted)
    return RepairReport("sequential", errors, choice.factors, loss_sliced, loss, tuple(walk.notes))


@torch.no_grad()
def answer_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy over all labelled tokens of some batches."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for raw in batches:
        inputs = _on(device, raw)
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        total += float(losses.token_cross_entropy(logits, labels).sum(dtype=torch.float64))
        count += int(losses.label_counts(labels).sum())
    if not count:
        raise DataError("held-out batches have no labelled token: nothing to judge a repair on")
    return total / count


@dataclass(frozen=True)
class _Fitted:
    kind: str
    fit: Fit


@dataclass
class _Record:
    """What it takes to run one batch through the decoder layer by layer.

    Attributes:
        hidden: Input of the first layer.
        weights: Of its tokens.
        calls: Other arguments of each layer.
        added: What the model adds to the output of a layer before the next one reads it.
    """

    weights: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    added: dict[int, Tensor] = field(default_factory=dict)

    def through(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run one layer on hidden states."""
        args, kwargs = self.calls[index]
        output = _hidden_of(layer(hidden, *args, **kwargs))
        return output + self.added[index] if index in self.added else output


class _Walk:
    """Goes through the decoder once and fits; the model is the same before and after."""

    def __init__(self, model: PreTrainedModel, plan: Plan, ridge: float) -> None:
        self.model, self.plan, self.ridge = model, plan, ridge
        self.layers = decoder_layers(model)
        self.fitted: dict[str, _Fitted] = {}
        self.notes: list[str] = []

    def run(
        self, batches: Sequence[Batch], kinds: Sequence[str], weights: TokenWeights | None
    ) -> None:
        """Fill `fitted`, layer by layer."""
        self.records = _recorded(self.model, batches, weights)
        self.hidden = [record.hidden for record in self.records]
        self.original, self.original_index = list(self.hidden), 0
        seams = self._seams() if SEAM in kinds else {}
        rows: dict[int, list[Any]] = {}
        for row in _consumers(self.model, range(len(self.layers))):
            rows.setdefault(row[1], []).append(row)
        for index in progress(self.plan.layers, "repair"):
            if index in seams:
                self._advance_original(seams[index])
            with _put_back([linear for *_, linear in rows[index]]):
                for name, _, projection, linear in rows[index]:
                    is_seam = index in seams and _kind_of(projection) == MLP
                    kind = SEAM if is_seam else _kind_of(projection)
                    self._fit(name, index, projection, linear, kind if kind in kinds else None)
                self.hidden = [
                    record.through(self.layers[index], index, hidden)
                    for record, hidden in zip(self.records, self.hidden, strict=True)
                ]

    def _seams(self) -> dict[int, int]:
        """The layer before each run of removed layers, and the first layer after it."""
        kept = self.plan.layers
        ends = [*kept[1:], len(self.layers)]
        seams = {a: b for a, b in zip(kept, ends, strict=True) if b > a + 1}
        if kept[0] > 0:
            self.notes.append("the first layers are gone: no layer before them could be repaired")
        record, hidden = self.records[0], self.hidden[0]
        for index in list(seams):
            if not _adds_plainly(record, self.layers[index], index, hidden, self._mlp(index)):
                self.notes.append(f"layer {index} has a norm after its MLP: its seam stays")
                del seams[index]
        return seams

    def _mlp(self, index: int) -> nn.Module:
        paths = [p.path for p in self.plan.before.backbone.mlp if p.dim == INPUT_COLUMNS]
        return self.layers[index].get_submodule(paths[0])

    def _advance_original(self, end: int) -> None:
        """Bring the original hidden states to the input of a layer; its weights are still whole."""
        for index in range(self.original_index, end):
            self.original = [
                record.through(self.layers[index], index, hidden)
                for record, hidden in zip(self.records, self.original, strict=True)
            ]
        self.original_index = end

    def _fit(
        self, name: str, index: int, projection: Projection, linear: nn.Linear, kind: str | None
    ) -> None:
        keep = _kept_channels(self.plan, index, projection).to(linear.weight.device)
        weight: Tensor = linear.weight[:, keep]
        bias: Tensor | None = linear.bias
        is_cut = len(keep) < linear.in_features
        if kind == SEAM or (kind is not None and is_cut):
            moments = self._gather(index, linear, kind)
            sums = [moments.gram] if moments.cross is None else [moments.gram, moments.cross]
            if not all(bool(torch.isfinite(values).all()) for values in sums):
                raise NumericalError(f"NaN or infinity in layer {name} during repair")
            fit = refit(linear.weight, bias, moments, keep, self.ridge)
            self.fitted[name] = _Fitted(kind, fit)
            weight, bias = fit.weight, fit.bias
        if is_cut or name in self.fitted:
            whole = torch.zeros_like(linear.weight, dtype=weight.dtype)
            whole[:, keep] = weight
            _assign(name, linear, whole, bias)

    def _gather(self, index: int, linear: nn.Linear, kind: str) -> Moments:
        """Sums of a matrix's full input and, at a seam, of what the layer's output lacks."""
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        outputs = linear.out_features if kind == SEAM else None
        moments = Moments.zero(linear.in_features, outputs, dtype, linear.weight.device)
        inputs: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            for j, record in enumerate(self.records):
                output = record.through(self.layers[index], index, self.hidden[j])
                x, missing = inputs.pop().flatten(0, -2), None
                if kind == SEAM:
                    missing = (self.original[j].to(dtype) - output.to(dtype)).flatten(0, -2)
                moments.add(x, record.weights.flatten(), missing)
        finally:
            hook.remove()
        return moments


class _Choice:
    """A pruned model that can be set to any blend of its sliced and its repaired weights."""

    def __init__(self, model: PreTrainedModel, plan: Plan, fitted: Mapping[str, _Fitted]) -> None:
        rows = [row for row in _consumers(model, plan.layers) if row[0] in fitted]
        self.model, self.fitted = model, fitted
        self.linears = {name: linear for name, _, _, linear in rows}
        self.kinds = _kinds(fitted)
        self.factors = dict.fromkeys(self.kinds, 0.0)
        self.sliced = {
            name: (linear.weight.clone(), None if linear.bias is None else linear.bias.clone())
            for name, linear in self.linears.items()
        }

    def apply_(self, factors: Mapping[str, float]) -> None:
        """Set the weights to ``sliced + factor · (repaired - sliced)``, by kind."""
        for name, linear in self.linears.items():
            kind, fit = self.fitted[name].kind, self.fitted[name].fit
            if factors[kind] == self.factors[kind]:
                continue
            weight, bias = self.sliced[name]
            if factors[kind]:
                weight = torch.lerp(weight.double(), fit.weight, factors[kind])
                bias = bias if fit.bias is None else bias.double().lerp(fit.bias, factors[kind])
            _assign(name, linear, weight, bias)
        self.factors = dict(factors)

    def best_(self, batches: Sequence[Batch], loss_sliced: float) -> float:
        """Find the factors with the lowest loss, kind by kind from the full repair; set them."""
        losses_of = {tuple(self.factors.values()): loss_sliced}

        def loss(factors: dict[str, float]) -> float:
            key = tuple(factors.values())
            if key not in losses_of:
                self.apply_(factors)
                losses_of[key] = answer_loss(self.model, batches)
            return losses_of[key]

        best = min((dict.fromkeys(self.kinds, f) for f in (1.0, 0.0)), key=loss)
        for kind in self.kinds:
            best = min(({**best, kind: factor} for factor in _FACTORS), key=loss)
        self.apply_(best)
        return loss(best)


def _recorded(
    model: PreTrainedModel, batches: Sequence[Batch], token_weights: TokenWeights | None
) -> list[_Record]:
    """Run the original model once and write down how its layers are called for each batch."""
    records: list[_Record] = []
    seen, last = BackbonePass(), dict[str, Tensor]()

    def before(index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            records.append(_Record(seen.weights, hidden.clone()))
        elif not torch.equal(hidden, last["output"]):
            records[-1].added[index - 1] = hidden - last["output"]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        records[-1].calls.append((args[1:], others))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        last["output"] = _hidden_of(output).clone()

    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            hook = partial(before, index)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        seen.run(model, progress(batches, "calibrate"), token_weights)
    return records


def _adds_plainly(
    record: _Record, layer: nn.Module, index: int, hidden: Tensor, mlp_output: nn.Module
) -> bool:
    """Whether what a layer's last matrix gives is added to the hidden states as it is."""
    seen: list[Tensor] = []

    def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return 2 * output

    once = record.through(layer, index, hidden)
    handle = mlp_output.register_forward_hook(twice)
    try:
        change = (record.through(layer, index, hidden) - once).double()
    finally:
        handle.remove()
    share = (change * seen[0]).sum() / seen[0].double().square().sum()
    return bool((share - 1).abs() < 0.25)


@contextmanager
def _put_back(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Weights and biases that are replaced inside come back."""
    parameters = [(linear.weight, linear.bias) for linear in linears]
    try:
        yield
    finally:
        for linear, (weight, bias) in zip(linears, parameters, strict=True):
            linear.weight, linear.bias = weight, bias


def _consumers(
    model: nn.Module, indices: Sequence[int]
) -> Iterator[tuple[str, int, Projection, nn.Linear]]:
    """The matrices that write to the residual stream: (name, original layer, row, module).

    ``indices`` are the original numbers of the model's layers.
    """
    for position, projection, linear in consumers(model):
        index = indices[position]
        yield f"{index}.{projection.path}", index, projection, linear


def _kept_channels(plan: Plan, index: int, projection: Projection) -> Tensor:
    kept = plan.kv_groups if unit_of(projection) == "kv_group" else plan.neurons
    return channels_of(projection, plan.before.layers[index], kept[index])


def _kind_of(projection: Projection) -> str:
    return ATTENTION if unit_of(projection) == "kv_group" else MLP


def _assign(name: str, linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a module new parameters of its own data type."""
    for part, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        old = getattr(linear, part)
        new = value.to(old.dtype)
        if not torch.isfinite(new).all():
            raise NumericalError(f"NaN or infinity in the repaired {part} of layer {name}")
        setattr(linear, part, nn.Parameter(new, old.requires_grad))


def _kinds(fitted: Mapping[str, _Fitted]) -> list[str]:
    found = {f.kind for f in fitted.values()}
    return [kind for kind in (ATTENTION, MLP, SEAM) if kind in found]


def _errors(fitted: Mapping[str, _Fitted]) -> dict[str, tuple[float, float]]:
    return {n: (f.fit.sliced_error, f.fit.repaired_error) for n, f in fitted.items()}


def _check_ridge(ridge: float) -> None:
    if not 0 <= ridge < float("inf"):
        raise ConfigError(f"ridge {ridge} must be a finite number of 0 or more")


def _split(
    batches: list[Batch], held_out: Iterable[Batch] | None, needs_judges: bool
) -> tuple[list[Batch], list[Batch]]:
    """Calibration batches, and those to judge on."""
    judges = list(held_out) if held_out is not None else []
    if needs_judges and not judges:
        batches, judges = [b for i, b in enumerate(batches) if i % 5 != 4], batches[4::5]
        if not judges:
            raise DataError("repair 'auto' needs held_out batches, or 5 calibration batches")
    if not batches:
        raise DataError("no calibration batch was given")
    return batches, judges


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _on(device: torch.device, batch: Batch) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
