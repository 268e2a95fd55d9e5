"""Inputs of the matrices that write to the residual stream: collected and scored by unit.

C input channel of such a matrix, T token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import Anatomy, LayerShape, read_anatomy, spread, unit_of
from slimvlm.models.cost import BYTES
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Matrix, Parts
from slimvlm.scoring.batches import (
    BackbonePass,
    Batch,
    LossPass,
    TokenWeights,
    batches_with_targets,
    frozen,
    weight_of,
)
from slimvlm.scoring.experts import ExpertInput, inputs_of_experts
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.statistics import (
    Activations,
    ChannelMoments,
    Gates,
    Grams,
    InputMoments,
    Place,
    require_finite,
)
from slimvlm.scoring.unit_scores import Scores


def linear_matrices(model: nn.Module) -> list[tuple[int, Projection, nn.Linear]]:
    """List the linear modules that units own parts of, by layer; refuse experts."""
    found = []
    for index, matrix in Parts(model).matrices():
        if not isinstance(matrix.owner, nn.Linear):
            raise UnsupportedModelError(
                f"layer {index} has experts ({matrix.projection.path!r}): score width by "
                "activation, wanda, flap, magnitude or random, or prune depth or experts"
            )
        found.append((index, matrix.projection, matrix.owner))
    return found


@contextmanager
def on_inputs(
    model: nn.Module,
    call: Callable[[int, Projection, Tensor], Tensor | None],
    on_expert: Callable[[int, Projection, ExpertInput], None] | None = None,
) -> Iterator[None]:
    """Hook the input of every matrix that writes to the residual stream; ``call`` may replace it.

    ``on_expert`` is called for each expert; without it experts are refused.
    """

    def before(index: int, matrix: Matrix, module: nn.Module, args: Any) -> Any:
        if on_expert is not None and matrix.is_of_experts:
            for found in inputs_of_experts(module, matrix.projection.transposed, args):
                on_expert(index, matrix.projection, found)
            return None
        changed = call(index, matrix.projection, args[0])
        return None if changed is None else (changed,)

    if on_expert is None:
        linear_matrices(model)
    with ExitStack() as stack:
        for index, matrix in Parts(model).matrices():
            if matrix.projection.dim == INPUT_COLUMNS:
                hook = partial(before, index, matrix)
                stack.enter_context(matrix.owner.register_forward_pre_hook(hook))
        yield


@torch.no_grad()
def capture_activations(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Activations:
    """Average over tokens, by weight, ``|a|`` of neurons and the L2 norm of KV groups.

    A neuron of experts adds up over those that a token takes, by the weights of the router.
    """
    anatomy = read_anatomy(model)
    sums: dict[Place, Tensor] = {}
    seen = BackbonePass()

    def add(index: int, projection: Projection, weighted: Tensor) -> None:
        place, total = (index, unit_of(projection)), with_float64(weighted)
        sums[place] = sums.get(place, 0) + total.sum(0, dtype=torch.float64).cpu()

    def on_matrix(index: int, projection: Projection, x: Tensor) -> None:
        weights = seen.row_weights(x)
        squares = x.float().square().flatten(0, -2) * (weights > 0)
        require_finite(squares, f"the input of layer {index} {projection.path}")
        if unit_of(projection) == "kv_group":
            squares = squares.view(len(squares), anatomy.layers[index].num_kv_heads, -1).sum(-1)
        add(index, projection, squares.sqrt() * weights)

    def on_expert(index: int, projection: Projection, found: ExpertInput) -> None:
        require_finite(found.values, f"the input of layer {index} {projection.path}")
        weights = seen.row_weights(found.values)[found.tokens]
        add(index, projection, found.values.abs() * weights)

    with on_inputs(model, on_matrix, on_expert):
        seen.run(model, batches, token_weights)
    means = {place: total.float() / float(seen.weight) for place, total in sums.items()}
    return Activations(parts=means, num_samples=seen.num_samples, num_tokens=seen.num_tokens)


@torch.no_grad()
def capture_moments(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> ChannelMoments:
    """Sum first and second moments of each input channel of ``o_proj`` and ``down_proj``.

    Experts have their own, with zeros for tokens that do not take them.
    """
    parts: dict[Place, InputMoments] = {}
    for index, matrix in Parts(model).matrices():
        if matrix.projection.dim == INPUT_COLUMNS:
            weight = weight_of(matrix.owner, matrix.name)
            weight = weight.transpose(-1, -2) if matrix.projection.transposed else weight
            parts[index, matrix.projection.path] = InputMoments.of(weight)
    seen = BackbonePass()

    def on_matrix(index: int, projection: Projection, x: Tensor) -> None:
        values = x.float().flatten(0, -2)
        require_finite(values, f"the input of layer {index} {projection.path}")
        parts[index, projection.path].add(values, seen.row_weights(x))

    def on_expert(index: int, projection: Projection, found: ExpertInput) -> None:
        require_finite(found.values, f"the input of layer {index} {projection.path}")
        weights = seen.row_weights(found.values)[found.tokens]
        parts[index, projection.path].of_expert(found.expert).add(found.values, weights)

    with on_inputs(model, on_matrix, on_expert):
        seen.run(model, batches, token_weights)
    return ChannelMoments(parts=parts, **seen.totals)


@torch.no_grad()
def capture_grams(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    layers: Collection[int] | None = None,
) -> Grams:
    """Sum `Moments` of the inputs of ``o_proj`` and ``down_proj``.

    Memory: ``sum C²`` float32 numbers over all these matrices, on the model's device, whatever the
    amount of data (11,008 neurons: 485 MB a layer). Sums are float32, or float64 for a model in
    float64. No activation outlives its hook. With ``layers``, only these layers' matrices.
    """
    weights: dict[Place, Tensor] = {}
    parts: dict[Place, Moments] = {}
    for index, projection, linear in linear_matrices(model):
        if projection.dim == INPUT_COLUMNS and (layers is None or index in layers):
            weight = weights[index, projection.path] = weight_of(linear)
            kind = torch.promote_types(weight.dtype, torch.float32)
            device = with_float64(weight[:0]).device
            parts[index, projection.path] = Moments.zero(weight.shape[1], None, kind, device)
    seen = BackbonePass()

    def on_matrix(index: int, projection: Projection, x: Tensor) -> None:
        part = parts.get((index, projection.path))
        if part is not None:
            require_finite(x, f"the input of layer {index} {projection.path}")
            x = x.to(part.pairs.device)
            part.add(x.flatten(0, -2), seen.row_weights(x)[:, 0])

    with on_inputs(model, on_matrix):
        seen.run(model, batches, token_weights)
    return Grams(parts=parts, matrices=weights, **seen.totals)


def gram_bytes(shape: LayerShape) -> int:
    """Bytes of a layer's Gram matrices, for a model in float32 or less."""
    channels = (shape.num_heads * shape.head_dim, shape.intermediate_size)
    return sum(count**2 for count in channels) * BYTES["float32"]


def capture_gates(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Gates:
    """Average ``|dL_j / dm_u|`` over samples for a gate on each unit's output.

    One backward pass gives the gradients of all samples of a batch, since each has its own gates.
    ``L_j`` is the mean cross-entropy of the sample's labelled tokens, or with ``token_weights`` the
    weighted mean over its prompt and answer tokens.
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
            total = with_float64(gate.grad).abs().double().sum((0, 1)).cpu()
            sums[index, unit] = sums.get((index, unit), 0) + total
        gates.clear()

    with frozen(model), on_inputs(model, on_matrix):
        seen.run(model, batches_with_targets(model, batches, token_weights), after_batch)
    means = {place: total.float() / float(seen.num_samples) for place, total in sums.items()}
    return Gates(parts=means, **seen.totals)


def score_gate(statistics: Gates, anatomy: Anatomy) -> Scores:
    """``mean_j |dL_j / dm|`` for a gate ``m = 1`` on each unit's output, over samples ``j``.

    Equals the first-order change of the loss when the unit is switched off, with the sum over the
    unit's channels inside the absolute value. Needs no gradient of any weight.

    Reference:
        Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650, Eq. 2.
    """
    return Scores.of_units("gate", anatomy.num_layers, statistics.per_unit())


def score_activation(statistics: Activations, anatomy: Anatomy) -> Scores:
    """Mean size of a unit's output to ``o_proj`` / ``down_proj`` over tokens, by weight.

    Neurons: mean of ``|a|``. KV groups: mean L2 norm of the group's heads, concatenated.

    Reference:
        Muralidharan et al. 2024, Minitron, arXiv:2407.14679, Sec. 2.2 (mean over tokens here,
        with padding left out; the paper aggregates batch and sequence separately).
    """
    return Scores.of_units("activation", anatomy.num_layers, statistics.per_unit())


def score_wanda(statistics: ChannelMoments, anatomy: Anatomy) -> Scores:
    """``sum_i |W_ij| · ‖x_j‖`` of ``o_proj`` / ``down_proj``, added over the unit's channels.

    ``‖x_j‖`` is the root mean square over tokens, so that more data does not score higher.

    Reference:
        Sun et al. 2023, Wanda, arXiv:2306.11695, Eq. 1, added over outputs as in the structured
        variant that An et al. 2023, FLAP, arXiv:2312.11983 compare with.
    """

    def channels(part: InputMoments) -> Tensor:
        return part.column_l1 * (part.square / statistics.weight).sqrt()

    return Scores.of_units("wanda", anatomy.num_layers, statistics.per_unit(anatomy, channels))


def score_flap(statistics: ChannelMoments, anatomy: Anatomy) -> Scores:
    """``Var(x_j) · ‖W_j‖²`` of ``o_proj`` / ``down_proj``, added over the unit's channels.

    That is the cost of removing a channel if a bias replaces its mean. The paper standardises
    scores within each layer before it compares layers. Here they stay squared errors of the layer's
    output.

    Reference:
        An et al. 2023, FLAP, arXiv:2312.11983, fluctuation metric (there divided by one less
        than the number of tokens).
    """

    def channels(part: InputMoments) -> Tensor:
        mean, square = part.sum / statistics.weight, part.square / statistics.weight
        return (square - mean.square()).clamp_min(0) * part.column_square

    return Scores.of_units("flap", anatomy.num_layers, statistics.per_unit(anatomy, channels))
