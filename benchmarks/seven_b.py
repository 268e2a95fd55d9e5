"""A LLaVA-1.5-7B-shaped checkpoint on a small machine: inspected, scored and pruned.

Command:  .venv/bin/python benchmarks/seven_b.py [--folder DIR] [--layers 32] [--samples 10]
Expect:   35 minutes on one core of a recent CPU with bfloat16 units; 35 GB of disk for 32 layers.

Random bfloat16 weights are written once, shard by shard. Then one fresh process for each step:
inspect; score (Taylor per sample, layer by layer, samples of one picture of 576 tokens and 64 text
tokens); prune 30 % of the backbone in depth, and in width. Each step reports its time and peak
memory (ru_maxrss; it counts mapped file pages). The share of arithmetic is the time that the
score's matrix products take at the rate measured just before, over the whole time; products that
the method repeats count, attention's do not. Steps that are done are skipped when the same command
is given again; an interrupted score goes on after its last layer, and reports the time of its end.
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
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import slimvlm as sv
from slimvlm.models.classes import empty_model
from slimvlm.scoring.unit_scores import Scores

IMAGE_TOKEN, PICTURE_TOKENS, TEXT_TOKENS, ANSWER_TOKENS = 32000, 576, 64, 32
RATIO = 0.3


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
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, dtype="bfloat16"
    )


def write(folder: Path, layers: int, samples: int) -> dict[str, Any]:
    """Random weights, a shard at a time; shards that are there stay."""
    shape = config(layers)
    shape.architectures = ["LlavaForConditionalGeneration"]
    model = empty_model(shape, torch.bfloat16)
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(state, max_shard_size="1GB")
    out = folder / "original"
    out.mkdir(exist_ok=True)
    for number, (file, names) in enumerate(split.filename_to_tensors.items()):
        if (out / file).exists():
            continue
        generator = torch.Generator().manual_seed(number)
        tensors = {name: random_weight(state[name], generator) for name in names}
        save_file(tensors, out / f"{file}.partial", {"format": "pt"})
        (out / f"{file}.partial").rename(out / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    shape.save_pretrained(out)
    return {"gib": sum(t.numel() * t.element_size() for t in state.values()) / 2**30}


def random_weight(like: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix around 0; vectors (norms, biases) around 1 or 0 do not matter here."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    return torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


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


def score(folder: Path, layers: int, samples: int) -> dict[str, Any]:
    """Taylor scores with one layer in memory."""
    anatomy = sv.anatomy(folder / "original")
    owned = sum(shape.params - shape.fixed_params for shape in anatomy.layers)
    rate = matmul_rate()
    start = time.perf_counter()
    scores = sv.score_checkpoint(
        folder / "original",
        batches(samples),
        "taylor",
        scratch=folder,
        say=lambda line: print(line, file=sys.stderr),
        gradient="per_sample",
    )
    seconds = time.perf_counter() - start
    scores.save(folder / "taylor")
    tokens = samples * (PICTURE_TOKENS + TEXT_TOKENS)
    products = 2 * owned * tokens * 4  # forward twice, gradients of inputs, of weights
    return {
        "gflop_per_s_of_matmul": rate / 1e9,
        "tflop": products / 1e12,
        "share_of_arithmetic": products / rate / seconds,
    }


def matmul_rate() -> float:
    """Operations a second of the products that a layer makes, bfloat16, all threads."""
    tokens, generator = PICTURE_TOKENS + TEXT_TOKENS, torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 4096, generator=generator).bfloat16()
    w = torch.randn(11008, 4096, generator=generator).bfloat16()
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


def prune(axis: str) -> Callable[[Path, int, int], dict[str, Any]]:
    """Cut along an axis."""

    def run(folder: Path, layers: int, samples: int) -> dict[str, Any]:
        anatomy = sv.anatomy(folder / "original")
        plan = sv.make_plan(anatomy, Scores.load(folder / "taylor"), RATIO, axis)
        sv.prune_checkpoint(folder / "original", plan, folder / axis, force=True)
        return {"ratio": plan.ratio, "summary": plan.summary()}

    return run


STEPS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "write": write,
    "inspect": inspect,
    "score": score,
    "prune depth": prune("depth"),
    "prune width": prune("width"),
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
    parser.add_argument("--samples", type=int, default=10)
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
