"""Gradients of the loss: for weights, as Taylor terms summed over channels, and for gates.

No gradient of a whole matrix exists: where the backward pass comes to a matrix, blocks of its rows
are multiplied out for each sample, reduced to sums over channels and dropped. Only what joins
several batches before the absolute value is taken has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimvlm.models.anatomy import Anatomy, read_anatomy, spread, unit_of
from slimvlm.models.families import INPUT_COLUMNS, OUTPUT_ROWS, Projection
from slimvlm.models.hidden import layer_input, require_finite_values
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Parts
from slimvlm.scoring.batches import (
    Batch,
    Pass,
    Targets,
    TokenWeights,
    batches_with_targets,
    frozen,
    weight_of,
)
from slimvlm.scoring.inputs import linear_matrices
from slimvlm.scoring.statistics import ChannelSums, Place, Statistics
from slimvlm.scoring.unit_scores import Scores

Data = Iterator[tuple[Batch, Targets]]
Weight = Float[Tensor, "O I"]
OnProduct = Callable[[Place, int, Tensor, Tensor, Tensor], None]

_BLOCK = 2**19
"""Numbers of a block on a CPU: small enough for its cache. Other devices take whole matrices."""


def capture_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    order: str = "first",
    gradient: str = "batch",
) -> ChannelSums:
    """Sum the Taylor terms of the model's answer loss over each channel.

    ``order``: ``first`` is ``|w g|``; ``second`` is ``w² mean_j(g_j²)`` with the Fisher diagonal;
    ``mix`` is ``|w g - ½ w² mean_j(g_j²)|``. For the first order, ``gradient`` is ``batch``: ``g``
    is the gradient of the mean loss over all labelled tokens; or ``per_sample``: the mean over
    samples of ``|w g_j|``, each ``g_j`` of one sample's mean loss.

    With ``token_weights`` the loss is the weighted mean over prompt and answer tokens, in place of
    the mean over the labelled ones.

    Memory beyond the weights: with ``per_sample``, ``second``, or ``batch`` over a single batch,
    only the activations of a batch. ``batch`` over several batches keeps one float32 gradient,
    ``mix`` one gradient and one squared gradient, of the matrices that units own. Embeddings and
    the head never get a gradient.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5 (for the second order its code omits
        the ½); Huang et al. 2025, arXiv:2507.20749, Eq. 3-5.
    """
    data, seen = batches_with_targets(model, batches, token_weights), Pass()
    if order == "mix":
        sums = _mixed(model, data, seen)
    elif order == "second":
        sums = _per_sample(model, data, seen, lambda w, g: w * g.square() * w)
    elif gradient == "per_sample":
        sums = _per_sample(model, data, seen, _taylor)
    else:
        sums = _batch_gradient(model, data, seen)
    return ChannelSums(parts=sums, **seen.totals)


def _taylor(weight: Weight, gradient: Weight) -> Weight:
    """``|w g|``: the first-order change of the loss when a weight becomes zero."""
    return (weight * gradient).abs()


class _Sums(dict[Place, Tensor]):
    """Sums over the channels of every matrix, added block by block of rows."""

    def add(self, place: Place, dim: int, weight: Tensor, rows: slice, terms: Tensor) -> None:
        """Add the terms of some rows of a matrix whose dimension ``dim`` units divide."""
        if place not in self:
            self[place] = with_float64(terms.new_zeros(weight.shape[dim])).double()
        total = self[place]
        part = terms.sum(1 - dim).to(total.device)
        (total[rows] if dim == OUTPUT_ROWS else total).add_(part)

    def over(self, count: float) -> dict[Place, Tensor]:
        """Divide the sums by a count."""
        return {place: (total / count).cpu() for place, total in self.items()}


def _per_sample(
    model: nn.Module, data: Data, seen: Pass, terms_of: Callable[..., Tensor]
) -> dict[Place, Tensor]:
    """Average ``terms_of(w, gradient of the sample's loss)`` over samples."""
    sums = _Sums()

    def on_product(place: Place, dim: int, matrix: Tensor, x: Tensor, dy: Tensor) -> None:
        for rows in _row_blocks(matrix):
            weight = matrix[rows].float()
            for x_j, dy_j in zip(x, dy, strict=True):
                terms = terms_of(weight, (dy_j[:, rows].mT @ x_j).float())
                sums.add(place, dim, matrix, rows, terms)

    with on_products(model, on_product):
        seen.backward(model, data)
    return sums.over(seen.num_samples)


def _batch_gradient(model: nn.Module, data: Data, seen: Pass) -> dict[Place, Tensor]:
    """Sum ``|w g|`` for the gradient ``g`` of the weighted mean over all batches."""
    sums, at_last = _Sums(), False
    gradients: dict[Place, Tensor] = {}

    def looking_ahead() -> Data:
        nonlocal at_last
        current = next(data)
        for following in data:
            yield current
            current = following
        at_last = True
        yield current

    def on_product(place: Place, dim: int, matrix: Tensor, x: Tensor, dy: Tensor) -> None:
        totals = seen.weights.sum(1).to(dy)
        dy, x = (dy * totals[:, None, None]).flatten(0, 1), x.flatten(0, 1)
        if not at_last and place not in gradients:
            gradients[place] = torch.zeros_like(matrix, dtype=torch.float32)
        for rows in _row_blocks(matrix):
            gradient = (dy[:, rows].mT @ x).float()
            if place in gradients:
                gradient = gradients[place][rows].add_(gradient)
            if at_last:
                sums.add(place, dim, matrix, rows, _taylor(matrix[rows].float(), gradient))
        if at_last:
            gradients.pop(place, None)

    with on_products(model, on_product):
        seen.backward(model, looking_ahead())
    return sums.over(float(seen.weight))


def _mixed(model: nn.Module, data: Data, seen: Pass) -> dict[Place, Tensor]:
    """Join both orders, gathered in the same pass."""
    sums = _Sums()
    gradients: dict[Place, Tensor] = {}
    squares: dict[Place, Tensor] = {}

    def on_product(place: Place, dim: int, matrix: Tensor, x: Tensor, dy: Tensor) -> None:
        for kept in (gradients, squares):
            if place not in kept:
                kept[place] = torch.zeros_like(matrix, dtype=torch.float32)
        total, square = gradients[place], squares[place]
        weights = seen.weights.sum(1).tolist()
        for rows in _row_blocks(matrix):
            for x_j, dy_j, weight in zip(x, dy, weights, strict=True):
                g = (dy_j[:, rows].mT @ x_j).float()
                total[rows].add_(g, alpha=weight)
                square[rows].addcmul_(g, g)

    with on_products(model, on_product):
        seen.backward(model, data)
    for index, projection, linear in linear_matrices(model):
        place, matrix = (index, projection.path), weight_of(linear)
        gradient, square = gradients.pop(place), squares.pop(place)
        for rows in _row_blocks(matrix):
            w, g = matrix[rows].float(), gradient[rows] / float(seen.weight)
            terms = (w * g - 0.5 * w * (square[rows] / seen.num_samples) * w).abs()
            sums.add(place, projection.dim, matrix, rows, terms)
    return sums.over(1)


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slice the rows of a matrix into blocks that fit a CPU's cache."""
    rows, columns = weight.shape
    step = max(_BLOCK // columns, 1) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


@contextmanager
def on_products(model: nn.Module, call: OnProduct) -> Iterator[None]:
    """Call a function for every matrix that units own, in the backward pass.

    As ``call(place, dim that units divide, matrix [O, I], x [B, T, I], dy [B, T, O])``; the
    gradient of sample ``j`` is ``dy[j]ᵀ x[j]``. No parameter needs or gets a gradient.
    """
    inputs: dict[Place, Tensor] = {}

    def start(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs)
        if hidden.requires_grad:
            return None
        leaf = hidden.detach().requires_grad_()
        return ((leaf, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": leaf})

    def after(place: Place, dim: int, module: nn.Linear, args: Any, output: Tensor) -> None:
        inputs[place] = args[0].detach()

        def on_gradient(dy: Tensor) -> None:
            call(place, dim, weight_of(module), inputs.pop(place), dy)

        if output.requires_grad:
            output.register_hook(on_gradient)

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        first = Parts(model).layers[0]
        stack.enter_context(first.register_forward_pre_hook(start, with_kwargs=True))
        for index, projection, linear in linear_matrices(model):
            hook = partial(after, (index, projection.path), projection.dim)
            stack.enter_context(linear.register_forward_hook(hook))
        yield


def capture_gates(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Average ``|dL_j / dm_u|`` over samples for a gate ``m_u = 1`` on each unit's output.

    One backward pass gives the gradients of all samples of a batch, since each has its own gates.
    ``L_j`` is the mean cross-entropy of the sample's labelled tokens, or with ``token_weights`` the
    weighted mean over its prompt and answer tokens.
    """
    anatomy, seen = read_anatomy(model), Pass()
    sums: dict[Place, Tensor] = {}
    gates: dict[Place, Tensor] = {}

    def before(index: int, projection: Projection, module: nn.Module, args: Any) -> Any:
        (x,), shape = args, anatomy.layers[index]
        gate = torch.ones(len(x), 1, shape.units(unit_of(projection)), device=x.device)
        gates[index, unit_of(projection)] = gate.requires_grad_()
        return (x * spread(projection, shape, gate).to(x.dtype),)

    def after_batch() -> None:
        for place, gate in gates.items():
            assert gate.grad is not None
            require_finite_values(gate.grad, f"the gate gradient of {place[0]}.{place[1]}")
            total = with_float64(gate.grad).abs().double().sum((0, 1)).cpu()
            sums[place] = sums.get(place, 0) + total
        gates.clear()

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for index, projection, linear in linear_matrices(model):
            if projection.dim == INPUT_COLUMNS:
                hook = partial(before, index, projection)
                stack.enter_context(linear.register_forward_pre_hook(hook))
        data = batches_with_targets(model, batches, token_weights)
        seen.backward(model, data, after_batch)
    means = {place: total.float() / float(seen.num_samples) for place, total in sums.items()}
    return Statistics(parts=means, **seen.totals)


def score_gate(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """``mean_j |dL_j / dm|`` for a gate ``m = 1`` on each unit's output, over samples ``j``.

    Equals the first-order change of the loss when the unit is switched off, with the sum over the
    unit's channels inside the absolute value. Needs no gradient of any weight.

    Reference:
        Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650, Eq. 2.
    """
    return Scores.of_units("gate", anatomy.num_layers, statistics.parts.items())


def score_taylor(statistics: ChannelSums, anatomy: Anatomy) -> Scores:
    """``|w g|`` added over each unit; for layers over all matrices that units own, each once."""
    found, layer = statistics.per_unit(anatomy), statistics.per_layer(anatomy)
    return Scores.of_units("taylor", anatomy.num_layers, found, layer)


def score_taylor_widths(statistics: ChannelSums, anatomy: Anatomy) -> Scores:
    """Taylor terms of any order added over each unit."""
    return Scores.of_units("taylor", anatomy.num_layers, statistics.per_unit(anatomy))
