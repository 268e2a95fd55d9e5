"""Find the class of a configuration: the native one, or its subclass for uneven layers."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.models import modeling_pruned
from slimvlm.models.modeling_pruned import PREFIX, cut_layers_
from slimvlm.models.parts import Parts, family_of, text_config_of

UNEVEN_FIELD = "pruned_layers"
"""Text configuration field that holds the widths of every layer when they differ."""
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Keys of each of its entries."""


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that plain transformers code would load this model with."""
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
    """Refuse to change weights that are quantised; ``what`` is the change, for the message."""
    if is_quantized(config):
        raise ConfigError(
            f"model: its weights are quantised, so it cannot be {what}. Quantise last: take the "
            "checkpoint from before"
        )


def require_undivided(
    model: Any, what: str, on_one_device: bool = False, field: str = "model"
) -> None:
    """Refuse to change a model partly on host or disk or, ``on_one_device``, on several devices."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if "disk" in places or (len(places) > 1 and (on_one_device or "cpu" in places)):
        raise ConfigError(
            f"{field}: its device_map divides it over {', '.join(sorted(places))}, so it cannot be "
            f"{what}. Load it without device_map; a CPU will do"
        )


def check_widths(config: PreTrainedConfig) -> None:
    """Check the widths of every layer in a configuration from a file."""
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
    """Return the class for layers of different widths: the native one with its layers cut."""
    auto = auto_class(config)
    name = f"{PREFIX}{auto._model_mapping[type(config)].__name__}"
    made: type[PreTrainedModel] = getattr(modeling_pruned, name)
    made.register_for_auto_class(auto.__name__)  # so that save_pretrained copies the file
    return made


def class_of(config: PreTrainedConfig) -> Any:
    """Return the class whose ``from_pretrained`` reads the model of a configuration."""
    return uneven_class(config) if is_uneven(config) else auto_class(config)


def auto_map_of(config: PreTrainedConfig) -> dict[str, str]:
    """Make the ``auto_map`` that lets plain transformers code find the uneven classes."""
    file = modeling_pruned.__name__.rpartition(".")[2]
    autos: tuple[Any, ...] = (auto_class(config), transformers.AutoModel)
    native = {auto.__name__: auto._model_mapping[type(config)].__name__ for auto in autos}
    return {auto: f"{file}.{PREFIX}{name}" for auto, name in native.items()}


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, with_buffers: bool = False
) -> PreTrainedModel:
    """Build a model without its weights; ``with_buffers`` computes the buffers that no file has."""
    given = {} if dtype is None else {"dtype": dtype}
    with init_empty_weights() if with_buffers else torch.device("meta"):
        build = getattr(class_of(config), "_from_config" if is_uneven(config) else "from_config")
        model: PreTrainedModel = build(copy.deepcopy(config), **given)
    return model


def with_text_config(config: PreTrainedConfig, text_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the whole configuration with another language-model part."""
    name = family_of(config.model_type).text_config
    if name is None:
        return text_config
    setattr(config, name, text_config)
    return config


def set_class_(model: PreTrainedModel) -> None:
    """Give a model its native or uneven class by its config, instead of a checkpoint's own code."""
    config: Any = model.config
    if is_uneven(config):
        model.__class__ = uneven_class(config)
        config.auto_map = auto_map_of(config)
        cut_layers_(model)
    elif type(model).__name__.startswith(PREFIX):
        model.__class__ = type(model).__bases__[0]
        vars(config).pop("auto_map", None)


def retype_modules_(model: PreTrainedModel, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Give the language model's modules the classes of another type that computes the same.

    Relies on: a type's classes lie in ``models.<type>.modeling_<type>``, are called after its
    configuration (``LlamaConfig``, ``LlamaMLP``), and have the same attributes in both types. Tried
    with transformers 5.24.
    """
    source, target = (
        importlib.import_module(f".models.{kind}.modeling_{kind}", "transformers")
        for kind in (old.model_type, new.model_type)
    )
    old_prefix, new_prefix = (type(each).__name__.removesuffix("Config") for each in (old, new))
    family = Parts(model).family
    root = model if family.text_config is None else model.get_submodule(family.backbone)
    for module in root.modules():
        name = type(module).__name__
        if getattr(source, name, None) is type(module) and name.startswith(old_prefix):
            module.__class__ = getattr(target, new_prefix + name.removeprefix(old_prefix))
