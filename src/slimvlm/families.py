"""What slimvlm knows about model families, as data: a family is a row.

Two tables. `BACKBONES` describes decoder layers: which matrices own the rows and columns of a
unit, and what the configuration class allows. `FAMILIES` says where the backbone, the vision
tower and the projector sit inside a whole model. A plain causal LM is a family without eyes.

The rules were measured on transformers 5.24 and are tested in ``tests/contract/test_families.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Segment = Literal["query", "key_value", "neuron"]
HeadRule = Literal["any", "divides_hidden_size", "fixed"]

OUTPUT_ROWS = 0
INPUT_COLUMNS = 1


@dataclass(frozen=True)
class Projection:
    """A weight matrix of a decoder layer, part of which belongs to units.

    Attributes:
        path: Where it sits below the layer.
        dim: The dimension that units divide: `OUTPUT_ROWS` or `INPUT_COLUMNS`.
        segments: The blocks along that dimension, in order. ``query`` has one block of
            ``head_dim`` for each query head, ``key_value`` one for each KV head, ``neuron`` one
            channel for each neuron. Fused matrices have several.
    """

    path: str
    dim: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How the decoder layers of one text model type are built and configured.

    Attributes:
        attention: Matrices of the attention block; the one with `INPUT_COLUMNS` writes to the
            residual stream.
        mlp: Matrices of the MLP; likewise.
        final_norm: Name of the norm after the last layer.
        head_rule: ``any``: every head count can be configured. ``divides_hidden_size``: the
            configuration insists that heads divide the hidden size. ``fixed``: the class computes
            ``head_dim`` from the head count, so heads cannot change.
        retype: Model type with identical computation but a freer configuration, used when
            `head_rule` forbids a count.
        retype_fields: Fields that the retyped configuration must state.
        retype_requires: Fields that must have these values for the types to be identical.
        layer_lists: Configuration lists with one entry a layer.
        live_attributes: Attributes of the attention module that repeat a count of the
            configuration.
    """

    attention: tuple[Projection, ...]
    mlp: tuple[Projection, ...]
    final_norm: str = "norm"
    head_rule: HeadRule = "any"
    retype: str | None = None
    retype_fields: Mapping[str, object] = field(default_factory=dict)
    retype_requires: Mapping[str, object] = field(default_factory=dict)
    layer_lists: tuple[str, ...] = ()
    live_attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a model sit.

    Attributes:
        backbone: Path of the text model (layers, embeddings, final norm) in the whole model.
        head: Path of the language-model head.
        vision: Path of the vision tower, None for a text model.
        projector: Paths of what maps vision features into the text model.
        text_config: Attribute that holds the text configuration, None if it is the whole one.
        pinned_layers: Dotted configuration path of a list; as many first layers as it has entries
            must stay, because features are added to layers by position.
        caps_logits: Whether the model obeys the text configuration's ``final_logit_softcapping``.
    """

    backbone: str
    head: str = "lm_head"
    vision: str | None = None
    projector: tuple[str, ...] = ()
    text_config: str | None = "text_config"
    pinned_layers: str | None = None
    caps_logits: bool = False


_SPLIT_ATTENTION = (
    Projection("self_attn.q_proj", OUTPUT_ROWS, ("query",)),
    Projection("self_attn.k_proj", OUTPUT_ROWS, ("key_value",)),
    Projection("self_attn.v_proj", OUTPUT_ROWS, ("key_value",)),
    Projection("self_attn.o_proj", INPUT_COLUMNS, ("query",)),
)
_GATED_MLP = (
    Projection("mlp.gate_proj", OUTPUT_ROWS, ("neuron",)),
    Projection("mlp.up_proj", OUTPUT_ROWS, ("neuron",)),
    Projection("mlp.down_proj", INPUT_COLUMNS, ("neuron",)),
)
_PHI_ATTENTION = (
    *_SPLIT_ATTENTION[:3],
    Projection("self_attn.dense", INPUT_COLUMNS, ("query",)),
)
_PLAIN_MLP = (
    Projection("mlp.fc1", OUTPUT_ROWS, ("neuron",)),
    Projection("mlp.fc2", INPUT_COLUMNS, ("neuron",)),
)
_FUSED_ATTENTION = (
    Projection("self_attn.qkv_proj", OUTPUT_ROWS, ("query", "key_value", "key_value")),
    Projection("self_attn.o_proj", INPUT_COLUMNS, ("query",)),
)
_FUSED_GATED_MLP = (
    Projection("mlp.gate_up_proj", OUTPUT_ROWS, ("neuron", "neuron")),
    Projection("mlp.down_proj", INPUT_COLUMNS, ("neuron",)),
)

BACKBONES: dict[str, Backbone] = {
    "llama": Backbone(
        attention=_SPLIT_ATTENTION,
        mlp=_GATED_MLP,
        head_rule="divides_hidden_size",
        retype="mistral",
        retype_fields={"sliding_window": None},
        retype_requires={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Backbone(attention=_SPLIT_ATTENTION, mlp=_GATED_MLP),
    "qwen2": Backbone(attention=_SPLIT_ATTENTION, mlp=_GATED_MLP, layer_lists=("layer_types",)),
    "qwen3": Backbone(attention=_SPLIT_ATTENTION, mlp=_GATED_MLP, layer_lists=("layer_types",)),
    "phi": Backbone(attention=_PHI_ATTENTION, mlp=_PLAIN_MLP, final_norm="final_layernorm"),
    "phi3": Backbone(
        attention=_FUSED_ATTENTION,
        mlp=_FUSED_GATED_MLP,
        live_attributes={"num_key_value_heads": "num_key_value_heads"},
    ),
    "gemma": Backbone(attention=_SPLIT_ATTENTION, mlp=_GATED_MLP),
    "gemma2": Backbone(
        attention=_SPLIT_ATTENTION,
        mlp=_GATED_MLP,
        head_rule="divides_hidden_size",
        layer_lists=("layer_types",),
    ),
    "gemma3_text": Backbone(
        attention=_SPLIT_ATTENTION,
        mlp=_GATED_MLP,
        head_rule="divides_hidden_size",
        layer_lists=("layer_types",),
    ),
    "qwen2_vl_text": Backbone(
        attention=_SPLIT_ATTENTION,
        mlp=_GATED_MLP,
        head_rule="fixed",
        layer_lists=("layer_types",),
    ),
    "qwen2_5_vl_text": Backbone(
        attention=_SPLIT_ATTENTION,
        mlp=_GATED_MLP,
        head_rule="fixed",
        layer_lists=("layer_types",),
    ),
    "qwen3_vl_text": Backbone(attention=_SPLIT_ATTENTION, mlp=_GATED_MLP),
}

_LLAVA = Family(
    backbone="model.language_model",
    vision="model.vision_tower",
    projector=("model.multi_modal_projector",),
)
_IDEFICS = Family(
    backbone="model.text_model", vision="model.vision_model", projector=("model.connector",)
)
_QWEN_VL = Family(
    backbone="model.language_model",
    vision="model.visual",
    projector=("model.visual.merger",),
)

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": Family(
        backbone="model.language_model",
        vision="model.vision_tower",
        projector=("model.multi_modal_projector", "model.image_newline"),
    ),
    "llava_onevision": Family(
        backbone="model.language_model",
        vision="model.vision_tower",
        projector=("model.multi_modal_projector", "model.image_newline"),
    ),
    "vipllava": _LLAVA,
    "internvl": _LLAVA,
    "mistral3": _LLAVA,
    "paligemma": replace(_LLAVA, caps_logits=True),
    "gemma3": _LLAVA,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": Family(
        backbone="model.language_model",
        vision="model.visual",
        projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
        pinned_layers="vision_config.deepstack_visual_indexes",
    ),
    **{
        text_type: Family(backbone="model", text_config=None, caps_logits=True)
        for text_type in BACKBONES
        if not text_type.endswith("vl_text")
    },
}
