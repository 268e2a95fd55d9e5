"""Which cases run by default and which in the slow tier.

`ARCHETYPES` are the few tiny models that together have every trait of the tables of families.
They stand for all others in the default tier (``make test``); the slow tier (``make test-slow``)
runs every family. `traits` reads the traits of a model off the tables and the model itself, so
that a row with something new needs an archetype: ``tests/contract/test_archetypes.py``.
"""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any

import pytest

from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.families import INPUT_COLUMNS, Backbone, Family, Projection
from slimvlm.models.parts import Parts
from tests import tiny

ARCHETYPES: dict[str, tuple[str, ...]] = {
    "llava-llama": ("retype", "head_rule: divides_hidden_size"),
    "phi": ("mlp: neuron > neuron", "text alone", "one query head per KV head", "biases"),
    "llava-phi3": ("attention: query+key_value+key_value > query",),
    "qwen3_vl_moe": ("pinned_layers", "neuron_field", "neuron_multiple", "experts"),
    "llama4": ("mlp: transposed", "layer_lists: no_rope_layers", "layer_indices: moe_layers"),
    "lfm2": ("width_fields", "some layers without attention"),
    "qwen3_5_text": ("attention: query_and_gate, key_value, key_value > query",),
    "mllama": ("layer_indices: cross_attention_layers",),
    "gemma3n_text": ("layer_lists: intermediate_size", "shared_tail"),
    "gemma4": ("layer_maps: per_layer_config", "other_towers", "attention: none"),
    "molmo2": ("live_lists: rope_types",),
    "kosmos2_5": ("mlp: none", "head_rule: fixed"),
    "idefics2": ("fixed_neurons", "head_rule: any"),
}
"""Name in `tiny.CONFIGS`, and what it stands for: the first trait is its alone."""

BY_VALUE = ("head_rule", "layer_lists", "layer_indices", "layer_maps", "live_lists")
"""Fields of the tables of which each value is a trait; of others, that they are set at all."""


def traits(name: str) -> frozenset[str]:
    """What is special about a tiny model: how its rows differ from the defaults, and its layers."""
    model = tiny.build(name)
    anatomy = read_anatomy(model)
    biased = {linear.bias is not None for _, _, linear in Parts(model).projections()}
    return frozenset(
        [
            *(*_set_fields(anatomy.backbone), *_set_fields(anatomy.family)),
            *_layout("attention", anatomy.backbone.attention),
            *(*_layout("mlp", anatomy.backbone.mlp), *_layers(anatomy)),
            *("biases" if has_bias else "no biases" for has_bias in biased),
            "pictures" if tiny.is_multimodal(model.config) else "text alone",
            "a head of its own" if anatomy.head_params else "a tied head",
        ]
    )


def _set_fields(row: Backbone | Family) -> Iterable[str]:
    for field in fields(row):
        value, makes = getattr(row, field.name), field.default_factory
        unset = field.default if makes is MISSING else makes()
        if field.name in BY_VALUE:
            values = (value,) if isinstance(value, str) else value
            yield from (f"{field.name}: {item}" for item in values)
        elif unset is not MISSING and value != unset and field.name != "tower_types":  # read only
            yield field.name


def _layout(part: str, matrices: tuple[Projection, ...]) -> Iterable[str]:
    """Which blocks the matrices of a part have: those that read, then those that write."""
    written = ["+".join(p.segments) for p in matrices if p.dim == INPUT_COLUMNS]
    read = ["+".join(p.segments) for p in matrices if p.dim != INPUT_COLUMNS]
    yield f"{part}: {', '.join(read)} > {', '.join(written)}" if matrices else f"{part}: none"
    if any(p.transposed for p in matrices):
        yield f"{part}: transposed"


def _layers(anatomy: Anatomy) -> Iterable[str]:
    groups = {layer.num_kv_heads for layer in anatomy.layers}
    if 0 in groups and groups != {0}:
        yield "some layers without attention"
    if len({layer.intermediate_size for layer in anatomy.layers}) > 1:
        yield "some layers without units in their MLP"
    for layer in anatomy.layers:
        if layer.num_kv_heads:
            shared = layer.queries_per_group > 1
            yield "several query heads per KV head" if shared else "one query head per KV head"


def _is_archetype(name: str, *_: Any) -> bool:
    return name in ARCHETYPES


def tiered(cases: Iterable[Any], by_default: Callable[..., bool] = _is_archetype) -> list[Any]:
    """Cases (values, tuples or ``pytest.param``); those not ``by_default`` in the slow tier alone.

    By default run those whose first value is the name of one of the `ARCHETYPES`.
    """
    found = []
    for case in cases:
        if not isinstance(case, type(pytest.param())):
            case = pytest.param(*(case if isinstance(case, tuple) else (case,)))
        marks = () if by_default(*case.values) else (pytest.mark.slow,)
        found.append(pytest.param(*case.values, id=case.id, marks=(*case.marks, *marks)))
    return found
