"""LLaVA-1.5 (Llama + CLIP) and Bunny-v1.0 (Phi-2 + SigLIP) as `LlavaForConditionalGeneration`.

Both write a vision tower, a two-layer projector and a language model side by side into one
``model.`` namespace, and keep one placeholder a picture. The native class wants one a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from slimvlm.core.errors import UnsupportedModelError
from slimvlm_tools.convert.dialogue import vicuna_template
from slimvlm_tools.convert.layout import Layout, Rule, apply_rules, keep, pick, require
from slimvlm_tools.convert.source import Weights
from slimvlm_tools.convert.tokens import (
    TokenizerFiles,
    add_new_tokens,
    byte_level_tokenizer,
    llama_tokenizer,
    token_id,
)
from slimvlm_tools.convert.towers import CLIP, SIGLIP, Tower, find_tower, image_processor

IMAGE, PAD = "<image>", "<pad>"
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
LANGUAGE_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "use_cache"),
)
LLAMA_FIELDS = (*LANGUAGE_FIELDS, "rms_norm_eps", "attention_bias", "mlp_bias", "head_dim")
PHI_FIELDS = (*LANGUAGE_FIELDS, "layer_norm_eps", "resid_pdrop", "embd_pdrop", "qk_layernorm")
PROJECTOR = [
    keep("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    keep("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
]
ROTARY = Rule(r"model\..*rotary_emb\.inv_freq", reason="computed from the configuration")
TIED = Rule(r"lm_head\.weight", reason="tied to the embeddings")


STRATEGIES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
"""What the originals and what the native class call the choice of visual tokens."""


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer with a picture token, and the vocabulary that the model then has."""

    tokenizer: PreTrainedTokenizerFast
    image_id: int
    pad_id: int
    vocab_size: int
    new_rows: int

    @property
    def new_ids(self) -> list[int]:
        """Ids that the original model does not have, and so never says."""
        return list(range(self.vocab_size - self.new_rows, self.vocab_size))


def refuse_llava(config: Mapping[str, Any]) -> None:
    """Refuse what the configuration of a LLaVA-1.5 shows to have no native counterpart.

    Raises:
        UnsupportedModelError: With the field, its value and what can be converted.
    """
    _refuse_common(config)
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        require(config, name, (False,), False)
    require(config, "mm_patch_merge_type", ("flat", None), "flat")
    require(config, "mm_vision_select_feature", tuple(STRATEGIES), "patch")


def refuse_bunny(config: Mapping[str, Any]) -> None:
    """Refuse what the configuration of a Bunny-v1.0 shows to have no native counterpart.

    Raises:
        UnsupportedModelError: With the field, its value and what can be converted.
    """
    _refuse_common(config)
    require(config, "mm_vision_select_layer", (-2, None), -2)


def llava_layout(
    source: Weights, config: Mapping[str, Any], vision_tower: str | Path | None
) -> Layout:
    """LLaVA-1.5: how an original checkpoint becomes the native class.

    Raises:
        UnsupportedModelError: If something in it has no native counterpart.
        ConfigError: If files are missing.
    """
    feature = config.get("mm_vision_select_feature", "patch")
    tower = find_tower(source, config, CLIP, vision_tower)
    tokens = _tokens(llama_tokenizer(TokenizerFiles(source.folder)), config, PAD)
    text = LlamaConfig(
        **pick(config, LLAMA_FIELDS),
        **_shared_text_values(config, tokens),
        rope_parameters=_rope(config),
    )
    layer = int(config.get("mm_vision_select_layer", -2))
    native = _native_config(config, tower, CLIPVisionConfig(**tower.fields), text, tokens)
    native.vision_feature_layer = _checked_layer(layer, tower.num_layers)
    native.vision_feature_select_strategy = STRATEGIES[feature]
    native.image_seq_length = tower.num_patches + (feature == "cls_patch")
    rules = [
        Rule(r"model\.image_newline", reason="LLaVA-1.6 only; this picture mode never reads it"),
        *_language_rules(config, "model.norm."),
    ]
    return _layout(
        source, config, native, tower, tower.num_layers, tokens, rules,
        template=vicuna_template("</s>", _picture_text(tokens.tokenizer)),
        center_crop=True, extra_tokens=1,
    )  # fmt: skip


def bunny_layout(
    source: Weights, config: Mapping[str, Any], vision_tower: str | Path | None
) -> Layout:
    """Bunny-v1.0 with Phi-2: how an original checkpoint becomes the native class.

    The original reads the last but one layer of SigLIP. Its published checkpoint has no last
    layer, and a tower folder's last layer is left out here.

    Raises:
        UnsupportedModelError: If something in it has no native counterpart.
        ConfigError: If files are missing.
    """
    if "lm_head.bias" in source.shapes:
        _refuse_head_bias(source)
    tower = find_tower(source, config, SIGLIP, vision_tower)
    tokens = _tokens(byte_level_tokenizer(TokenizerFiles(source.folder)), config)
    text = PhiConfig(
        **pick(config, PHI_FIELDS),
        **_shared_text_values(config, tokens),
        rope_parameters={
            **_rope(config),
            "partial_rotary_factor": float(config.get("partial_rotary_factor", 0.5)),
        },
    )
    whole = int(tower.fields.get("num_hidden_layers", 12))
    if tower.num_layers not in (whole, whole - 1):
        raise UnsupportedModelError(
            f"vision_tower: {tower.num_layers} layers in the weights, where {whole} or {whole - 1} "
            "are expected"
        )
    fields = {**tower.fields, "num_hidden_layers": whole - 1, "vision_use_head": False}
    fields.pop("projection_dim", None)
    native = _native_config(config, tower, SiglipVisionConfig(**fields), text, tokens)
    native.vision_feature_layer = -1
    native.vision_feature_select_strategy = "full"
    native.image_seq_length = tower.num_patches
    unused_bias = Rule(r"lm_head\.bias", reason="all zeros")
    rules = [unused_bias, *_language_rules(config, "model.final_layernorm.")]
    return _layout(
        source, config, native, tower, whole - 1, tokens, rules,
        template=vicuna_template("<|endoftext|>", _picture_text(tokens.tokenizer)),
        center_crop=False, extra_tokens=0,
    )  # fmt: skip


def _layout(
    source: Weights,
    config: Mapping[str, Any],
    native: LlavaConfig,
    tower: Tower,
    tower_layers: int,
    tokens: _Tokens,
    rules: list[Rule],
    template: str,
    center_crop: bool,
    extra_tokens: int,
) -> Layout:
    pieces, unused = tower.place(tower_layers)
    names = [n for n in source.shapes if not (tower.inside and n.startswith("model.vision_tower."))]
    language_pieces, language_unused = apply_rules(source, rules, names)
    pieces |= language_pieces
    for name in EMBEDDINGS:
        if name in pieces and tokens.new_rows:
            pieces[name] = replace(pieces[name], new_rows=tokens.new_rows)
    picture = image_processor(tower, config.get("image_aspect_ratio"), center_crop)

    def make_processor() -> LlavaProcessor:
        return LlavaProcessor(
            image_processor=picture,
            tokenizer=tokens.tokenizer,
            patch_size=int(tower.fields["patch_size"]),
            vision_feature_select_strategy=native.vision_feature_select_strategy,
            chat_template=template,
            image_token=IMAGE,
            num_additional_image_tokens=extra_tokens,
        )

    generation: dict[str, Any] = {"pad_token_id": tokens.pad_id}
    if tokens.new_ids:
        generation |= {"suppress_tokens": tokens.new_ids}
    return Layout(native, pieces, generation, make_processor, unused | language_unused)


def _refuse_common(config: Mapping[str, Any]) -> None:
    require(config, "mm_projector_type", ("mlp2x_gelu",), "linear")
    require(config, "image_aspect_ratio", ("pad", "square", None), None)
    for name in ("quantization_config", "mm_resampler_type"):
        require(config, name, (None,), None)
    for name in ("s2", "use_s2"):
        require(config, name, (False, None), False)
    _rope(config)


def _refuse_head_bias(source: Weights) -> None:
    """A bias of the head that is not all zeros changes logits and has no native place."""
    if source.read("lm_head.bias").any():
        raise UnsupportedModelError(
            "weights: 'lm_head.bias' is not zero, and the native class has no bias there"
        )


def _language_rules(config: Mapping[str, Any], final_norm: str) -> list[Rule]:
    tied = [TIED] if config.get("tie_word_embeddings") else []
    return [
        ROTARY,
        *PROJECTOR,
        *tied,
        keep("model.embed_tokens.", "model.language_model.embed_tokens."),
        keep("model.layers.", "model.language_model.layers."),
        keep(final_norm, "model.language_model." + final_norm.removeprefix("model.")),
        keep("lm_head.weight", "lm_head.weight"),
    ]


def _native_config(
    config: Mapping[str, Any],
    tower: Tower,
    vision: PreTrainedConfig,
    text: PreTrainedConfig,
    tokens: _Tokens,
) -> LlavaConfig:
    if "mm_hidden_size" in config and config["mm_hidden_size"] != vision.hidden_size:
        raise UnsupportedModelError(
            f"config.json: mm_hidden_size {config['mm_hidden_size']} is not the tower's "
            f"hidden_size {vision.hidden_size}"
        )
    named: dict[str, Any] = {
        "pad_token_id": tokens.pad_id,
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
    }
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokens.image_id,
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **named,
    )


def _shared_text_values(config: Mapping[str, Any], tokens: _Tokens) -> dict[str, Any]:
    return {
        "vocab_size": tokens.vocab_size,
        "pad_token_id": tokens.pad_id,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings. Of the scaled kinds only ``linear`` means the same in both."""
    rope: dict[str, Any] = {"rope_theta": float(config.get("rope_theta") or 10000.0)}
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UnsupportedModelError(
            f"config.json: rope_scaling {kind!r} has no native counterpart. Can be converted: "
            "none, 'linear'"
        )
    rope["rope_type"] = kind
    if kind == "linear":
        rope["factor"] = float(scaling["factor"])
    return rope


def _checked_layer(layer: int, num_layers: int) -> int:
    """The tower has hidden states 0 (embeddings) to ``num_layers``."""
    if not -num_layers - 1 <= layer <= num_layers:
        raise UnsupportedModelError(
            f"config.json: mm_vision_select_layer {layer}, but the tower has {num_layers} layers"
        )
    return layer


def _picture_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """A picture and the line break after it, as a piece of a template.

    The originals tokenize the text on both sides of a picture apart. Where their tokenizer puts a
    space before the start of a text but not after a special token, the native text needs it.

    Raises:
        UnsupportedModelError: If no space gives the same ids either.
    """
    apart = tokenizer("\n", add_special_tokens=False).input_ids
    for space in ("", " "):
        joined = tokenizer(f"{IMAGE}{space}\n", add_special_tokens=False).input_ids
        if joined[1:] == apart:
            return f"{IMAGE}{space}\\n"
    raise UnsupportedModelError("tokenizer: no text gives the original ids after a picture")


def _tokens(
    tokenizer: PreTrainedTokenizerFast, config: Mapping[str, Any], pad: str | None = None
) -> _Tokens:
    """Add the picture token (and a padding token of its own, if asked) behind the vocabulary.

    Rows of the embeddings that no token uses are taken first.
    """
    add_new_tokens(tokenizer, [IMAGE] + ([pad] if pad else []))
    if pad:
        tokenizer.pad_token = pad
    if config.get("tokenizer_model_max_length"):
        tokenizer.model_max_length = int(config["tokenizer_model_max_length"])
    rows = int(config["vocab_size"])
    image_id = token_id(tokenizer, IMAGE)
    pad_id = tokenizer.pad_token_id
    vocab_size = max(rows, len(tokenizer))
    return _Tokens(
        tokenizer,
        image_id,
        int(config.get("pad_token_id") or 0) if pad_id is None else int(pad_id),
        vocab_size,
        vocab_size - rows,
    )
