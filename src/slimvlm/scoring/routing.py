"""Experts: which ones tokens take, and how much these add to them. Collected and scored.

E expert, T token, k experts that a token takes, H hidden size. A pair is a token and an expert that
it takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.parts import backbone_of, decoder_layers
from slimvlm.scoring.batches import BackbonePass, Batch, TokenWeights
from slimvlm.scoring.statistics import Routing, Taken, require_finite
from slimvlm.scoring.unit_scores import Scores

Pairs = tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]
"""The token and the expert of each pair, and the size of what the expert adds to the token."""


def pairs_of_outputs(module: Any, args: Any, output: Tensor) -> Pairs:
    """Of experts that are called with tokens, the experts that they take, and weights.

    The module is called once more, with each pair for a token by itself.
    """
    hidden, taken, weights = args
    count = taken.shape[1]
    rows = hidden.repeat_interleave(count, 0)
    added = module.forward(rows, taken.reshape(-1, 1), weights.reshape(-1, 1))
    tokens = torch.arange(len(hidden), device=hidden.device).repeat_interleave(count)
    return tokens, taken.flatten(), added.float().norm(dim=-1)


def pairs_of_inputs(module: Any, args: Any, output: Tensor) -> Pairs:
    """Of experts that all read all tokens: zeros where they are not taken."""
    (inputs,) = args
    experts = len(module.gate_up_proj)
    is_taken = (inputs != 0).any(-1).view(experts, -1)
    sizes = output.float().norm(dim=-1).view(experts, -1)
    of_expert, tokens = is_taken.nonzero(as_tuple=True)
    return tokens, of_expert, sizes[is_taken]


@torch.no_grad()
def capture_routing(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Routing:
    """Weighted counts of the tokens that take each expert, and sums of what it adds to them.

    Raises:
        UnsupportedModelError: If the family has no experts.
    """
    row = backbone_of(model.config).experts
    if row is None:
        raise UnsupportedModelError(f"{model.config.model_type!r} has no experts to score")  # type: ignore[union-attr]
    layers, shapes = decoder_layers(model), read_anatomy(model).layers
    parts = {
        (index, "expert"): Taken.of(shape.num_experts)
        for index, shape in enumerate(shapes)
        if shape.num_experts
    }
    pairs_of = pairs_of_inputs if row.input_is_scaled else pairs_of_outputs
    seen = BackbonePass()

    def after(index: int, module: nn.Module, args: Any, output: Tensor) -> None:
        tokens, experts, sizes = pairs_of(module, args, output)
        require_finite(sizes, f"what the experts of layer {index} give")
        weights = seen.row_weights(sizes)[:, 0]
        parts[index, "expert"].add(experts, sizes, weights[tokens])

    with ExitStack() as stack:
        for index, _ in parts:
            module = layers[index].get_submodule(row.module)
            stack.enter_context(module.register_forward_hook(partial(after, index)))
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

    def mean(part: Taken) -> Tensor:
        return part.size / part.count.clamp_min(torch.finfo(torch.float64).tiny)

    return _scores("reap", statistics, anatomy, mean)


def score_frequency(statistics: Routing, anatomy: Anatomy) -> Scores:
    """Share of the tokens that take the expert.

    Reference:
        A baseline in Lasby et al. 2025, REAP, arXiv:2510.13999.
    """

    def share(part: Taken) -> Tensor:
        return part.count / statistics.weight

    return _scores("frequency", statistics, anatomy, share)


def _scores(name: str, statistics: Routing, anatomy: Anatomy, value: Any) -> Scores:
    found = statistics.per_unit(value)
    return Scores.of_units(name, anatomy.num_layers, found, units=("expert",))
