"""Write a plan down as a Hugging Face configuration, and prove that it can be read back."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from slimvlm.errors import ImpossiblePlanError
from slimvlm.geometry import Anatomy, family_of, read_anatomy, text_config_of
from slimvlm.plan import Plan

UNEVEN_FIELD = "pruned_layers"
"""Text configuration field that holds per-layer widths when they differ."""


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that plain transformers code would load this model with."""
    if family_of(config.model_type).vision is None:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration without storage for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(copy.deepcopy(config))
    return model


def smaller_text_config(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The language-model configuration of the pruned model; the given one is left alone."""
    old: PreTrainedConfig = text_config_of(config)
    after, row = plan.after, plan.before.backbone
    new: PreTrainedConfig = copy.deepcopy(old)
    if plan.needs_retype:
        new = _retyped(new, after.text_type, row.retype_fields)
    changes: dict[str, Any] = {"num_hidden_layers": after.num_layers}
    for name in row.layer_lists:
        if getattr(new, name, None) is not None:
            changes[name] = [getattr(old, name)[i] for i in plan.layers]
    widest = max(after.layers, key=lambda shape: (shape.num_kv_heads, shape.intermediate_size))
    if any(len(plan.kv_groups[i]) < plan.before.layers[i].num_kv_heads for i in plan.layers):
        changes["num_attention_heads"] = widest.num_heads
        changes["num_key_value_heads"] = widest.num_kv_heads
        changes["head_dim"] = widest.head_dim
    if any(len(plan.neurons[i]) < plan.before.layers[i].intermediate_size for i in plan.layers):
        changes["intermediate_size"] = max(shape.intermediate_size for shape in after.layers)
    if not after.is_uniform:
        changes[UNEVEN_FIELD] = [_widths(after, i) for i in range(after.num_layers)]
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def validate(config: PreTrainedConfig, text_config: PreTrainedConfig, plan: Plan) -> None:
    """Build the planned model without weights and compare its shapes with the plan.

    Args:
        config: Configuration of the whole original model.
        text_config: What `smaller_text_config` made.
        plan: The plan. Layers of different widths cannot be checked this way and pass.

    Raises:
        ImpossiblePlanError: If the configuration class refuses the shape, or ignores a field.
    """
    if not plan.after.is_uniform:
        return
    try:
        checked = type(text_config).from_dict(text_config.to_dict())
        whole = with_text_config(copy.deepcopy(config), checked)
        found = read_anatomy(empty_model(whole))
    except (StrictDataclassError, ValueError, RuntimeError, ZeroDivisionError) as error:
        first_line = str(error).strip().splitlines()[-1]
        raise ImpossiblePlanError(_refusal(plan, first_line)) from error
    if found.layers != plan.after.layers:
        raise ImpossiblePlanError(
            _refusal(plan, "a model built from the new configuration has other shapes")
        )


def with_text_config(config: PreTrainedConfig, text_config: PreTrainedConfig) -> PreTrainedConfig:
    """The whole configuration with another language-model part."""
    name = family_of(config.model_type).text_config
    if name is None:
        return text_config
    setattr(config, name, text_config)
    return config


def _widths(anatomy: Anatomy, index: int) -> dict[str, int]:
    shape = anatomy.layers[index]
    return {
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate_size,
    }


def _retyped(text_config: Any, model_type: str, fields: Any) -> PreTrainedConfig:
    values = text_config.to_dict()
    target = CONFIG_MAPPING[model_type]
    dropped = {"model_type", "architectures", "transformers_version"}
    dropped |= set(values) - set(target().to_dict())
    kept = {name: value for name, value in values.items() if name not in dropped}
    new: PreTrainedConfig = target(**{**kept, **fields})
    new._attn_implementation = text_config._attn_implementation
    return new


def _refusal(plan: Plan, why: str) -> str:
    legal = plan.before.legal_kv_heads()
    counts = sorted({shape.num_kv_heads for shape in plan.after.layers})
    return (
        f"plan: {plan.before.text_type!r} cannot be configured with {counts[0]} KV groups "
        f"({why}). KV groups that it can have: {', '.join(map(str, legal))}"
    )
