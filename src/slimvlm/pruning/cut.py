"""Apply a plan to a live model: weights, configuration, layer indices and counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.models.classes import require_full_precision, set_class_, with_text_config
from slimvlm.models.families import OUTPUT_ROWS
from slimvlm.models.internals import retype_modules_
from slimvlm.models.modeling_pruned import set_counts_
from slimvlm.models.parts import decoder_layers, matrices, stacks, text_config_of
from slimvlm.planning.mask import kept_channels, require_match
from slimvlm.planning.plan import Plan
from slimvlm.pruning.config import smaller_text_config, validate


def prune_(model: PreTrainedModel, plan: Plan, allow_uneven: bool = False) -> None:
    """Cut a model down to a plan, in place: afterwards it is an ordinary smaller model.

    The new configuration is built and checked before any weight is touched. Query heads go with
    their KV head, fused matrices are cut inside their blocks, biases follow their rows and the
    biases of output projections stay whole. Layers are renumbered for the cache.

    If the head count needs it, the language model is retyped (Llama → Mistral, which computes the
    same); `Plan.needs_retype` tells beforehand.

    Layers of different widths cannot be said in a plain configuration. The model then becomes the
    subclass of its class that ``modeling_pruned.py`` describes, and ``save_pretrained`` writes that
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
    require_full_precision(model.config, "pruned")
    require_match(model, plan)
    uneven = not plan.after.is_uniform or (allow_uneven and plan.file_format == "uneven")
    text_config = smaller_text_config(model.config, plan, uneven)
    validate(model.config, text_config, plan)
    _cut_weights(model, plan)
    _drop_layers(model, plan)
    _apply_config(model, text_config, plan)


@dataclass(frozen=True)
class Cut:
    """What a plan keeps of one parameter.

    Attributes:
        owner: The module that holds it.
        name: Its name there.
        dim: The dimension that loses channels.
        keep: The channels that stay.
        units: Neurons that stay, where the module holds experts and repeats their number.
    """

    owner: nn.Module
    name: str
    dim: int
    keep: Tensor
    units: int | None = None


def cuts_of(model: nn.Module, plan: Plan) -> Iterator[Cut]:
    """Everything that a plan cuts: parameters of kept layers, and weights with a slice for each."""
    for index, matrix in matrices(model):
        projection = matrix.projection
        if index not in plan.layers:
            continue
        keep = kept_channels(plan, index, projection)
        if len(keep) == matrix.width:
            continue
        is_expert = not isinstance(matrix.owner, nn.Linear)
        units = len(keep) // len(projection.segments) if is_expert else None
        yield Cut(matrix.owner, matrix.name, projection.axis, keep, units)
        if projection.dim == OUTPUT_ROWS and matrix.bias is not None:
            yield Cut(matrix.owner, "bias", 0, keep)
    for stack, holder in stacks(model):
        slices = torch.arange(holder.weight.shape[stack.dim]).view(plan.before.num_layers, -1)
        yield Cut(holder, "weight", stack.dim, slices[list(plan.layers)].flatten())


def _cut_weights(model: nn.Module, plan: Plan) -> None:
    """Cut parameters, and let their modules say so."""
    for cut in list(cuts_of(model, plan)):
        owner: Any = cut.owner
        parameter = getattr(owner, cut.name)
        kept = parameter.detach().index_select(cut.dim, cut.keep.to(parameter.device))
        setattr(owner, cut.name, nn.Parameter(kept, parameter.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif isinstance(owner, nn.Embedding):
            owner.num_embeddings, owner.embedding_dim = owner.weight.shape
        for name in ("intermediate_dim", "intermediate_size", "expert_dim"):
            if cut.units is not None and name in vars(owner):
                setattr(owner, name, cut.units)


def _drop_layers(model: nn.Module, plan: Plan) -> None:
    """Keep the planned layers and number them for the cache."""
    layers = decoder_layers(model)
    kept = [layers[i] for i in plan.layers]
    parent: Any = model.get_submodule(plan.before.family.backbone)
    parent.layers = nn.ModuleList(kept)
    for name in plan.before.backbone.live_lists:
        setattr(parent, name, [getattr(parent, name)[i] for i in plan.layers])
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = index  # type: ignore[assignment]


def _apply_config(model: PreTrainedModel, text_config: PreTrainedConfig, plan: Plan) -> None:
    """Make every module see the new configuration; copies of counts follow."""
    old = text_config_of(model.config)
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = text_config  # type: ignore[assignment]
    model.config = with_text_config(model.config, text_config)
    text_model: Any = model.get_submodule(plan.before.family.backbone)
    for name in plan.before.backbone.layer_indices:
        if hasattr(text_model, name):
            setattr(text_model, name, getattr(text_config, name))
    if "first_kv_shared_layer_idx" in vars(text_model):
        shared: int = getattr(text_config, plan.before.backbone.shared_tail or "")
        text_model.first_kv_shared_layer_idx = plan.after.num_layers - shared
    for layer, shape in zip(decoder_layers(model), plan.after.layers, strict=True):
        if shape.num_kv_heads:
            attention = layer.get_submodule("self_attn")
            set_counts_(attention, text_config, shape.num_heads, shape.num_kv_heads)
    set_class_(model)
    if plan.needs_retype:
        retype_modules_(model, old, text_config)
