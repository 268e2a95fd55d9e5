"""Run calibration batches through a model and keep sums: batches → `Statistics`.

Nothing that grows with the data is kept. Hidden states are compared inside forward hooks;
gradients are reduced to one number per channel inside post-accumulate hooks and freed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm import losses
from slimvlm.errors import DataError, NumericalError
from slimvlm.families import INPUT_COLUMNS
from slimvlm.geometry import decoder_layers, final_norm, projections, read_anatomy
from slimvlm.roles import valid_tokens
from slimvlm.scores.layers import angular_distance, block_influence
from slimvlm.scores.width import magnitude, taylor, taylor_mix, taylor_second
from slimvlm.units import spread, unit_of
from slimvlm.values import Statistics

Batch = dict[str, Any]


def capture_nothing(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Statistics for criteria that look at neither weights nor data."""
    return Statistics("nothing", {})


def capture_weights(model: nn.Module, batches: Iterable[Batch], p: int = 1) -> Statistics:
    """Sums of ``|w|^p`` for each channel of each matrix."""
    sums = {
        f"{index}.{projection.path}": magnitude(linear.weight.detach().float(), p)
        .double()
        .sum(1 - projection.dim)
        .cpu()
        for index, projection, linear in projections(model)
    }
    return Statistics("weights", sums)


@torch.no_grad()
def capture_hidden_states(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Block influence and angular distances, compared layer by layer as they appear.

    At any time only one layer's input and, for the angular distance, one vector for each sample
    and layer are held.
    """
    layers = decoder_layers(model)
    influence = torch.zeros(len(layers), dtype=torch.float64)
    influence_postnorm = torch.zeros((), dtype=torch.float64)
    angular = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    angular_postnorm = torch.zeros(len(layers), dtype=torch.float64)
    samples = tokens = 0
    seen: dict[str, Tensor] = {}
    last_tokens: list[Tensor] = []

    def on_layer(index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden_in = args[0] if args else kwargs["hidden_states"]
        hidden_out = output if isinstance(output, Tensor) else output[0]
        _require_finite(hidden_out, f"the output of layer {index}")
        values = block_influence(hidden_in, hidden_out, seen["mask"])
        influence[index] += values.sum(dtype=torch.float64).cpu()
        last_tokens.append(_at_last_token(hidden_in, seen["mask"]))
        if index == len(layers) - 1:
            seen["last_input"] = hidden_in
            last_tokens.append(_at_last_token(hidden_out, seen["mask"]))

    def on_norm(module: nn.Module, args: Any, output: Tensor) -> None:
        values = block_influence(seen["last_input"], output, seen["mask"])
        influence_postnorm.add_(values.sum(dtype=torch.float64).cpu())
        seen["final"] = _at_last_token(output, seen["mask"])

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = layer.register_forward_hook(partial(on_layer, index), with_kwargs=True)
            stack.callback(hook.remove)
        stack.callback(final_norm(model).register_forward_hook(on_norm).remove)
        for batch in _prepared(model, batches):
            seen["mask"] = valid_tokens(batch)
            last_tokens.clear()
            _forward_backbone(model, batch)
            for length in range(1, len(layers) + 1):
                for start in range(len(layers) - length + 1):
                    distance = angular_distance(last_tokens[start], last_tokens[start + length])
                    angular[length - 1, start] += distance.sum(dtype=torch.float64)
                to_final = angular_distance(last_tokens[len(layers) - length], seen["final"])
                angular_postnorm[length - 1] += to_final.sum(dtype=torch.float64)
            samples += len(seen["mask"])
            tokens += int(seen["mask"].sum())
    return Statistics(
        "hidden_states",
        {
            "influence_sum": influence,
            "influence_sum_postnorm": influence_postnorm,
            "angular_sum": angular,
            "angular_sum_postnorm": angular_postnorm,
        },
        samples,
        tokens,
    )


@torch.no_grad()
def capture_activations(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Sums over valid tokens of ``|a|`` for neurons and of the L2 norm for KV groups."""
    anatomy = read_anatomy(model)
    sums: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    samples = tokens = 0

    def on_consumer(name: str, index: int, projection: Any, module: Any, args: Any) -> None:
        squares = args[0].float().square() * seen["mask"][..., None]
        _require_finite(squares, f"the input of layer {index} {projection.path}")
        flat = squares.flatten(0, -2).sqrt() if name.endswith("neuron") else squares.flatten(0, -2)
        if name.endswith("neuron"):
            total = flat.sum(0, dtype=torch.float64)
        else:
            shape = anatomy.layers[index]
            grouped = flat.view(len(flat), shape.num_kv_heads, -1).sum(-1)
            total = grouped.sqrt().sum(0, dtype=torch.float64)
        sums[name] = sums.get(name, 0) + total.cpu()

    with _on_consumers(model, on_consumer):
        for batch in _prepared(model, batches):
            seen["mask"] = valid_tokens(batch)
            _forward_backbone(model, batch)
            samples += len(seen["mask"])
            tokens += int(seen["mask"].sum())
    return Statistics("activations", sums, samples, tokens)


def capture_gates(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Sums over samples of ``|dL_j / dm_u|`` for a gate on each unit's output.

    One backward pass gives the gradients of all samples of a batch, since each has its own gates.
    """
    anatomy = read_anatomy(model)
    sums: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    samples = tokens = 0

    def on_consumer(name: str, index: int, projection: Any, module: Any, args: Any) -> Any:
        shape = anatomy.layers[index]
        units = shape.block(projection.segments[0])[0]
        gates[name] = torch.ones(len(args[0]), 1, units, device=args[0].device, requires_grad=True)
        return (args[0] * spread(projection, shape, gates[name]).to(args[0].dtype),)

    with _frozen(model), _on_consumers(model, on_consumer):
        for batch in _prepared(model, batches, labels=True):
            _sample_losses(model, batch).sum().backward()
            for name, gate in gates.items():
                assert gate.grad is not None
                _require_finite(gate.grad, f"the gate gradient of {name}")
                sums[name] = sums.get(name, 0) + gate.grad.abs().double().sum((0, 1)).cpu()
            gates.clear()
            samples += len(batch["labels"])
            tokens += int(losses.label_counts(batch["labels"]).sum())
    return Statistics("gates", sums, samples, tokens)


def capture_gradients(
    model: nn.Module, batches: Iterable[Batch], order: str = "first", gradient: str = "batch"
) -> Statistics:
    """Sums over each channel of the Taylor terms of the model's answer loss.

    Args:
        model: Its parameters are frozen but for the matrices that units own.
        batches: Model inputs with ``labels``.
        order: ``first``: ``|w g|``; ``second``: ``w² mean_j(g_j²)``; ``mix``: both.
        gradient: For the first order. ``batch``: ``g`` is the gradient of the mean loss over all
            labelled tokens. ``per_sample``: the mean over samples of ``|w g_j|``, each ``g_j`` of
            one sample's mean loss (arXiv:2507.20749, Eq. 5).

    Memory beyond the weights: with ``per_sample``, ``second``, or ``batch`` over a single batch,
    one matrix at a time, since its gradient is reduced and freed as soon as it is there. ``batch``
    over several batches keeps one gradient, ``mix`` one gradient and one squared gradient, of the
    matrices that units own. Embeddings and the head never get a gradient.
    """
    if order == "first":
        collect = _batch_gradient if gradient == "batch" else _per_sample_gradient
        return collect(model, batches)
    return _squared_gradients(model, batches, mix=order == "mix")


def _batch_gradient(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """|w · gradient of the summed loss|, divided by the number of labelled tokens at the end."""
    sums: dict[str, Tensor] = {}
    state = {"last": False}

    def on_gradient(name: str, dim: int, weight: Tensor) -> None:
        if state["last"]:
            assert weight.grad is not None
            sums[name] = _channel_sums(taylor(weight.detach().float(), weight.grad.float()), dim)
            weight.grad = None

    samples = tokens = 0
    with _hooked_weights(model, on_gradient):
        for batch, last in _with_last(_prepared(model, batches, labels=True)):
            state["last"] = last
            counts = losses.label_counts(batch["labels"])
            (_sample_losses(model, batch) * counts.to(_device(model))).sum().backward()
            samples += len(counts)
            tokens += int(counts.sum())
    means = {name: value / max(tokens, 1) for name, value in sums.items()}
    return Statistics("gradients", means, samples, tokens)


def _per_sample_gradient(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Mean over samples of |w · gradient of the sample's loss|."""
    sums: dict[str, Tensor] = {}

    def on_gradient(name: str, dim: int, weight: Tensor) -> None:
        assert weight.grad is not None
        value = _channel_sums(taylor(weight.detach().float(), weight.grad.float()), dim)
        sums[name] = sums.get(name, 0) + value
        weight.grad = None

    return _means_over_samples(model, batches, on_gradient, sums)


def _squared_gradients(model: nn.Module, batches: Iterable[Batch], mix: bool) -> Statistics:
    """Second-order terms; with ``mix`` the first-order gradient is gathered in the same pass."""
    sums: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    state = {"weight": 1.0}

    def on_gradient(name: str, dim: int, weight: Tensor) -> None:
        assert weight.grad is not None
        g = weight.grad.float()
        if mix:
            squares[name] = _added(squares.get(name), g.square())
            gradients[name] = _added(gradients.get(name), g.mul_(state["weight"]))
        else:
            value = _channel_sums(taylor_second(weight.detach().float(), g.square()), dim)
            sums[name] = sums.get(name, 0) + value
        weight.grad = None

    if not mix:
        return _means_over_samples(model, batches, on_gradient, sums)
    samples = tokens = 0
    with _hooked_weights(model, on_gradient):
        for batch in _prepared(model, batches, labels=True):
            counts = losses.label_counts(batch["labels"]).tolist()
            for count in _backward_each_sample(model, batch, counts):
                state["weight"] = float(count)
            samples += len(counts)
            tokens += sum(counts)
    for index, projection, linear in projections(model):
        name = f"{index}.{projection.path}"
        weight = linear.weight.detach().float()
        gradient = gradients.pop(name).div_(max(tokens, 1))
        square = squares.pop(name).div_(max(samples, 1))
        sums[name] = _channel_sums(taylor_mix(weight, gradient, square), projection.dim)
    return Statistics("gradients", sums, samples, tokens)


def _means_over_samples(
    model: nn.Module,
    batches: Iterable[Batch],
    on_gradient: Callable[[str, int, Tensor], None],
    sums: dict[str, Tensor],
) -> Statistics:
    samples = tokens = 0
    with _hooked_weights(model, on_gradient):
        for batch in _prepared(model, batches, labels=True):
            counts = losses.label_counts(batch["labels"]).tolist()
            for _ in _backward_each_sample(model, batch, counts):
                pass
            samples += len(counts)
            tokens += sum(counts)
    means = {name: value / max(samples, 1) for name, value in sums.items()}
    return Statistics("gradients", means, samples, tokens)


def _backward_each_sample(model: nn.Module, batch: Batch, counts: list[int]) -> Iterator[int]:
    """Backward through one sample's mean loss at a time, each announced before it runs."""
    sample_losses = _sample_losses(model, batch)
    for j, count in enumerate(counts):
        yield count
        sample_losses[j].backward(retain_graph=j + 1 < len(counts))


def _sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of each sample over its labelled tokens."""
    labels = batch["labels"]
    counts = losses.label_counts(labels)
    if not bool(counts.all()):
        raise DataError("a calibration sample has no labelled token: nothing to take a loss of")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    token_losses = losses.token_cross_entropy(logits, labels)
    sample_losses = token_losses.sum(1) / counts.to(token_losses)
    _require_finite(sample_losses, "the calibration loss")
    return sample_losses


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if total is None else total.add_(value)


def _channel_sums(values: Tensor, dim: int) -> Tensor:
    return values.sum(1 - dim, dtype=torch.float64).cpu()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _prepared(model: nn.Module, batches: Iterable[Batch], labels: bool = False) -> Iterator[Batch]:
    """Batches on the model's device; labels checked, made from the text where absent."""
    device, empty = _device(model), True
    for raw in batches:
        empty = False
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in raw.items()}
        if labels:
            batch["labels"] = _labels(batch)
        else:
            batch.pop("labels", None)
        yield batch
    if empty:
        raise DataError("no calibration batch was given")


def _labels(batch: Batch) -> Tensor:
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        if "input_ids" not in batch:
            raise DataError("a batch of inputs_embeds needs labels for this criterion")
        labels = batch["input_ids"]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, losses.IGNORE)


def _at_last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each sample's last valid token."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].cpu()


def _forward_backbone(model: Any, batch: Batch) -> None:
    """Run everything but the head."""
    model.base_model(**batch, use_cache=False)


def _with_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last one."""
    current = next(batches)
    for following in batches:
        yield current, False
        current = following
    yield current, True


def _require_finite(values: Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise NumericalError(f"NaN or infinity in {what} during calibration")


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient inside; flags are put back afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _hooked_weights(
    model: nn.Module, on_gradient: Callable[[str, int, Tensor], None]
) -> Iterator[None]:
    """Only the matrices that units own get gradients; each is handed over as soon as it is there.

    ``on_gradient(name, divided dimension, weight)`` must free ``weight.grad`` when done with it.
    """
    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        for index, projection, linear in projections(model):
            linear.weight.requires_grad_(True)
            call = partial(on_gradient, f"{index}.{projection.path}", projection.dim)
            stack.callback(linear.weight.register_post_accumulate_grad_hook(call).remove)
            stack.callback(setattr, linear.weight, "grad", None)
        yield


@contextmanager
def _on_consumers(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Hook the input of every matrix that writes to the residual stream.

    ``call(name, layer index, projection, module, args)`` may return new arguments. The name is
    ``<layer index>.<unit>``.
    """
    with ExitStack() as stack:
        for index, projection, linear in projections(model):
            if projection.dim == INPUT_COLUMNS:
                hook = partial(call, f"{index}.{unit_of(projection)}", index, projection)
                stack.callback(linear.register_forward_pre_hook(hook).remove)
        yield


CAPTURES: dict[str, Callable[..., Statistics]] = {
    "nothing": capture_nothing,
    "weights": capture_weights,
    "hidden_states": capture_hidden_states,
    "activations": capture_activations,
    "gates": capture_gates,
    "gradients": capture_gradients,
}
"""How each kind of statistics that a criterion may ask for is collected."""
