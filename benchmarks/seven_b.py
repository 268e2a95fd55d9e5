"""A LLaVA-1.5-7B-shaped checkpoint on a small machine: inspected and walked.

Command:  .venv/bin/python benchmarks/seven_b.py [--folder DIR] [--layers 32] [--samples 16]
Expect:   two hours on one core with bfloat16 units; 35 GB of disk for 32 layers.

Random bfloat16 weights are written once, shard by shard. Then one fresh process for each step, all
from the files with one layer in memory: inspect; the whole default recipe without local steps at
30 % width and at 30 % depth (score, cut, repair, write, check; samples of one picture of 576 tokens
and 64 text tokens, every fifth held out); 8 local steps a layer, on the first four layers alone.
Each step reports its time and peak memory (ru_maxrss; it counts mapped file pages).
The share of arithmetic is the time that the step's matrix products take at the rates measured just
before, each in the data type that it computes in, over the whole time; attention's do not count.
Steps that are done are skipped when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import slimvlm as sv
from random_weights import write_random
from slimvlm.models.load import empty_model

IMAGE_TOKEN, PICTURE_TOKENS, TEXT_TOKENS, ANSWER_TOKENS = 32000, 576, 64, 32
RATIO = 0.3
FIRST, LOCAL_STEPS = 4, 8


def config(layers: int) -> LlavaConfig:
    """LLaVA-1.5-7B's configuration, with so many decoder layers."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )


def write(folder: Path, layers: int, samples: int) -> dict[str, Any]:
    """Random weights, a shard at a time; shards that are there stay."""
    return {"gib": write_random(config(layers), folder / "original") / 2**30}


def inspect(folder: Path, layers: int, samples: int) -> dict[str, Any]:
    """Parameters, from the configuration alone."""
    anatomy = sv.anatomy(folder / "original")
    return {"total_params": anatomy.total_params, "backbone_params": anatomy.backbone_params}


def batches(count: int) -> Iterator[dict[str, Tensor]]:
    """Samples of one picture and some text, half of which is the answer."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        text = torch.randint(3, 31000, (1, TEXT_TOKENS), generator=generator)
        picture = torch.full((1, PICTURE_TOKENS), IMAGE_TOKEN)
        ids = torch.cat([text[:, :8], picture, text[:, 8:]], 1)
        labels = ids.clone()
        labels[:, :-ANSWER_TOKENS] = -100
        pixels = torch.randn(1, 3, 336, 336, generator=generator).bfloat16()
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "pixel_values": pixels,
        }


def rates() -> dict[str, float]:
    """Operations a second, by data type."""
    kinds = (torch.bfloat16, torch.float32, torch.float64)
    return {str(kind).removeprefix("torch."): matmul_rate(kind) for kind in kinds}


def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of the products that a layer makes, all threads."""
    tokens, generator = PICTURE_TOKENS + TEXT_TOKENS, torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 4096, generator=generator).to(dtype)
    w = torch.randn(11008, 4096, generator=generator).to(dtype)
    y = x @ w.T
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(2):
            x @ w.T
            y @ w
            y.T @ x
        best = max(best, 2 * 3 * 2 * tokens * w.numel() / (time.perf_counter() - start))
    return best


def walk(axis: str, local_steps: int = 0) -> Callable[[Path, int, int], dict[str, Any]]:
    """The default recipe along an axis, written and read back."""

    def run(folder: Path, layers: int, samples: int) -> dict[str, Any]:
        found = rates()
        start = time.perf_counter()
        walked = sv.walk_checkpoint(
            folder / "original",
            batches(samples),
            folder / f"{axis}-{local_steps}",
            RATIO,
            axis,
            local_steps=local_steps,
            scratch=folder / f"scratch-{axis}-{local_steps}",
            force=True,
        )
        seconds = time.perf_counter() - start
        needs = arithmetic(walked.plan, samples, local_steps)
        ideal = sum(flop / found[dtype] for dtype, flop in needs.items())
        return {
            "gflop_per_s": {dtype: rate / 1e9 for dtype, rate in found.items()},
            "tflop": {dtype: flop / 1e12 for dtype, flop in needs.items()},
            "share_of_arithmetic": ideal / seconds,
            "summary": walked.summary(),
        }

    return run


def arithmetic(plan: sv.Plan, samples: int, local_steps: int) -> dict[str, float]:
    """Operations of a walk's matrix products, by the data type that they are made in."""
    held_out = samples // 5
    tokens, fitted = (n * (PICTURE_TOKENS + TEXT_TOKENS) for n in (samples, samples - held_out))
    before, half, single, double = plan.before, 0.0, 0.0, 0.0
    needs_original = local_steps > 0 or len(plan.layers) < before.num_layers
    for index, shape in enumerate(before.layers):
        owned = shape.params - shape.fixed_params
        half += 2 * tokens * owned * needs_original
        if plan.axis == "depth":  # the layer scores' own pass
            half += 2 * fitted * owned
        if index not in plan.layers:
            continue
        half += 2 * tokens * owned
        for channels, units, kept in (
            (shape.num_heads * shape.head_dim, shape.num_kv_heads, plan.kv_groups[index]),
            (shape.intermediate_size, shape.intermediate_size, plan.neurons[index]),
        ):
            stays = channels * len(kept) // units
            gone = channels - stays
            if gone:
                half += fitted * channels**2
                single += channels**2 * (channels + 3 * gone)
                single += stays**3 / 3 + 2 * before.hidden_size * stays * (gone + stays)
        kept_share = (len(plan.kv_groups[index]) + len(plan.neurons[index])) / (
            shape.num_kv_heads + shape.intermediate_size
        )
        half += 3 * 2 * local_steps * (PICTURE_TOKENS + TEXT_TOKENS) * owned * kept_share
    return {"bfloat16": half, "float32": single, "float64": double}


def first_layers(folder: Path, count: int) -> None:
    """A checkpoint of the first layers alone; its files are hard links to those of the whole."""
    source, out = folder / "original", folder / "first" / "original"
    out.mkdir(parents=True, exist_ok=True)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    names = empty_model(config(count), torch.bfloat16).state_dict().keys()
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k in names}
    for file in set(index["weight_map"].values()):
        if not (out / file).exists():
            (out / file).hardlink_to(source / file)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config(count).save_pretrained(out)


def walk_first(folder: Path, layers: int, samples: int) -> dict[str, Any]:
    """Eight local steps a layer on four layers, beside none; what they would take on all."""
    first_layers(folder, FIRST)
    with_steps = walk("width", LOCAL_STEPS)(folder / "first", FIRST, samples)
    start = time.perf_counter()
    walk("width")(folder / "first", FIRST, samples)
    without = time.perf_counter() - start
    return {**with_steps, "seconds_without_steps": without, "layers_extrapolated_to": layers}


STEPS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "write": write,
    "inspect": inspect,
    "walk width": walk("width"),
    "walk depth": walk("depth"),
    "local steps": walk_first,
}


def run_step(name: str, folder: Path, layers: int, samples: int) -> dict[str, Any]:
    """Run a step in this process; its figures."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = STEPS[name](folder, layers, samples)
    return {
        "step": name,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
        **found,
    }


def main() -> None:
    """Run one step, or all that are not done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "seven_b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--step", choices=STEPS)
    options = parser.parse_args()
    folder = options.folder / f"{options.layers}-layers-{options.samples}-samples"
    folder.mkdir(parents=True, exist_ok=True)
    if options.step:
        print(json.dumps(run_step(options.step, folder, options.layers, options.samples)))
        return
    for name in STEPS:
        done = folder / f"{name.replace(' ', '-')}.json"
        if not done.exists():
            command = [sys.executable, __file__, "--step", name, "--folder", str(options.folder)]
            command += ["--layers", str(options.layers), "--samples", str(options.samples)]
            step = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            done.write_text(step.stdout.splitlines()[-1] + "\n")
        print(done.read_text().strip(), flush=True)


if __name__ == "__main__":
    main()
