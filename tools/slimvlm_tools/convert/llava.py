"""LLaVA-1.5 (Llama + CLIP) and Bunny-v1.0 (Phi-2 + SigLIP) as `LlavaForConditionalGeneration`.

Both write a vision tower, a two-layer projector and a language model side by side into one
``model.`` namespace, and keep one placeholder a picture. The native class wants one a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from slimvlm.core.errors import UnsupportedModelError
from slimvlm_tools.convert.dialogue import vicuna_template
from slimvlm_tools.convert.pieces import EMBEDDINGS, HEAD, Conversion, Rules, place
from slimvlm_tools.convert.source import Allowed, OriginalWeights, pick, require
from slimvlm_tools.convert.tokens import (
    TokenizerFiles,
    add_new_tokens,
    byte_level_tokenizer,
    llama_tokenizer,
    token_id,
)
from slimvlm_tools.convert.towers import CLIP, INSIDE, SIGLIP, Tower, find_tower, image_processor

IMAGE, PAD = "<image>", "<pad>"
STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""What the originals and what the native class call the choice of visual tokens."""
LANGUAGE_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "use_cache"),
)
LLAMA_FIELDS = (*LANGUAGE_FIELDS, "rms_norm_eps", "attention_bias", "mlp_bias", "head_dim")
PHI_FIELDS = (*LANGUAGE_FIELDS, "layer_norm_eps", "resid_pdrop", "embd_pdrop", "qk_layernorm")

SHARED_ALLOWED: Allowed = {
    "mm_projector_type": (("mlp2x_gelu",), "linear"),
    "image_aspect_ratio": (("pad", "square", None), None),
    "quantization_config": ((None,), None),
    "mm_resampler_type": ((None,), None),
    "s2": ((False, None), False),
    "use_s2": ((False, None), False),
}
LLAVA_ALLOWED: Allowed = {
    **SHARED_ALLOWED,
    "mm_use_im_start_end": ((False,), False),
    "mm_use_im_patch_token": ((False,), False),
    "mm_patch_merge_type": (("flat", None), "flat"),
    "mm_vision_select_feature": (tuple(STRATEGIES), "patch"),
}
BUNNY_ALLOWED: Allowed = {**SHARED_ALLOWED, "mm_vision_select_layer": ((-2, None), -2)}

SHARED_RULES: Rules = {
    r"model\..*rotary_emb\.inv_freq": (),  # computed from the configuration
    r"model\.mm_projector\.0\.(.*)": (r"model.multi_modal_projector.linear_1.\1",),
    r"model\.mm_projector\.2\.(.*)": (r"model.multi_modal_projector.linear_2.\1",),
    r"model\.((?:embed_tokens|layers)\..*)": (r"model.language_model.\1",),
    r"lm_head\.weight": (HEAD,),
}
LLAVA_RULES: Rules = {
    **SHARED_RULES,
    r"model\.(norm\..*)": (r"model.language_model.\1",),
    r"model\.image_newline": (),  # LLaVA-1.6 only; this picture mode never reads it
}
BUNNY_RULES: Rules = {
    **SHARED_RULES,
    r"model\.(final_layernorm\..*)": (r"model.language_model.\1",),
    r"lm_head\.bias": (),  # all zeros, or refused
}


def plan_llava(
    folder: Path, config: Mapping[str, Any], vision_tower: str | Path | None
) -> Conversion:
    """How a LLaVA-1.5 becomes the native class."""
    require(config, LLAVA_ALLOWED)
    rope = _rope(config)
    source = OriginalWeights(folder)
    tower = find_tower(source, config, CLIP, vision_tower)
    layer = int(config.get("mm_vision_select_layer", -2))
    if not -tower.num_layers - 1 <= layer <= tower.num_layers:  # hidden state 0: the embeddings
        raise UnsupportedModelError(
            f"config.json: mm_vision_select_layer {layer}, but the tower has {tower.num_layers} "
            "layers"
        )
    tokenizer = llama_tokenizer(TokenizerFiles(folder))
    add_new_tokens(tokenizer, [IMAGE, PAD])
    tokenizer.pad_token = PAD
    text = LlamaConfig(
        **pick(config, LLAMA_FIELDS), **_text_values(config, tokenizer), rope_parameters=rope
    )
    strategy = STRATEGIES[config.get("mm_vision_select_feature", "patch")]
    native = _native_config(config, tower, tokenizer, text, layer, strategy)
    return _plan(source, config, tower, tokenizer, native, LLAVA_RULES, end="</s>")


def plan_bunny(
    folder: Path, config: Mapping[str, Any], vision_tower: str | Path | None
) -> Conversion:
    """How a Bunny-v1.0 with Phi-2 becomes the native class.

    The original reads the last but one layer of SigLIP. Its published checkpoint has no last
    layer, and a tower folder's last layer is left out here.
    """
    require(config, BUNNY_ALLOWED)
    rope = _rope(config)
    source = OriginalWeights(folder)
    if "lm_head.bias" in source.tensors and source.read("lm_head.bias").any():
        raise UnsupportedModelError(
            "weights: 'lm_head.bias' is not zero, and the native class has no bias there"
        )
    tower = find_tower(source, config, SIGLIP, vision_tower)
    whole = tower.config.num_hidden_layers
    if tower.num_layers not in (whole, whole - 1):
        raise UnsupportedModelError(
            f"vision_tower: {tower.num_layers} layers in the weights, where {whole} or {whole - 1} "
            "are expected"
        )
    tower = tower.first_layers(whole - 1)
    tower.config.vision_use_head = False
    tokenizer = byte_level_tokenizer(TokenizerFiles(folder))
    add_new_tokens(tokenizer, [IMAGE])
    rope["partial_rotary_factor"] = float(config.get("partial_rotary_factor", 0.5))
    text = PhiConfig(
        **pick(config, PHI_FIELDS), **_text_values(config, tokenizer), rope_parameters=rope
    )
    native = _native_config(config, tower, tokenizer, text, -1, "full")
    return _plan(source, config, tower, tokenizer, native, BUNNY_RULES, end="<|endoftext|>")


def _plan(
    source: OriginalWeights,
    config: Mapping[str, Any],
    tower: Tower,
    tokenizer: PreTrainedTokenizerFast,
    native: LlavaConfig,
    rules: Rules,
    end: str,
) -> Conversion:
    names = [name for name in source.tensors if not name.startswith(INSIDE)]
    pieces = {**place(source, names, rules), **tower.pieces}
    text = native.get_text_config()
    # ids that the original model does not have, and so never says
    new_ids = list(range(config["vocab_size"], text.vocab_size))
    for name in {EMBEDDINGS, HEAD} & pieces.keys():
        pieces[name] = replace(pieces[name], new_rows=len(new_ids))
    generation: dict[str, Any] = {"pad_token_id": text.pad_token_id}
    if new_ids:
        generation["suppress_tokens"] = new_ids
    if config.get("tokenizer_model_max_length"):
        tokenizer.model_max_length = int(config["tokenizer_model_max_length"])
    processor = LlavaProcessor(
        image_processor=image_processor(tower, config.get("image_aspect_ratio")),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=native.vision_feature_select_strategy,
        chat_template=vicuna_template(end, _picture_text(tokenizer)),
        image_token=IMAGE,
        num_additional_image_tokens=int(tower.kind == CLIP),  # its class token
    )
    return Conversion(native, pieces, generation, processor)


def _native_config(
    config: Mapping[str, Any],
    tower: Tower,
    tokenizer: PreTrainedTokenizerFast,
    text: PreTrainedConfig,
    layer: int,
    strategy: str,
) -> LlavaConfig:
    width = tower.config.hidden_size
    if config.get("mm_hidden_size", width) != width:
        raise UnsupportedModelError(
            f"config.json: mm_hidden_size {config['mm_hidden_size']} is not the tower's "
            f"hidden_size {width}"
        )
    values: dict[str, Any] = {
        "image_token_index": token_id(tokenizer, IMAGE),
        "image_seq_length": tower.num_patches + (tower.kind == CLIP and strategy == "full"),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_word_embeddings,
        "pad_token_id": text.pad_token_id,
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
    }
    return LlavaConfig(vision_config=tower.config, text_config=text, **values)


def _text_values(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """New tokens take rows of the embeddings that no token uses first."""
    pad_id = tokenizer.pad_token_id
    return {
        "vocab_size": max(int(config["vocab_size"]), len(tokenizer)),
        "pad_token_id": int(config.get("pad_token_id") or 0) if pad_id is None else pad_id,
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
    factor = {"factor": float(scaling["factor"])} if kind == "linear" else {}
    return {**rope, "rope_type": kind, **factor}


def _picture_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """A picture and the line break after it, as a piece of a template.

    The originals tokenize the text on both sides of a picture apart. Where their tokenizer puts a
    space before the start of a text but not after a special token, the native text needs it.
    """
    apart = tokenizer("\n", add_special_tokens=False).input_ids
    for space in ("", " "):
        joined = tokenizer(f"{IMAGE}{space}\n", add_special_tokens=False).input_ids
        if joined[1:] == apart:
            return f"{IMAGE}{space}\\n"
    raise UnsupportedModelError("tokenizer: no text gives the original ids after a picture")
