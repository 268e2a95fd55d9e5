"""Describe model families as data: `BACKBONES` (decoders) and `FAMILIES` (whole models).

A row of `BACKBONES` names the matrices that hold the rows and columns of a unit, and what the
configuration class allows; a row of `FAMILIES` names the paths of a model's parts. The rules were
measured on transformers 5.24 and are tested in ``tests/contract/test_families.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Segment = Literal["query", "query_and_gate", "key_value", "neuron", "expert"]
HeadRule = Literal["any", "divides_hidden_size", "fixed"]

OUTPUT_ROWS = 0
INPUT_COLUMNS = 1
ENTRIES = 2


@dataclass(frozen=True)
class Projection:
    """A weight matrix of a decoder layer, part of which belongs to units."""

    # Below the layer: a linear module, or a parameter ``[E, O, C]`` that holds a matrix for each of
    # ``E`` experts. A neuron then is a channel of every expert.
    path: str
    # The dimension that units divide: `OUTPUT_ROWS` or `INPUT_COLUMNS`; `ENTRIES` for the first one
    # of whatever has an entry for each expert.
    dim: int
    # The blocks along it, in order: ``query`` has one of ``head_dim`` for each query head,
    # ``query_and_gate`` two for each (the second switches the head's output), ``key_value`` one for
    # each KV head, ``neuron`` and ``expert`` one channel for each. Fused matrices have several.
    segments: tuple[Segment, ...]
    transposed: bool = False  # whether it is stored with inputs first, ``[E, C, O]``

    @property
    def axis(self) -> int:
        """The divided dimension of the stored tensor: counted from its end, or 0 for `ENTRIES`."""
        if self.dim == ENTRIES:
            return 0
        is_rows = (self.dim == OUTPUT_ROWS) != self.transposed
        return -2 if is_rows else -1


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, of which a router gives each token a few."""

    module: str  # path, below the layer, of the module that runs them
    entries: tuple[Projection, ...]  # with an entry for each expert first: weights, router's rows
    count_field: str = "num_experts"  # of the configuration
    taken_field: str = "num_experts_per_tok"  # of the configuration: how many each token takes
    transposed: bool = False  # whether matrices are stored with inputs first, ``[E, C, O]``


@dataclass(frozen=True)
class Stack:
    """A weight of the text model that holds an equal slice for each layer, one after another."""

    path: str  # of its module below the text model, which need not have it
    dim: int  # that layers divide: `OUTPUT_ROWS` or `INPUT_COLUMNS`
    # Configuration field with the number of tokens that have a row each; None if they have none, or
    # rows that do not go with those of the embedding.
    rows: str | None = None


_SPLIT_ATTENTION = (
    Projection("self_attn.q_proj", OUTPUT_ROWS, ("query",)),
    Projection("self_attn.k_proj", OUTPUT_ROWS, ("key_value",)),
    Projection("self_attn.v_proj", OUTPUT_ROWS, ("key_value",)),
    Projection("self_attn.o_proj", INPUT_COLUMNS, ("query",)),
)


def _mlp(module: str, rows: Sequence[str], columns: str, fused: int = 1) -> tuple[Projection, ...]:
    """Name the matrices of an MLP whose rows are neurons, and the one whose columns are."""
    neuron: Segment = "neuron"
    into = (Projection(f"{module}.{name}", OUTPUT_ROWS, (neuron,) * fused) for name in rows)
    return (*into, Projection(f"{module}.{columns}", INPUT_COLUMNS, (neuron,)))


_GATED_MLP = _mlp("mlp", ("gate_proj", "up_proj"), "down_proj")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How the decoder layers of one text model type are built and configured.

    A layer has all matrices of ``attention`` or none (linear attention, convolution), all of
    ``mlp`` or none (a dense layer between layers of experts), and likewise of ``experts``. Matrices
    that are not listed stay whole. The defaults are Mistral's.
    """

    # The matrix with `INPUT_COLUMNS` writes to the residual stream. Empty if units cannot go.
    attention: tuple[Projection, ...] = _SPLIT_ATTENTION
    mlp: tuple[Projection, ...] = _GATED_MLP
    experts: Experts | None = None  # those of which some can go
    final_norm: str = "norm"  # name of the norm after the last layer
    # ``any``: every head count can be configured. ``divides_hidden_size``: heads must divide the
    # hidden size. ``fixed``: the class computes ``head_dim`` from the head count, so heads stay.
    head_rule: HeadRule = "any"
    # Model type with identical computation but a freer configuration, for counts that `head_rule`
    # forbids; fields that it must state, and values that make the two types identical.
    retype: str | None = None
    retype_fields: Mapping[str, object] = field(default_factory=dict)
    retype_requires: Mapping[str, object] = field(default_factory=dict)
    layer_lists: tuple[str, ...] = ()  # of the configuration, with one entry a layer
    layer_indices: tuple[str, ...] = ()  # lists of layer numbers in the configuration
    layer_maps: tuple[str, ...] = ()  # mappings from layer numbers to exceptions in these layers
    layer_stacks: tuple[Stack, ...] = ()  # weights outside the layers, with a slice for each
    # Configuration field with the number of last layers that read the keys and values of earlier
    # ones: each those of the last earlier layer with its entry in ``layer_types``. These earlier
    # layers must stay, and the last layer.
    shared_tail: str | None = None
    live_lists: tuple[str, ...] = ()  # of the text model, not its configuration; one entry a layer
    neuron_field: str = "intermediate_size"  # of the configuration; may be among `layer_lists`
    neuron_multiple: int = 1  # neurons must be a multiple of it
    # Values with which the configuration takes `neuron_field` literally.
    width_fields: Mapping[str, object] = field(default_factory=dict)
    whole_mlp_if: str | None = None  # dotted attribute; where it is true, all neurons stay
    can_be_uneven: bool = True  # whether `modeling_pruned.py` can cut layers to different widths


_PHI_ATTENTION = (*_SPLIT_ATTENTION[:3], Projection("self_attn.dense", INPUT_COLUMNS, ("query",)))
_PLAIN_MLP = _mlp("mlp", ("fc1",), "fc2")
_FUSED_ATTENTION = (
    Projection("self_attn.qkv_proj", OUTPUT_ROWS, ("query", "key_value", "key_value")),
    Projection("self_attn.o_proj", INPUT_COLUMNS, ("query",)),
)
_FUSED_GATED_MLP = _mlp("mlp", ("gate_up_proj",), "down_proj", fused=2)
_OUT_PROJ_ATTENTION = (
    *_SPLIT_ATTENTION[:3],
    Projection("self_attn.out_proj", INPUT_COLUMNS, ("query",)),
)
_GATED_OUTPUT_ATTENTION = (
    Projection("self_attn.q_proj", OUTPUT_ROWS, ("query_and_gate",)),
    *_SPLIT_ATTENTION[1:],
)
_W123_MLP = _mlp("feed_forward", ("w1", "w3"), "w2")
_EXPERT_NEURONS = _mlp("mlp.experts", ("gate_up_proj",), "down_proj", fused=2)
_TRANSPOSED_AND_SHARED_NEURONS = (
    Projection("feed_forward.experts.gate_up_proj", OUTPUT_ROWS, ("neuron", "neuron"), True),
    Projection("feed_forward.experts.down_proj", INPUT_COLUMNS, ("neuron",), True),
    *_mlp("feed_forward.shared_expert", ("gate_proj", "up_proj"), "down_proj"),
)


def _experts(module: str, *routers: str, **fields: Any) -> Experts:
    """Describe experts with two weights each, and what of their routers has an entry for each."""
    paths = (*routers, f"{module}.gate_up_proj", f"{module}.down_proj")
    return Experts(module, tuple(Projection(p, ENTRIES, ("expert",)) for p in paths), **fields)


_MLP_EXPERTS = _experts("mlp.experts", "mlp.gate.weight")
_PER_LAYER_EMBEDDINGS = (
    Stack("embed_tokens_per_layer", INPUT_COLUMNS),
    Stack("per_layer_model_projection", OUTPUT_ROWS),
)
_PER_LAYER_ROWS = (
    replace(_PER_LAYER_EMBEDDINGS[0], rows="vocab_size_per_layer_input"),
    _PER_LAYER_EMBEDDINGS[1],
)

_WITH_LAYER_TYPES = Backbone(layer_lists=("layer_types",))
_WITH_DIVIDING_HEADS = replace(_WITH_LAYER_TYPES, head_rule="divides_hidden_size")
_QWEN3_MOE = Backbone(
    mlp=_EXPERT_NEURONS,
    experts=_MLP_EXPERTS,
    layer_indices=("mlp_only_layers",),
    neuron_field="moe_intermediate_size",
    neuron_multiple=8,
    can_be_uneven=False,
)
_WITH_FIXED_HEADS = replace(_WITH_DIVIDING_HEADS, head_rule="fixed")

BACKBONES: dict[str, Backbone] = {
    "llama": Backbone(
        head_rule="divides_hidden_size",
        retype="mistral",
        retype_fields={"sliding_window": None},
        retype_requires={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Backbone(),
    "qwen2": _WITH_LAYER_TYPES,
    "qwen3": _WITH_LAYER_TYPES,
    "phi": Backbone(attention=_PHI_ATTENTION, mlp=_PLAIN_MLP, final_norm="final_layernorm"),
    "phi3": Backbone(attention=_FUSED_ATTENTION, mlp=_FUSED_GATED_MLP),
    "gemma": Backbone(),
    "gemma2": _WITH_DIVIDING_HEADS,
    "gemma3_text": _WITH_DIVIDING_HEADS,
    "gemma3n_text": Backbone(
        attention=(),
        layer_lists=("layer_types", "activation_sparsity_pattern", "intermediate_size"),
        layer_stacks=_PER_LAYER_EMBEDDINGS,
        shared_tail="num_kv_shared_layers",
        whole_mlp_if="mlp.activation_sparsity",
        can_be_uneven=False,
    ),
    "gemma4_text": Backbone(
        attention=(),
        layer_lists=("layer_types",),
        layer_maps=("per_layer_config",),
        experts=_experts(
            *("experts", "router.proj.weight", "router.per_expert_scale"),
            taken_field="top_k_experts",
        ),
        layer_stacks=_PER_LAYER_ROWS,
        shared_tail="num_kv_shared_layers",
        whole_mlp_if="config.use_double_wide_mlp",
        can_be_uneven=False,
    ),
    "qwen2_vl_text": _WITH_FIXED_HEADS,
    "qwen2_5_vl_text": _WITH_FIXED_HEADS,
    "qwen3_vl_text": Backbone(),
    "qwen3_vl_moe_text": _QWEN3_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_5_moe_text": replace(
        _QWEN3_MOE,
        attention=_GATED_OUTPUT_ATTENTION,
        layer_lists=("layer_types",),
        layer_indices=(),
    ),
    "qwen3_5_text": Backbone(attention=_GATED_OUTPUT_ATTENTION, layer_lists=("layer_types",)),
    "stablelm": Backbone(head_rule="fixed"),
    "cohere2": _WITH_LAYER_TYPES,
    "phi4_multimodal": Backbone(attention=_FUSED_ATTENTION, mlp=_FUSED_GATED_MLP),
    "glm_ocr_text": Backbone(mlp=_FUSED_GATED_MLP),
    "paddleocr_vl_text": Backbone(),
    "glm4v_text": Backbone(mlp=_FUSED_GATED_MLP, head_rule="fixed"),
    "mllama_text_model": Backbone(head_rule="fixed", layer_indices=("cross_attention_layers",)),
    "llama4_text": Backbone(
        mlp=_TRANSPOSED_AND_SHARED_NEURONS,
        experts=_experts(
            *("feed_forward.experts", "feed_forward.router.weight"),
            count_field="num_local_experts",
            transposed=True,
        ),
        layer_lists=("layer_types", "no_rope_layers"),
        layer_indices=("moe_layers",),
        can_be_uneven=False,
    ),
    "lfm2": Backbone(
        attention=_OUT_PROJ_ATTENTION,
        mlp=_W123_MLP,
        final_norm="embedding_norm",
        layer_lists=("layer_types",),
        width_fields={"block_auto_adjust_ff_dim": False},
    ),
    "molmo2_text": Backbone(layer_indices=("rope_scaling_layers",), live_lists=("rope_types",)),
    "kosmos_2_5_text_model": Backbone(
        attention=_OUT_PROJ_ATTENTION,
        mlp=(),
        final_norm="layer_norm",
        head_rule="fixed",
        can_be_uneven=False,
    ),
}


@dataclass(frozen=True)
class Knob:
    """A setting of a family's image processor that bounds how many tokens a picture becomes."""

    field: str  # with a dot before the key of a mapping
    # How it goes down: an area or edge in ``pixels`` by a hundredth; ``grids``, shapes of tiles,
    # which the configuration has, too, without the largest; or to the next of some values.
    way: Literal["pixels", "grids"] | tuple[int, ...] = tuple(range(1023, 0, -1))


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a model sit."""

    # Path of the text model (layers, embeddings, final norm) in the whole model.
    backbone: str = "model.language_model"
    head: str = "lm_head"  # path
    vision: str | None = None  # path of the vision tower; None for a text model
    # Types that the tower's configuration may have, where the family's class allows any.
    tower_types: tuple[str, ...] = ("clip_vision_model", "siglip_vision_model", "pixtral")
    projector: tuple[str, ...] = ()  # paths of modules from towers' features to the text model
    other_towers: tuple[str, ...] = ()  # paths, such as that of an audio tower
    text_config: str | None = "text_config"  # attribute; None if the configuration is the text's
    # Dotted configuration path of a list; as many first layers as it has entries must stay, because
    # features are added to layers by position.
    pinned_layers: str | None = None
    # Whether ``final_logit_softcapping`` and ``logit_scale`` of the text configuration are obeyed.
    caps_logits: bool = False
    # What lowers a picture's tokens, each once the one before is at its least; or why nothing does.
    pictures: tuple[Knob, ...] | str = "every picture becomes the same number of tokens"
    # Whether the text configuration's MLP width also sizes a part outside the backbone, so that a
    # plain configuration cannot change it.
    fixed_neurons: bool = False

    @property
    def towers(self) -> tuple[str, ...]:
        """Paths of all towers."""
        return (*(() if self.vision is None else (self.vision,)), *self.other_towers)


_ONLY_INSIDE = (
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text"),
    *("mllama_text_model", "molmo2_text", "kosmos_2_5_text_model", "phi4_multimodal"),
    *("glm_ocr_text", "paddleocr_vl_text"),
)
"""Types of language models that transformers offers as a part of another model only."""

_OF_TIMM = ("timm_wrapper",)
_PIXELS, _PATCHES = (Knob("size.longest_edge", "pixels"),), (Knob("max_patches"),)
_PIECES = (Knob("max_tiles"), Knob("max_image_tokens"))
_NUMBERED = "max_image_tiles also numbers the embeddings of the tiles' arrangements"
_SPLIT = (Knob("do_image_splitting", (False,)),)
_SOFT_TOKENS = (Knob("max_soft_tokens", (1120, 560, 280, 140, 70)),)

_LLAVA = Family(vision="model.vision_tower", projector=("model.multi_modal_projector",))
_PATCHED_LLAVA = replace(_LLAVA, pictures=_PATCHES)
_IDEFICS = Family(
    backbone="model.text_model",
    vision="model.vision_model",
    projector=("model.connector",),
    pictures=_PIXELS,
)
_QWEN_VL = Family(vision="model.visual", projector=("model.visual.merger",), pictures=_PIXELS)
_QWEN3_VL = replace(
    _QWEN_VL,
    projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    pinned_layers="vision_config.deepstack_visual_indexes",
)
_GEMMA = Family(
    vision="model.vision_tower",
    projector=("model.embed_vision", "model.embed_audio"),
    other_towers=("model.audio_tower",),
    caps_logits=True,
)
_ANYRES = replace(
    _LLAVA,
    projector=("model.multi_modal_projector", "model.image_newline"),
    pictures=(Knob("image_grid_pinpoints", "grids"),),
)

FAMILIES: dict[str, Family] = {
    **{"vipllava": _LLAVA, "gemma3": _LLAVA, "fast_vlm": replace(_LLAVA, tower_types=_OF_TIMM)},
    # Pixtral's processor bounds the edge; those of CLIP and SigLIP have no such setting
    **dict.fromkeys(("llava", "mistral3"), replace(_LLAVA, pictures=_PIXELS)),
    **dict.fromkeys(("internvl", "aya_vision", "cohere2_vision"), _PATCHED_LLAVA),
    "perception_lm": replace(_LLAVA, tower_types=_OF_TIMM, pictures=(Knob("max_num_tiles"),)),
    "molmo2": replace(_LLAVA, pictures=(Knob("max_crops"),)),
    "lfm2_vl": replace(_LLAVA, tower_types=("siglip2_vision_model",), pictures=_PIECES),
    **dict.fromkeys(("llava_next", "llava_onevision"), _ANYRES),
    **{"gemma3n": _GEMMA, "gemma4": replace(_GEMMA, pictures=_SOFT_TOKENS)},
    **dict.fromkeys(("idefics3", "smolvlm"), _IDEFICS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"), _QWEN_VL),
    **dict.fromkeys(("glm4v", "glm_ocr"), _QWEN_VL),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), _QWEN3_VL),
    "paligemma": replace(_LLAVA, caps_logits=True),
    "paddleocr_vl": replace(_QWEN_VL, projector=("model.projector",)),
    "minicpmv4_6": replace(_LLAVA, projector=("model.merger",), pictures=(Knob("max_slice_nums"),)),
    "idefics2": replace(_IDEFICS, fixed_neurons=True, pictures=_SPLIT),
    "deepseek_vl": Family(vision="model.vision_model", projector=("model.aligner",)),
    "video_llama_3": replace(_QWEN_VL, vision="model.vision_model", projector=("model.projector",)),
    "ovis2": replace(_PATCHED_LLAVA, projector=("model.visual_embeddings_table",)),
    "phi4_multimodal": Family(
        backbone="model",
        vision="model.embed_tokens_extend",
        projector=(
            "model.embed_tokens_extend.image_embed.img_projection_up",
            "model.embed_tokens_extend.image_embed.img_projection_down",
        ),
        text_config=None,
        pictures=(Knob("dynamic_hd"),),
    ),
    "mllama": replace(_LLAVA, vision="model.vision_model", pictures=_NUMBERED),
    "llama4": Family(
        backbone="language_model.model",
        head="language_model.lm_head",
        vision="vision_model",
        projector=("multi_modal_projector",),
        pictures=_PATCHES,
    ),
    "kosmos-2.5": Family(
        backbone="text_model.model",
        head="text_model.lm_head",
        vision="vision_model",
        projector=("image_to_text_projection", "text_model.model.segment_emb"),
    ),
    **{
        text_type: Family(backbone="model", text_config=None, caps_logits=True)
        for text_type in BACKBONES
        if text_type not in _ONLY_INSIDE
    },
}
