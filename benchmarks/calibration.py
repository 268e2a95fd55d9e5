"""Time and peak memory of calibration, ours against plain Taylor and Torch-Pruning, in one run.

Command:  .venv/bin/python benchmarks/calibration.py [--shape 135m|1b|tiny] [--samples 10]
          [--tokens 128] [--micro-batch 5]
Needs:    pip install torch-pruning, for the job of that name; it fails where queries share heads,
          so that only 1b has its figures.
Expect:   3 minutes for 135m and 17 for 1b on one core of a recent CPU; 1b needs 13 GiB.

Every job runs in a process of its own on the same random model; peak memory is what the operating
system saw (ru_maxrss). "plain taylor" is LLM-Pruner's way: all samples in one batch, gradients of
all parameters kept, then |w g| summed over the channels of every matrix. Ours takes the samples in
micro-batches. "activations" runs one micro-batch forward with a graph: what ours may use beside the
weights. "allowed" is libraries + 1.35 x weights + activations.

Last, block influence of 2,880 tokens of width 4,096, row by row and as the diagonal of the tokens x
tokens product (the reference code's form). Results are JSON lines, then Markdown tables.
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
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import slimvlm as sv
from shapes import SHAPES

Batches = list[dict[str, Tensor]]
RATIO = 0.25
TOKENS, WIDTH = 2880, 4096


def build(shape: str) -> LlamaForCausalLM:
    """A random model, always the same."""
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(SHAPES[shape]).eval()
    return model


def batches(samples: int, tokens: int, vocabulary: int, micro_batch: int) -> Batches:
    """Random samples, some in a batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=generator)
    return [{"input_ids": part, "labels": part} for part in ids.split(micro_batch)]


def nothing(model: LlamaForCausalLM, data: Batches) -> None:
    """Only the model."""


def activations(model: LlamaForCausalLM, data: Batches) -> None:
    """One micro-batch forward, with everything that a backward pass would need."""
    graph = model(**data[0]).loss
    assert graph.requires_grad


def plain_taylor(model: LlamaForCausalLM, data: Batches) -> None:
    """All samples in one graph, gradients of all parameters kept, scores at the end."""
    ids = torch.cat([batch["input_ids"] for batch in data])
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                dim = 0 if name.endswith(("o_proj", "down_proj")) else 1
                (module.weight * module.weight.grad).abs().sum(dim)


def ours(criterion: str, **options: str) -> Callable[..., None]:
    """Our scores by a criterion."""

    def run(model: LlamaForCausalLM, data: Batches) -> None:
        sv.score(model, data, criterion, **options)

    return run


def prune_by_magnitude(model: LlamaForCausalLM, data: Batches) -> None:
    """Ours: scores, plan and cut."""
    scores = sv.score(model, (), "magnitude", p=2)
    plan = sv.make_plan(sv.anatomy(model), scores, RATIO, "width", allocation="uniform")
    sv.prune_(model, plan)


def torch_pruning(model: LlamaForCausalLM, data: Batches) -> None:
    """Torch-Pruning: graph, group magnitudes and cut; it cuts the hidden size as well."""
    import torch_pruning as tp

    config = model.config
    heads = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = config.num_key_value_heads
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=data[0]["input_ids"][:1],
        forward_fn=lambda model, ids: model(input_ids=ids, use_cache=False).logits,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        head_pruning_ratio=RATIO,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[model.lm_head],
        round_to=4,
    )
    pruner.step()


JOBS: dict[str, Callable[..., None]] = {
    "nothing": nothing,
    "activations": activations,
    "plain taylor": plain_taylor,
    "taylor per_sample": ours("taylor", gradient="per_sample"),
    "taylor batch": ours("taylor", gradient="batch"),
    "taylor_second": ours("taylor_second"),
    "taylor_mix": ours("taylor_mix"),
    "gate": ours("gate"),
    "activation": ours("activation"),
    "block_influence": ours("block_influence"),
    "magnitude": ours("magnitude"),
    "magnitude, pruned": prune_by_magnitude,
    "Torch-Pruning magnitude, pruned": torch_pruning,
}


def square_influence(hidden_in: Tensor, hidden_out: Tensor) -> Tensor:
    """The reference code's form: every token with every token, of which the diagonal is kept."""
    norms = hidden_in.norm(dim=-1, keepdim=True), hidden_out.norm(dim=-1, keepdim=True)
    similarity = (hidden_in @ hidden_out.T) / (norms[0] @ norms[1].T)
    return 1 - similarity.diagonal()


INFLUENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row by row": lambda x, y: sv.block_influence(x[None], y[None])[0],
    "tokens x tokens": square_influence,
}


def run_job(options: argparse.Namespace) -> dict[str, float]:
    """Run one job in this process; its figures."""
    libraries = _peak()
    model = build(options.shape)
    vocabulary = SHAPES[options.shape].vocab_size
    data = batches(options.samples, options.tokens, vocabulary, options.micro_batch)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    wall, cpu = time.perf_counter(), time.process_time()
    JOBS[options.job](model, data)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": _peak(),
        "weights_gib": weights,
        "libraries_gib": libraries,
    }


def run_influence(form: str) -> dict[str, float]:
    """Median time of one call."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, TOKENS, WIDTH, generator=generator)
    INFLUENCES[form](x, y)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        INFLUENCES[form](x, y)
        times.append(time.perf_counter() - start)
    return {"seconds": median(times), "peak_gib": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def in_process(job: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run a job in a fresh process and print its figures; None if it failed."""
    command = [sys.executable, __file__, "--job", job, "--shape", options.shape]
    for name in ("samples", "tokens", "micro_batch"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(json.dumps({"job": job, "failed": done.stderr.strip().splitlines()[-1]}))
        return None
    figures: dict[str, Any] = {"job": job, **json.loads(done.stdout.splitlines()[-1])}
    print(json.dumps(figures), flush=True)
    return figures


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Ratios of the figures of all jobs."""
    plain, first = rows["plain taylor"], rows["nothing"]
    extra = rows["activations"]["peak_gib"] - first["peak_gib"]
    allowed = first["libraries_gib"] + 1.35 * first["weights_gib"] + extra
    lines = [
        "| job | s | CPU s | CPU s / plain taylor | peak GiB | peak / plain taylor | / allowed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} "
            f"| {row['cpu_seconds'] / plain['cpu_seconds']:.2f} | {row['peak_gib']:.2f} "
            f"| {row['peak_gib'] / plain['peak_gib']:.2f} | {row['peak_gib'] / allowed:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run one job, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=5)
    parser.add_argument("--job", choices=[*JOBS, *INFLUENCES])
    options = parser.parse_args()
    if options.job in INFLUENCES:
        print(json.dumps(run_influence(options.job)))
        return
    if options.job:
        print(json.dumps(run_job(options)))
        return
    about = {
        "shape": options.shape,
        "samples": options.samples,
        "tokens": options.tokens,
        "micro_batch": options.micro_batch,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about))
    found = {job: in_process(job, options) for job in (*JOBS, *INFLUENCES)}
    rows = {job: figures for job, figures in found.items() if figures is not None}
    print("\n" + table({job: row for job, row in rows.items() if job in JOBS}))
    ratio = rows["tokens x tokens"]["seconds"] / rows["row by row"]["seconds"]
    print(f"\nblock influence, {TOKENS} x {WIDTH}: row by row is {ratio:.1f} times as fast")


if __name__ == "__main__":
    main()
