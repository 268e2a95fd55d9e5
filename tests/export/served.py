"""Small models of kinds that engines know, with heads as wide as attention kernels want them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from slimvlm.models.classes import auto_class
from slimvlm.models.parts import text_config_of
from tests import tiny, tiny_folder

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 4,
}
MAX_POSITIONS = 512
FOLDERS = {
    "llava/llama": "llava",
    "qwen2_5_vl/qwen2_5_vl_text": "qwen2_5_vl",
    "idefics3/llama": "idefics3",
    "internvl/qwen2": "internvl",
}
"""Kinds for which there is a whole tiny folder, with a processor."""


def config_and_words(kind: str) -> tuple[Any, Any]:
    """A configuration of a kind, and its processor or tokenizer."""
    if kind in FOLDERS:
        return tiny_folder.KINDS[FOLDERS[kind]].make()
    if kind.startswith("llava/"):
        _, processor = tiny_folder.KINDS["llava"].make()
        text = tiny.CONFIGS[kind.removeprefix("llava/")]()
        text.vocab_size = tiny_folder.VOCAB
        config: Any = tiny.llava(text)
        config.image_token_index = processor.image_token_id
        return config, processor
    config, (_, words) = tiny.CONFIGS[kind](), tiny_folder.KINDS["text"].make()
    config.vocab_size = tiny_folder.VOCAB
    return config, words


def build(kind: str) -> tuple[PreTrainedModel, Any]:
    """A model of a kind whose random weights say different things to different prompts."""
    config, words = config_and_words(kind)
    text = text_config_of(config)
    for name, value in SHAPE.items():
        if hasattr(text, name):
            setattr(text, name, value)
    text.max_position_embeddings = MAX_POSITIONS
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1] * SHAPE["num_hidden_layers"]
    if config.model_type == "qwen2_5_vl":
        config.vision_config.out_hidden_size = SHAPE["hidden_size"]
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    tokenizer = getattr(words, "tokenizer", words)
    model.generation_config = hf.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, words
