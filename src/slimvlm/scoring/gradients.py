"""Gradients of the weights, as Taylor terms summed over channels.

No gradient of a whole matrix exists: where the backward pass comes to a matrix, blocks of its rows
are multiplied out for each sample, reduced to sums over channels and dropped. Only what joins
several batches before the absolute value is taken has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from slimvlm.models.anatomy import projections
from slimvlm.models.families import OUTPUT_ROWS
from slimvlm.scoring.batches import (
    Batch,
    Targets,
    TokenWeights,
    batches_with_targets,
    sample_losses,
)
from slimvlm.scoring.hooks import Product, on_products, weight_of
from slimvlm.scoring.statistics import Statistics
from slimvlm.scoring.widths import taylor, taylor_mix, taylor_second

Data = Iterator[tuple[Batch, Targets]]
Terms = Callable[..., Tensor]

_BLOCK = 2**19
"""Numbers of a block on a CPU: small enough for its cache. Other devices take whole matrices."""


def capture_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    order: str = "first",
    gradient: str = "batch",
) -> Statistics:
    """Sums over each channel of the Taylor terms of the model's answer loss.

    Args:
        model: Its parameters are frozen.
        batches: Model inputs with ``labels``.
        token_weights: None: the loss is the mean cross-entropy of the labelled tokens. Otherwise
            it is the weighted mean over prompt and answer tokens, and "labelled" below means so.
        order: ``first``: ``|w g|``; ``second``: ``w² mean_j(g_j²)``; ``mix``: both.
        gradient: For the first order. ``batch``: ``g`` is the gradient of the mean loss over all
            labelled tokens. ``per_sample``: the mean over samples of ``|w g_j|``, each ``g_j`` of
            one sample's mean loss (arXiv:2507.20749, Eq. 5).

    Memory beyond the weights: with ``per_sample``, ``second``, or ``batch`` over a single batch,
    only the activations of a batch. ``batch`` over several batches keeps one float32 gradient,
    ``mix`` one gradient and one squared gradient, of the matrices that units own. Embeddings and
    the head never get a gradient.
    """
    data = batches_with_targets(model, batches, token_weights)
    if order == "mix":
        return _mixed(model, data)
    if order == "second":
        return _per_sample(model, data, lambda w, g: taylor_second(w, g.square()))
    if gradient == "per_sample":
        return _per_sample(model, data, taylor)
    return _batch_gradient(model, data)


class _ChannelSums:
    """Sums over the channels of every matrix, added block by block."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, dim: int, weight: Tensor, rows: slice, terms: Tensor) -> None:
        """Add the terms of some rows of a matrix."""
        if name not in self.tensors:
            zero = torch.zeros(weight.shape[dim], dtype=torch.float64, device=terms.device)
            self.tensors[name] = zero
        total = self.tensors[name]
        (total[rows] if dim == OUTPUT_ROWS else total).add_(terms.sum(1 - dim))

    def divided(self, count: float) -> dict[str, Tensor]:
        return {name: (total / count).cpu() for name, total in self.tensors.items()}


def _per_sample(model: nn.Module, data: Data, terms_of: Terms) -> Statistics:
    """Means over samples of ``terms_of(w, gradient of the sample's loss)``."""
    sums = _ChannelSums()

    def on_product(product: Product, targets: Targets) -> None:
        for rows in _row_blocks(product.weight):
            weight = product.weight[rows].float()
            for x, dy in zip(product.x, product.dy, strict=True):
                terms = terms_of(weight, (dy[:, rows].mT @ x).float())
                sums.add(product.name, product.dim, product.weight, rows, terms)

    samples, tokens, _ = _run(model, data, on_product)
    return Statistics("gradients", sums.divided(samples), samples, tokens)


def _batch_gradient(model: nn.Module, data: Data) -> Statistics:
    """``|w g|`` for the gradient ``g`` of the weighted mean over all batches."""
    sums = _ChannelSums()
    gradients: dict[str, Tensor] = {}
    batches = _Lookahead(data)

    def on_product(product: Product, targets: Targets) -> None:
        name, weighted = product.name, product.dy * _for_rows(targets.totals, product.dy)
        dy, x = weighted.flatten(0, 1), product.x.flatten(0, 1)
        if not batches.at_last and name not in gradients:
            gradients[name] = torch.zeros_like(product.weight, dtype=torch.float32)
        for rows in _row_blocks(product.weight):
            gradient = (dy[:, rows].mT @ x).float()
            if name in gradients:
                gradient = gradients[name][rows].add_(gradient)
            if batches.at_last:
                terms = taylor(product.weight[rows].float(), gradient)
                sums.add(name, product.dim, product.weight, rows, terms)
        if batches.at_last:
            gradients.pop(name, None)

    samples, tokens, weight = _run(model, batches, on_product)
    return Statistics("gradients", sums.divided(weight), samples, tokens)


def _mixed(model: nn.Module, data: Data) -> Statistics:
    """Second-order terms with the first-order gradient, gathered in the same pass."""
    gradients: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def on_product(product: Product, targets: Targets) -> None:
        for kept in (gradients, squares):
            if product.name not in kept:
                kept[product.name] = torch.zeros_like(product.weight, dtype=torch.float32)
        total, square = gradients[product.name], squares[product.name]
        weights = targets.totals.tolist()
        for rows in _row_blocks(product.weight):
            for x, dy, weight in zip(product.x, product.dy, weights, strict=True):
                g = (dy[:, rows].mT @ x).float()
                total[rows].add_(g, alpha=weight)
                square[rows].addcmul_(g, g)

    samples, tokens, total_weight = _run(model, data, on_product)
    sums = _ChannelSums()
    for index, projection, linear in projections(model):
        name, matrix = f"{index}.{projection.path}", weight_of(linear)
        gradient, square = gradients.pop(name), squares.pop(name)
        for rows in _row_blocks(matrix):
            means = (gradient[rows] / total_weight, square[rows] / samples)
            terms = taylor_mix(matrix[rows].float(), *means)
            sums.add(name, projection.dim, matrix, rows, terms)
    return Statistics("gradients", sums.divided(1), samples, tokens)


def _run(
    model: nn.Module,
    data: Iterable[tuple[Batch, Targets]],
    call: Callable[[Product, Targets], None],
) -> tuple[int, int, float]:
    """Go backward through every sample's loss; how many samples, tokens and what they weigh.

    Samples do not mix: a row of ``dy`` holds the gradient of its own sample's loss only.
    """
    in_flight: list[Targets] = []
    samples, tokens, weight = 0, 0, 0.0
    with on_products(model, lambda product: call(product, in_flight[0])):
        for batch, targets in data:
            in_flight[:] = [targets]
            sample_losses(model, batch, targets).sum().backward()
            samples += len(targets.labels)
            tokens += targets.num_tokens
            weight += float(targets.totals.sum())
    return samples, tokens, weight


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Row slices of a matrix, each small enough for a CPU's cache."""
    rows, columns = weight.shape
    step = max(_BLOCK // columns, 1) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _for_rows(values: Tensor, like: Tensor) -> Tensor:
    """A value for each sample, to multiply with ``[B, T, ...]``."""
    return values.to(like)[:, None, None]


class _Lookahead:
    """Batches in order, with word of whether the one in flight is the last."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.at_last = False

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        current = next(self.data)
        for following in self.data:
            yield current
            current = following
        self.at_last = True
        yield current
