"""Mini-InternVL-Chat (InternViT + Phi-3) as `InternVLForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
)

from slimvlm.core.errors import UnsupportedModelError
from slimvlm_tools.convert.dialogue import phi3_template
from slimvlm_tools.convert.pieces import HEAD, Conversion, Rules, place
from slimvlm_tools.convert.source import Allowed, OriginalWeights, pick, require
from slimvlm_tools.convert.tokens import TokenizerFiles, llama_tokenizer, token_id

START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""The original normalizes with these, whatever ``preprocessor_config.json`` says."""
USED = {START, END, CONTEXT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}
TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
    *("original_max_position_embeddings", "initializer_range", "rms_norm_eps", "sliding_window"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "use_cache"),
)
VISION_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "hidden_act", "layer_norm_eps", "attention_dropout", "norm_type"),
    "initializer_range",
)
INTERNVIT_DEFAULTS = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "norm_type": "rms_norm",
}
"""Values of the original vision configuration where the native class has others."""

_LAYER, _TO_LAYER = (
    r"vision_model\.encoder\.layers\.(\d+)\.",
    r"model.vision_tower.encoder.layer.\1.",
)
_EMBEDDINGS, _TO_EMBEDDINGS = r"vision_model\.embeddings\.", r"model.vision_tower.embeddings."
RULES: Rules = {
    _EMBEDDINGS + "class_embedding": (_TO_EMBEDDINGS + "cls_token",),
    _EMBEDDINGS + "position_embedding": (_TO_EMBEDDINGS + "position_embeddings",),
    _EMBEDDINGS + r"patch_embedding\.(.*)": (_TO_EMBEDDINGS + r"patch_embeddings.projection.\1",),
    _LAYER + r"attn\.qkv\.(.*)": tuple(_TO_LAYER + rf"attention.{p}_proj.\2" for p in "qkv"),
    _LAYER + r"attn\.proj\.(.*)": (_TO_LAYER + r"attention.projection_layer.\2",),
    _LAYER + r"attn\.([qk]_norm\.weight)": (_TO_LAYER + r"attention.\2",),
    _LAYER + r"norm1\.(.*)": (_TO_LAYER + r"layernorm_before.\2",),
    _LAYER + r"norm2\.(.*)": (_TO_LAYER + r"layernorm_after.\2",),
    _LAYER + r"ls([12])": (_TO_LAYER + r"lambda_\2",),
    _LAYER + r"(mlp\.fc[12]\..*)": (_TO_LAYER + r"\2",),
    r"mlp1\.0\.(.*)": (r"model.multi_modal_projector.layer_norm.\1",),
    r"mlp1\.1\.(.*)": (r"model.multi_modal_projector.linear_1.\1",),
    r"mlp1\.3\.(.*)": (r"model.multi_modal_projector.linear_2.\1",),
    r"language_model\..*rotary_emb\.inv_freq": (),  # computed from the configuration
    r"language_model\.model\.(.*)": (r"model.language_model.\1",),
    r"language_model\.lm_head\.weight": (HEAD,),
}


ALLOWED: Allowed = {
    "ps_version": (("v2",), "v1"),
    "pad2square": ((False,), False),
    "template": (("phi3-chat",), None),
    "use_backbone_lora": ((0, False, None), 0),
    "use_llm_lora": ((0, False, None), 0),
    "dynamic_image_size": ((True, False), False),
}


def plan_internvl(
    folder: Path, config: Mapping[str, Any], vision_tower: str | Path | None
) -> Conversion:
    """How a Mini-InternVL-Chat becomes the native class."""
    require(config, ALLOWED)
    if config.get("dynamic_image_size"):
        require(config, {"use_thumbnail": ((True,), False)})
    text = _text_config(config["llm_config"])
    vision = _vision_config(config["vision_config"])
    if vision_tower is not None:
        raise UnsupportedModelError(
            "vision_tower: InternVL checkpoints hold their own tower; none can be given"
        )
    source = OriginalWeights(folder)
    side = int(config.get("force_image_size") or vision.image_size[0])
    ratio = float(config.get("downsample_ratio", 0.5))
    files = TokenizerFiles(folder)
    tokenizer = llama_tokenizer(files, _named_tokens(files))
    native = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id(tokenizer, CONTEXT),
        image_seq_length=int((side // vision.patch_size[0]) ** 2 * ratio**2),
        downsample_ratio=ratio,
        projector_hidden_act="gelu",
        vision_feature_layer=int(config.get("select_layer", -1)),
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    end = token_id(tokenizer, "<|end|>")
    stops = [end] + [i for i in (text.eos_token_id,) if isinstance(i, int) and i != end]
    return Conversion(
        native,
        place(source, source.tensors, RULES),
        {"eos_token_id": stops, "pad_token_id": text.pad_token_id},
        _processor(config, files, tokenizer, side, native.image_seq_length),
    )


def _text_config(config: Mapping[str, Any]) -> Phi3Config:
    by_type = ["Phi3ForCausalLM"] if config.get("model_type") == "phi3" else None
    require(config, {"architectures": ((["Phi3ForCausalLM"],), by_type)})
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(config.get("rope_theta") or 10000.0),
    }
    scaling = config.get("rope_scaling")
    if scaling:
        require(scaling, {"type": (("su", "longrope"), scaling.get("rope_type"))})
        original = int(config.get("original_max_position_embeddings", 4096))
        rope |= {
            "rope_type": "longrope",
            "short_factor": list(scaling["short_factor"]),
            "long_factor": list(scaling["long_factor"]),
            "original_max_position_embeddings": original,
            "factor": int(config.get("max_position_embeddings", 4096)) / original,
        }
    return Phi3Config(
        **pick(config, TEXT_FIELDS),
        rope_parameters=rope,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _vision_config(config: Mapping[str, Any]) -> Any:
    normalized = bool(config.get("qk_normalization", True))
    if normalized:  # the native norms of queries and keys have a fixed epsilon
        require(config, {"layer_norm_eps": ((1e-6,), 1e-6)})
    dropout = float(config.get("dropout", 0.0))
    return InternVLVisionConfig(
        **{**INTERNVIT_DEFAULTS, **pick(config, VISION_FIELDS)},
        image_size=int(config.get("image_size", 224)),
        patch_size=int(config.get("patch_size", 14)),
        attention_bias=bool(config.get("qkv_bias", False)),
        use_qk_norm=normalized,
        hidden_dropout_prob=dropout,
        projection_dropout=dropout,
        layer_scale_init_value=float(config.get("initializer_factor", 0.1)),
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # with it, no norm follows the last layer
    )


def _processor(
    config: Mapping[str, Any],
    files: TokenizerFiles,
    tokenizer: PreTrainedTokenizerFast,
    side: int,
    image_seq_length: int,
) -> InternVLProcessor:
    pictures: dict[str, Any] = {
        "size": {"height": side, "width": side},
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "resample": 3,
    }
    dynamic = bool(config.get("dynamic_image_size"))
    # The slow tokenizer in its newer mode puts a lone space before a first token that is not
    # among its special ones.
    lonely = not files.legacy and files.prefix and "<|system|>" not in files.special
    lonely = lonely and (files.folder / "tokenizer.model").is_file()
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            crop_to_patches=dynamic,
            min_patches=int(config.get("min_dynamic_patch", 1)) if dynamic else 1,
            max_patches=int(config.get("max_dynamic_patch", 6)) if dynamic else 1,
            **pictures,
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**pictures),
        image_seq_length=image_seq_length,
        chat_template=phi3_template(" " if lonely else "", CONTEXT + "\\n"),
    )


def _named_tokens(files: TokenizerFiles) -> dict[str, str]:
    """Tokens that the native processor asks its tokenizer for.

    The originals have none for videos, which gets one that no conversation uses.
    """
    taken = USED | {str(token) for token in files.named.values()}
    free = [token.content for token in files.added.values() if token.content not in taken]
    placeholders = [token for token in free if "placeholder" in token]
    video = [t for t in free if t == "<video>"] + placeholders[-1:] + free[-1:] + ["<unk>"]
    return {
        "start_image_token": START,
        "end_image_token": END,
        "context_image_token": CONTEXT,
        "video_token": video[0],
    }
