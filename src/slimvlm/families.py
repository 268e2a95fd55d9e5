"""What slimvlm knows about model families, as data: a family is a row.

Two tables. `BACKBONES` describes decoder layers, see `slimvlm.backbones`. `FAMILIES` says where the
backbone, the vision tower and the projector sit inside a whole model. A plain causal LM is a family
without eyes.

The rules were measured on transformers 5.24 and are tested in ``tests/contract/test_families.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from slimvlm.backbones import BACKBONES as BACKBONES
from slimvlm.backbones import INPUT_COLUMNS as INPUT_COLUMNS
from slimvlm.backbones import OUTPUT_ROWS as OUTPUT_ROWS
from slimvlm.backbones import Backbone as Backbone
from slimvlm.backbones import Projection as Projection
from slimvlm.backbones import Segment as Segment
from slimvlm.backbones import Stack as Stack


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a model sit.

    Attributes:
        backbone: Path of the text model (layers, embeddings, final norm) in the whole model.
        head: Path of the language-model head.
        vision: Path of the vision tower, None for a text model.
        projector: Paths of what maps the towers' features into the text model.
        other_towers: Paths of towers beside the vision tower, such as one for sound.
        text_config: Attribute that holds the text configuration, None if it is the whole one.
        pinned_layers: Dotted configuration path of a list; as many first layers as it has entries
            must stay, because features are added to layers by position.
        caps_logits: Whether the model obeys the text configuration's ``final_logit_softcapping``.
        fixed_neurons: Whether the text configuration's MLP width also sizes a part outside the
            backbone, so that a plain configuration cannot change it.
        residual_writers: Patterns of the names of parameters outside the backbone whose first
            dimension is the text model's hidden size; none if another hidden size is not known to
            work.
        inner_projector: Paths of two linear modules whose common width is configured as the text
            model's hidden size.
        hidden_fields: Dotted configuration paths that repeat the text model's hidden size.
    """

    backbone: str
    head: str = "lm_head"
    vision: str | None = None
    projector: tuple[str, ...] = ()
    other_towers: tuple[str, ...] = ()
    text_config: str | None = "text_config"
    pinned_layers: str | None = None
    caps_logits: bool = False
    fixed_neurons: bool = False
    residual_writers: tuple[str, ...] = ()
    inner_projector: tuple[str, str] | None = None
    hidden_fields: tuple[str, ...] = ()

    @property
    def towers(self) -> tuple[str, ...]:
        """Paths of all towers."""
        return (*(() if self.vision is None else (self.vision,)), *self.other_towers)


_ONLY_INSIDE = (
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text"),
    *("mllama_text_model", "molmo2_text", "kosmos_2_5_text_model", "phi4_multimodal"),
)
"""Types of language models that transformers offers as a part of another model only."""

_TWO_LINEARS: dict[str, Any] = {
    "residual_writers": ("model.multi_modal_projector.linear_2.*", "model.image_newline"),
    "inner_projector": (
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ),
}
_LLAVA = Family(
    backbone="model.language_model",
    vision="model.vision_tower",
    projector=("model.multi_modal_projector",),
)
_IDEFICS = Family(
    backbone="model.text_model",
    vision="model.vision_model",
    projector=("model.connector",),
    residual_writers=("model.connector.modality_projection.proj.weight",),
)
_QWEN_VL = Family(
    backbone="model.language_model",
    vision="model.visual",
    projector=("model.visual.merger",),
)
_QWEN3_VL = Family(
    backbone="model.language_model",
    vision="model.visual",
    projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    pinned_layers="vision_config.deepstack_visual_indexes",
    residual_writers=(
        "model.visual.merger.linear_fc2.*",
        "model.visual.deepstack_merger_list.*.linear_fc2.*",
    ),
    hidden_fields=("vision_config.out_hidden_size",),
)
_GEMMA = Family(
    backbone="model.language_model",
    vision="model.vision_tower",
    projector=("model.embed_vision", "model.embed_audio"),
    other_towers=("model.audio_tower",),
    caps_logits=True,
)
_ANYRES = Family(
    backbone="model.language_model",
    vision="model.vision_tower",
    projector=("model.multi_modal_projector", "model.image_newline"),
    **_TWO_LINEARS,
)

FAMILIES: dict[str, Family] = {
    "llava": replace(_LLAVA, **_TWO_LINEARS),
    "llava_next": _ANYRES,
    "llava_onevision": _ANYRES,
    "vipllava": replace(_LLAVA, **_TWO_LINEARS),
    "internvl": replace(_LLAVA, **_TWO_LINEARS),
    "mistral3": replace(_LLAVA, **_TWO_LINEARS),
    "paligemma": replace(_LLAVA, caps_logits=True),
    "gemma3": _LLAVA,
    "gemma3n": _GEMMA,
    "gemma4": _GEMMA,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": replace(_QWEN3_VL, residual_writers=()),
    "qwen3_5": _QWEN_VL,
    "glm4v": _QWEN_VL,
    "minicpmv4_6": Family(
        backbone="model.language_model", vision="model.vision_tower", projector=("model.merger",)
    ),
    "aya_vision": _LLAVA,
    "cohere2_vision": replace(_LLAVA, residual_writers=_TWO_LINEARS["residual_writers"]),
    "perception_lm": replace(_LLAVA, **_TWO_LINEARS),
    "lfm2_vl": _LLAVA,
    "molmo2": _LLAVA,
    "idefics2": Family(
        backbone="model.text_model",
        vision="model.vision_model",
        projector=("model.connector",),
        fixed_neurons=True,
    ),
    "deepseek_vl": Family(
        backbone="model.language_model",
        vision="model.vision_model",
        projector=("model.aligner",),
        residual_writers=("model.aligner.linear2.*",),
        inner_projector=("model.aligner.linear1", "model.aligner.linear2"),
    ),
    "video_llama_3": Family(
        backbone="model.language_model",
        vision="model.vision_model",
        projector=("model.projector",),
        residual_writers=("model.projector.readout.2.*",),
        inner_projector=("model.projector.readout.0", "model.projector.readout.2"),
    ),
    "ovis2": Family(
        backbone="model.language_model",
        vision="model.vision_tower",
        projector=("model.visual_embeddings_table",),
    ),
    "phi4_multimodal": Family(
        backbone="model",
        vision="model.embed_tokens_extend",
        projector=(
            "model.embed_tokens_extend.image_embed.img_projection_up",
            "model.embed_tokens_extend.image_embed.img_projection_down",
        ),
        text_config=None,
    ),
    "mllama": Family(
        backbone="model.language_model",
        vision="model.vision_model",
        projector=("model.multi_modal_projector",),
    ),
    "llama4": Family(
        backbone="language_model.model",
        head="language_model.lm_head",
        vision="vision_model",
        projector=("multi_modal_projector",),
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
