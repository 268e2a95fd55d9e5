"""Speed-up over the ideal of depth and width pruning, for reading and for writing.

Command:  .venv/bin/python benchmarks/speed.py [--shape 135m|1b|both] [--dtype bfloat16|float32]
Expect:   3 GiB of weights for 1b in bfloat16, twice that in float32; a quiet machine.
Goal:     a share of the ideal of 0.85 for depth and 0.75 for width, prefill and decode.

Random weights: what a product costs does not depend on its numbers. Each pruned model runs in turn
with the whole one, in this process, so that a busy machine slows both. The share is the measured
speed-up over the ratio of FLOPs (prefill) and of bytes read (decode); see
`slimvlm.evaluation.bench`. Rows are JSON lines, then a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM

from shapes import SHAPES
from slimvlm.core.options import Axis, Workload
from slimvlm.evaluation.bench import SpeedUp, bench
from slimvlm.models.anatomy import read_anatomy
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.runs.tables import as_markdown
from slimvlm.scoring.score_model import score
from workloads import add_workload, workload_of

MEASURED = ("135m", "1b")
AXES: tuple[Axis, ...] = ("depth", "width")
HEADER = ["shape", "axis", "removed", "batch", *("prefill", "ideal", "share"),
          *("decode", "ideal", "share")]  # fmt: skip


def build(shape: str, dtype: torch.dtype) -> Any:
    """A model with random weights, the same at every call."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(SHAPES[shape], dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def row(shape: str, axis: str, removed: float, found: SpeedUp) -> list[str]:
    """A line of the table."""
    read = (found.prefill, found.prefill_ideal, found.prefill_share)
    written = (found.decode, found.decode_ideal, found.decode_share)
    numbers = (f"{value:.2f}" for value in (*read, *written))
    return [shape, axis, f"{removed:.1%}", str(found.batch_size), *numbers]


def measure(shape: str, axis: Axis, ratio: float, dtype: torch.dtype, work: Workload) -> Any:
    """Rows of one shape and axis."""
    whole, pruned = build(shape, dtype), build(shape, dtype)
    scores = score(pruned, (), "spacing" if axis == "depth" else "random")
    plan = make_plan(read_anatomy(pruned), scores, ratio, axis)
    prune_(pruned, plan)
    result = bench(pruned, whole, work, (f"{shape} {axis}", shape))
    print(json.dumps({"axis": axis, "plan": plan.summary(), **asdict(result)}), flush=True)
    return [row(shape, axis, plan.ratio, found) for found in result.speed_ups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=(*MEASURED, "both"), default="both")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add_workload(parser, 512, 16, (1, 16), 5)
    options = parser.parse_args()
    work = workload_of(options)
    about = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(about))
    shapes = MEASURED if options.shape == "both" else (options.shape,)
    dtype = getattr(torch, options.dtype)
    cells = [(shape, axis) for shape in shapes for axis in AXES]
    rows = [r for shape, axis in cells for r in measure(shape, axis, options.ratio, dtype, work)]
    print(as_markdown(HEADER, rows))


if __name__ == "__main__":
    main()
