"""Gradients of the weights, as Taylor terms summed over channels.

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

from slimvlm.models.anatomy import Anatomy
from slimvlm.models.families import OUTPUT_ROWS
from slimvlm.models.hidden import layer_input
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Parts
from slimvlm.scoring.batches import (
    Batch,
    LossPass,
    Targets,
    TokenWeights,
    batches_with_targets,
    frozen,
    weight_of,
)
from slimvlm.scoring.inputs import linear_matrices
from slimvlm.scoring.statistics import Gradients, Place
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
) -> Gradients:
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
    data = batches_with_targets(model, batches, token_weights)
    if order == "mix":
        return _mixed(model, data)
    if order == "second":
        return _per_sample(model, data, lambda w, g: w * g.square() * w)
    if gradient == "per_sample":
        return _per_sample(model, data, taylor)
    return _batch_gradient(model, data)


def taylor(weight: Weight, gradient: Weight) -> Weight:
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

    def over(self, count: float, seen: LossPass) -> Gradients:
        """Divide the sums by a count."""
        parts = {place: (total / count).cpu() for place, total in self.items()}
        return Gradients(parts=parts, **seen.totals)


def _per_sample(model: nn.Module, data: Data, terms_of: Callable[..., Tensor]) -> Gradients:
    """Average ``terms_of(w, gradient of the sample's loss)`` over samples."""
    sums, seen = _Sums(), LossPass()

    def on_product(place: Place, dim: int, matrix: Tensor, x: Tensor, dy: Tensor) -> None:
        for rows in _row_blocks(matrix):
            weight = matrix[rows].float()
            for x_j, dy_j in zip(x, dy, strict=True):
                terms = terms_of(weight, (dy_j[:, rows].mT @ x_j).float())
                sums.add(place, dim, matrix, rows, terms)

    with on_products(model, on_product):
        seen.run(model, data)
    return sums.over(seen.num_samples, seen)


def _batch_gradient(model: nn.Module, data: Data) -> Gradients:
    """Sum ``|w g|`` for the gradient ``g`` of the weighted mean over all batches."""
    sums, seen, at_last = _Sums(), LossPass(), False
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
        totals = seen.targets.totals.to(dy)
        dy, x = (dy * totals[:, None, None]).flatten(0, 1), x.flatten(0, 1)
        if not at_last and place not in gradients:
            gradients[place] = torch.zeros_like(matrix, dtype=torch.float32)
        for rows in _row_blocks(matrix):
            gradient = (dy[:, rows].mT @ x).float()
            if place in gradients:
                gradient = gradients[place][rows].add_(gradient)
            if at_last:
                sums.add(place, dim, matrix, rows, taylor(matrix[rows].float(), gradient))
        if at_last:
            gradients.pop(place, None)

    with on_products(model, on_product):
        seen.run(model, looking_ahead())
    return sums.over(seen.weight, seen)


def _mixed(model: nn.Module, data: Data) -> Gradients:
    """Join both orders, gathered in the same pass."""
    sums, seen = _Sums(), LossPass()
    gradients: dict[Place, Tensor] = {}
    squares: dict[Place, Tensor] = {}

    def on_product(place: Place, dim: int, matrix: Tensor, x: Tensor, dy: Tensor) -> None:
        for kept in (gradients, squares):
            if place not in kept:
                kept[place] = torch.zeros_like(matrix, dtype=torch.float32)
        total, square = gradients[place], squares[place]
        weights = seen.targets.totals.tolist()
        for rows in _row_blocks(matrix):
            for x_j, dy_j, weight in zip(x, dy, weights, strict=True):
                g = (dy_j[:, rows].mT @ x_j).float()
                total[rows].add_(g, alpha=weight)
                square[rows].addcmul_(g, g)

    with on_products(model, on_product):
        seen.run(model, data)
    for index, projection, linear in linear_matrices(model):
        place, matrix = (index, projection.path), weight_of(linear)
        gradient, square = gradients.pop(place), squares.pop(place)
        for rows in _row_blocks(matrix):
            w, g = matrix[rows].float(), gradient[rows] / seen.weight
            terms = (w * g - 0.5 * w * (square[rows] / seen.num_samples) * w).abs()
            sums.add(place, projection.dim, matrix, rows, terms)
    return sums.over(1, seen)


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


def score_taylor(statistics: Gradients, anatomy: Anatomy) -> Scores:
    """``|w g|`` added over each unit; for layers over all matrices that units own, each once."""
    found, layer = statistics.per_unit(anatomy), statistics.per_layer(anatomy)
    return Scores.of_units("taylor", anatomy.num_layers, found, layer)


def score_taylor_widths(statistics: Gradients, anatomy: Anatomy) -> Scores:
    """Taylor terms of any order added over each unit."""
    return Scores.of_units("taylor", anatomy.num_layers, statistics.per_unit(anatomy))
