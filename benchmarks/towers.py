"""Where the work of a question with an image goes, in ten published models.

Command:  .venv/bin/python benchmarks/towers.py            (writes the table of docs/towers.md)
          .venv/bin/python benchmarks/towers.py --measure  (times two shapes, with random weights)
Expect:   half a minute; with ``--measure`` some ten minutes on one core, and 4 GiB.

Models are configurations on the meta device: only shapes count. Sizes are those of the published
configurations; fields that are not named are defaults of transformers. A question has one image (in
one tile, or of one megapixel where the model takes any size) and 64 tokens of text.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import slimvlm as sv
from slimvlm.core.files import write_text
from slimvlm.evaluation.bench import times_of_parts
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import QUESTION_TOKENS, Picture, Work, question_flops
from slimvlm.models.load import auto_class
from slimvlm.models.pictures import usual_picture
from slimvlm.planning.make import make_plan
from slimvlm.runs.recipe import dummy_scores
from slimvlm.runs.tables import as_markdown

PAGE = Path(__file__).parent.parent / "docs" / "towers.md"
MARKS = "<!-- written by benchmarks/towers.py{} -->\n", "<!-- end -->"
BACKBONE, MLPS = 0.3, 0.4
"""Shares of the decoder layers' parameters, and of the neurons of the tower, that are removed."""


def sized(*sizes: int) -> dict[str, int]:
    """Name hidden size, MLP width, layers, heads and KV heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip((*names, "num_key_value_heads"), sizes, strict=False))


def qwen(*sizes: int, vocab: int = 151936, **more: Any) -> dict[str, Any]:
    """Describe a Qwen2.5 language model."""
    return {"model_type": "qwen2", **sized(*sizes), "vocab_size": vocab, **more}


SO400M = {"model_type": "siglip_vision_model", "vision_use_head": False, "patch_size": 14}
SO400M |= sized(1152, 4304, 27, 16)
SMOL: dict[str, Any] = {"model_type": "llama", "vocab_size": 49280}
ROPE_3D = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def qwen2_5_vl(*sizes: int, tied: bool) -> hf.PreTrainedConfig:
    """Describe Qwen2.5-VL, whose sizes have one tower."""
    text = {**sized(*sizes), "vocab_size": 151936, "rope_parameters": ROPE_3D}
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    tower |= {"out_hidden_size": sizes[0]}
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=tied)


def models() -> dict[str, tuple[Any, Picture | None]]:
    """Describe the models, and the image where it is one megapixel."""
    small = {"image_size": 512, "patch_size": 16, **sized(768, 3072, 12, 12)}
    large = {**SO400M, "model_type": "smolvlm_vision", "image_size": 384}
    del large["vision_use_head"]
    gemma2 = {"model_type": "gemma2", **sized(2304, 9216, 26, 8, 4), "head_dim": 256}
    gemma3 = {**sized(2560, 10240, 34, 8, 4), "head_dim": 256, "vocab_size": 262208}
    gemma3 |= {"sliding_window": 1024}
    qwen3 = {**sized(2048, 6144, 28, 16, 8), "head_dim": 128, "vocab_size": 151936}
    qwen3 |= {"rope_parameters": {**ROPE_3D, "mrope_section": [24, 20, 20]}}
    deepstack = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    deepstack |= {"out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]}
    in_14 = Picture(5120, 5120, 1280, 1282)  # 64 x 80 patches of 14 pixels
    in_16 = Picture(4096, 4096, 1024, 1026)  # 64 x 64 of 16 pixels
    return {
        "LLaVA-1.5-7B": (
            hf.LlavaConfig(text_config={"model_type": "llama", "vocab_size": 32064}),
            None,
        ),
        "SmolVLM-256M": (
            hf.Idefics3Config(
                vision_config=small,
                text_config={**SMOL, **sized(576, 1536, 30, 9, 3)},
                scale_factor=4,
                tie_word_embeddings=True,
            ),
            None,
        ),
        "SmolVLM2-2.2B": (
            hf.SmolVLMConfig(
                vision_config=large,
                text_config={**SMOL, **sized(2048, 8192, 24, 32, 32)},
                scale_factor=3,
            ),
            None,
        ),
        "InternVL3-1B": (hf.InternVLConfig(text_config=qwen(896, 4864, 24, 14, 2)), None),
        "InternVL3-8B": (hf.InternVLConfig(text_config=qwen(3584, 18944, 28, 28, 4)), None),
        "Qwen2.5-VL-3B": (qwen2_5_vl(2048, 11008, 36, 16, 2, tied=True), in_14),
        "Qwen2.5-VL-7B": (qwen2_5_vl(3584, 18944, 28, 28, 4, tied=False), in_14),
        "Qwen3-VL-2B": (
            hf.Qwen3VLConfig(text_config=qwen3, vision_config=deepstack, tie_word_embeddings=True),
            in_16,
        ),
        "Gemma-3-4B": (
            hf.Gemma3Config(text_config=gemma3, vision_config={**SO400M, "image_size": 896}),
            None,
        ),
        "PaliGemma-2-3B": (
            hf.PaliGemmaConfig(
                text_config={**gemma2, "vocab_size": 257216},
                vision_config={**SO400M, "image_size": 224, "projection_dim": 2304},
                projection_dim=2304,
                hidden_size=2304,
            ),
            None,
        ),
    }


def with_narrow_tower(shape: Anatomy) -> Anatomy:
    """Remove neurons of the tower from a shape."""
    assert shape.tower is not None
    layers = [
        replace(layer, intermediate_size=round((1 - MLPS) * layer.intermediate_size))
        for layer in shape.tower.layers
    ]
    return replace(shape, tower=shape.tower.with_layers(layers))


def row_of(name: str, config: Any, picture: Picture | None) -> list[str]:
    """Make a model's row of the table."""
    shape, shown = sv.anatomy(config), picture or usual_picture(config)
    assert shape.tower is not None
    of_layers = sum(layer.params for layer in shape.layers)
    scores = dummy_scores(shape, ("obs", "magnitude"))
    plan = make_plan(shape, scores, BACKBONE * of_layers / shape.backbone_params)
    whole = question_flops(shape, shown)
    left = [sum(question_flops(s, shown)) for s in (plan.after, with_narrow_tower(plan.after))]
    of_tower = whole.tower / sum(whole)
    sizes = (shape.vision_params, of_layers)
    return [
        name,
        *(f"{size / 1e6:,.0f}" for size in sizes),
        f"{shown.patches:,}",
        f"{shown.tokens:,}",
        f"{sum(whole) / 1e9:,.0f}",
        f"{of_tower:.0%}",
        *(f"{work / sum(whole):.2f}" for work in left),
    ]


def written(name: str, table: str) -> None:
    """Replace what is between the marks of the page."""
    begin, end = (mark.format(name) for mark in MARKS)
    page = re.sub(
        f"({re.escape(begin)}).*?({re.escape(end)})",
        lambda found: f"{found[1]}{table}{found[2]}",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    write_text(PAGE, page)


def measured(name: str, config: Any, shown: Picture, inputs: dict[str, Any], scale: Work) -> str:
    """Print measured shares of a model with random weights beside calculated ones."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    ids = torch.full((1, shown.tokens + QUESTION_TOKENS), 5)
    ids[0, 1 : 1 + shown.features] = config.image_token_id
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    if "image_grid_thw" in inputs:
        given["mm_token_type_ids"] = (ids == config.image_token_id).int()
    work = question_flops(sv.anatomy(config), shown)
    rows = []
    for way, parts in (("calculated", work), ("measured", times_of_parts(model, given))):
        parts = [part * factor for part, factor in zip(parts, scale, strict=True)]
        rows.append([name, way, *(f"{part / sum(parts):.1%}" for part in parts)])
    print(as_markdown(["model", "", "tower", "projector", "backbone"], rows), flush=True)
    return "".join(as_markdown([""], rows).splitlines(keepends=True)[2:])


def measure() -> str:
    """Measure SmolVLM-256M whole, and Qwen2.5-VL-3B with a quarter or less of its layers."""
    known = models()
    config, _ = known["SmolVLM-256M"]
    config.image_token_id = 49190
    table = measured(
        "SmolVLM-256M",
        config,
        usual_picture(config),
        {"pixel_values": torch.randn(1, 1, 3, 512, 512)},
        Work(1, 1, 1),
    )
    config, shown = known["Qwen2.5-VL-3B"]
    assert shown is not None
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 8, [7]
    text = config.text_config
    text.num_hidden_layers, text.layer_types = 3, text.layer_types[:3]
    text.vocab_size, config.image_token_id = 2048, 2000
    inputs = {
        "pixel_values": torch.randn(shown.patches, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 64, 80]]),
    }
    return table + measured("Qwen2.5-VL-3B", config, shown, inputs, Work(4, 1, 12))


def main() -> None:
    """Write the table of the page, or the measured shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        head = ["model", "", "tower", "projector", "backbone"]
        written(" --measure", as_markdown(head, []) + measure())
        return
    header = ["model", "tower, M", "decoder layers, M", "patches", "image tokens", "GFLOP"]
    header += ["tower's share", "decoder layers - 30 %", "and tower's neurons - 40 %"]
    table = as_markdown(header, [row_of(n, *described) for n, described in models().items()])
    written("", table)
    print(table)


if __name__ == "__main__":
    main()
