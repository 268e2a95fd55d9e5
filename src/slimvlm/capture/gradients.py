"""Gradients of the weights, as Taylor terms summed over channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from slimvlm.capture.batches import Batch, Targets, TokenWeights, batches_with_targets
from slimvlm.capture.hooks import hooked_weights
from slimvlm.geometry import projections
from slimvlm.scores.width import taylor, taylor_mix, taylor_second
from slimvlm.values import Statistics

Data = Iterator[tuple[Batch, Targets]]


def capture_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    order: str = "first",
    gradient: str = "batch",
) -> Statistics:
    """Sums over each channel of the Taylor terms of the model's answer loss.

    Args:
        model: Its parameters are frozen but for the matrices that units own.
        batches: Model inputs with ``labels``.
        token_weights: None: the loss is the mean cross-entropy of the labelled tokens. Otherwise
            it is the weighted mean over prompt and answer tokens, and "labelled" below means so.
        order: ``first``: ``|w g|``; ``second``: ``w² mean_j(g_j²)``; ``mix``: both.
        gradient: For the first order. ``batch``: ``g`` is the gradient of the mean loss over all
            labelled tokens. ``per_sample``: the mean over samples of ``|w g_j|``, each ``g_j`` of
            one sample's mean loss (arXiv:2507.20749, Eq. 5).

    Memory beyond the weights: with ``per_sample``, ``second``, or ``batch`` over a single batch,
    one matrix at a time, since its gradient is reduced and freed as soon as it is there. ``batch``
    over several batches keeps one gradient, ``mix`` one gradient and one squared gradient, of the
    matrices that units own. Embeddings and the head never get a gradient.
    """
    data = batches_with_targets(model, batches, token_weights)
    if order == "first":
        collect = _batch_gradient if gradient == "batch" else _per_sample_gradient
        return collect(model, data)
    return _squared_gradients(model, data, mix=order == "mix")


def _batch_gradient(model: nn.Module, data: Data) -> Statistics:
    """|w · gradient of the summed loss|, divided by the weight of all targets at the end."""
    sums: dict[str, Tensor] = {}
    state = {"last": False}

    def on_gradient(name: str, dim: int, weight: Tensor) -> None:
        if state["last"]:
            assert weight.grad is not None
            sums[name] = _channel_sums(taylor(weight.detach().float(), weight.grad.float()), dim)
            weight.grad = None

    samples, tokens, weight = 0, 0, 0.0
    with hooked_weights(model, on_gradient):
        for (batch, targets), last in _with_last(data):
            state["last"] = last
            sample_losses = _sample_losses(model, batch, targets)
            (sample_losses * targets.totals.to(sample_losses)).sum().backward()
            samples += len(targets.labels)
            tokens += targets.num_tokens
            weight += float(targets.totals.sum())
    means = {name: value / weight for name, value in sums.items()}
    return Statistics("gradients", means, samples, tokens)


def _per_sample_gradient(model: nn.Module, data: Data) -> Statistics:
    """Mean over samples of |w · gradient of the sample's loss|."""
    sums: dict[str, Tensor] = {}

    def on_gradient(name: str, dim: int, weight: Tensor) -> None:
        assert weight.grad is not None
        value = _channel_sums(taylor(weight.detach().float(), weight.grad.float()), dim)
        sums[name] = sums.get(name, 0) + value
        weight.grad = None

    return _means_over_samples(model, data, on_gradient, sums)


def _squared_gradients(model: nn.Module, data: Data, mix: bool) -> Statistics:
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
        return _means_over_samples(model, data, on_gradient, sums)
    samples, tokens, total = 0, 0, 0.0
    with hooked_weights(model, on_gradient):
        for batch, targets in data:
            for weight in _backward_each_sample(model, batch, targets):
                state["weight"] = weight
                total += weight
            samples += len(targets.labels)
            tokens += targets.num_tokens
    for index, projection, linear in projections(model):
        name = f"{index}.{projection.path}"
        gradient = gradients.pop(name).div_(total)
        square = squares.pop(name).div_(samples)
        terms = taylor_mix(linear.weight.detach().float(), gradient, square)
        sums[name] = _channel_sums(terms, projection.dim)
    return Statistics("gradients", sums, samples, tokens)


def _means_over_samples(
    model: nn.Module,
    data: Data,
    on_gradient: Callable[[str, int, Tensor], None],
    sums: dict[str, Tensor],
) -> Statistics:
    samples = tokens = 0
    with hooked_weights(model, on_gradient):
        for batch, targets in data:
            for _ in _backward_each_sample(model, batch, targets):
                pass
            samples += len(targets.labels)
            tokens += targets.num_tokens
    means = {name: value / samples for name, value in sums.items()}
    return Statistics("gradients", means, samples, tokens)


def _backward_each_sample(model: nn.Module, batch: Batch, targets: Targets) -> Iterator[float]:
    """Backward through one sample's mean loss at a time, its weight announced before it runs."""
    sample_losses = _sample_losses(model, batch, targets)
    for j, weight in enumerate(targets.totals.tolist()):
        yield weight
        sample_losses[j].backward(retain_graph=j + 1 < len(sample_losses))


def _sample_losses(model: nn.Module, batch: Batch, targets: Targets) -> Tensor:
    return targets.sample_losses(model(**batch, use_cache=False).logits)


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    return value.clone() if total is None else total.add_(value)


def _channel_sums(values: Tensor, dim: int) -> Tensor:
    return values.sum(1 - dim, dtype=torch.float64).cpu()


def _with_last(data: Data) -> Iterator[tuple[tuple[Batch, Targets], bool]]:
    """Each batch, and whether it is the last one."""
    current = next(data)
    for following in data:
        yield current, False
        current = following
    yield current, True
