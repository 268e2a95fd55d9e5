"""What tiny models are put together from: sizes, text configurations, vision towers."""

from __future__ import annotations

from typing import Any

import transformers as hf

IMAGE_TOKEN = 120
VOCAB = 128
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "attention_dropout": 0.0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def llama(**changes: Any) -> hf.LlamaConfig:
    return hf.LlamaConfig(**{**TEXT, **changes})


def mistral(**changes: Any) -> hf.MistralConfig:
    return hf.MistralConfig(**{**TEXT, "sliding_window": None, **changes})


def qwen2(**changes: Any) -> hf.Qwen2Config:
    return hf.Qwen2Config(**{**TEXT, **changes})


def qwen3(**changes: Any) -> hf.Qwen3Config:
    return hf.Qwen3Config(**{**TEXT, "head_dim": 8, **changes})


def phi(**changes: Any) -> hf.PhiConfig:
    return hf.PhiConfig(
        **{**TEXT, "num_key_value_heads": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **changes}
    )


def phi3(**changes: Any) -> hf.Phi3Config:
    return hf.Phi3Config(**{**TEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, **changes})


def gemma(**changes: Any) -> hf.GemmaConfig:
    return hf.GemmaConfig(**{**TEXT, "head_dim": 8, **changes})


def gemma2(**changes: Any) -> hf.Gemma2Config:
    return hf.Gemma2Config(**{**TEXT, "head_dim": 8, "sliding_window": 16, **changes})


def gemma3(**changes: Any) -> hf.Gemma3TextConfig:
    return hf.Gemma3TextConfig(
        **{
            **TEXT,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **changes,
        }
    )


def clip() -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**VISION, projection_dim=32)


def siglip() -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**VISION, vision_use_head=False)


ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 64,
}
QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 123,
    "vision_start_token_id": 124,
    "vision_end_token_id": 125,
    "tie_word_embeddings": False,
}
