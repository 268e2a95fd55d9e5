"""Inputs of the matrices that write to the residual stream, and of experts: gathered and scored.

C input channel of such a matrix, T token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import Anatomy, LayerShape, read_anatomy, unit_of
from slimvlm.models.cost import BYTES
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.hidden import require_finite_values
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Matrix, Parts, backbone_of
from slimvlm.scoring.batches import Batch, Pass, TokenWeights, weight_of
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.statistics import ChannelMoments, Grams, InputMoments, Place, Statistics
from slimvlm.scoring.unit_scores import Scores

OnInput = Callable[
    [int, Projection, Float[Tensor, "T C"], Float[Tensor, "T 1"], int | None], object
]
"""Takes layer, matrix, inputs, the weights of their tokens and, of experts, the expert."""


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


def writing_matrices(model: nn.Module) -> list[tuple[int, Matrix]]:
    """List the matrices that write to the residual stream, experts' too, by layer."""
    matrices = Parts(model).matrices()
    return [(index, each) for index, each in matrices if each.projection.dim == INPUT_COLUMNS]


@contextmanager
def on_inputs(
    model: nn.Module, seen: Pass, call: OnInput, layers: Collection[int] | None = None
) -> Iterator[None]:
    """Call a function for the inputs of every matrix that writes to the residual stream.

    With ``layers``, of these layers only.
    """

    def before(index: int, matrix: Matrix, module: nn.Module, args: Any) -> None:
        projection = matrix.projection
        if matrix.is_of_experts:
            for expert, tokens, x in inputs_of_experts(module, projection.transposed, args):
                require_finite_values(x, f"the input of layer {index} {projection.path}")
                call(index, projection, x, seen.row_weights(x)[tokens], expert)
        else:
            x = args[0].flatten(0, -2)
            require_finite_values(x, f"the input of layer {index} {projection.path}")
            call(index, projection, x, seen.row_weights(x), None)

    with ExitStack() as stack:
        for index, matrix in writing_matrices(model):
            if layers is None or index in layers:
                hook = partial(before, index, matrix)
                stack.enter_context(matrix.owner.register_forward_pre_hook(hook))
        yield


def inputs_of_experts(
    module: Any, transposed: bool, args: Any
) -> Iterator[tuple[int, Int[Tensor, " T"], Float[Tensor, "T C"]]]:
    """Compute the inputs of each expert's last matrix, as its module runs.

    Yields the expert, the tokens that take it, and for each its neurons ``act(gate) * up`` times
    the weight that the router gives the expert. The module is called with tokens, their experts and
    the router's weights, which scale the output; or (Llama 4) with all tokens for each expert,
    scaled already, zero where they do not take it.
    """
    weight = weight_of(module, "gate_up_proj")
    weight = weight.transpose(1, 2) if transposed else weight
    hidden, *routed = args
    for expert, matrix in enumerate(weight):
        if routed:
            tokens, place = (routed[0] == expert).nonzero(as_tuple=True)
            entered, scale = hidden[tokens], routed[1][tokens, place, None]
        else:
            all_tokens = hidden.view(len(weight), -1, hidden.shape[-1])[expert]
            tokens = (all_tokens != 0).any(-1).nonzero()[:, 0]
            entered, scale = all_tokens[tokens], 1.0
        gate, up = F.linear(entered, matrix).chunk(2, dim=-1)
        if len(tokens):
            yield expert, tokens, (module.act_fn(gate) * up).float() * scale


@torch.no_grad()
def capture_activations(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Average over tokens, by weight, ``|a|`` of neurons and the L2 norm of KV groups.

    A neuron of experts adds up over those that a token takes, by the weights of the router.
    """
    anatomy, seen = read_anatomy(model), Pass()
    sums: dict[Place, Tensor] = {}

    def add(
        index: int, projection: Projection, x: Tensor, weights: Tensor, expert: int | None
    ) -> None:
        place, sizes = (index, unit_of(projection)), x.float().abs()
        if place[1] == "kv_group":
            squares = sizes.square().view(len(x), anatomy.layers[index].num_kv_heads, -1)
            sizes = squares.sum(-1).sqrt()
        total = with_float64(sizes * weights).sum(0, dtype=torch.float64).cpu()
        sums[place] = sums.get(place, 0) + total

    with on_inputs(model, seen, add):
        seen.forward(model, batches, token_weights)
    means = {place: total.float() / float(seen.weight) for place, total in sums.items()}
    return Statistics(parts=means, **seen.totals)


@torch.no_grad()
def capture_moments(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> ChannelMoments:
    """Sum first and second moments of each input channel of ``o_proj`` and ``down_proj``.

    Experts have their own, with zeros for tokens that do not take them.
    """
    parts: dict[Place, InputMoments] = {}
    for index, matrix in writing_matrices(model):
        weight = weight_of(matrix.owner, matrix.name)
        weight = weight.transpose(-1, -2) if matrix.projection.transposed else weight
        parts[index, matrix.projection.path] = InputMoments.of(weight)
    seen = Pass()

    def add(
        index: int, projection: Projection, x: Tensor, weights: Tensor, expert: int | None
    ) -> None:
        parts[index, projection.path].add(x.float(), weights, expert)

    with on_inputs(model, seen, add):
        seen.forward(model, batches, token_weights)
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
    seen = Pass()

    def add(
        index: int, projection: Projection, x: Tensor, weights: Tensor, expert: int | None
    ) -> None:
        part = parts[index, projection.path]
        part.add(x.to(part.pairs.device), weights[:, 0].to(part.pairs.device))

    with on_inputs(model, seen, add, layers):
        seen.forward(model, batches, token_weights)
    return Grams(parts=parts, matrices=weights, **seen.totals)


def gram_bytes(shape: LayerShape) -> int:
    """Bytes of a layer's Gram matrices, for a model in float32 or less."""
    channels = (shape.num_heads * shape.head_dim, shape.intermediate_size)
    return sum(count**2 for count in channels) * BYTES["float32"]


@torch.no_grad()
def capture_routing(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Gather which experts tokens take, and how much these add, at ``(layer, "expert")``.

    The two rows are ``sum_t w_t`` over the tokens that take an expert, and
    ``sum_t w_t ‖g_t f(x_t)‖`` with the router's weight ``g_t``.
    """
    config: Any = model.config
    experts, layers = backbone_of(config).experts, Parts(model).layers
    if experts is None:
        raise UnsupportedModelError(f"{config.model_type!r} has no experts to score")
    parts: dict[Place, Tensor] = {
        (index, "expert"): torch.zeros(2, shape.num_experts, dtype=torch.float64)
        for index, shape in enumerate(read_anatomy(model).layers)
        if shape.num_experts
    }
    seen = Pass()

    def before(index: int, module: Any, args: Any) -> None:
        last = weight_of(module, "down_proj")
        for expert, tokens, x in inputs_of_experts(module, experts.transposed, args):
            matrix = last[expert].float()
            added = x @ (matrix if experts.transposed else matrix.T)
            require_finite_values(added, f"the experts of layer {index}")
            weights = with_float64(seen.row_weights(added)[tokens, 0]).double()
            sizes = with_float64(added.norm(dim=-1)).double()
            sums = torch.stack([weights.sum(), (weights * sizes).sum()])
            parts[index, "expert"][:, expert] += sums.cpu()

    with ExitStack() as stack:
        for index, _ in parts:
            module = layers[index].get_submodule(experts.module)
            stack.enter_context(module.register_forward_pre_hook(partial(before, index)))
        seen.forward(model, batches, token_weights)
    return Statistics(parts=parts, **seen.totals)


def score_activation(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """Mean size of a unit's output to ``o_proj`` / ``down_proj`` over tokens, by weight.

    Neurons: mean of ``|a|``. KV groups: mean L2 norm of the group's heads, concatenated.

    Reference:
        Muralidharan et al. 2024, Minitron, arXiv:2407.14679, Sec. 2.2 (mean over tokens here,
        with padding left out; the paper aggregates batch and sequence separately).
    """
    return Scores.of_units("activation", anatomy.num_layers, statistics.parts.items())


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


def score_reap(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """``mean_t g_t ‖f(x_t)‖`` over the tokens ``t`` that take the expert ``f``; 0 if none does.

    ``g_t`` is the weight that the router gives it. Where that scales the expert's input (Llama 4),
    it is ``‖f(g_t x_t)‖``.

    Reference:
        Lasby et al. 2025, REAP, arXiv:2510.13999, Eq. 9. Tokens may count differently by their role
        here, and padding does not count.
    """
    least = torch.finfo(torch.float64).tiny
    parts = statistics.parts.items()
    found = ((place, size / count.clamp_min(least)) for place, (count, size) in parts)
    return Scores.of_units("reap", anatomy.num_layers, found, units=("expert",))


def score_frequency(statistics: Statistics, anatomy: Anatomy) -> Scores:
    """Share of the tokens that take the expert.

    Reference:
        A baseline in Lasby et al. 2025, REAP, arXiv:2510.13999.
    """
    found = ((place, count / statistics.weight) for place, (count, _) in statistics.parts.items())
    return Scores.of_units("frequency", anatomy.num_layers, found, units=("expert",))
