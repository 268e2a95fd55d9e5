"""The demo model's architecture: a small CLIP tower, a two-layer projector, SmolLM2-135M."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from slimvlm.demo.scenes import GRID, PATCH, SIDE

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = 16
"""SmolLM2's vocabulary has reserved entries; `<empty_output>` (16) becomes the image token."""
RESERVED_TOKEN = "<empty_output>"
NUM_IMAGE_TOKENS = GRID * GRID


def make_text_config() -> LlamaConfig:
    """Returns the configuration of SmolLM2-135M-Instruct."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_config() -> LlavaConfig:
    """Returns the configuration of the whole demo model."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=192,
        hidden_act="gelu",
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=make_text_config(),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def make_model() -> Any:
    """Returns the demo model with random weights, in single precision."""
    model: Any = LlavaForConditionalGeneration(make_config())
    return model.float()
