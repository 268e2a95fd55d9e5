"""Small models of kinds that engines know, with heads as wide as attention kernels want them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from slimvlm.models.load import auto_class
from slimvlm.models.parts import text_config_of
from tests import tiny, tiny_folder
from tests.tiny import QWEN_IDS

SHAPE = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "query_pre_attn_scalar": 32,  # as in Gemma 3 up to 12B
}
MAX_POSITIONS = 512
FULL, FULL_AT_EVERY = "full_attention", {"gemma2": 2, "gemma3_text": 6}
WINDOW = 8  # shorter than every prompt
ENDS = (tiny_folder.EOS, "<|im_end|>", "<end_of_utterance>", tiny_folder.PAD)
"""Tokens that end a reply; llama.cpp knows them by name."""


def qwen(kind: str) -> tuple[Any, Any]:
    """A Qwen-VL with patches as real ones have, and pictures that stay as large as they are."""
    named, words = tiny_folder.KINDS["qwen2_5_vl"].make()
    config: Any = tiny.CONFIGS[kind]()
    for name in QWEN_IDS:
        setattr(config, name, getattr(named, name))
    text, tower, sizes = config.text_config, config.vision_config, words.image_processor
    text.vocab_size, text.bos_token_id = tiny_folder.VOCAB, None
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
    tower.depth, tower.fullatt_block_indexes, tower.window_size = 4, [1, 3], 112
    out = "hidden_size" if kind == "qwen2_vl" else "out_hidden_size"
    setattr(tower, out, SHAPE["hidden_size"])
    for part in (tower, sizes, words.video_processor):
        part.patch_size, part.temporal_patch_size = 14, 2
    sizes.size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    return config, words


def idefics3(kind: str) -> tuple[Any, Any]:
    """An Idefics3 or SmolVLM that divides pictures, as real ones do."""
    named, words = tiny_folder.KINDS["idefics3"].make()
    config: Any = tiny.CONFIGS[kind]()
    config.image_token_id = named.image_token_id
    parts = [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    words.tokenizer.add_tokens(["\n\n", *parts], True)  # llama.cpp looks them up
    config.text_config.vocab_size = len(words.tokenizer)
    config.vision_config.image_size, config.vision_config.patch_size = 112, 28
    words.image_processor.do_image_splitting = True
    words.image_processor.max_image_size = {"longest_edge": 112}
    words.image_processor.size = {"longest_edge": 224}
    return config, words


def gemma3() -> tuple[Any, Any]:
    """A Gemma 3; its processor takes its tokens by name."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    named["image_token"] = "<image_soft_token>"
    words = tiny_folder.tokenizer(list(named.values()), extra_special_tokens=named)
    config: Any = tiny.CONFIGS["gemma3"]()
    config.text_config.vocab_size = tiny_folder.VOCAB
    ids = {name: words.convert_tokens_to_ids(token) for name, token in named.items()}
    config.image_token_index = config.image_token_id = ids["image_token"]
    config.boi_token_index, config.eoi_token_index = ids["boi_token"], ids["eoi_token"]
    pictures = hf.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return config, hf.Gemma3Processor(
        pictures, words, image_seq_length=4, chat_template=tiny_folder.CHATML % "<start_of_image>"
    )


SEEING: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava/llama": tiny_folder.KINDS["llava"].make,
    "internvl/qwen2": tiny_folder.KINDS["internvl"].make,
    "gemma3/gemma3_text": gemma3,
    "idefics3/llama": partial(idefics3, "idefics3"),
    "smolvlm/llama": partial(idefics3, "smolvlm"),
    "qwen2_vl/qwen2_vl_text": partial(qwen, "qwen2_vl"),
    "qwen2_5_vl/qwen2_5_vl_text": partial(qwen, "qwen2_5_vl"),
}
"""Kinds that have a processor of their own."""


def config_and_words(kind: str) -> tuple[Any, Any]:
    """A configuration of a kind, and its processor or tokenizer."""
    if kind in SEEING:
        return SEEING[kind]()
    if kind.startswith("llava/"):
        _, processor = tiny_folder.KINDS["llava"].make()
        text = tiny.CONFIGS[kind.removeprefix("llava/")]()
        text.vocab_size = tiny_folder.VOCAB
        config: Any = tiny.llava(text_config=text)
        config.image_token_index = processor.image_token_id
        return config, processor
    config, (_, words) = tiny.CONFIGS[kind](), tiny_folder.KINDS["text"].make()
    config.vocab_size = tiny_folder.VOCAB
    return config, words


def build(kind: str) -> tuple[PreTrainedModel, Any]:
    """A model of a kind with random weights that answer prompts differently."""
    config, words = config_and_words(kind)
    text = text_config_of(config)
    for name, value in SHAPE.items():
        if hasattr(text, name):
            setattr(text, name, value)
    text.max_position_embeddings = MAX_POSITIONS
    if getattr(text, "layer_types", None):  # two periods, as real models have them
        every = FULL_AT_EVERY.get(text.model_type, 1)
        text.num_hidden_layers = max(SHAPE["num_hidden_layers"], 2 * every)
        places = range(1, text.num_hidden_layers + 1)
        text.layer_types = [FULL if n % every == 0 else "sliding_attention" for n in places]
        text.sliding_window = WINDOW if every > 1 else None
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    tokenizer = getattr(words, "tokenizer", words)
    known = tokenizer.get_vocab()
    model.generation_config = hf.GenerationConfig(
        eos_token_id=[known[end] for end in ENDS if end in known],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, words
