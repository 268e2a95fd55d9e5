"""Experts: which ones tokens take, and how much these add to them. Collected and scored."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.core.errors import UnsupportedModelError
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.parts import backbone_of, decoder_layers
from slimvlm.scoring.batches import BackbonePass, Batch, TokenWeights
from slimvlm.scoring.inputs import inputs_of_experts, weight_of
from slimvlm.scoring.statistics import Routing, Taken, require_finite
from slimvlm.scoring.unit_scores import Scores


@torch.no_grad()
def capture_routing(
    model: nn.Module, batches: Iterable[Batch], token_weights: TokenWeights | None = None
) -> Routing:
    """Weighted counts of the tokens that take each expert, and sums of what it adds to them.

    Raises:
        UnsupportedModelError: If the family has no experts.
    """
    config: Any = model.config
    experts = backbone_of(config).experts
    if experts is None:
        raise UnsupportedModelError(f"{config.model_type!r} has no experts to score")
    layers, shapes = decoder_layers(model), read_anatomy(model).layers
    parts = {
        (index, "expert"): Taken.of(shape.num_experts)
        for index, shape in enumerate(shapes)
        if shape.num_experts
    }
    seen = BackbonePass()

    def before(index: int, module: Any, args: Any) -> None:
        last = weight_of(module, "down_proj")
        for found in inputs_of_experts(module, experts.transposed, args):
            matrix = last[found.expert].float()
            added = found.values @ (matrix if experts.transposed else matrix.T)
            require_finite(added, f"what the experts of layer {index} give")
            weights = seen.row_weights(added)[found.tokens, 0]
            parts[index, "expert"].add(found.expert, added.norm(dim=-1), weights)

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
