"""Configurations and image inputs of the rarer families; `tests.tiny` builds the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from tests.tiny_parts import (
    IMAGE_TOKEN,
    QWEN_IDS,
    QWEN_VISION,
    ROPE_3D,
    TEXT,
    VISION,
    llama,
    mistral,
    qwen2,
    siglip,
)

# transformers 5.24 reads this of the output of Llama 4's language model, which does not have it
hf.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None

Config = hf.PreTrainedConfig


def stablelm() -> Config:
    return hf.StableLmConfig(**TEXT)


def cohere2() -> Config:
    return hf.Cohere2Config(**{**TEXT, "head_dim": 8, "sliding_window": 16, "logit_scale": 1.0})


def llava_without_class_token(vision: Config, text: Config) -> Config:
    return hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def pixtral() -> Config:
    vision = hf.PixtralVisionConfig(**{**VISION, "head_dim": 16})
    return llava_without_class_token(vision, mistral())


def aya_vision() -> Config:
    return hf.AyaVisionConfig(
        vision_config=siglip(), text_config=cohere2(), image_token_index=IMAGE_TOKEN
    )


def cohere2_vision() -> Config:
    return hf.Cohere2VisionConfig(
        vision_config=siglip(),
        text_config=cohere2(),
        image_token_id=IMAGE_TOKEN,
        alignment_intermediate_size=32,
    )


def deepseek_vl() -> Config:
    return hf.DeepseekVLConfig(
        vision_config=siglip(),
        text_config=llama(),
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )


def ovis2() -> Config:
    vision = {**VISION, "vocab_size": 16, "hidden_stride": 2, "num_visual_indicator_tokens": 5}
    return hf.Ovis2Config(
        vision_config=vision,
        text_config=qwen2(),
        image_token_id=IMAGE_TOKEN,
        visual_indicator_token_ids=[121, 122, 123, 124, 125],
        hidden_size=64,
        vocab_size=TEXT["vocab_size"],
        tie_word_embeddings=False,
    )


def video_llama_3() -> Config:
    vision = {name: VISION[name] for name in VISION if name != "image_size"}
    return hf.VideoLlama3Config(
        vision_config=vision,
        text_config=qwen2(),
        image_token_id=IMAGE_TOKEN,
        video_token_id=123,
    )


def perception_lm() -> Config:
    vision = hf.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={
            **{"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 32]},
            **{"patch_size": 8, "global_pool": ""},
        },
        do_pooling=False,
    )
    return hf.PerceptionLMConfig(
        vision_config=vision, text_config=llama(), image_token_id=IMAGE_TOKEN, video_token_id=123
    )


def glm4v() -> Config:
    rope = {**ROPE_3D, "partial_rotary_factor": 1.0}
    return hf.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**QWEN_VISION, "image_size": 32},
        image_token_id=IMAGE_TOKEN,
        video_token_id=123,
        **{f"{kind}_start_token_id": 124 for kind in ("image", "video")},
        **{f"{kind}_end_token_id": 125 for kind in ("image", "video")},
    )


def glm_ocr() -> Config:
    rope = {**ROPE_3D, "partial_rotary_factor": 1.0}
    vision = {**QWEN_VISION, "image_size": 32, "depth": 2}
    return hf.GlmOcrConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=123,
        **{f"{kind}_start_token_id": 124 for kind in ("image", "video")},
        **{f"{kind}_end_token_id": 125 for kind in ("image", "video")},
    )


def paddleocr_vl() -> Config:
    return hf.PaddleOCRVLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE_3D},
        vision_config=VISION,
        **QWEN_IDS,
    )


def fast_vlm() -> Config:
    stages = {"embed_dims": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
    vision = hf.TimmWrapperConfig(
        architecture="fastvit_t8", model_args={**stages, "inference_mode": True}, hidden_size=32
    )
    return hf.FastVlmConfig(
        vision_config=vision, text_config=qwen2(), image_token_index=IMAGE_TOKEN
    )


def phi4_multimodal() -> Config:
    return hf.Phi4MultimodalConfig(
        **{**TEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "original_max_position_embeddings": 256},
        vision_config={**VISION, "crop_size": 32, "image_token_id": IMAGE_TOKEN},
        audio_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 2, "input_size": 8},
            **{"num_attention_heads": 2, "ext_pw_out_channel": 16, "nemo_conv_channels": 16},
            **{"audio_token_id": 121},
        },
    )


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def qwen3_moe() -> Config:
    dense = {"intermediate_size": 96, "mlp_only_layers": [1]}
    return hf.Qwen3MoeConfig(**{**TEXT, **EXPERTS, **dense, "head_dim": 8})


def qwen3_5_moe() -> Config:
    text = qwen3_5_text().to_dict()
    shared = {"shared_expert_intermediate_size": 24, "model_type": "qwen3_5_moe_text"}
    return hf.Qwen3_5MoeConfig(
        text_config={**text, **EXPERTS, **shared},
        vision_config={**QWEN_VISION, "num_position_embeddings": 16},
        **QWEN_IDS,
    )


def qwen3_vl_moe() -> Config:
    return hf.Qwen3VLMoeConfig(
        text_config={**TEXT, **EXPERTS, "head_dim": 8, "rope_parameters": ROPE_3D},
        vision_config={
            **QWEN_VISION,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1],
        },
        **QWEN_IDS,
    )


def qwen3_5_text() -> hf.PreTrainedConfig:
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    rope = {**ROPE_3D, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    return hf.Qwen3_5TextConfig(
        **{**TEXT, **linear, **heads, "head_dim": 8, "rope_parameters": rope},
        layer_types=["linear_attention", "full_attention"] * 2,
    )


def qwen3_5() -> Config:
    return hf.Qwen3_5Config(
        text_config=qwen3_5_text().to_dict(),
        vision_config={**QWEN_VISION, "num_position_embeddings": 16},
        **QWEN_IDS,
    )


def minicpmv4_6() -> Config:
    return hf.MiniCPMV4_6Config(
        text_config=qwen3_5_text(),
        vision_config={**VISION, "insert_layer_id": 0},
        insert_layer_id=0,
        image_size=32,
        image_token_id=IMAGE_TOKEN,
        video_token_id=123,
    )


def idefics2() -> Config:
    return hf.Idefics2Config(
        vision_config=VISION,
        text_config=mistral(),
        perceiver_config={
            **{"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1},
            **{"resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2},
        },
        image_token_id=IMAGE_TOKEN,
    )


def mllama() -> Config:
    text = {name: TEXT[name] for name in TEXT if name != "attention_dropout"}
    return hf.MllamaConfig(
        text_config={
            **text,
            "cross_attention_layers": [1, 3],
            "num_hidden_layers": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_global_layers": 1, "attention_heads": 2, "image_size": 32, "patch_size": 8},
            **{"max_num_tiles": 4, "intermediate_layers_indices": [0], "vision_output_dim": 64},
        },
        image_token_index=IMAGE_TOKEN,
    )


def llama4() -> Config:
    return hf.Llama4Config(
        text_config={
            **TEXT,
            **{"intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 4},
            **{"head_dim": 8, "interleave_moe_layer_step": 2, "attention_chunk_size": 16},
        },
        vision_config={
            **{**VISION, "intermediate_size": 128},
            **{"pixel_shuffle_ratio": 0.5, "projector_input_dim": 32},
            **{"projector_output_dim": 32, "vision_output_dim": 32},
        },
        image_token_index=IMAGE_TOKEN,
        boi_token_index=121,
        eoi_token_index=122,
    )


def lfm2() -> Config:
    layers = ["conv", "full_attention", "conv", "full_attention"]
    return hf.Lfm2Config(**TEXT, block_auto_adjust_ff_dim=False, layer_types=layers)


def lfm2_vl() -> Config:
    vision = {name: VISION[name] for name in VISION if name != "image_size"}
    return hf.Lfm2VlConfig(
        vision_config=hf.Siglip2VisionConfig(**vision, num_patches=16, vision_use_head=False),
        text_config=lfm2(),
        image_token_id=IMAGE_TOKEN,
        projector_hidden_size=32,
    )


def molmo2() -> Config:
    vision = {name: VISION[name] for name in VISION if name != "image_size"}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    text = {**TEXT, "head_dim": 8, "additional_vocab_size": 8, "rope_scaling_layers": [1, 2]}
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    return hf.Molmo2Config(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, **heads, "image_size": [32, 32]},
        adapter_config={
            **{**heads, "hidden_size": 32, "intermediate_size": 48, "text_hidden_size": 64},
            **{"vision_feature_layer": [-1, -2]},
        },
        image_patch_id=IMAGE_TOKEN,
        **{"image_start_token_id": 121, "image_end_token_id": 122},
        **{"low_res_image_start_token_id": 123},
        **{"frame_start_token_id": 124, "frame_end_token_id": 125},
    )


def kosmos2_5() -> Config:
    return hf.Kosmos2_5Config(
        text_config={
            **{"vocab_size": 128, "embed_dim": 64, "layers": 4, "ffn_dim": 96},
            **{"attention_heads": 8, "max_position_embeddings": 256, "dropout": 0.0},
        },
        vision_config={
            **{"hidden_size": 32, "patch_embed_hidden_size": 3 * 64, "intermediate_size": 48},
            **{"head_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"max_num_patches": 16},
        },
        latent_query_num=4,
    )


GEMMA_TEXT: dict[str, Any] = {
    **{**TEXT, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "head_dim": 8},
    **{"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 3},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": TEXT["vocab_size"]},
}
"""The last two layers read the keys and values of layers 2 and 3."""


def gemma3n_text() -> Config:
    altup = {"altup_num_inputs": 2, "laurel_rank": 8}
    sparsity = [0.5, 0.0, 0.5, 0.0, 0.0, 0.0]
    return hf.Gemma3nTextConfig(**GEMMA_TEXT, **altup, activation_sparsity_pattern=sparsity)


def gemma3n() -> Config:
    model_args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 32]}
    return hf.Gemma3nConfig(
        text_config=gemma3n_text().to_dict(),
        vision_config={
            **{"architecture": "vit_tiny_patch16_224", "hidden_size": 32},
            **{"model_args": {**model_args, "patch_size": 8, "global_pool": ""}},
            **{"vocab_size": 2, "vocab_offset": 124},
        },
        audio_config={
            **{"hidden_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2},
            **{"input_feat_size": 16, "sscp_conv_channel_size": [4, 4]},
            **{"vocab_size": 2, "vocab_offset": 126},
        },
        image_token_id=IMAGE_TOKEN,
        audio_token_id=123,
    )


def gemma4_text() -> Config:
    return hf.Gemma4TextConfig(**GEMMA_TEXT, global_head_dim=16)


def gemma4_experts() -> Config:
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    wide = {**GEMMA_TEXT, **experts, "enable_moe_block": True, "num_kv_shared_layers": 0}
    return hf.Gemma4TextConfig(**wide, global_head_dim=16)


def gemma4() -> Config:
    return hf.Gemma4Config(
        text_config=gemma4_text().to_dict(),
        vision_config={
            **{**VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2},
            **{"position_embedding_size": 16},
        },
        audio_config={
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"subsampling_conv_channels": [4, 4], "output_proj_dims": 16},
        },
        image_token_id=IMAGE_TOKEN,
        audio_token_id=123,
        video_token_id=124,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "stablelm": stablelm,
    "cohere2": cohere2,
    "lfm2": lfm2,
    "qwen3_5_text": qwen3_5_text,
    "llava-pixtral": pixtral,
    "llava-stablelm": lambda: llava_without_class_token(siglip(), stablelm()),
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
    "deepseek_vl": deepseek_vl,
    "ovis2": ovis2,
    "video_llama_3": video_llama_3,
    "perception_lm": perception_lm,
    "glm4v": glm4v,
    "glm_ocr": glm_ocr,
    "paddleocr_vl": paddleocr_vl,
    "fast_vlm": fast_vlm,
    "phi4_multimodal": phi4_multimodal,
    "qwen3_moe": qwen3_moe,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "minicpmv4_6": minicpmv4_6,
    "idefics2": idefics2,
    "mllama": mllama,
    "llama4": llama4,
    "lfm2_vl": lfm2_vl,
    "molmo2": molmo2,
    "kosmos2_5": kosmos2_5,
    "gemma3n_text": gemma3n_text,
    "gemma3n": gemma3n,
    "gemma4_text": gemma4_text,
    "gemma4-experts": gemma4_experts,
    "gemma4": gemma4,
}


def image_inputs(config: Config, pixels: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """The inputs of a 32-pixel image and how many image tokens it takes.

    Args:
        config: The model's.
        pixels: ``[1, 3, 32, 32]``.
    """
    kind = config.model_type
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).reshape(3, 16, 64).transpose(0, 1).flatten(1)
    grid = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if kind in ("glm4v", "glm_ocr", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"):
        return grid, 4
    if kind == "paddleocr_vl":
        return {**grid, "pixel_values": patches.view(16, 3, 8, 8)}, 4
    if kind == "fast_vlm":
        return {"pixel_values": pixels.repeat(1, 1, 2, 2)}, 4
    if kind == "video_llama_3":
        return {**grid, "image_merge_sizes": torch.tensor([2])}, 4
    if kind == "llava" and config.vision_config.model_type == "pixtral":
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[32, 32]])}, 16
    if kind in ("perception_lm", "idefics2"):
        return {"pixel_values": pixels[None]}, 16 if kind == "perception_lm" else 4
    if kind == "mllama":
        return {
            "pixel_values": pixels.expand(1, 1, 4, 3, 32, 32),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
        }, 1
    if kind in TEXT_ONLY:
        return {}, 0
    tokens = {"aya_vision": 4, "cohere2_vision": 4, "ovis2": 4, "deepseek_vl": 16, "llama4": 4}
    return {"pixel_values": pixels}, tokens[kind]


TEXT_ONLY = (
    *("phi4_multimodal", "minicpmv4_6", "lfm2_vl", "molmo2", "kosmos-2.5"),
    *("gemma3n", "gemma4"),
)
"""Their image inputs are too special for the battery: only text goes through them."""
