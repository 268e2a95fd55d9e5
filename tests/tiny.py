"""Tiny, randomly initialised, real transformers models: one per family, no download."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from slimvlm.models.load import auto_class

# transformers 5.24 reads this of the output of Llama 4's language model, which does not have it
hf.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None

Config = hf.PreTrainedConfig
Maker = Callable[..., Any]


def of(config_class: type[Any], **parts: Any) -> Maker:
    """A maker of configurations, which calls those of its parts that are makers themselves."""

    def make(**changes: Any) -> Any:
        given = {**parts, **changes}.items()
        return config_class(**{k: v() if callable(v) else copy.deepcopy(v) for k, v in given})

    return make


IMAGE_TOKEN = 120
VOCAB = 128
TEXT: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"initializer_range": 0.1, "attention_dropout": 0.0},
}
UNSIZED: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "patch_size": 8},
}
VISION = {**UNSIZED, "image_size": 32}
INDEX, ID = {"image_token_index": IMAGE_TOKEN}, {"image_token_id": IMAGE_TOKEN}
ID_VIDEO = {**ID, "video_token_id": 123}
UNTIED = {"tie_word_embeddings": False}
ENDS = {"boi_token_index": 121, "eoi_token_index": 122}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_3D = {**ROPE, "mrope_section": [2, 1, 1]}
TEXT_3D = {**TEXT, "rope_parameters": ROPE_3D}
QWEN_VISION: dict[str, Any] = {
    **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8},
    **{"spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 64},
}
PLACED = {**QWEN_VISION, "num_position_embeddings": 16}
DEEPSTACK = {**PLACED, "deepstack_visual_indexes": [1]}
QWEN_IDS = {**ID_VIDEO, **UNTIED, "vision_start_token_id": 124, "vision_end_token_id": 125}
GLM_TEXT = {**TEXT, "rope_parameters": {**ROPE_3D, "partial_rotary_factor": 1.0}}
GLM_IDS = {
    **{**ID_VIDEO, "image_start_token_id": 124, "video_start_token_id": 124},
    **{"image_end_token_id": 125, "video_end_token_id": 125},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TIMM = {
    **{"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 32]},
    **{"patch_size": 8, "global_pool": ""},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
SLIDING = {"head_dim": 8, "sliding_window": 16}
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA_TEXT: dict[str, Any] = {
    **{**TEXT, **SLIDING, "num_hidden_layers": 6, "num_kv_shared_layers": 2},
    **{"layer_types": ["sliding_attention", "full_attention"] * 3},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
}
"""The last two layers read the keys and values of layers 2 and 3."""

# Language models and towers

llama = of(hf.LlamaConfig, **TEXT)
mistral = of(hf.MistralConfig, **TEXT, sliding_window=None)
qwen2 = of(hf.Qwen2Config, **TEXT)
qwen3 = of(hf.Qwen3Config, **TEXT, head_dim=8)
phi = of(hf.PhiConfig, **{**TEXT, "num_key_value_heads": 8, **NO_DROPOUT})
phi3 = of(hf.Phi3Config, **TEXT, **NO_DROPOUT)
gemma = of(hf.GemmaConfig, **TEXT, head_dim=8)
gemma2 = of(hf.Gemma2Config, **TEXT, **SLIDING)
gemma3 = of(hf.Gemma3TextConfig, **TEXT, **SLIDING, **ALTERNATE)
stablelm = of(hf.StableLmConfig, **TEXT)
cohere2 = of(hf.Cohere2Config, **TEXT, **SLIDING, logit_scale=1.0)
lfm2 = of(
    hf.Lfm2Config,
    **{**TEXT, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
)
qwen3_5_text = of(
    hf.Qwen3_5TextConfig,
    **{**TEXT, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    layer_types=["linear_attention", "full_attention"] * 2,
    rope_parameters={**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
)
gemma3n_text = of(
    hf.Gemma3nTextConfig,
    **{**GEMMA_TEXT, "altup_num_inputs": 2, "laurel_rank": 8},
    activation_sparsity_pattern=[0.5, 0.0, 0.5, 0.0, 0.0, 0.0],
)
gemma4_text = of(hf.Gemma4TextConfig, **GEMMA_TEXT, global_head_dim=16)
clip = of(hf.CLIPVisionConfig, **VISION, projection_dim=32)
siglip = of(hf.SiglipVisionConfig, **VISION, vision_use_head=False)
pixtral = of(hf.PixtralVisionConfig, **VISION, head_dim=16)

# Both together

llava = of(hf.LlavaConfig, vision_config=clip, **INDEX)
bunny = partial(
    llava, vision_config=siglip, vision_feature_layer=-1, vision_feature_select_strategy="full"
)
"""A LLaVA whose tower has no class token."""
internvl = of(
    hf.InternVLConfig,
    vision_config=of(
        hf.InternVLVisionConfig, **{**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
    ),
    **{"downsample_ratio": 0.5, **ID, **UNTIED},
)
idefics3 = of(
    hf.Idefics3Config,
    vision_config=of(hf.Idefics3VisionConfig, **VISION),
    **{"text_config": llama, "scale_factor": 2, **ID, **UNTIED},
)
qwen2_5_vl = of(
    hf.Qwen2_5_VLConfig,
    text_config=TEXT_3D,
    vision_config={**QWEN_VISION, "depth": 2, "window_size": 32, "fullatt_block_indexes": [1]},
    **QWEN_IDS,
)
qwen3_vl = of(
    hf.Qwen3VLConfig, text_config={**TEXT_3D, "head_dim": 8}, vision_config=DEEPSTACK, **QWEN_IDS
)
ADAPTED = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
COMMON: dict[str, Maker] = {
    **{"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "phi": phi},
    **{"phi3": phi3, "gemma2": gemma2},
    "llava-llama": partial(llava, text_config=llama),
    "llava-mistral": partial(llava, text_config=mistral),
    "llava-qwen2": partial(llava, text_config=qwen2),
    "llava-qwen3": partial(llava, text_config=qwen3),
    "llava-phi": partial(bunny, text_config=phi),
    "llava-phi3": partial(llava, text_config=phi3),
    "llava-gemma2": partial(llava, text_config=gemma2),
    "vipllava": of(
        hf.VipLlavaConfig,
        **{"vision_config": clip, "text_config": llama, "vision_feature_layers": [-2, -1], **INDEX},
    ),
    "llava_next": of(
        hf.LlavaNextConfig,
        **{"vision_config": clip, "text_config": mistral, **INDEX},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    ),
    "llava_onevision": of(
        hf.LlavaOnevisionConfig,
        **{"vision_config": siglip, "text_config": qwen2, **INDEX},
        image_grid_pinpoints=[[32, 32], [64, 32], [32, 64]],
    ),
    "internvl-qwen2": partial(internvl, text_config=qwen2),
    "internvl-llama": partial(internvl, text_config=llama),
    "internvl-qwen3": partial(internvl, text_config=qwen3),
    "internvl-phi3": partial(internvl, text_config=phi3),
    "idefics3": idefics3,
    "smolvlm": of(
        hf.SmolVLMConfig,
        vision_config=of(hf.SmolVLMVisionConfig, **VISION),
        **{"text_config": llama, "scale_factor": 2, **ID, **UNTIED},
    ),
    "paligemma": of(
        hf.PaliGemmaConfig,
        vision_config=partial(siglip, projection_dim=64),
        **{"text_config": gemma, "projection_dim": 64, "hidden_size": 64, **INDEX},
    ),
    "gemma3": of(
        hf.Gemma3Config,
        **{"vision_config": siglip, "text_config": gemma3, "mm_tokens_per_image": 4},
        **{**ENDS, **INDEX},
    ),
    "mistral3": of(
        hf.Mistral3Config,
        **{"vision_config": pixtral, "text_config": mistral, "spatial_merge_size": 2},
        **{**INDEX, **UNTIED},
    ),
    "qwen2_vl": of(
        hf.Qwen2VLConfig,
        text_config=TEXT_3D,
        vision_config={
            **{"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
            **{"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1},
            **{"in_channels": 3},
        },
        **QWEN_IDS,
    ),
    **{"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl},
}
CONFIGS: dict[str, Maker] = {
    **COMMON,
    **{"stablelm": stablelm, "cohere2": cohere2, "lfm2": lfm2, "qwen3_5_text": qwen3_5_text},
    "llava-pixtral": partial(bunny, text_config=mistral, vision_config=pixtral),
    "llava-stablelm": partial(bunny, text_config=stablelm),
    "aya_vision": of(hf.AyaVisionConfig, vision_config=siglip, text_config=cohere2, **INDEX),
    "cohere2_vision": of(
        hf.Cohere2VisionConfig,
        **{"vision_config": siglip, "text_config": cohere2, "alignment_intermediate_size": 32},
        **ID,
    ),
    "deepseek_vl": of(hf.DeepseekVLConfig, vision_config=siglip, text_config=llama, **ID, **UNTIED),
    "ovis2": of(
        hf.Ovis2Config,
        vision_config={
            **{**VISION, "vocab_size": 16, "hidden_stride": 2, "num_visual_indicator_tokens": 5}
        },
        **{"text_config": qwen2, "visual_indicator_token_ids": [121, 122, 123, 124, 125]},
        **{"hidden_size": 64, "vocab_size": VOCAB, **ID, **UNTIED},
    ),
    "video_llama_3": of(hf.VideoLlama3Config, vision_config=UNSIZED, text_config=qwen2, **ID_VIDEO),
    "perception_lm": of(
        hf.PerceptionLMConfig,
        vision_config=of(
            hf.TimmWrapperConfig,
            **{"architecture": "vit_tiny_patch16_224", "model_args": TIMM, "do_pooling": False},
        ),
        **{"text_config": llama, **ID_VIDEO},
    ),
    "glm4v": of(
        hf.Glm4vConfig,
        **{"text_config": GLM_TEXT, "vision_config": {**QWEN_VISION, "image_size": 32}, **GLM_IDS},
    ),
    "glm_ocr": of(
        hf.GlmOcrConfig,
        text_config=GLM_TEXT,
        vision_config={**QWEN_VISION, "image_size": 32, "depth": 2},
        **GLM_IDS,
    ),
    "paddleocr_vl": of(
        hf.PaddleOCRVLConfig,
        **{"text_config": {**TEXT_3D, "head_dim": 8}, "vision_config": VISION, **QWEN_IDS},
    ),
    "fast_vlm": of(
        hf.FastVlmConfig,
        vision_config=of(
            hf.TimmWrapperConfig,
            **{"architecture": "fastvit_t8", "hidden_size": 32},
            model_args={
                **{"embed_dims": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "inference_mode": True}
            },
        ),
        **{"text_config": qwen2, **INDEX},
    ),
    "phi4_multimodal": of(
        hf.Phi4MultimodalConfig,
        **{**TEXT, **NO_DROPOUT, "original_max_position_embeddings": 256},
        vision_config={**VISION, "crop_size": 32, "image_token_id": IMAGE_TOKEN},
        audio_config={
            **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 2, "input_size": 8},
            **{"num_attention_heads": 2, "ext_pw_out_channel": 16, "nemo_conv_channels": 16},
            **{"audio_token_id": 121},
        },
    ),
    "qwen3_moe": of(hf.Qwen3MoeConfig, **TEXT, **EXPERTS, mlp_only_layers=[1], head_dim=8),
    "qwen3_vl_moe": of(
        hf.Qwen3VLMoeConfig,
        text_config={**TEXT_3D, **EXPERTS, "head_dim": 8},
        vision_config=DEEPSTACK,
        **QWEN_IDS,
    ),
    "qwen3_5": of(
        hf.Qwen3_5Config,
        text_config=lambda: qwen3_5_text().to_dict(),
        **{"vision_config": PLACED, **QWEN_IDS},
    ),
    "qwen3_5_moe": of(
        hf.Qwen3_5MoeConfig,
        text_config=lambda: {
            **{**qwen3_5_text().to_dict(), **EXPERTS, "shared_expert_intermediate_size": 24},
            "model_type": "qwen3_5_moe_text",
        },
        **{"vision_config": PLACED, **QWEN_IDS},
    ),
    "minicpmv4_6": of(
        getattr(hf, "MiniCPMV4_6Config", None),  # neither
        **{"text_config": qwen3_5_text, "vision_config": {**VISION, "insert_layer_id": 0}},
        **{"insert_layer_id": 0, "image_size": 32, **ID_VIDEO},
    ),
    "idefics2": of(
        hf.Idefics2Config,
        **{"vision_config": VISION, "text_config": mistral, **ID},
        perceiver_config={
            **{"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1},
            **{"resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2},
        },
    ),
    "mllama": of(
        hf.MllamaConfig,
        text_config={
            **{name: TEXT[name] for name in TEXT if name != "attention_dropout"},
            **{"cross_attention_layers": [1, 3], "num_hidden_layers": 5, "rope_parameters": ROPE},
        },
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
            **{"num_global_layers": 1, "attention_heads": 2, "image_size": 32, "patch_size": 8},
            **{"max_num_tiles": 4, "intermediate_layers_indices": [0], "vision_output_dim": 64},
        },
        **INDEX,
    ),
    "llama4": of(
        hf.Llama4Config,
        text_config={
            **{**TEXT, "intermediate_size": 32, "intermediate_size_mlp": 96, "head_dim": 8},
            **{"num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 16},
        },
        vision_config={
            **{**VISION, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5},
            **{"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        },
        **{**ENDS, **INDEX},
    ),
    "lfm2_vl": of(
        hf.Lfm2VlConfig,
        vision_config=of(hf.Siglip2VisionConfig, **UNSIZED, num_patches=16, vision_use_head=False),
        **{"text_config": lfm2, "projector_hidden_size": 32, **ID},
    ),
    "molmo2": of(
        getattr(hf, "Molmo2Config", None),  # transformers 5.15 has none
        text_config={
            **{**TEXT, "head_dim": 8, "additional_vocab_size": 8, "rope_scaling_layers": [1, 2]},
            "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0},
        },
        vision_config={**VISION, **ADAPTED, "image_size": [32, 32]},
        adapter_config={
            **{**ADAPTED, "hidden_size": 32, "intermediate_size": 48, "text_hidden_size": 64},
            **{"vision_feature_layer": [-1, -2]},
        },
        **{"image_patch_id": IMAGE_TOKEN, "image_start_token_id": 121, "image_end_token_id": 122},
        **{"low_res_image_start_token_id": 123},
        **{"frame_start_token_id": 124, "frame_end_token_id": 125},
    ),
    "kosmos2_5": of(
        hf.Kosmos2_5Config,
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
    ),
    "gemma3n_text": gemma3n_text,
    "gemma3n": of(
        hf.Gemma3nConfig,
        text_config=lambda: gemma3n_text().to_dict(),
        vision_config={
            **{"architecture": "vit_tiny_patch16_224", "hidden_size": 32, "model_args": TIMM},
            **{"vocab_size": 2, "vocab_offset": 124},
        },
        audio_config={
            **{"hidden_size": 16, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2},
            **{"input_feat_size": 16, "sscp_conv_channel_size": [4, 4]},
            **{"vocab_size": 2, "vocab_offset": 126},
        },
        **{"audio_token_id": 123, **ID},
    ),
    "gemma4_text": gemma4_text,
    "gemma4-experts": partial(
        gemma4_text,
        **{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8},
        **{"enable_moe_block": True, "num_kv_shared_layers": 0},
    ),
    "gemma4": of(
        hf.Gemma4Config,
        text_config=lambda: gemma4_text().to_dict(),
        vision_config={
            **{**VISION, "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2},
            **{"position_embedding_size": 16},
        },
        audio_config={
            **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"subsampling_conv_channels": [4, 4], "output_proj_dims": 16},
        },
        **{"audio_token_id": 123, "video_token_id": 124, **ID},
    ),
}
"""One maker of configurations for each family; those in `COMMON` see more tests."""

TOKEN_TYPES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    *("glm4v", "glm_ocr", "paddleocr_vl"),
)
TEXT_ONLY = (
    *("phi4_multimodal", "minicpmv4_6", "lfm2_vl", "molmo2", "kosmos-2.5"),
    *("gemma3n", "gemma4"),
)
"""Their image inputs are too special for the battery: only text goes through them."""


def is_multimodal(config: Config) -> bool:
    return "vision_config" in config.sub_configs


def made(config: Config, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, in evaluation mode, float32."""
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases, norms and zero-initialised projectors must matter in tests
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def build(name: str, seed: int = 0) -> PreTrainedModel:
    model = made(CONFIGS[name](), seed)
    # model.generate must not stop early, so that cached and uncached runs can be compared
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = list(range(IMAGE_TOKEN, VOCAB))
    return model


TOKENS = {
    **dict.fromkeys(("llava", "vipllava", "paligemma", "perception_lm", "deepseek_vl"), 16),
    **{"llava_next": 16 + 4 * 8 + 4, "llava_onevision": 16 + 20, "mllama": 1},
}
"""Image tokens of a picture, where they are not 4."""
ONE_MORE_AXIS = ("idefics2", "idefics3", "smolvlm", "perception_lm")


def _image_inputs(config: Config) -> dict[str, torch.Tensor]:
    """Inputs of a picture of 32 pixels."""
    generator, kind = torch.Generator().manual_seed(1), config.model_type
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
    if kind in TOKEN_TYPES[:3]:
        return {"pixel_values": torch.randn(16, 3 * 8 * 8, generator=generator), **grid}
    pixels, more = torch.randn(1, 3, 32, 32, generator=generator), dict[str, torch.Tensor]()
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).reshape(3, 16, 64).transpose(0, 1).flatten(1)
    if kind == "llava_next":
        tiles = torch.randn(1, 3, 3, 32, 32, generator=generator)
        return {"pixel_values": tiles, "image_sizes": torch.tensor([[32, 64]])}
    if kind == "llava_onevision":
        pixels = torch.randn(1, 2, 3, 32, 32, generator=generator)
    if kind in ("llava_onevision", "mistral3") or config.vision_config.model_type == "pixtral":
        more = {"image_sizes": torch.tensor([[32, 32]])}
    if kind in TOKEN_TYPES or kind == "video_llama_3":
        pixels, more = patches.view(16, 3, 8, 8) if kind == "paddleocr_vl" else patches, grid
    if kind == "video_llama_3":
        more = {**grid, "image_merge_sizes": torch.tensor([2])}
    if kind in ONE_MORE_AXIS:
        pixels = pixels[None]
    if kind == "fast_vlm":
        pixels = pixels.repeat(1, 1, 2, 2)
    if kind == "mllama":
        mask = torch.tensor([[[1, 0, 0, 0]]])
        pixels = pixels.expand(1, 1, 4, 3, 32, 32)
        more = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": mask}
    return {"pixel_values": pixels, **more}


def batch(model: PreTrainedModel, text_tokens: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """One sequence with an image (where the model can see), labels on its second half."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 119, (1, text_tokens), generator=generator)
    extra: dict[str, torch.Tensor] = {}
    ids = text
    if is_multimodal(model.config) and model.config.model_type not in TEXT_ONLY:
        extra, count = _image_inputs(model.config), TOKENS.get(model.config.model_type, 4)
        ids = torch.cat([text[:, :2], torch.full((1, count), IMAGE_TOKEN), text[:, 2:]], dim=1)
    labels = ids.clone()
    labels[:, : -text_tokens // 2] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}
    if model.config.model_type in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    if model.config.model_type in TOKEN_TYPES:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return inputs
