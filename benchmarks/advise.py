"""What `advise` and `compress --dry-run` say of memory and time, against what `compress` takes.

Command:  .venv/bin/python benchmarks/advise.py [--shapes qwen2 gemma3 demo]
          .venv/bin/python benchmarks/advise.py --pretend [--card-gib 2.5] [--conversations 16]
Expect:   about ten minutes on two cores with bfloat16 units.

For each shape of benchmarks/walk.py and its 64 conversations of 180 tokens, `compress` at 20 %
width by a recipe, in a fresh process: the walk by obs, with two local steps; taylor; and a short
LoRA training with the default loss, and one of all weights. Peaks are ru_maxrss, or on an
accelerator what tensors held there. Trainings take three steps: longer ones take no more memory.
With ``--pretend`` that is the card that tests pretend, whose times mean nothing.

Times are of the processor, of all threads together, which a busy machine hardly changes: with
OMP_NUM_THREADS=1 they are those of a clock. What is said is work over the speed of a matrix
product, which is timed in the same way.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import slimvlm as sv
from own_process import card_peak, measured
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.models.load import computes_bfloat16
from slimvlm.runs.advise import dry_run
from slimvlm.runs.cost import device_flops
from slimvlm.runs.tables import as_markdown
from walk import CONVERSATIONS, RATIO, SHAPES, write, write_data

LORA = RecoverConfig(train="lora", loss="sft+hidden", max_steps=3)
RECIPES = {
    "obs": {"local_steps": 2},
    "taylor": {"criterion": ("taylor",), "repair": "none"},
    "training": {"criterion": ("magnitude",), "repair": "none", "recover": LORA},
    "full": {"criterion": ("magnitude",), "repair": "none", "recover": replace(LORA, train="full")},
}
"""Options of `compress` by name; each is about one part of a run."""


def config_of(recipe: str, data: Path, conversations: int) -> CompressConfig:
    """What is measured."""
    options = {"ratio": RATIO, "axis": "width", "data": str(data), "samples": conversations // 2}
    return CompressConfig(**options, report_samples=conversations // 8, **RECIPES[recipe])


def speed_of_processor(kind: torch.dtype) -> float:
    """FLOP a second of processor time, in a matrix product."""
    matrix = torch.ones(1024, 1024, dtype=kind)
    matrix @ matrix
    start = time.process_time()
    for _ in range(20):
        matrix @ matrix
    return 20 * 2 * 1024**3 / (time.process_time() - start)


def of_processor(hours: float, kind: torch.dtype) -> float:
    """Hours by a clock as seconds of the processor."""
    cpu = torch.device("cpu")
    if not computes_bfloat16(cpu):
        kind = torch.float32
    return 3600 * hours * device_flops(cpu, kind) / speed_of_processor(kind)


def said(model: Path, config: CompressConfig) -> tuple[float, float]:
    """What the estimate is, in GiB and seconds."""
    found = dry_run(str(model), config, say=lambda line: None)
    cost, kind = found.cost, getattr(torch, found.dtype)
    peak = max(cost.calibration_bytes, cost.training_bytes) / 2**30
    pruning = of_processor(cost.pruning_hours, kind)
    return peak, pruning + of_processor(cost.training_hours, torch.bfloat16)


def run(shape: str, recipe: str, folder: Path, conversations: int) -> list[tuple[float, float]]:
    """What is said and what it takes, in GiB and seconds; in a process of its own."""
    model = write(shape, folder)
    config = config_of(recipe, write_data(model, folder, conversations), conversations)
    told = said(model, config)
    start = time.process_time()
    sv.compress(str(model), config, folder / "run", force=True, say=lambda line: None)
    seconds = time.process_time() - start
    peak = card_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [told, (peak, seconds)]


def main() -> None:
    """Measure one recipe, or all of all shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, "demo"])
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "walk")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--pretend", action="store_true", help="on the card that tests pretend")
    parser.add_argument("--card-gib", type=float, default=0.0, help="how large that card is")
    parser.add_argument("--one", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    count = options.conversations
    if options.one:
        print(json.dumps(run(options.shapes[0], options.recipes[0], options.folder, count)))
        return
    rows, units = [], ("GiB",) if options.pretend else ("GiB", "s")
    for shape in options.shapes:
        for recipe in options.recipes:
            words = ["--one", "--folder", str(options.folder), "--shapes", shape]
            words += ["--recipes", recipe, "--conversations", str(count)]
            found = measured(__file__, words, options.pretend, options.card_gib)
            row = [shape, recipe]
            for _, a, b, places in zip(units, *found, (2, 0), strict=False):
                row += [f"{a:.{places}f}", f"{b:.{places}f}", f"{a / b - 1:+.0%}"]
            rows.append(row)
            print(" ".join(row), flush=True)
    header = [word for unit in units for word in (f"said, {unit}", f"taken, {unit}", "")]
    print(as_markdown(["shape", "recipe", *header], rows))


if __name__ == "__main__":
    main()
