"""Gradients of the loss: for weights, as Taylor terms summed over channels, and for gates.

No gradient of a whole matrix exists: where the backward pass comes to a matrix, blocks of its rows
are multiplied out for each sample, reduced to sums over channels and dropped. Only what joins
samples before the absolute value is taken has to be kept.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.models.anatomy import read_anatomy, spread, unit_of
from slimvlm.models.devices import weight_of, with_float64
from slimvlm.models.families import INPUT_COLUMNS, OUTPUT_ROWS, Projection
from slimvlm.models.hidden import frozen, layer_input, require_finite_values
from slimvlm.models.parts import Parts
from slimvlm.scoring.batches import Batch, Pass, TokenWeights, batches_with_targets
from slimvlm.scoring.forward import linear_matrices
from slimvlm.scoring.unit_scores import Place, Statistics

_BLOCK = 2**19  # numbers of a block that fits a CPU's cache; other devices take whole matrices


def capture_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    order: str = "first",
    gradient: str = "batch",
) -> Statistics:
    """Sum the Taylor terms of the model's answer loss over each channel.

    ``order``: ``first`` is ``|w g|``; ``second`` is ``w² mean_j(g_j²)`` with the Fisher diagonal;
    ``mix`` is ``|w g - ½ w² mean_j(g_j²)|``. For the first order, ``gradient`` is ``batch``: ``g``
    is the gradient of the mean loss over all labelled tokens; or ``per_sample``: the mean over
    samples of ``|w g_j|``, each ``g_j`` of one sample's mean loss. With ``token_weights`` losses
    are weighted means over prompt and answer tokens.

    Memory beyond the weights: the activations of a batch. ``batch`` keeps one float32 gradient,
    ``mix`` one gradient and one squared gradient, of the matrices that units own.

    Reference:
        Ma et al. 2023, LLM-Pruner, arXiv:2305.11627, Eq. 5 (for the second order its code omits
        the ½); Huang et al. 2025, arXiv:2507.20749, Eq. 3-5.
    """
    seen, is_mix, is_joined = Pass(), order == "mix", (order, gradient) == ("first", "batch")
    sums: dict[Place, Tensor] = {}  # of terms over channels
    # sums over batches of gradients, and of their squares, with the dimension that units divide
    kept: dict[Place, list[Tensor]] = {}

    def add(place: Place, dim: int, matrix: Tensor, rows: slice, terms: Tensor) -> None:
        if place not in sums:
            sums[place] = with_float64(terms.new_zeros(matrix.shape[dim])).double()
        total = sums[place]
        part = terms.sum(1 - dim).to(total.device)
        (total[rows] if dim == OUTPUT_ROWS else total).add_(part)

    def on_product(place: Place, dim: int, matrix: Tensor, x: Tensor, dy: Tensor) -> None:
        totals = seen.weights.sum(1)
        factors = totals.tolist() if is_mix else [1] * len(x)
        if is_joined:  # all samples are one
            dy = (dy * totals.to(dy)[:, None, None]).flatten(0, 1)[None]
            x, factors = x.flatten(0, 1)[None], [1]
        if (is_mix or is_joined) and place not in kept:
            zeros = [torch.zeros_like(matrix, dtype=torch.float32) for _ in range(1 + is_mix)]
            kept[place] = zeros  # not the matrix, which may be a copy of one on disk
        for rows in _row_blocks(matrix):
            weight = matrix[rows].float()
            for x_j, dy_j, factor in zip(x, dy, factors, strict=True):
                g = (dy_j[:, rows].mT @ x_j).float()
                if place in kept:
                    total, *squares = kept[place]
                    total[rows].add_(g, alpha=factor)
                    for square in squares:
                        square[rows].addcmul_(g, g)
                elif order == "second":
                    add(place, dim, matrix, rows, weight * g.square() * weight)
                else:
                    add(place, dim, matrix, rows, (weight * g).abs())

    with on_products(model, on_product):
        seen.backward(model, batches_with_targets(model, batches, token_weights))
    places = (each for each in linear_matrices(model) if (each[0], each[1].path) in kept)
    for index, projection, linear in places:
        place, matrix = (index, projection.path), weight_of(linear)
        total, *squares = kept.pop(place)
        for rows in _row_blocks(matrix):
            w = matrix[rows].float()
            terms = w * total[rows]
            for square in squares:  # of `mix`
                g = total[rows] / float(seen.weight)
                terms = w * g - 0.5 * w * (square[rows] / seen.num_samples) * w
            add(place, projection.dim, matrix, rows, terms.abs())
    count = 1 if is_mix else float(seen.weight) if is_joined else seen.num_samples
    return Statistics(parts={p: (total / count).cpu() for p, total in sums.items()}, **seen.totals)


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slice the rows of a matrix into blocks that fit a CPU's cache."""
    rows, columns = weight.shape
    step = max(_BLOCK // columns, 1) if weight.device.type == "cpu" else max(rows, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


@contextmanager
def on_products(
    model: nn.Module, call: Callable[[Place, int, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
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
        if output.requires_grad:
            output.register_hook(
                lambda dy: call(place, dim, weight_of(module), inputs.pop(place), dy)
            )

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

    Each sample of a batch has its own gates. This is the first-order change of the loss when the
    unit is switched off, with the sum over its channels inside the absolute value.

    Reference:
        Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650, Eq. 2.
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
