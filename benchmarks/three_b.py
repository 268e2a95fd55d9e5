"""A Bunny-v1.0-3B-shaped checkpoint the whole way: walked, distilled, trained, written.

Command:  .venv/bin/python benchmarks/three_b.py [--folder DIR] [--layers 32] [--samples 16]
Expect:   100 minutes of one core.
Goal:     at most 12 GiB of memory.

Random bfloat16 weights (Phi-2 and SigLIP, 729 tokens a picture) with the demo's tokenizer, its
conversations, and the command that a user would give: ``slimvlm compress`` at 30 % width with eight
local steps a layer, then two steps of LoRA against the original. Prints the command's time and peak
memory (ru_maxrss, which counts mapped file pages), and the summary that it wrote.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import (
    LlavaConfig,
    LlavaProcessor,
    PhiConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

import slimvlm as sv
from random_weights import write_random

RATIO, LOCAL_STEPS, TRAINING_STEPS = 0.3, 8, 2


def write(folder: Path, layers: int) -> float:
    """The checkpoint with its processor; GiB of its weights."""
    _, demo = sv.load("demo")
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = PhiConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.4,
        },
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=demo.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=729,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )
    LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 384, "width": 384}),
        tokenizer=demo.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=demo.chat_template,
    ).save_pretrained(folder)
    return write_random(config, folder) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "three_b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    original = options.folder / f"{options.layers}-layers"
    weights = write(original, options.layers)
    settings = options.folder / "settings.yaml"  # for what has no flag
    rows = [f"model: {original}", f"ratio: {RATIO}", "recover: {trainer: {logging_steps: 1}}"]
    settings.write_text("\n".join(rows))
    command = [sys.executable, "-m", "slimvlm", "compress", "--config", str(settings)]
    command += ["--out", str(options.folder / "run"), "--force"]
    command += ["--data", "demo", "--samples", str(options.samples), "--dtype", "bfloat16"]
    command += ["--axis", "width", "--ratio", str(RATIO), "--local-steps", str(LOCAL_STEPS)]
    command += ["--train", "lora", "--loss", "sft+hidden", "--batch-size", "1"]
    command += ["--max-steps", str(TRAINING_STEPS), "--gradient-checkpointing"]
    print(" ".join(command), flush=True)
    start = time.perf_counter()
    subprocess.run(command, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "weights_gib": weights,
        "peak_gib": used.ru_maxrss / 2**20,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }
    print((options.folder / "run" / "summary.md").read_text())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
