"""Write a plan down as a Hugging Face configuration, and prove that it can be read back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from slimvlm import modeling_pruned
from slimvlm.errors import ConfigError, ImpossiblePlanError
from slimvlm.geometry import Anatomy, LayerShape, family_of, read_anatomy, text_config_of
from slimvlm.plan import Plan

UNEVEN_FIELD = "pruned_layers"
"""Text configuration field that holds the widths of every layer when they differ."""
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What each of its entries says."""


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that plain transformers code would load this model with."""
    sees = family_of(config.model_type).vision is not None
    if sees and type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def is_uneven(config: PreTrainedConfig) -> bool:
    """Whether a configuration gives every decoder layer its own widths."""
    return getattr(text_config_of(config), UNEVEN_FIELD, None) is not None


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a configuration says that weights are stored in another type than they compute in."""
    return getattr(config, "quantization_config", None) is not None


def require_full_precision(config: PreTrainedConfig, what: str) -> None:
    """Refuse to change weights that are quantised.

    Args:
        config: Configuration of the whole model.
        what: What was to be done, for the message.

    Raises:
        ConfigError: If they are.
    """
    if is_quantized(config):
        raise ConfigError(
            f"model: its weights are quantised, so it cannot be {what}. Quantise last: take the "
            "checkpoint from before"
        )


def check_widths(config: PreTrainedConfig) -> None:
    """Check the widths of every layer in a configuration that a file may have brought.

    Raises:
        ConfigError: If entries are missing, or one is not a whole number that the layers can have.
    """
    text_config = text_config_of(config)
    rows = getattr(text_config, UNEVEN_FIELD, None)
    if rows is None:
        return
    most = {name: getattr(text_config, name) for name in WIDTHS}
    count = text_config.num_hidden_layers
    if not isinstance(rows, list) or len(rows) != count:
        raise ConfigError(f"config: {UNEVEN_FIELD} must be a list of {count} entries, one a layer")
    for index, row in enumerate(rows):
        is_good = isinstance(row, dict) and row.keys() == most.keys()
        if not is_good or any(
            type(value) is not int or not 1 <= value <= most[name] for name, value in row.items()
        ):
            limits = ", ".join(f"{name} (1 to {limit})" for name, limit in most.items())
            raise ConfigError(f"config: {UNEVEN_FIELD}[{index}] is {row!r} but must give {limits}")


def uneven_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class for layers of different widths: the native one with its layers cut."""
    auto = auto_class(config)
    made: type[PreTrainedModel] = _uneven(auto, config)
    made.register_for_auto_class(auto.__name__)  # so that save_pretrained copies the file
    return made


def auto_map_of(config: PreTrainedConfig) -> dict[str, str]:
    """What ``auto_map`` must say so that plain transformers code finds the uneven classes."""
    file = modeling_pruned.__name__.rpartition(".")[2]
    autos = (auto_class(config), transformers.AutoModel)
    return {auto.__name__: f"{file}.{_uneven(auto, config).__name__}" for auto in autos}


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, with_buffers: bool = False
) -> PreTrainedModel:
    """The model of a configuration without storage for its weights.

    Args:
        config: The configuration.
        dtype: Data type of the weights; by default the configuration's.
        with_buffers: Whether what is computed and not stored in files (such as rotary frequencies)
            is there.
    """
    with init_empty_weights() if with_buffers else torch.device("meta"):
        if is_uneven(config):
            build: Any = uneven_class(config)._from_config
        else:
            build = auto_class(config).from_config
        given = {} if dtype is None else {"dtype": dtype}
        model: PreTrainedModel = build(copy.deepcopy(config), **given)
    return model


def smaller_text_config(
    config: PreTrainedConfig, plan: Plan, uneven: bool = False
) -> PreTrainedConfig:
    """The language-model configuration of the pruned model; the given one is left alone.

    Args:
        config: Configuration of the whole model.
        plan: The plan.
        uneven: Whether each layer gets its own entry in `UNEVEN_FIELD`. The fields for all layers
            then stay, so that the rules of the configuration class hold for them.
    """
    old: PreTrainedConfig = text_config_of(config)
    after = plan.after
    new: PreTrainedConfig = copy.deepcopy(old)
    vars(new).pop(UNEVEN_FIELD, None)
    if plan.needs_retype:
        new = _retyped(new, after.text_type, plan.before.backbone.retype_fields)
    for name, value in _of_kept_layers(old, plan).items():
        setattr(new, name, value)
    if uneven:
        setattr(new, UNEVEN_FIELD, [_widths(old, shape) for shape in after.layers])
        return new
    for name, value in _changed_widths(new, after).items():
        setattr(new, name, value)
    return new


def validate(config: PreTrainedConfig, text_config: PreTrainedConfig, plan: Plan) -> None:
    """Build the planned model without weights and compare its shapes with the plan.

    Args:
        config: Configuration of the whole original model.
        text_config: What `smaller_text_config` made.
        plan: The plan.

    Raises:
        ImpossiblePlanError: If the configuration class refuses the shape, or ignores a field.
    """
    if not getattr(text_config, UNEVEN_FIELD, None):
        _require_legal_neurons(plan)
    elif not plan.before.backbone.can_be_uneven:
        raise ImpossiblePlanError(
            f"plan: layers of {plan.before.text_type!r} must stay equally wide, since "
            "modeling_pruned.py cannot cut them one by one. Plan with allocation 'uniform'"
        )
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


def _uneven(auto: Any, config: PreTrainedConfig) -> Any:
    native = auto._model_mapping[type(config)]
    return getattr(modeling_pruned, f"{modeling_pruned.PREFIX}{native.__name__}")


def _lists(text_config: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(text_config, name, None) is not None]


def _of_kept_layers(old: PreTrainedConfig, plan: Plan) -> dict[str, Any]:
    """What a configuration says layer by layer, for the layers that stay."""
    row = plan.before.backbone
    lists = {n: [getattr(old, n)[i] for i in plan.layers] for n in _lists(old, row.layer_lists)}
    numbers = {
        name: [new for new, i in enumerate(plan.layers) if i in getattr(old, name)]
        for name in _lists(old, row.layer_indices)
    }
    maps = {name: _renumbered(old, name, plan) for name in row.layer_maps}
    counts = {"num_hidden_layers": len(plan.layers)}
    if row.shared_tail is not None:
        first = old.num_hidden_layers - getattr(old, row.shared_tail)
        counts[row.shared_tail] = sum(index >= first for index in plan.layers)
    return {**counts, **lists, **numbers, **maps}


def _renumbered(text_config: PreTrainedConfig, name: str, plan: Plan) -> dict[int, Any]:
    """A mapping from layer numbers, for the layers that stay."""
    given = {int(index): value for index, value in text_config.to_dict().get(name, {}).items()}
    return {new: given[old] for new, old in enumerate(plan.layers) if old in given}


def _widths(text_config: Any, shape: LayerShape) -> dict[str, int]:
    """A layer's entry; units that it lacks have the count of the configuration."""
    counts = (shape.num_heads, shape.num_kv_heads, shape.intermediate_size)
    named = zip(WIDTHS, counts, strict=True)
    return {name: count or getattr(text_config, name, 1) for name, count in named}


def _changed_widths(text_config: Any, after: Anatomy) -> dict[str, Any]:
    """The fields that do not yet say what all layers have."""
    changed: dict[str, Any] = {}
    for kv_heads, queries_per_group, head_dim in after.attention_shapes:
        heads = {
            "num_attention_heads": kv_heads * queries_per_group,
            "num_key_value_heads": kv_heads,
        }
        if any(getattr(text_config, name, count) != count for name, count in heads.items()):
            changed = {**heads, "head_dim": head_dim}
    row = after.backbone
    if row.neuron_field in row.layer_lists:
        rows = zip(after.layers, getattr(text_config, row.neuron_field), strict=True)
        widths = [shape.intermediate_size or whole for shape, whole in rows]
        return {**changed, row.neuron_field: widths}
    for neurons in after.mlp_widths:
        if getattr(text_config, row.neuron_field) != neurons:
            changed |= {row.neuron_field: neurons, **row.width_fields}
    return changed


def _require_legal_neurons(plan: Plan) -> None:
    legal = plan.before.legal_neurons()
    for neurons in plan.after.mlp_widths:
        if neurons in legal:
            continue
        nearest = sorted(sorted(legal, key=lambda count: abs(count - neurons))[:2])
        even = ", or any number with allow_uneven, whose files need trust_remote_code=True"
        raise ImpossiblePlanError(
            f"plan: {plan.before.model_type!r} cannot be configured with {neurons} neurons in a "
            f"layer; the nearest that it can have: {', '.join(map(str, nearest))}"
            + even
            * plan.before.backbone.can_be_uneven
        )


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
    counts = [shape[0] for shape in plan.after.attention_shapes] or [0]
    return (
        f"plan: {plan.before.text_type!r} cannot be configured with {counts[0]} KV groups "
        f"({why}). KV groups that it can have: {', '.join(map(str, legal))}, or any count with "
        "allow_uneven, whose files need trust_remote_code=True"
    )
