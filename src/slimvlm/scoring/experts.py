"""Experts: collect and score which ones tokens take, and how much these add to them.

C neuron of an expert, T token that takes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.load import with_float64
from slimvlm.models.parts import Parts, backbone_of
from slimvlm.scoring.batches import BackbonePass, Batch, TokenWeights, weight_of
from slimvlm.scoring.statistics import Place, Routing, require_finite
from slimvlm.scoring.unit_scores import Scores


@dataclass(frozen=True)
class ExpertInput:
    """The inputs of an expert's last matrix."""

    expert: int
    tokens: Int[Tensor, " T"]  # those that take it
    values: Float[Tensor, "T C"]  # neurons, times the weight that the router gives the expert


def inputs_of_experts(module: Any, transposed: bool, args: Any) -> Iterator[ExpertInput]:
    """Compute the neurons ``act(gate) * up`` of each expert that a token takes, as its module runs.

    The module is called with tokens, their experts and the router's weights, which scale the
    output; or (Llama 4) with all tokens for each expert, scaled already, zero where they do not
    take it.
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
            yield ExpertInput(expert, tokens, (module.act_fn(gate) * up).float() * scale)


@torch.no_grad()
def capture_routing(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Routing:
    """Count the tokens that take each expert, by weight, and sum what it adds to them."""
    config: Any = model.config
    experts = backbone_of(config).experts
    if experts is None:
        raise UnsupportedModelError(f"{config.model_type!r} has no experts to score")
    parts: dict[Place, Tensor] = {
        (index, "expert"): torch.zeros(2, shape.num_experts, dtype=torch.float64)
        for index, shape in enumerate(read_anatomy(model).layers)
        if shape.num_experts
    }
    seen = BackbonePass()

    def before(index: int, module: Any, args: Any) -> None:
        last = weight_of(module, "down_proj")
        for found in inputs_of_experts(module, experts.transposed, args):
            matrix = last[found.expert].float()
            added = found.values @ (matrix if experts.transposed else matrix.T)
            require_finite(added, f"the experts of layer {index}")
            weights = with_float64(seen.row_weights(added)[found.tokens, 0]).double()
            sizes = with_float64(added.norm(dim=-1)).double()
            sums = torch.stack([weights.sum(), (weights * sizes).sum()])
            parts[index, "expert"][:, found.expert] += sums.cpu()

    layers = Parts(model).layers
    with ExitStack() as stack:
        for index, _ in parts:
            module = layers[index].get_submodule(experts.module)
            stack.enter_context(module.register_forward_pre_hook(partial(before, index)))
        seen.run(model, batches, token_weights)
    return Routing(parts=parts, **seen.totals)


def score_reap(statistics: Routing, anatomy: Anatomy) -> Scores:
    """``mean_t g_t ‖f(x_t)‖`` over the tokens ``t`` that take the expert ``f``; 0 if none does.

    ``g_t`` is the weight that the router gives it. Where that scales the expert's input (Llama 4),
    it is ``‖f(g_t x_t)‖``.

    Reference:
        Lasby et al. 2025, REAP, arXiv:2510.13999, Eq. 9. Tokens may count differently by their role
        here, and padding does not count.
    """
    least = torch.finfo(torch.float64).tiny
    found = (
        (index, unit, size / count.clamp_min(least))
        for (index, unit), (count, size) in statistics.parts.items()
    )
    return Scores.of_units("reap", anatomy.num_layers, found, units=("expert",))


def score_frequency(statistics: Routing, anatomy: Anatomy) -> Scores:
    """Share of the tokens that take the expert.

    Reference:
        A baseline in Lasby et al. 2025, REAP, arXiv:2510.13999.
    """
    found = (
        (index, unit, part[0] / statistics.weight)
        for (index, unit), part in statistics.parts.items()
    )
    return Scores.of_units("frequency", anatomy.num_layers, found, units=("expert",))
