"""Score layers by how they change the hidden states.

B batch, T token, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from slimvlm.models.anatomy import Anatomy
from slimvlm.models.hidden import layer_input, layer_output, main_stream, require_finite_values
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Parts
from slimvlm.scoring.batches import Batch, Pass, TokenWeights
from slimvlm.scoring.statistics import Statistics, Values


def block_influence(
    hidden_in: Float[Tensor, "B T D"],
    hidden_out: Float[Tensor, "B T D"],
    mask: Int[Tensor, "B T"] | Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """How much a layer turns each token: ``1 - cos(hidden_in, hidden_out)``, in float32.

    Computed row by row and in float32, so that large activations in half precision neither
    overflow nor cost a T × T product.

    Args:
        hidden_in: The layer's input.
        hidden_out: The layer's output.
        mask: Valid tokens. Others get 0.

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
    cosine = torch.nn.functional.cosine_similarity(
        ours, theirs, dim=-1, eps=torch.finfo(torch.float64).tiny
    )
    return (torch.arccos(cosine.clamp(-1.0, 1.0)) / math.pi).float()


@torch.no_grad()
def capture_hidden_states(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Statistics:
    """Sum block influences over tokens by weight, and angular distances over samples.

    Entry ``[n - 1, i]`` of ``angular_sum`` is the distance over the run of ``n`` layers that begins
    at layer ``i``, at the last token, whatever its weight. In ``postnorm`` the last layer has the
    final norm. Memory: one layer's input, and one vector for each sample and layer.
    """
    parts, seen = Parts(model), Pass()
    count = len(parts.layers)
    sizes = {"influence_sum": (count,), "influence_sum_postnorm": (), "angular_sum": (count, count)}
    sums = {n: torch.zeros(size, dtype=torch.float64) for n, size in sizes.items()}
    sums["angular_sum_postnorm"] = torch.zeros(count, dtype=torch.float64)
    last_input: list[Tensor] = []
    last_tokens: list[Tensor] = []  # before each layer, after the last one, after the norm

    def influence_of(hidden_in: Tensor, hidden_out: Tensor) -> Tensor:
        device = hidden_out.device  # the input may come from another card
        values = block_influence(hidden_in.to(device), hidden_out, seen.mask.to(device))
        weighted = with_float64(values * seen.weights.to(device))
        return weighted.sum(dtype=torch.float64).cpu()

    def note_last_token(hidden: Tensor) -> None:
        positions = torch.arange(seen.mask.shape[1], device=seen.mask.device)
        last = (seen.mask * positions).argmax(1).to(hidden.device)
        last_tokens.append(hidden[torch.arange(len(hidden), device=hidden.device), last].cpu())

    def on_layer(index: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden_in = main_stream(layer_input(args, kwargs))
        hidden_out = main_stream(layer_output(output))
        require_finite_values(hidden_out, f"the output of layer {index}")
        sums["influence_sum"][index] += influence_of(hidden_in, hidden_out)
        note_last_token(hidden_in)
        if index == count - 1:
            last_input[:] = [hidden_in]
            note_last_token(hidden_out)

    def on_norm(module: nn.Module, args: Any, output: Tensor) -> None:
        sums["influence_sum_postnorm"] += influence_of(last_input[0], output)
        note_last_token(output)

    def after_batch() -> None:
        """Compare the last tokens at both ends of every run of layers."""
        *states, final = last_tokens
        for length in range(1, count + 1):
            for start in range(count - length + 1):
                distance = angular_distance(states[start], states[start + length])
                sums["angular_sum"][length - 1, start] += distance.sum(dtype=torch.float64)
            to_final = angular_distance(states[count - length], final)
            sums["angular_sum_postnorm"][length - 1] += to_final.sum(dtype=torch.float64)
        last_tokens.clear()

    with ExitStack() as stack:
        for index, layer in enumerate(parts.layers):
            hook = partial(on_layer, index)
            stack.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
        stack.enter_context(parts.norm.register_forward_hook(on_norm))
        seen.forward(model, batches, token_weights, after_batch)
    return Statistics(parts=sums, **seen.totals)


def score_block_influence(
    statistics: Statistics, anatomy: Anatomy, reduction: str = "mean", last_layer: str = "prenorm"
) -> Values:
    """Take the block influence of each layer; the least influential layers go first.

    ``reduction`` is the ``mean`` over valid tokens by weight, or their ``sum`` as in the reference
    code (same order; long samples weigh more in both). ``last_layer`` takes the last layer's own
    output (``prenorm``), or that of the final norm as the reference code does (``postnorm``).
    """
    values = statistics.parts["influence_sum"].clone()
    if last_layer == "postnorm":
        values[-1] = statistics.parts["influence_sum_postnorm"]
    return {"layer": values / statistics.weight if reduction == "mean" else values}


def score_angular(statistics: Statistics, anatomy: Anatomy, last_layer: str = "prenorm") -> Values:
    """Take the angular distance over runs of layers at the last valid token; the nearest run goes.

    ``layer`` holds the distances of single layers, ``layer_runs`` those of all runs.
    """
    totals, count = statistics.parts["angular_sum"].clone(), anatomy.num_layers
    lengths = torch.arange(count)
    if last_layer == "postnorm":  # only runs that end with the last layer differ
        totals[lengths, count - 1 - lengths] = statistics.parts["angular_sum_postnorm"]
    mean = (totals / max(statistics.num_samples, 1)).float()
    runs = mean.masked_fill(lengths[:, None] + 1 + lengths > count, math.inf)
    return {"layer": runs[0].clone(), "layer_runs": runs}
