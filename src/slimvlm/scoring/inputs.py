"""What units send to the matrices that write to the residual stream: collected and scored.

C input channel of such a matrix, T token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import Anatomy, LayerShape, read_anatomy
from slimvlm.models.cost import BYTES
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.parts import matrices
from slimvlm.models.units import spread, unit_of
from slimvlm.scoring.batches import (
    BackbonePass,
    Batch,
    LossPass,
    TokenWeights,
    batches_with_targets,
)
from slimvlm.scoring.statistics import (
    Activations,
    ChannelMoments,
    Gates,
    Grams,
    GramSums,
    InputMoments,
    Place,
    require_finite,
)
from slimvlm.scoring.unit_scores import Scores


def hookable(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """Every matrix that units own parts of: (layer index, its row of data, the module).

    Raises:
        UnsupportedModelError: If one belongs to experts, which are no modules that hooks could see.
    """
    for index, matrix in matrices(model):
        if not isinstance(matrix.owner, nn.Linear):
            raise UnsupportedModelError(
                f"layer {index} has experts ({matrix.projection.path!r}), whose inputs and "
                "gradients no hook sees: score width by magnitude or random, or prune depth"
            )
        yield index, matrix.projection, matrix.owner


def writing_matrices(model: nn.Module) -> Iterator[tuple[int, Projection, nn.Linear]]:
    """Every matrix that writes to the residual stream: its input columns belong to units.

    Raises:
        UnsupportedModelError: If one belongs to experts.
    """
    for index, projection, linear in hookable(model):
        if projection.dim == INPUT_COLUMNS:
            yield index, projection, linear


@contextmanager
def on_writing_matrices(
    model: nn.Module, call: Callable[[int, Projection, Tensor], Tensor | None]
) -> Iterator[None]:
    """Hook the input of every matrix that writes to the residual stream.

    ``call(layer index, projection, input)`` may return another input.
    """

    def before(index: int, projection: Projection, module: nn.Module, args: Any) -> Any:
        changed = call(index, projection, args[0])
        return None if changed is None else (changed,)

    with ExitStack() as stack:
        for index, projection, linear in writing_matrices(model):
            hook = partial(before, index, projection)
            stack.enter_context(linear.register_forward_pre_hook(hook))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient inside; flags are put back afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def weight_of(owner: Any, name: str = "weight") -> Tensor:
    """A parameter, also where accelerate has put it aside until its module runs."""
    weight: Tensor = getattr(owner, name).detach()
    return owner._hf_hook.weights_map[name] if weight.is_meta else weight


@torch.no_grad()
def capture_activations(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Activations:
    """Weighted sums over tokens of ``|a|`` for neurons and of the L2 norm for KV groups."""
    anatomy = read_anatomy(model)
    sums: dict[Place, Tensor] = {}
    seen = BackbonePass()

    def on_matrix(index: int, projection: Projection, x: Tensor) -> None:
        unit, weights = unit_of(projection), seen.row_weights(x)
        squares = x.float().square().flatten(0, -2) * (weights > 0)
        require_finite(squares, f"the input of layer {index} {projection.path}")
        if unit == "kv_group":
            squares = squares.view(len(squares), anatomy.layers[index].num_kv_heads, -1).sum(-1)
        total = (squares.sqrt() * weights).sum(0, dtype=torch.float64)
        sums[index, unit] = sums.get((index, unit), 0) + total.cpu()

    with on_writing_matrices(model, on_matrix):
        seen.run(model, batches, token_weights)
    return Activations(parts=sums, **seen.totals)


@torch.no_grad()
def capture_moments(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> ChannelMoments:
    """First and second moments of each input channel of ``o_proj`` and ``down_proj``."""
    parts = {(i, row.path): InputMoments.of(weight_of(o)) for i, row, o in writing_matrices(model)}
    seen = BackbonePass()

    def on_matrix(index: int, projection: Projection, x: Tensor) -> None:
        values = x.float().flatten(0, -2)
        require_finite(values, f"the input of layer {index} {projection.path}")
        parts[index, projection.path].add(values, seen.row_weights(x))

    with on_writing_matrices(model, on_matrix):
        seen.run(model, batches, token_weights)
    return ChannelMoments(parts=parts, **seen.totals)


@torch.no_grad()
def capture_grams(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    layers: Collection[int] | None = None,
) -> Grams:
    """Gram matrices of what enters ``o_proj`` and ``down_proj``.

    Memory: ``sum C²`` float32 numbers over all these matrices, on the model's device, whatever the
    amount of data (11,008 neurons: 485 MB a layer). Sums are float32, or float64 for a model in
    float64. No activation outlives its hook. With ``layers``, only these layers' matrices.
    """
    parts = {
        (index, projection.path): GramSums(weight_of(linear))
        for index, projection, linear in writing_matrices(model)
        if layers is None or index in layers
    }
    seen = BackbonePass()

    def on_matrix(index: int, projection: Projection, x: Tensor) -> None:
        part = parts.get((index, projection.path))
        if part is not None:
            require_finite(x, f"the input of layer {index} {projection.path}")
            part.add_(x.flatten(0, -2), seen.row_weights(x))

    with on_writing_matrices(model, on_matrix):
        seen.run(model, batches, token_weights)
    found = {place: part.value() for place, part in parts.items()}
    return Grams(parts=found, **seen.totals)


def gram_bytes(shape: LayerShape) -> int:
    """Memory that the Gram matrices of a layer take, of a model of single precision or less."""
    channels = (shape.num_heads * shape.head_dim, shape.intermediate_size)
    return sum(count**2 for count in channels) * BYTES["float32"]


def capture_gates(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Gates:
    """Sums over samples of ``|dL_j / dm_u|`` for a gate on each unit's output.

    One backward pass gives the gradients of all samples of a batch, since each has its own gates.

    Args:
        model: The model.
        batches: Model inputs with ``labels``.
        token_weights: None: ``L_j`` is the mean cross-entropy of the sample's labelled tokens.
            Otherwise it is the weighted mean over its prompt and answer tokens.
    """
    anatomy = read_anatomy(model)
    sums: dict[Place, Tensor] = {}
    gates: dict[Place, Tensor] = {}
    seen = LossPass()

    def on_matrix(index: int, projection: Projection, x: Tensor) -> Tensor:
        shape = anatomy.layers[index]
        units = shape.block(projection.segments[0])[0]
        gate = torch.ones(len(x), 1, units, device=x.device, requires_grad=True)
        gates[index, unit_of(projection)] = gate
        return x * spread(projection, shape, gate).to(x.dtype)

    def after_batch() -> None:
        for (index, unit), gate in gates.items():
            assert gate.grad is not None
            require_finite(gate.grad, f"the gate gradient of {index}.{unit}")
            total = gate.grad.abs().double().sum((0, 1)).cpu()
            sums[index, unit] = sums.get((index, unit), 0) + total
        gates.clear()

    with frozen(model), on_writing_matrices(model, on_matrix):
        seen.run(model, batches_with_targets(model, batches, token_weights), after_batch)
    return Gates(parts=sums, **seen.totals)


def wanda(column_l1: Float[Tensor, " C"], mean_square: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """``sum_i |W_ij| · ‖x_j‖``: a channel's weights times the size of its input.

    ``‖x_j‖`` is the root mean square over tokens, so that more data does not score higher.

    Reference:
        Sun et al. 2023, Wanda, arXiv:2306.11695, Eq. 1, added over outputs as in the structured
        variant that An et al. 2023, FLAP, arXiv:2312.11983 compare with.
    """
    return column_l1 * mean_square.sqrt()


def fluctuation(
    column_square: Float[Tensor, " C"],
    mean: Float[Tensor, " C"],
    mean_square: Float[Tensor, " C"],
) -> Float[Tensor, " C"]:
    """``Var(x_j) · ‖W_j‖²``: what removing a channel costs if a bias stands in for its mean.

    Reference:
        An et al. 2023, FLAP, arXiv:2312.11983, fluctuation metric (there divided by one less
        than the number of tokens).
    """
    return (mean_square - mean.square()).clamp_min(0) * column_square


def score_gate(statistics: Gates, anatomy: Anatomy) -> Scores:
    """``mean_j |dL_j / dm|`` for a gate ``m = 1`` on each unit's output, over samples ``j``.

    Equals the first-order change of the loss when the unit is switched off, with the sum over the
    unit's channels inside the absolute value. Needs no gradient of any weight.

    Reference:
        Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650, Eq. 2.
    """
    return Scores.of_units("gate", anatomy.num_layers, statistics.means())


def score_activation(statistics: Activations, anatomy: Anatomy) -> Scores:
    """Mean size of what a unit sends to ``o_proj`` / ``down_proj`` over tokens, by weight.

    Neurons: mean of ``|a|``. KV groups: mean L2 norm of the group's heads, concatenated.

    Reference:
        Muralidharan et al. 2024, Minitron, arXiv:2407.14679, Sec. 2.2 (mean over tokens here,
        with padding left out; the paper aggregates batch and sequence separately).
    """
    return Scores.of_units("activation", anatomy.num_layers, statistics.means())


def score_wanda(statistics: ChannelMoments, anatomy: Anatomy) -> Scores:
    """`wanda` of each channel of ``o_proj`` / ``down_proj``, added over the unit's channels."""

    def channels(part: InputMoments) -> Tensor:
        return wanda(part.column_l1, part.square / statistics.weight)

    return Scores.of_units("wanda", anatomy.num_layers, statistics.per_unit(anatomy, channels))


def score_flap(statistics: ChannelMoments, anatomy: Anatomy) -> Scores:
    """`fluctuation` of each channel of ``o_proj`` / ``down_proj``, added over the unit's channels.

    The paper standardises scores within each layer before it compares layers. Here they stay
    squared errors of the layer's output.
    """

    def channels(part: InputMoments) -> Tensor:
        mean, square = part.sum / statistics.weight, part.square / statistics.weight
        return fluctuation(part.column_square, mean, square)

    return Scores.of_units("flap", anatomy.num_layers, statistics.per_unit(anatomy, channels))
