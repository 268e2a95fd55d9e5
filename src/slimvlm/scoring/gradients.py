"""Gradients of the weights, as Taylor terms summed over channels.

No gradient of a whole matrix exists: where the backward pass comes to a matrix, blocks of its rows
are multiplied out for each sample, reduced to sums over channels and dropped. Only what joins
several batches before the absolute value is taken has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
Terms = Callable[..., Tensor]
Weight = Float[Tensor, "O I"]

_BLOCK = 2**19
"""Numbers of a block on a CPU: small enough for its cache. Other devices take whole matrices."""


def capture_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    order: str = "first",
    gradient: str = "batch",
) -> Gradients:
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


def taylor(weight: Weight, gradient: Weight) -> Weight:
    """First order: ``|w g|``, the change of the loss when a weight becomes zero.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5; Huang et al. 2025,
        arXiv:2507.20749, Eq. 3-5.
    """
    return (weight * gradient).abs()


def taylor_second(weight: Weight, squared_gradient: Weight) -> Weight:
    """Second order with the Fisher diagonal: ``w² mean_j(g_j²)``.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5 (second term; its code omits the ½).
    """
    return weight * squared_gradient * weight


def taylor_mix(weight: Weight, gradient: Weight, squared_gradient: Weight) -> Weight:
    """Both orders: ``|w g - ½ w² mean_j(g_j²)|``.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5.
    """
    return (weight * gradient - 0.5 * weight * squared_gradient * weight).abs()


@dataclass(frozen=True)
class Product:
    """A matrix that units own a part of, in a backward pass.

    The gradient of sample ``j`` is ``dy[j]ᵀ x[j]``. It is left to the receiver to compute it, whole
    or in parts.

    Attributes:
        place: Layer index and path of the matrix.
        dim: The dimension that units divide.
        weight: ``[O, I]``.
        x: ``[B, T, I]`` its input.
        dy: ``[B, T, O]`` gradient of its output.
    """

    place: Place
    dim: int
    weight: Tensor
    x: Tensor
    dy: Tensor


class _Sums(dict[Place, Tensor]):
    """Sums over the channels of every matrix, added block by block of rows."""

    def add(self, place: Place, dim: int, weight: Tensor, rows: slice, terms: Tensor) -> None:
        """Add the terms of some rows of a matrix."""
        if place not in self:
            self[place] = with_float64(terms.new_zeros(weight.shape[dim])).double()
        total = self[place]
        part = terms.sum(1 - dim).to(total.device)
        (total[rows] if dim == OUTPUT_ROWS else total).add_(part)

    def over(self, count: float, seen: LossPass) -> Gradients:
        """The sums divided by a count."""
        parts = {place: (total / count).cpu() for place, total in self.items()}
        return Gradients(parts=parts, **seen.totals)


def _per_sample(model: nn.Module, data: Data, terms_of: Terms) -> Gradients:
    """Means over samples of ``terms_of(w, gradient of the sample's loss)``."""
    sums, seen = _Sums(), LossPass()

    def on_product(product: Product) -> None:
        for rows in _row_blocks(product.weight):
            weight = product.weight[rows].float()
            for x, dy in zip(product.x, product.dy, strict=True):
                terms = terms_of(weight, (dy[:, rows].mT @ x).float())
                sums.add(product.place, product.dim, product.weight, rows, terms)

    with on_products(model, on_product):
        seen.run(model, data)
    return sums.over(seen.num_samples, seen)


def _batch_gradient(model: nn.Module, data: Data) -> Gradients:
    """``|w g|`` for the gradient ``g`` of the weighted mean over all batches."""
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

    def on_product(product: Product) -> None:
        place, totals = product.place, seen.targets.totals.to(product.dy)
        dy, x = (product.dy * totals[:, None, None]).flatten(0, 1), product.x.flatten(0, 1)
        if not at_last and place not in gradients:
            gradients[place] = torch.zeros_like(product.weight, dtype=torch.float32)
        for rows in _row_blocks(product.weight):
            gradient = (dy[:, rows].mT @ x).float()
            if place in gradients:
                gradient = gradients[place][rows].add_(gradient)
            if at_last:
                terms = taylor(product.weight[rows].float(), gradient)
                sums.add(place, product.dim, product.weight, rows, terms)
        if at_last:
            gradients.pop(place, None)

    with on_products(model, on_product):
        seen.run(model, looking_ahead())
    return sums.over(seen.weight, seen)


def _mixed(model: nn.Module, data: Data) -> Gradients:
    """Second-order terms with the first-order gradient, gathered in the same pass."""
    sums, seen = _Sums(), LossPass()
    gradients: dict[Place, Tensor] = {}
    squares: dict[Place, Tensor] = {}

    def on_product(product: Product) -> None:
        for kept in (gradients, squares):
            if product.place not in kept:
                kept[product.place] = torch.zeros_like(product.weight, dtype=torch.float32)
        total, square = gradients[product.place], squares[product.place]
        weights = seen.targets.totals.tolist()
        for rows in _row_blocks(product.weight):
            for x, dy, weight in zip(product.x, product.dy, weights, strict=True):
                g = (dy[:, rows].mT @ x).float()
                total[rows].add_(g, alpha=weight)
                square[rows].addcmul_(g, g)

    with on_products(model, on_product):
        seen.run(model, data)
    for index, projection, linear in linear_matrices(model):
        place, matrix = (index, projection.path), weight_of(linear)
        gradient, square = gradients.pop(place), squares.pop(place)
        for rows in _row_blocks(matrix):
            means = (gradient[rows] / seen.weight, square[rows] / seen.num_samples)
            terms = taylor_mix(matrix[rows].float(), *means)
            sums.add(place, projection.dim, matrix, rows, terms)
    return sums.over(1, seen)


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Row slices of a matrix, each small enough for a CPU's cache."""
    rows, columns = weight.shape
    step = max(_BLOCK // columns, 1) if weight.device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, start + step)


@contextmanager
def on_products(model: nn.Module, call: Callable[[Product], None]) -> Iterator[None]:
    """Hand over every matrix that units own as soon as the backward pass has come to it.

    No parameter needs or gets a gradient: they are flags that are put back afterwards.
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
            call(Product(place, dim, weight_of(module), inputs.pop(place), dy))

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
