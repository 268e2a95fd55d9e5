"""Layers of different widths, filled up with zeros to the widest."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.models.anatomy import Anatomy, LayerShape, channels_of, read_anatomy, segments, unit_of
from slimvlm.models.classes import empty_model, with_text_config
from slimvlm.models.families import OUTPUT_ROWS, Projection
from slimvlm.models.parts import projections, text_config_of
from slimvlm.planning.plan import Plan
from slimvlm.pruning.config import smaller_text_config


def padded(model: PreTrainedModel) -> PreTrainedModel:
    """A native model with the widest layer's widths everywhere that computes the same.

    A padded KV group has zero query, key and value rows (and biases), so it attends evenly to
    values that are zero, and zero columns in the output projection. A padded neuron is likewise
    zero on both sides. If the widest head count cannot be configured, the next larger one is taken.

    Args:
        model: A model with layers of different widths; it stays as it is, and the new one shares
            every matrix with it that needs no padding.

    Returns:
        A model to save: buffers that files do not hold have no storage.
    """
    shape = read_anatomy(model)
    plan = _padding_plan(shape, text_config_of(model.config).num_key_value_heads)
    config = copy.deepcopy(model.config)
    vars(config).pop("auto_map", None)
    config = with_text_config(config, smaller_text_config(config, plan))
    wide = empty_model(config)
    weights = {**model.state_dict(), **_padded_weights(model, plan.after)}
    wide.load_state_dict(weights, assign=True)
    wide.tie_weights()
    wide.generation_config = model.generation_config
    return wide


def _padding_plan(shape: Anatomy, num_kv_heads: int) -> Plan:
    """What would cut an even model, as its configuration has it, to the widest layer."""
    groups = max(layer.num_kv_heads for layer in shape.layers)
    neurons = shape.fixed_neurons or max(layer.intermediate_size for layer in shape.layers)
    even = shape.with_layers(
        [
            replace(
                layer,
                num_kv_heads=num_kv_heads if layer.num_kv_heads else 0,
                intermediate_size=neurons if layer.intermediate_size else 0,
            )
            for layer in shape.layers
        ]
    )
    groups = min((count for count in even.legal_kv_heads() if count >= groups), default=0)
    kept = tuple(tuple(range(min(groups, layer.num_kv_heads))) for layer in even.layers)
    return replace(Plan.everything(even), kv_groups=kept)


def _padded_weights(model: PreTrainedModel, after: Anatomy) -> dict[str, Tensor]:
    """The matrices and biases that need zeros, by their names."""
    names = {id(module): name for name, module in model.named_modules()}
    shapes = read_anatomy(model).layers
    weights = {}
    for index, projection, linear in projections(model):
        narrow, wide = shapes[index], after.layers[index]
        if narrow == wide:
            continue
        for name, value in linear.named_parameters():
            if name == "weight" or projection.dim == OUTPUT_ROWS:
                found = _with_zeros(value.detach(), projection, narrow, wide)
                weights[f"{names[id(linear)]}.{name}"] = found
    return weights


def _with_zeros(
    value: Tensor, projection: Projection, narrow: LayerShape, wide: LayerShape
) -> Tensor:
    """A matrix or bias with its units first in every segment and zeros after them."""
    is_neuron = unit_of(projection) == "neuron"
    units = range(narrow.intermediate_size if is_neuron else narrow.num_kv_heads)
    places = channels_of(projection, wide, units).to(value.device)
    dim = projection.dim if value.ndim > 1 else 0
    size = list(value.shape)
    size[dim] = sum(count * width for _, _, count, width in segments(projection, wide))
    return value.new_zeros(size).index_copy(dim, places, value)
