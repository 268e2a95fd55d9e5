"""Criteria of forward passes: of hidden states, of the inputs of matrices, of experts.

B batch, T token, D hidden, C input channel of a matrix that writes to the residual stream.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import Anatomy, read_anatomy, unit_of
from slimvlm.models.devices import weight_of, with_float64
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.hidden import layer_input, layer_output, main_stream, require_finite_values
from slimvlm.models.parts import Matrix, Parts, backbone_of
from slimvlm.scoring.batches import Batch, Pass, TokenWeights
from slimvlm.scoring.moments import Moments
from slimvlm.scoring.unit_scores import Place, Statistics, Values, per_unit


def block_influence(
    hidden_in: Float[Tensor, "B T D"],
    hidden_out: Float[Tensor, "B T D"],
    mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """How much a layer turns each token: ``1 - cos(hidden_in, hidden_out)``, in float32.

    Computed row by row, so that large activations in half precision neither overflow nor cost a
    T × T product. Tokens that ``mask`` says are not valid get 0.

    Reference:
        Men et al. 2024, ShortGPT, arXiv:2403.03853, Eq. 1 (there a mean over tokens).
    """
    x, y = hidden_in.float(), hidden_out.float()
    norms = (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    influence = 1 - (x * y).sum(-1) / norms.clamp_min(torch.finfo(torch.float32).tiny)
    return influence if mask is None else influence.masked_fill(mask == 0, 0.0)


def angular_distance(
    hidden_in: Float[Tensor, "*batch D"], hidden_out: Float[Tensor, "*batch D"]
) -> Float[Tensor, "*batch"]:
    """``arccos(cos(hidden_in, hidden_out)) / pi`` in [0, 1] (arXiv:2403.17887, Eq. 6)."""
    ours, theirs = (with_float64(hidden).double() for hidden in (hidden_in, hidden_out))
    cosine = F.cosine_similarity(ours, theirs, dim=-1, eps=torch.finfo(torch.float64).tiny)
    return (torch.arccos(cosine.clamp(-1.0, 1.0)) / math.pi).float()


def _on_hidden_states(
    seen: Pass,
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None,
    call: Callable[[int, Tensor, Tensor], None],
    after_batch: Callable[[], None],
) -> None:
    """Call a function for input and output of each layer and, as if another one, the final norm."""
    parts = Parts(model)

    def after(index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = main_stream(layer_output(output))
        if module is not parts.norm:
            require_finite_values(hidden, f"the output of layer {index}")
        call(index, main_stream(layer_input(args, kwargs)), hidden)

    with ExitStack() as stack:
        for index, module in enumerate([*parts.layers, parts.norm]):
            hook = partial(after, index)
            stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        seen.forward(model, batches, token_weights, after_batch)


def capture_influences(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Sum block influences over tokens by weight; memory: one layer's input.

    The last entry of ``influence_sum`` is that of the last layer with the final norm.
    """
    count, seen = len(Parts(model).layers), Pass()
    sums = torch.zeros(count + 1, dtype=torch.float64)
    last_input: list[Tensor] = []

    def add(index: int, hidden_in: Tensor, hidden_out: Tensor) -> None:
        before = last_input.pop() if last_input else hidden_in
        if index == count - 1:
            last_input.append(hidden_in)
        device = hidden_out.device  # the input may come from another card
        values = block_influence(before.to(device), hidden_out, seen.mask.to(device))
        weighted = with_float64(values * seen.weights.to(device))
        sums[index] += weighted.sum(dtype=torch.float64).cpu()

    _on_hidden_states(seen, model, batches, token_weights, add, last_input.clear)
    return Statistics(parts={"influence_sum": sums}, **seen.totals)


def capture_angles(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Sum angular distances over samples at the last token, whatever its weight.

    Entry ``[n - 1, i]`` of ``angular_sum`` is the distance over the run of ``n`` layers that begins
    at layer ``i``. Memory: one vector for each sample of a batch and layer.
    """
    count, seen = len(Parts(model).layers), Pass()
    sums = torch.zeros(count, count, dtype=torch.float64)
    last_tokens: list[Tensor] = []  # before each layer, and after the last one

    def note(index: int, hidden_in: Tensor, hidden_out: Tensor) -> None:
        positions = torch.arange(seen.mask.shape[1], device=seen.mask.device)
        last = (seen.mask * positions).argmax(1)
        passed_on = [hidden_in] * (index + 1 - len(last_tokens))  # also by layers that were skipped
        for hidden in [*passed_on, hidden_out] if index == count - 1 else passed_on:
            rows = torch.arange(len(hidden), device=hidden.device)
            last_tokens.append(hidden[rows, last.to(hidden.device)].cpu())

    def after_batch() -> None:
        """Compare the last tokens at both ends of every run of layers."""
        states = torch.stack(last_tokens)
        for length in range(1, count + 1):
            distances = angular_distance(states[:-length], states[length:])
            of_runs = distances.sum(1, dtype=torch.float64)
            sums[length - 1, : len(of_runs)] += of_runs
        last_tokens.clear()

    _on_hidden_states(seen, model, batches, token_weights, note, after_batch)
    return Statistics(parts={"angular_sum": sums}, **seen.totals)


def score_block_influence(
    statistics: Statistics, anatomy: Anatomy, reduction: str = "mean", last_layer: str = "prenorm"
) -> Values:
    """Take the block influence of each layer; the least influential layers are removed first.

    ``reduction`` is the ``mean`` over valid tokens by weight, or their ``sum`` as in the reference
    code (same order; long samples weigh more in both). ``last_layer`` takes the last layer's own
    output (``prenorm``), or that of the final norm as the reference code does (``postnorm``).
    """
    *values, with_norm = statistics.parts["influence_sum"]
    if last_layer == "postnorm":
        values[-1] = with_norm
    return {"layer": torch.stack(values) / (statistics.weight if reduction == "mean" else 1)}


def score_angular(statistics: Statistics, anatomy: Anatomy) -> Values:
    """Take the angular distance over runs of layers at the last valid token."""
    lengths = torch.arange(anatomy.num_layers)
    mean = (statistics.parts["angular_sum"] / max(statistics.num_samples, 1)).float()
    runs = mean.masked_fill(lengths[:, None] + 1 + lengths > anatomy.num_layers, math.inf)
    return {"layer": runs[0].clone(), "layer_runs": runs}


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


def on_inputs(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None,
    call: Callable[[int, Projection, Tensor, Tensor, int | None], None],
    layers: Collection[int] | None = None,
) -> Pass:
    """Run a model, and call a function for the inputs of matrices that write to the stream.

    As ``call(layer, matrix, x [T, C], weights [T, 1], the expert whose inputs they are or None)``.
    """
    seen = Pass()

    def before(index: int, matrix: Matrix, module: nn.Module, args: Any) -> None:
        projection = matrix.projection
        found: list[Any] = [(None, slice(None), args[0].flatten(0, -2))]
        if matrix.is_of_experts:
            found = list(inputs_of_experts(module, projection.transposed, args))
        if extremes := [each for *_, x in found for each in x.detach().aminmax()]:  # read once
            where = f"the input of layer {index} {projection.path}"
            require_finite_values(torch.stack(extremes), where)
        for expert, tokens, x in found:
            weights = seen.weights.flatten()[:, None].to(x.device)[tokens]
            call(index, projection, x, weights, expert)

    with ExitStack() as stack:
        for index, matrix in Parts(model).matrices():
            writes = matrix.projection.dim == INPUT_COLUMNS
            if writes and (layers is None or index in layers):
                hook = partial(before, index, matrix)
                stack.enter_context(matrix.owner.register_forward_pre_hook(hook))
        seen.forward(model, batches, token_weights)
    return seen


def inputs_of_experts(
    module: Any, transposed: bool, args: Any
) -> Iterator[tuple[int, Int[Tensor, " T"], Float[Tensor, "T C"]]]:
    """Compute inputs of experts' last matrices: ``act(gate) * up`` times the router's weight.

    Yields the expert, the tokens that take it, and their inputs. Its module is called with tokens,
    their experts and the router's weights; or (Llama 4) with all tokens for each expert, scaled
    already, zero where they do not take it.
    """
    weight = weight_of(module, "gate_up_proj")
    weight = weight.transpose(1, 2) if transposed else weight
    hidden, *routed = args
    if routed:
        chosen, scales = (each.flatten() for each in routed)  # k experts of each token
        places, takes = chosen.argsort(stable=True), chosen.bincount(minlength=len(weight))
        rows, scales = places // routed[0].shape[-1], scales[places, None]
    else:
        entering = hidden.view(len(weight), -1, hidden.shape[-1])
        taken = (entering != 0).any(-1)
        rows, takes = taken.nonzero()[:, 1], taken.sum(1)
    counts = takes.tolist()[: len(weight)]  # read once, not for each expert
    for expert, tokens in enumerate(rows[: sum(counts)].split(counts)):
        if len(tokens):
            entered = hidden[tokens] if routed else entering[expert, tokens]
            scale = scales[sum(counts[:expert]) :][: len(tokens)] if routed else 1.0
            gate, up = F.linear(entered, weight[expert]).chunk(2, dim=-1)
            yield expert, tokens, (module.act_fn(gate) * up).float() * scale


def capture_activations(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Average over tokens, by weight, ``|a|`` of neurons and the L2 norm of KV groups' heads."""
    anatomy, sums = read_anatomy(model), dict[Place, Tensor]()

    def add(layer: int, matrix: Projection, x: Tensor, weights: Tensor, expert: int | None) -> None:
        place, sizes = (layer, unit_of(matrix)), x.float().abs()
        if place[1] == "kv_group":
            groups = anatomy.layers[layer].num_kv_heads
            sizes = sizes.square().view(len(sizes), groups, -1).sum(-1).sqrt()
        total = with_float64(sizes * weights).sum(0, dtype=torch.float64)
        sums[place] = sums.get(place, 0) + total

    seen = on_inputs(model, batches, token_weights, add)
    means = {place: total.cpu().float() / float(seen.weight) for place, total in sums.items()}
    return Statistics(parts=means, **seen.totals)


def capture_moments(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Sum ``w_t x_t`` and ``w_t x_t²`` of each input channel, a row for each expert."""
    parts: dict[Place, dict[str, Tensor]] = {}
    for index, each in Parts(model).matrices():
        if each.projection.dim != INPUT_COLUMNS:
            continue
        weight = weight_of(each.owner, each.name)
        weight = with_float64(weight.mT if each.projection.transposed else weight).double()
        l1, square = weight.abs().sum(-2), weight.square().sum(-2)
        sums = {"sum": torch.zeros_like(l1), "square": torch.zeros_like(l1)}
        parts[index, each.projection.path] = {**sums, "column_l1": l1, "column_square": square}

    def add(layer: int, matrix: Projection, x: Tensor, weights: Tensor, expert: int | None) -> None:
        x, rows = x.float(), ... if expert is None else expert
        part, weighted = parts[layer, matrix.path], x * weights
        for name, values in (("sum", weighted), ("square", weighted * x)):
            part[name][rows] += with_float64(values).sum(0, dtype=torch.float64)

    seen = on_inputs(model, batches, token_weights, add)
    found = {at: {name: sums.cpu() for name, sums in part.items()} for at, part in parts.items()}
    return Statistics(parts=found, **seen.totals)


def capture_grams(
    model: nn.Module,
    batches: Iterable[Batch],
    token_weights: TokenWeights | None = None,
    layers: Collection[int] | None = None,
) -> Statistics:
    """Sum `Moments` of the inputs of ``o_proj`` and ``down_proj`` (of some layers).

    Memory: ``C²`` float32 numbers of each matrix on the model's device (11,008 neurons: 485 MB).
    """
    weights: dict[Place, Tensor] = {}
    parts: dict[Place, Moments] = {}
    for index, projection, linear in linear_matrices(model):
        if projection.dim == INPUT_COLUMNS and (layers is None or index in layers):
            weight = weights[index, projection.path] = weight_of(linear)
            kind = torch.promote_types(weight.dtype, torch.float32)
            device = with_float64(weight[:0]).device
            parts[index, projection.path] = Moments.zero(weight.shape[1], None, kind, device)

    def add(layer: int, matrix: Projection, x: Tensor, weights: Tensor, expert: int | None) -> None:
        part = parts[layer, matrix.path]
        part.add(x.to(part.pairs.device), weights[:, 0].to(part.pairs.device))

    seen = on_inputs(model, batches, token_weights, add, layers)
    return Statistics(parts=parts, matrices=weights, **seen.totals)


def capture_routing(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Sum ``w_t``, and ``w_t ‖g_t f(x_t)‖``, over the tokens that take an expert.

    These are two rows at ``(layer, "expert")``; ``g_t`` is the router's weight.
    """
    config: Any = model.config
    experts, layers, seen = backbone_of(config).experts, Parts(model).layers, Pass()
    if experts is None:
        raise UnsupportedModelError(f"{config.model_type!r} has no experts to score")
    parts: dict[Place, Tensor] = {
        (index, "expert"): torch.zeros(2, shape.num_experts, dtype=torch.float64)
        for index, shape in enumerate(read_anatomy(model).layers)
        if shape.num_experts
    }

    def before(index: int, module: Any, args: Any) -> None:
        last, found = weight_of(module, "down_proj"), parts[index, "expert"].clone().zero_()
        for expert, tokens, x in inputs_of_experts(module, experts.transposed, args):
            matrix = last[expert].float()
            added = x @ (matrix if experts.transposed else matrix.T)
            weights = with_float64(seen.weights.flatten().to(added.device)[tokens]).double()
            sizes = with_float64(added.norm(dim=-1)).double()
            sums = torch.stack([weights.sum(), (weights * sizes).sum()])
            found = found.to(sums.device)
            found[:, expert] = sums
        require_finite_values(found, f"the experts of layer {index}")
        parts[index, "expert"] += found.cpu()

    with ExitStack() as stack:
        for index, _ in parts:
            module = layers[index].get_submodule(experts.module)
            stack.enter_context(module.register_forward_pre_hook(partial(before, index)))
        seen.forward(model, batches, token_weights)
    return Statistics(parts=parts, **seen.totals)


def score_wanda(statistics: Statistics, anatomy: Anatomy) -> Values:
    """``Σ_i |W_ij| · ‖x_j‖``, added over the unit's channels ``j``; the norm is a root mean square.

    Reference:
        Sun et al. 2023, Wanda, arXiv:2306.11695, Eq. 1, added over outputs as in the structured
        variant that An et al. 2023, FLAP, arXiv:2312.11983 compare with.
    """
    channels = {
        place: part["column_l1"] * (part["square"] / statistics.weight).sqrt()
        for place, part in statistics.parts.items()
    }
    return per_unit(channels, anatomy)


def score_flap(statistics: Statistics, anatomy: Anatomy) -> Values:
    """``Var(x_j) · ‖W_j‖²``, added over the unit's channels: the cost if a bias replaces them.

    Reference:
        An et al. 2023, FLAP, arXiv:2312.11983, fluctuation metric (there divided by one less than
        the number of tokens, and standardised within each layer).
    """
    channels: dict[Place, Tensor] = {}
    for place, part in statistics.parts.items():
        mean, square = part["sum"] / statistics.weight, part["square"] / statistics.weight
        channels[place] = (square - mean.square()).clamp_min(0) * part["column_square"]
    return per_unit(channels, anatomy)


def score_reap(statistics: Statistics, anatomy: Anatomy) -> Values:
    """``mean_t g_t ‖f(x_t)‖`` over the tokens that take the expert ``f``; 0 if none does.

    Where the router's weight ``g_t`` scales the expert's input (Llama 4), it is ``‖f(g_t x_t)‖``.

    Reference:
        Lasby et al. 2025, REAP, arXiv:2510.13999, Eq. 9 (tokens may count differently here).
    """
    least = torch.finfo(torch.float64).tiny
    return {p: size / count.clamp_min(least) for p, (count, size) in statistics.parts.items()}
