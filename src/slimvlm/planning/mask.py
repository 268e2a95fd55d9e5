"""Switch off the removed units of a plan without changing shapes: the reference for `prune_`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import WIDTH_UNITS, Anatomy, channels_of, read_anatomy, unit_of
from slimvlm.models.families import INPUT_COLUMNS, Projection
from slimvlm.models.hidden import layer_input
from slimvlm.models.load import require_undivided
from slimvlm.models.parts import Parts, layer_matrices
from slimvlm.planning.plan import Kept, Plan


def mask_(model: PreTrainedModel, plan: Plan) -> None:
    """Switch off the removed units of a plan without changing any shape, in place.

    The columns of ``o_proj`` and ``down_proj`` that read removed units become zero. Removed layers
    become zero altogether, and a hook passes their input on. Routers score removed experts with
    minus infinity. Removed tokens are zero in the embedding, and a hook sets their logits to minus
    infinity. This is the slow and obvious meaning of a plan, against which `prune_` is tested.
    """

    def pass_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = layer_input(args, kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    require_match(model, plan)
    parts, kept_layers = Parts(model), set(plan.layers)
    with torch.no_grad():
        for index, layer in enumerate(parts.layers):
            if index not in kept_layers:
                for parameter in layer.parameters():
                    parameter.zero_()
                layer.register_forward_hook(pass_on, with_kwargs=True)
        for index, matrix in parts.matrices():
            if matrix.projection.dim == INPUT_COLUMNS and index in kept_layers:
                removed = _removed(matrix.width, kept_channels(plan, index, matrix.projection))
                shape = [1] * matrix.weight.ndim
                shape[matrix.projection.axis] = matrix.width
                matrix.weight.masked_fill_(removed.view(shape).to(matrix.weight.device), 0)
        for index in plan.layers:
            layer = parts.layers[index]
            for matrix in layer_matrices(layer, parts.row)[2]:
                if matrix.weight.ndim == 2 and len(plan.experts[index]) < matrix.width:
                    path, _, _ = matrix.projection.path.rpartition(".")
                    _route_without(layer.get_submodule(path), matrix.weight, plan.experts[index])
        if plan.tokens is not None:
            embedding, head = parts.token_matrices()
            gone = _removed(len(embedding.weight), plan.tokens)
            for holder in (embedding, *(holder for stack, holder in parts.stacks() if stack.rows)):
                holder.weight[gone.to(holder.weight.device)] = 0
            head.register_forward_hook(
                lambda module, args, logits: logits.masked_fill(gone.to(logits.device), -torch.inf)
            )


def _route_without(router: Any, weight: Tensor, kept: Kept) -> None:
    """Let a router score the experts that are not kept with minus infinity."""
    removed, forward = _removed(len(weight), kept).to(weight.device), router.forward

    class Masked(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), given: Any = None
        ) -> Any:
            result = func(*args, **(given or {}))
            is_routing = func is F.linear and args[1] is weight
            return result.masked_fill(removed, -torch.inf) if is_routing else result

    def route(*args: Any, **kwargs: Any) -> Any:
        with Masked():
            return forward(*args, **kwargs)

    router.forward = route


def require_match(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan for another model, and a model without all its weights in place."""
    require_undivided(model, "pruned")
    anatomy = read_anatomy(model)
    if anatomy.layers != plan.before.layers or anatomy.model_type != plan.before.model_type:
        raise ConfigError(
            f"plan: made for {_shape_line(plan.before)}, but the model is {_shape_line(anatomy)}"
        )
    if plan.tokens is not None and anatomy.vocab_size != plan.before.vocab_size:
        raise ConfigError(
            f"plan: made for {plan.before.vocab_size:,} tokens, but the model has "
            f"{anatomy.vocab_size:,}"
        )
    for stack, holder in Parts(model).stacks():
        if plan.tokens is not None and stack.rows and len(holder.weight) != anatomy.vocab_size:
            raise ConfigError(
                f"plan: no token can go: {stack.path} has {len(holder.weight):,} rows, the "
                f"vocabulary {anatomy.vocab_size:,} tokens"
            )


def _shape_line(anatomy: Anatomy) -> str:
    groups, neurons = (max(s.units(unit) for s in anatomy.layers) for unit in WIDTH_UNITS)
    experts = "".join(f", {count} experts" for count in anatomy.expert_counts)
    return (
        f"{anatomy.model_type} with {anatomy.num_layers} layers, {groups} KV groups, "
        f"{neurons} neurons{experts}"
    )


def kept_channels(plan: Plan, index: int, projection: Projection) -> Tensor:
    """The channels of a matrix of layer ``index`` that a plan keeps along its divided dimension."""
    units = plan.kept(unit_of(projection))[index]
    return channels_of(projection, plan.before.layers[index], units)


def _removed(count: int, kept: Kept | Tensor) -> Tensor:
    """A mask of the indices that are not kept."""
    removed = torch.ones(count, dtype=torch.bool)
    removed[torch.as_tensor(kept, dtype=torch.long)] = False
    return removed
