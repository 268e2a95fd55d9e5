"""Memory that held-out measures need beyond the weights, with a large vocabulary.

Command:  OMP_NUM_THREADS=2 .venv/bin/python benchmarks/peak_memory.py
Expect:   two minutes on two cores; Linux.

Random weights in bfloat16, batches of four conversations of random words whose second half is the
answer. The peak is that of the resident set while a measure runs, less what it was before.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from slimvlm.planning.balance import PlanDivergence
from transformers import AutoModelForCausalLM

from shapes import GEMMA, SHAPES
from slimvlm.models.anatomy import read_anatomy
from slimvlm.planning.plan import Plan
from slimvlm.scoring.batches import answer_loss

ALL_SHAPES = {**SHAPES, "gemma": GEMMA}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=ALL_SHAPES, default="gemma")
    parser.add_argument("--conversations", type=int, default=16, help="held out of 64")
    parser.add_argument("--tokens", type=int, default=180)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = ALL_SHAPES[options.shape]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    batches = [
        batch(config.vocab_size, options.tokens, seed) for seed in range(options.conversations // 4)
    ]
    whole = Plan.everything(read_anatomy(model))
    measures: dict[str, Callable[[], object]] = {
        "answer loss": lambda: answer_loss(model, batches),
        "divergence of a plan": lambda: PlanDivergence(model, batches).of(whole),
    }
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    for name, run in measures.items():
        print(json.dumps({"measure": name, "weights_gib": round(weights, 2), **figures(run)}))


def batch(vocabulary: int, tokens: int, seed: int) -> dict[str, Any]:
    """Four conversations."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (4, tokens), generator=generator)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def figures(run: Callable[[], object]) -> dict[str, float]:
    """Seconds, the peak while something runs, and how much of it was not there before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before, start = resident_gib("VmRSS"), time.perf_counter()
    run()
    seconds, peak = time.perf_counter() - start, resident_gib("VmHWM")
    found = {"peak_gib": peak, "beyond_gib": peak - before, "seconds": seconds}
    return {name: round(value, 2) for name, value in found.items()}


def resident_gib(name: str) -> float:
    """A resident size of this process: of now (VmRSS) or the largest so far (VmHWM)."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) / 2**20 for row in rows if row.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
