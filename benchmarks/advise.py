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
OMP_NUM_THREADS=1 they are those of a clock. What is said is of one core, times the cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import slimvlm as sv
from own_process import card_peak, measured
from slimvlm.core.options import CompressConfig, RecoverConfig
from slimvlm.models.devices import usable_cores
from slimvlm.runs.advise import dry_run
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
    return CompressConfig(**options, test_samples=conversations // 8, **RECIPES[recipe])


def said(model: Path, config: CompressConfig) -> tuple[float, float]:
    """What the estimate is, in GiB and seconds."""
    found = dry_run(str(model), config, say=lambda line: None)
    cost = found.cost
    peak = max(cost.calibration_bytes, cost.training_bytes) / 2**30
    return peak, 3600 * (cost.pruning_hours + cost.training_hours) * usable_cores()


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
