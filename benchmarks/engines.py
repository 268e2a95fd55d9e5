"""Speed-up over the ideal of pruned models, in engines that serve them.

Command:  PYTHONPATH=. .venv/bin/python benchmarks/engines.py [--shape demo|1b] [--engine vllm|gguf]
          [--clock wall|cpu]
Expect:   2 GiB for each of two processes, 5 GiB for 1b; minutes on a quiet machine. vLLM's program
          is on PATH.
Goal:     a share of the ideal of 0.85 for depth and 0.75 for width, in writing.

What is removed is drawn by chance, and so are the weights of 1b: speed depends on shapes alone.
Each pruned model runs in turn with the whole one, each in a process of its own; see
`tests.export.engines.bench_engine`. Where cores are shared, CPU time of one thread says
more than the wall clock (``OMP_NUM_THREADS=1 taskset -c 0``). Rows are JSON lines, then a Markdown
table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tests.export.engines import bench_engine
from transformers import LlamaConfig, LlamaForCausalLM

import slimvlm as sv
from shapes import SHAPES
from slimvlm.core.options import Axis
from slimvlm.data.chat import tokenizer_of
from slimvlm.evaluation.bench import SpeedUp
from slimvlm.models.anatomy import read_anatomy
from slimvlm.planning.make import make_plan
from slimvlm.pruning.cut import prune_
from slimvlm.runs.tables import as_markdown
from workloads import add_workload, workload_of

AXES: tuple[Axis, ...] = ("depth", "width")
HEADER = ["engine", "axis", "removed", "at a time", *("prefill", "ideal", "share"),
          *("decode", "ideal", "share")]  # fmt: skip


def built(shape: str) -> tuple[Any, Any]:
    """The demo model in float32, or a shape with random bfloat16 weights and the demo's words."""
    model, processor = sv.load("demo", dtype="float32", device="cpu")
    if shape == "demo":
        return model, processor
    words = tokenizer_of(processor)
    config = LlamaConfig(**{**SHAPES[shape].to_dict(), "vocab_size": len(words)})
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval(), words


def written(out: Path, shape: str, axis: Axis | None, ratio: float) -> tuple[str, float]:
    """A model, whole or pruned, in a folder; and the share that was removed."""
    model, processor = built(shape)
    plan = None
    if axis is not None:
        scores = sv.score(model, (), criterion="spacing" if axis == "depth" else "random")
        plan = make_plan(read_anatomy(model), scores, ratio, axis)
        prune_(model, plan)
    name = str(out / str(axis))
    sv.save(model, processor, name, plan)
    return name, 0.0 if plan is None else plan.ratio


def row(engine: str, axis: str, removed: float, found: SpeedUp) -> list[str]:
    """A line of the table."""
    read = (found.prefill, found.prefill_ideal, found.prefill_share)
    wrote = (found.decode, found.decode_ideal, found.decode_share)
    numbers = (f"{value:.2f}" for value in (*read, *wrote))
    return [engine, axis, f"{removed:.1%}", str(found.batch_size), *numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("demo", "1b"), default="demo")
    parser.add_argument("--axis", choices=AXES, nargs="+", default=AXES)
    parser.add_argument("--engine", choices=("vllm", "gguf"), default="vllm")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--ratio", type=float, default=0.3)
    add_workload(parser, 64, 16, (1, 4, 16), 3)
    options = parser.parse_args()
    work = workload_of(options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole, _ = written(Path(folder), options.shape, None, 0.0)
        for axis in options.axis:
            small, removed = written(Path(folder), options.shape, axis, options.ratio)
            found = bench_engine(options.engine, small, whole, work, clock=options.clock)
            print(json.dumps({"axis": axis, "removed": removed, **asdict(found)}), flush=True)
            rows += [row(found.device, axis, removed, each) for each in found.speed_ups]
    print(as_markdown(HEADER, rows))


if __name__ == "__main__":
    main()
