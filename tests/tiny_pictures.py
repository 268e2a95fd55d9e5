"""Tiny models of every family whose pictures can take fewer tokens, with their processors."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers as hf
from transformers.models.smolvlm import processing_smolvlm

from tests import tiny
from tests.tables import tables
from tests.tiers import tiered
from tests.tiny_folder import CHATML, VOCAB, root, tokenizer

# a package that numbers the frames of videos
processing_smolvlm.num2words = processing_smolvlm.num2words or str


class Seeing(NamedTuple):
    """A family's processor: how it is built around a tokenizer."""

    processor: Mapping[str, Any]  # its class and arguments, among them parts with a class
    shown: str = "<image>"  # what its chat template writes for a picture
    counted: str = "<image>"  # the token that stands for a picture's features
    specials: Sequence[str] = ()
    named: Mapping[str, str] = {}
    ids: Mapping[str, str] = {}  # fields of the configuration, and their tokens
    config: str = ""  # in `tiny.CONFIGS`, if it is not the family's name
    size: Sequence[int] = (96, 64)  # of a picture that takes more than the least


FAMILIES = {name: Seeing(**row) for name, row in tables(__file__)["families"].items()}
BY_DEFAULT = tiered(
    FAMILIES,
    {"qwen2_5_vl", "internvl", "gemma4", "llava_onevision", "idefics2", "molmo2"}.__contains__,
)
"""Parameters: by default one of each knob (pixels, tiles, soft tokens, grids, a switch, crops)."""


def _built(row: Mapping[str, Any], **more: Any) -> Any:
    parts = {
        name: _built(value) if isinstance(value, Mapping) and "class" in value else value
        for name, value in row.items()
    }
    return getattr(hf, parts.pop("class"))(**parts, **more)


@cache
def made(name: str) -> tuple[Any, Any]:
    """A family's model and processor."""
    row = FAMILIES[name]
    specials = dict.fromkeys(("<|im_start|>", "<|im_end|>", *row.specials, *row.named.values()))
    words = tokenizer(
        list(specials), adds_bos=False, bos=None, extra_special_tokens=dict(row.named)
    )
    words.chat_template = CHATML % row.shown
    processor = _built(row.processor, tokenizer=words, chat_template=words.chat_template)
    config = tiny.CONFIGS[row.config or name]()
    text = config.get_text_config()
    for part in {id(each): each for each in (config, text)}.values():
        if hasattr(part, "vocab_size"):
            part.vocab_size = VOCAB
    text.max_position_embeddings = 2048
    if name == "phi4_multimodal":  # its processor counts the tokens of tiles of 448 pixels
        vision = config.vision_config
        vision.crop_size = vision.image_size = 448
        vision.patch_size, vision.image_token_id = 14, words.convert_tokens_to_ids("<image>")
    if name == "gemma4":
        text.vocab_size_per_layer_input = config.vision_config.position_embedding_size = VOCAB
    if name == "molmo2":  # tiles overlap, so that small ones take as many tokens as one
        config.vision_config.image_size = [64, 64]
        config.vision_config.num_position_embeddings = 64
    if name == "ovis2":
        config.visual_indicator_token_ids = words.convert_tokens_to_ids(row.specials[2:])
    for field, token in row.ids.items():
        setattr(config, field, words.convert_tokens_to_ids(token))
    return tiny.made(config), processor


@cache
def folder(name: str) -> Path:
    """A complete model folder of a family. Tests must not change it."""
    model, processor = made(name)
    path = root() / f"pictures-{name}"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
