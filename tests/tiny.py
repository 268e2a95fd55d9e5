"""Tiny, randomly initialised, real transformers models: one per family, no download."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from transformers import PreTrainedModel

from slimvlm.models.load import auto_class

# transformers 5.24 reads this of the output of Llama 4's language model, which does not have it
hf.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None

Config = hf.PreTrainedConfig
Maker = Callable[..., Any]
ROWS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
IMAGE_TOKEN = 120
TEXT: dict[str, Any] = ROWS["text"]
GEMMA_TEXT, QWEN_IDS = ROWS["gemma_text"], ROWS["qwen_ids"]
VOCAB = TEXT["vocab_size"]


def configured(row: Mapping[str, Any], /, **changes: Any) -> Any:
    """Make the configuration of a row, and of its parts; a change replaces a field."""
    values = {**copy.deepcopy(row), **changes}
    kind, fields = values.pop("class"), values.pop("to_dict", None)
    for name, value in values.items():
        if isinstance(value, Mapping) and "class" in value:
            values[name] = configured(value)
        elif callable(value):
            values[name] = value()
    config = getattr(hf, kind)(**values)
    return config if fields is None else {**config.to_dict(), **fields}


COMMON: dict[str, Maker] = {name: partial(configured, row) for name, row in ROWS["common"].items()}
"""Those that see more tests."""
CONFIGS = {**COMMON, **{name: partial(configured, row) for name, row in ROWS["others"].items()}}
"""One maker of configurations for each family."""


def __getattr__(name: str) -> Maker:
    """Find a maker of `CONFIGS`, or of a part of them: ``tiny.llama(vocab_size=8)``."""
    if (row := {**ROWS["common"], **ROWS["others"], **ROWS["parts"]}.get(name)) is None:
        raise AttributeError(name)
    return partial(configured, row)


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
