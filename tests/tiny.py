"""Tiny, randomly initialised, real transformers models: one per family, no download."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PreTrainedModel

from slimvlm.models.classes import auto_class
from tests import tiny_rare
from tests.tiny_parts import (
    IMAGE_TOKEN,
    QWEN_IDS,
    QWEN_VISION,
    ROPE_3D,
    TEXT,
    VISION,
    VOCAB,
    clip,
    gemma,
    gemma2,
    gemma3,
    llama,
    mistral,
    phi,
    phi3,
    qwen2,
    qwen3,
    siglip,
)


def llava(text: hf.PreTrainedConfig) -> hf.PreTrainedConfig:
    return hf.LlavaConfig(vision_config=clip(), text_config=text, image_token_index=IMAGE_TOKEN)


def bunny(text: hf.PreTrainedConfig) -> hf.PreTrainedConfig:
    return hf.LlavaConfig(
        vision_config=siglip(),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def vipllava() -> hf.PreTrainedConfig:
    return hf.VipLlavaConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-2, -1],
    )


def llava_next() -> hf.PreTrainedConfig:
    return hf.LlavaNextConfig(
        vision_config=clip(),
        text_config=mistral(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )


def llava_onevision() -> hf.PreTrainedConfig:
    return hf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=qwen2(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[32, 32], [64, 32], [32, 64]],
    )


def internvl(text: hf.PreTrainedConfig) -> hf.PreTrainedConfig:
    vision = hf.InternVLVisionConfig(**{**VISION, "image_size": [32, 32], "patch_size": [8, 8]})
    return hf.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def idefics3(config_class: type[hf.PreTrainedConfig], vision_class: type) -> hf.PreTrainedConfig:
    return config_class(
        vision_config=vision_class(**VISION),
        text_config=llama(),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        tie_word_embeddings=False,
    )


def paligemma() -> hf.PreTrainedConfig:
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=64, vision_use_head=False),
        text_config=gemma(),
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
        hidden_size=64,
    )


def gemma3_vl() -> hf.PreTrainedConfig:
    return hf.Gemma3Config(
        vision_config=siglip(),
        text_config=gemma3(),
        image_token_index=IMAGE_TOKEN,
        boi_token_index=121,
        eoi_token_index=122,
        mm_tokens_per_image=4,
    )


def mistral3() -> hf.PreTrainedConfig:
    vision = hf.PixtralVisionConfig(**{**VISION, "head_dim": 16})
    return hf.Mistral3Config(
        vision_config=vision,
        text_config=mistral(),
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def qwen2_vl() -> hf.PreTrainedConfig:
    return hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE_3D},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "in_channels": 3,
        },
        **QWEN_IDS,
    )


def qwen2_5_vl() -> hf.PreTrainedConfig:
    return hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE_3D},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "window_size": 32,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        **QWEN_IDS,
    )


def qwen3_vl() -> hf.PreTrainedConfig:
    return hf.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": ROPE_3D},
        vision_config={
            **QWEN_VISION,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1],
        },
        **QWEN_IDS,
    )


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi": phi,
    "phi3": phi3,
    "gemma2": gemma2,
    "llava-llama": lambda: llava(llama()),
    "llava-mistral": lambda: llava(mistral()),
    "llava-qwen2": lambda: llava(qwen2()),
    "llava-qwen3": lambda: llava(qwen3()),
    "llava-phi": lambda: bunny(phi()),
    "llava-phi3": lambda: llava(phi3()),
    "llava-gemma2": lambda: llava(gemma2()),
    "vipllava": vipllava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl-qwen2": lambda: internvl(qwen2()),
    "internvl-llama": lambda: internvl(llama()),
    "internvl-qwen3": lambda: internvl(qwen3()),
    "internvl-phi3": lambda: internvl(phi3()),
    "idefics3": lambda: idefics3(hf.Idefics3Config, hf.Idefics3VisionConfig),
    "smolvlm": lambda: idefics3(hf.SmolVLMConfig, hf.SmolVLMVisionConfig),
    "paligemma": paligemma,
    "gemma3": gemma3_vl,
    "mistral3": mistral3,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    **tiny_rare.CONFIGS,
}

QWEN_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOKEN_TYPES = (
    *QWEN_FAMILIES,
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm_ocr",
    "paddleocr_vl",
)


def is_multimodal(config: hf.PreTrainedConfig) -> bool:
    return "vision_config" in config.sub_configs


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model of a family, in evaluation mode, float32."""
    config = CONFIGS[name]()
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases, norms and zero-initialised projectors must matter in tests
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    # model.generate must not stop early, so that cached and uncached runs can be compared
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = list(range(IMAGE_TOKEN, VOCAB))
    return model.eval()


def _image_inputs(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], int]:
    """Pixels of one image and how many image tokens it takes."""
    generator = torch.Generator().manual_seed(1)
    kind = model.config.model_type
    if kind in QWEN_FAMILIES:
        pixels = torch.randn(16, 3 * 8 * 8, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}, 4
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    sizes = {"image_sizes": torch.tensor([[32, 32]])}
    if kind == "llava_next":
        return {
            "pixel_values": torch.randn(1, 3, 3, 32, 32, generator=generator),
            **{"image_sizes": torch.tensor([[32, 64]])},
        }, 16 + 4 * 8 + 4
    if kind == "llava_onevision":
        return {"pixel_values": torch.randn(1, 2, 3, 32, 32, generator=generator), **sizes}, 16 + 20
    if kind in ("idefics3", "smolvlm"):
        return {"pixel_values": pixels[None]}, 4
    if kind == "mistral3":
        return {"pixel_values": pixels, **sizes}, 4
    if kind == "llava" and model.config.vision_config.model_type != "pixtral":
        return {"pixel_values": pixels}, 16
    tokens = {"internvl": 4, "gemma3": 4, "paligemma": 16, "vipllava": 16}
    if kind in tokens:
        return {"pixel_values": pixels}, tokens[kind]
    return tiny_rare.image_inputs(model.config, pixels)


def batch(model: PreTrainedModel, text_tokens: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """One sequence with an image (where the model can see), labels on its second half."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 119, (1, text_tokens), generator=generator)
    extra: dict[str, torch.Tensor] = {}
    ids = text
    if is_multimodal(model.config):
        extra, count = _image_inputs(model)
        ids = torch.cat([text[:, :2], torch.full((1, count), IMAGE_TOKEN), text[:, 2:]], dim=1)
    labels = ids.clone()
    labels[:, : -text_tokens // 2] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}
    if model.config.model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if model.config.model_type in TOKEN_TYPES:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return inputs
