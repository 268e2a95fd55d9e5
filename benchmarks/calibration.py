"""Time and peak memory of calibration, ours against the plain way, in one run.

Command:  .venv/bin/python benchmarks/calibration.py [--shape smol|1b] [--samples 10] [--tokens 128]
Expect:   about 2 minutes for smol on 2 cores.

Every job runs in a process of its own on the same random model; peak memory is what the operating
system saw (ru_maxrss). "plain taylor" keeps the gradients of all parameters over one batch, as
LLM-Pruner does. Results are JSON lines, then a table of ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import slimvlm as sv

SHAPES = {
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}


def build(shape: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
    return model


def batches(samples: int, tokens: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=generator)
    return [{"input_ids": row[None], "labels": row[None]} for row in ids]


def nothing(model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]]) -> None:
    """Only the model: what the others' memory is compared with."""


def plain_taylor(model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]]) -> None:
    """All samples in one graph, gradients of all parameters kept, scores at the end."""
    ids = torch.cat([batch["input_ids"] for batch in data])
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            (linear.weight * linear.weight.grad).abs().sum(1)


def ours(criterion: str, **options: str) -> Callable[..., None]:
    def run(model: LlamaForCausalLM, data: list[dict[str, torch.Tensor]]) -> None:
        sv.score(model, data, criterion, **options)

    return run


JOBS: dict[str, Callable[..., None]] = {
    "nothing": nothing,
    "plain taylor": plain_taylor,
    "taylor per_sample": ours("taylor", gradient="per_sample"),
    "taylor batch": ours("taylor", gradient="batch"),
    "taylor_second": ours("taylor_second"),
    "taylor_mix": ours("taylor_mix"),
    "gate": ours("gate"),
    "activation": ours("activation"),
    "block_influence": ours("block_influence"),
    "magnitude": ours("magnitude"),
}


def run_job(name: str, shape: str, samples: int, tokens: int) -> None:
    """Run one job in this process and print its figures."""
    model = build(shape)
    data = batches(samples, tokens, SHAPES[shape]["vocab_size"])
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    start = time.perf_counter()
    JOBS[name](model, data)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {"job": name, "seconds": seconds, "peak_gib": peak, "weights_gib": weights}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smol")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--job", choices=JOBS)
    options = parser.parse_args()
    if options.job:
        run_job(options.job, options.shape, options.samples, options.tokens)
        return
    about = {
        "shape": options.shape,
        "samples": options.samples,
        "tokens": options.tokens,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about))
    rows = {}
    for name in JOBS:
        command = [sys.executable, __file__, "--job", name, "--shape", options.shape]
        command += ["--samples", str(options.samples), "--tokens", str(options.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(json.dumps({"job": name, "failed": done.stderr.strip().splitlines()[-1]}))
            continue
        print(done.stdout.strip(), flush=True)
        rows[name] = json.loads(done.stdout)
    floor, plain = rows["nothing"], rows["plain taylor"]
    print("\n| job | time / plain taylor | peak / model alone | peak / plain taylor |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['seconds'] / plain['seconds']:.2f} "
            f"| {row['peak_gib'] / floor['peak_gib']:.2f} "
            f"| {row['peak_gib'] / plain['peak_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
