"""Apply a plan to a live model: weights, configuration, layer indices and counts."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.configs import smaller_text_config, validate, with_text_config
from slimvlm.errors import ConfigError
from slimvlm.families import INPUT_COLUMNS, OUTPUT_ROWS, Projection
from slimvlm.geometry import (
    Anatomy,
    decoder_layers,
    family_of,
    projections,
    read_anatomy,
    text_config_of,
)
from slimvlm.modeling_pruned import set_counts_
from slimvlm.plan import Plan
from slimvlm.uneven import set_class_
from slimvlm.units import channels_of, unit_of


def prune_(model: PreTrainedModel, plan: Plan, allow_uneven: bool = False) -> None:
    """Cut a model down to a plan, in place: afterwards it is an ordinary smaller model.

    The new configuration is built and checked before any weight is touched. Query heads go with
    their KV head, fused matrices are cut inside their blocks, biases follow their rows and the
    biases of output projections stay whole. Layers are renumbered for the cache.

    If the head count needs it, the language model is retyped (Llama → Mistral, which computes the
    same); `Plan.needs_retype` tells beforehand.

    Layers of different widths cannot be said in a plain configuration. The model then becomes the
    subclass of its class that `slimvlm.modeling_pruned` describes, and ``save_pretrained`` writes
    that file too.

    Args:
        model: A transformers model of a known family.
        plan: Made for this model's anatomy.
        allow_uneven: Whether equal layers may be written like different ones if their head count
            cannot be configured. Loading the files then needs ``trust_remote_code=True``.

    Raises:
        ConfigError: If the plan is for another model.
        ImpossiblePlanError: If the configuration class cannot express the shape.
    """
    _require_match(model, plan)
    uneven = not plan.after.is_uniform or (allow_uneven and plan.file_format == "uneven")
    text_config = smaller_text_config(model.config, plan, uneven)
    validate(model.config, text_config, plan)
    _slice_weights(model, plan)
    _drop_layers(model, plan)
    _apply_config(model, text_config, plan)


def mask_(model: PreTrainedModel, plan: Plan) -> None:
    """Switch off what a plan removes without changing any shape, in place.

    The columns of ``o_proj`` and ``down_proj`` that read removed units become zero; in removed
    layers these matrices and their biases become zero, so that only the residual stream passes.
    This is the slow and obvious meaning of a plan, against which `prune_` is tested.
    """
    _require_match(model, plan)
    kept_layers = set(plan.layers)
    with torch.no_grad():
        for index, projection, linear in projections(model):
            if projection.dim != INPUT_COLUMNS:
                continue
            keep = torch.zeros(linear.in_features, dtype=torch.bool)
            keep[_kept_channels(plan, index, projection)] = True
            linear.weight[:, ~keep] = 0
            if index not in kept_layers and linear.bias is not None:
                linear.bias.zero_()


@contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Inside, the model computes what a plan leaves; its weights are never touched.

    The same meaning as `mask_`, by hooks: the inputs of ``o_proj`` and ``down_proj`` are zero
    where units are gone, and a removed layer passes its input on.
    """
    _require_match(model, plan)
    kept_layers = set(plan.layers)

    def hide(keep: Tensor, module: nn.Module, args: Any) -> Any:
        return (args[0] * keep.to(args[0]), *args[1:])

    def skip(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            if index not in kept_layers:
                handle = layer.register_forward_hook(skip, with_kwargs=True)
                stack.callback(handle.remove)
        for index, projection, linear in projections(model):
            if projection.dim != INPUT_COLUMNS or index not in kept_layers:
                continue
            keep = torch.zeros(linear.in_features)
            keep[_kept_channels(plan, index, projection)] = 1
            if not bool(keep.all()):
                handle = linear.register_forward_pre_hook(partial(hide, keep))
                stack.callback(handle.remove)
        yield


def _require_match(model: nn.Module, plan: Plan) -> None:
    anatomy = read_anatomy(model)
    if anatomy.layers != plan.before.layers or anatomy.model_type != plan.before.model_type:
        raise ConfigError(
            f"plan: made for {_shape_line(plan.before)}, but the model is {_shape_line(anatomy)}"
        )


def _shape_line(anatomy: Anatomy) -> str:
    shape = anatomy.layers[0]
    return (
        f"{anatomy.model_type} with {anatomy.num_layers} layers, {shape.num_kv_heads} KV groups, "
        f"{shape.intermediate_size} neurons"
    )


def _kept_channels(plan: Plan, index: int, projection: Projection) -> Tensor:
    kept = plan.kv_groups if unit_of(projection) == "kv_group" else plan.neurons
    return channels_of(projection, plan.before.layers[index], kept[index])


def _slice_weights(model: nn.Module, plan: Plan) -> None:
    kept_layers = set(plan.layers)
    for index, projection, linear in projections(model):
        if index not in kept_layers:
            continue
        keep = _kept_channels(plan, index, projection)
        if len(keep) == linear.weight.shape[projection.dim]:
            continue
        _slice_linear(linear, keep.to(linear.weight.device), projection.dim)


def _slice_linear(linear: nn.Linear, keep: Tensor, dim: int) -> None:
    needs_grad = linear.weight.requires_grad
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, keep), needs_grad)
    if dim == OUTPUT_ROWS and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[keep], linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _drop_layers(model: nn.Module, plan: Plan) -> None:
    """Keep the planned layers and number them for the cache."""
    layers = decoder_layers(model)
    kept = [layers[i] for i in plan.layers]
    parent = model.get_submodule(plan.before.family.backbone)
    parent.layers = nn.ModuleList(kept)
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
    for layer, shape in zip(decoder_layers(model), plan.after.layers, strict=True):
        attention = layer.get_submodule("self_attn")
        set_counts_(attention, text_config, shape.num_heads, shape.num_kv_heads)
    set_class_(model)
    if plan.needs_retype:
        _retype_modules(model, old, text_config)


def _retype_modules(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Give the language model's modules the classes of the new type; they compute the same."""
    source = importlib.import_module(
        f".models.{old.model_type}.modeling_{old.model_type}", "transformers"
    )
    target = importlib.import_module(
        f".models.{new.model_type}.modeling_{new.model_type}", "transformers"
    )
    old_prefix = type(old).__name__.removesuffix("Config")
    new_prefix = type(new).__name__.removesuffix("Config")
    is_text_model = family_of(model.config.model_type).text_config is None
    root = model if is_text_model else model.get_submodule(_backbone_path(model))
    for module in root.modules():
        name = type(module).__name__
        if getattr(source, name, None) is type(module) and name.startswith(old_prefix):
            module.__class__ = getattr(target, new_prefix + name.removeprefix(old_prefix))


def _backbone_path(model: PreTrainedModel) -> str:
    return family_of(model.config.model_type).backbone
