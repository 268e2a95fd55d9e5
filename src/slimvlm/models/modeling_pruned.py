# Copyright the slimvlm contributors. SPDX-License-Identifier: Apache-2.0
"""Transformers models whose decoder layers have different widths.

The text configuration says in transformers' own ``per_layer_config`` which fields have another
value in which layer, as in ``{"3": {"intermediate_size": 512}}``. Native classes build all layers
alike. ``PrunedX`` is the class ``X`` of transformers with its decoder layers cut to their own
widths before weights are loaded. Nothing else differs: ``PrunedLlavaForConditionalGeneration`` is a
``LlavaForConditionalGeneration``.

This file is copied into the checkpoints that need it. It reads no files and imports only torch and
transformers.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

PREFIX = "Pruned"
READS_GLOBAL = "allow_global_per_layer_attribute_access"  # without it native classes raise


def standardise_(config: Any) -> None:
    """Let native classes read the widths of the whole model."""
    setattr(config.get_text_config(), READS_GLOBAL, True)


def cut_layers_(model: PreTrainedModel) -> None:
    """Give decoder layers the widths that ``per_layer_config`` of the configuration says.

    Only shapes are set; which rows a layer keeps is up to the weights that are loaded.
    """
    for module in model.modules():
        config, layers = (getattr(module, name, None) for name in ("config", "layers"))
        if config is None or not isinstance(layers, nn.ModuleList):
            continue
        for index, fields in config.to_dict().get("per_layer_config", {}).items():
            its_config = copy.copy(config)
            its_config.per_layer_config = None
            for name, value in fields.items():
                setattr(its_config, name, value)
            _cut_layer_(layers[int(index)], its_config)


def set_counts_(attention: Any, config: Any, num_heads: int, num_kv_heads: int) -> None:
    """Tell an attention module its configuration and, wherever it repeats them, its counts."""
    attention.config = config
    counts = {
        "num_heads": num_heads,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "num_key_value_groups": num_heads // num_kv_heads,
    }
    for name, count in counts.items():
        if name in vars(attention):
            setattr(attention, name, count)


def _cut_layer_(layer: Any, config: Any) -> None:
    """Cut what the layer has: some have no ``self_attn`` but another mixer, which stays whole."""
    mlp = layer.mlp if hasattr(layer, "mlp") else layer.feed_forward
    neurons = config.intermediate_size
    rows = dict.fromkeys(("gate_proj", "up_proj", "fc1", "w1", "w3"), neurons)
    _cut_linears_(mlp, {**rows, "gate_up_proj": 2 * neurons}, neurons)
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        return
    counts = config.num_attention_heads, config.num_key_value_heads
    query, key_value = (count * attention.head_dim for count in counts)
    rows = dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), key_value)
    rows["qkv_proj"] += query + key_value
    (output,) = (
        part
        for name, part in attention.named_children()
        if isinstance(part, nn.Linear) and name not in rows
    )
    if hasattr(attention, "q_proj"):  # with an output gate it has two rows for each channel
        rows["q_proj"] = query * (attention.q_proj.out_features // output.in_features)
    set_counts_(attention, config, *counts)
    _cut_linears_(attention, rows, query)


def _cut_linears_(block: nn.Module, rows: dict[str, int], columns: int) -> None:
    """Cut the rows of the matrices that ``rows`` names and the columns of the other one."""
    for name, linear in block.named_children():
        if not isinstance(linear, nn.Linear):
            continue
        weight = linear.weight.detach()
        kept = weight[: rows[name]] if name in rows else weight[:, :columns]
        if kept.shape == weight.shape:
            continue
        linear.weight = nn.Parameter(kept.clone())
        linear.out_features, linear.in_features = kept.shape
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[: linear.out_features].clone())


def __getattr__(name: str) -> type[PreTrainedModel]:
    base: Any = getattr(transformers, name.removeprefix(PREFIX), None)
    is_model = isinstance(base, type) and issubclass(base, PreTrainedModel)
    if not (name.startswith(PREFIX) and is_model):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        standardise_(config)
        base.__init__(self, config, *args, **kwargs)
        cut_layers_(self)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the native one, with the weights' names in memory: no renaming rule is kept."""
        base.save_pretrained(self, *args, **{"save_original_format": False, **kwargs})

    bases = (base, GenerationMixin) if issubclass(base, GenerationMixin) else (base,)
    body = {"__init__": init, "save_pretrained": save_pretrained, "__module__": __name__}
    made: type[PreTrainedModel] = type(name, bases, body)
    globals()[name] = made
    return made
