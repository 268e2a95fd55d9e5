# Copyright the slimvlm contributors. SPDX-License-Identifier: Apache-2.0
"""Transformers models whose decoder layers have different widths.

A transformers configuration has one head count and one MLP width for all layers. Here the text
configuration has one entry for each layer in ``pruned_layers``, and ``PrunedX`` is the class ``X``
of transformers with its decoder layers cut to these widths before weights are loaded. Nothing else
differs: ``PrunedLlavaForConditionalGeneration`` is a ``LlavaForConditionalGeneration``.

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


def cut_layers_(model: PreTrainedModel) -> None:
    """Give every decoder layer the widths that ``pruned_layers`` of the configuration says.

    Only shapes are set; which rows a layer keeps is up to the weights that are loaded.
    """
    for module in model.modules():
        widths = getattr(getattr(module, "config", None), "pruned_layers", None)
        layers = getattr(module, "layers", None)
        if widths is not None and isinstance(layers, nn.ModuleList):
            for layer, its_widths in zip(layers, widths, strict=True):
                _cut_layer_(layer, **its_widths)


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


def _cut_layer_(
    layer: Any, num_attention_heads: int, num_key_value_heads: int, intermediate_size: int
) -> None:
    """Cut what the layer has: some have no ``self_attn`` but another mixer, which stays whole."""
    mlp = layer.mlp if hasattr(layer, "mlp") else layer.feed_forward
    rows = dict.fromkeys(("gate_proj", "up_proj", "fc1", "w1", "w3"), intermediate_size)
    _cut_linears_(mlp, {**rows, "gate_up_proj": 2 * intermediate_size}, intermediate_size)
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        return
    query, key_value = (n * attention.head_dim for n in (num_attention_heads, num_key_value_heads))
    rows = dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), key_value)
    rows["qkv_proj"] += query + key_value
    (output,) = (
        part
        for name, part in attention.named_children()
        if isinstance(part, nn.Linear) and name not in rows
    )
    if hasattr(attention, "q_proj"):  # with an output gate it has two rows for each channel
        rows["q_proj"] = query * (attention.q_proj.out_features // output.in_features)
    config = copy.copy(attention.config)
    config.num_attention_heads = num_attention_heads
    config.num_key_value_heads = num_key_value_heads
    set_counts_(attention, config, num_attention_heads, num_key_value_heads)
    _cut_linears_(attention, rows, query)


def _cut_linears_(block: nn.Module, rows: dict[str, int], columns: int) -> None:
    """Cut the rows of the matrices that ``rows`` names and the columns of the other one."""
    for name, linear in block.named_children():
        if not isinstance(linear, nn.Linear):
            continue
        out_features = rows.get(name, linear.out_features)
        in_features = linear.in_features if name in rows else columns
        if (out_features, in_features) == linear.weight.shape:
            continue
        linear.weight = nn.Parameter(linear.weight.detach()[:out_features, :in_features].clone())
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[:out_features].clone())
        linear.out_features, linear.in_features = out_features, in_features


def __getattr__(name: str) -> type[PreTrainedModel]:
    base: Any = getattr(transformers, name.removeprefix(PREFIX), None)
    is_model = isinstance(base, type) and issubclass(base, PreTrainedModel)
    if not (name.startswith(PREFIX) and is_model):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
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
