"""Apply a plan to a live model: weights, configuration, layer indices and counts."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.models.anatomy import LAYER_UNITS, unit_of
from slimvlm.models.classes import require_full_precision, retype_modules_, set_class_
from slimvlm.models.families import OUTPUT_ROWS
from slimvlm.models.modeling_pruned import set_counts_
from slimvlm.models.parts import Parts, layer_matrices, text_config_of
from slimvlm.planning.mask import kept_channels, require_match
from slimvlm.planning.plan import Plan
from slimvlm.pruning.config import smaller_text_config, validate, with_renumbered
from slimvlm.pruning.tokens import renumber_modules_, require_named_tokens

_COUNTS = {
    "neuron": ("intermediate_dim", "intermediate_size", "expert_dim"),
    "expert": ("num_experts",),
}
"""Attributes of experts' modules and routers that hold the number of a kind of unit."""


def prune_(model: PreTrainedModel, plan: Plan, allow_uneven: bool = False) -> None:
    """Cut a model down to a plan, in place: afterwards it is an ordinary smaller model.

    The new configuration is built and checked before any weight is touched. Query heads go with
    their KV head, fused matrices are cut inside their blocks, biases follow their rows and the
    biases of output projections stay whole. Layers are renumbered for the cache.

    If the head count needs it, the language model is retyped (Llama → Mistral, which computes the
    same); `Plan.needs_retype` tells beforehand.

    Layers of different widths cannot be said in a plain configuration. The model then becomes the
    subclass of its class that ``modeling_pruned.py`` defines, and ``save_pretrained`` writes that
    file too.

    Args:
        model: A transformers model of a known family.
        plan: Made for this model's anatomy.
        allow_uneven: Whether equal layers may be written like different ones if their head count
            cannot be configured. Loading the files then needs ``trust_remote_code=True``.

    Raises:
        ConfigError: If the plan is for another model.
        ImpossiblePlanError: If the configuration class cannot express the shape.
    """
    text_config = require_expressible(model, plan, allow_uneven)
    embedding, head = Parts(model).token_matrices()
    is_tied = head.weight is embedding.weight
    for cut in list(cuts_of(model, plan)):
        _cut_(cut)
    if is_tied:
        head.weight = embedding.weight
    parts = Parts(model)
    kept, parent = [parts.layers[i] for i in plan.layers], parts.text_model
    parent.layers = nn.ModuleList(kept)
    for name in plan.before.backbone.live_lists:
        setattr(parent, name, [getattr(parent, name)[i] for i in plan.layers])
    for index, layer in enumerate(kept):  # numbered anew for the cache
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = index  # type: ignore[assignment]
    _apply_config(model, text_config, plan)


def require_expressible(
    model: PreTrainedModel, plan: Plan, allow_uneven: bool = False
) -> PreTrainedConfig:
    """Build the configuration of the smaller language model; refuse plans as `prune_` does."""
    require_full_precision(model.config, "pruned")
    require_match(model, plan)
    require_named_tokens(model, plan)
    uneven = not plan.after.is_uniform or (allow_uneven and plan.file_format == "uneven")
    text_config = smaller_text_config(model.config, plan, uneven)
    validate(model.config, text_config, plan)
    return text_config


@dataclass(frozen=True)
class Cut:
    """The kept channels of one parameter."""

    owner: nn.Module
    name: str
    dim: int
    keep: Tensor
    count: tuple[str, int] | None = None
    """Kind and number of the units that stay, where the module repeats their number."""


def cuts_of(model: nn.Module, plan: Plan) -> Iterator[Cut]:
    """List all cuts of a plan: token rows, kept layers, weights with a slice for each layer."""
    if plan.tokens is not None:
        keep = torch.tensor(plan.tokens)
        for module in Parts(model).token_matrices():
            yield Cut(module, "weight", 0, keep)
            if getattr(module, "bias", None) is not None:
                yield Cut(module, "bias", 0, keep)
    for index in plan.layers:
        yield from cuts_of_layer(model, plan, index)
    for stack, holder in Parts(model).stacks():
        if stack.rows is not None and plan.tokens is not None:
            yield Cut(holder, "weight", 0, torch.tensor(plan.tokens))
        slices = torch.arange(holder.weight.shape[stack.dim]).view(plan.before.num_layers, -1)
        yield Cut(holder, "weight", stack.dim, slices[list(plan.layers)].flatten())


def cuts_of_layer(
    model: nn.Module, plan: Plan, index: int, units: Collection[str] = LAYER_UNITS
) -> Iterator[Cut]:
    """List the cuts of a layer that stays; a weight of experts may have two."""
    layer, row = Parts(model).layers[index], plan.before.backbone
    for matrix in chain(*layer_matrices(layer, row)):
        projection = matrix.projection
        unit, keep = unit_of(projection), kept_channels(plan, index, projection)
        if len(keep) == matrix.width or unit not in units:
            continue
        is_repeated = unit == "expert" or matrix.is_of_experts
        count = (unit, len(plan.kept(unit)[index])) if is_repeated else None
        yield Cut(matrix.owner, matrix.name, projection.axis, keep, count)
        if projection.dim == OUTPUT_ROWS and matrix.bias is not None:
            yield Cut(matrix.owner, "bias", 0, keep)


def cut_layer_(
    model: nn.Module, plan: Plan, index: int, units: Collection[str] = LAYER_UNITS
) -> None:
    """Cut one layer, in place; the model runs only layer by layer until all of it is cut."""
    for cut in list(cuts_of_layer(model, plan, index, units)):
        _cut_(cut)
    shape, groups = plan.before.layers[index], len(plan.kv_groups[index])
    if groups < shape.num_kv_heads and "kv_group" in units:
        attention: Any = Parts(model).layers[index].get_submodule("self_attn")
        heads = shape.num_heads // shape.num_kv_heads * groups
        config = copy.copy(attention.config)
        config.num_attention_heads, config.num_key_value_heads = heads, groups
        set_counts_(attention, config, heads, groups)


def _cut_(cut: Cut) -> None:
    """Cut a parameter, and update the counts of its module."""
    owner: Any = cut.owner
    parameter = getattr(owner, cut.name)
    kept = parameter.detach().index_select(cut.dim, cut.keep.to(parameter.device))
    setattr(owner, cut.name, nn.Parameter(kept, parameter.requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = owner.weight.shape
    if cut.count is not None:
        unit, count = cut.count
        for name in set(_COUNTS[unit]) & set(vars(owner)):
            setattr(owner, name, count)


def _apply_config(model: PreTrainedModel, text_config: PreTrainedConfig, plan: Plan) -> None:
    """Give every module the new configuration, and update copies of counts."""
    old = text_config_of(model.config)
    whole = with_renumbered(model.config, text_config, plan)
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = text_config  # type: ignore[assignment]
    model.config = whole
    renumber_modules_(model, plan)
    text_model = Parts(model).text_model
    for name in plan.before.backbone.layer_indices:
        if hasattr(text_model, name):
            setattr(text_model, name, getattr(text_config, name))
    if "first_kv_shared_layer_idx" in vars(text_model):
        shared: int = getattr(text_config, plan.before.backbone.shared_tail or "")
        text_model.first_kv_shared_layer_idx = plan.after.num_layers - shared
    for layer, shape in zip(text_model.layers, plan.after.layers, strict=True):
        if shape.num_kv_heads:
            attention = layer.get_submodule("self_attn")
            set_counts_(attention, text_config, shape.num_heads, shape.num_kv_heads)
    set_class_(model)
    if plan.needs_retype:
        retype_modules_(model, old, text_config)
