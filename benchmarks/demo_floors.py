"""Does each demo task measure sight? Scores of the demo model against its blind floor.

Command:  .venv/bin/python benchmarks/demo_floors.py --limit 300 --out runs/floors
Expect:   about 25 minutes on 2 cores with bfloat16 units; a stopped run goes on.

Blind means: the same model, shown the pictures of other questions. A task passes if the lower end
of its 95 % Wilson interval lies above the blind score. Text tasks have no pictures; their floor is
chance.
"""

from __future__ import annotations

import argparse
import math
import platform
from pathlib import Path

import torch
import transformers

import slimvlm as sv
from slimvlm.checkpoint import default_device
from slimvlm.recovery import computes_bfloat16
from slimvlm.summary import as_markdown


def wilson_low(percent: float, count: int, z: float = 1.96) -> float:
    """Lower end of the Wilson score interval, in percent."""
    p = percent / 100
    centre = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return 100 * (centre - spread) / (1 + z * z / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/floors"))
    options = parser.parse_args()
    dtype = "bfloat16" if computes_bfloat16(default_device()) else "float32"
    model, processor = sv.load(options.model, dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    seeing, blind = (
        sv.evaluate(
            model,
            processor,
            "demo",
            options.limit,
            name=options.model,
            blind=is_blind,
            log_folder=options.out / "answers",
        )
        for is_blind in (False, True)
    )
    seeing.save(options.out / "seeing.json")
    blind.save(options.out / "blind.json")
    rows = []
    for name, task in seeing.tasks.items():
        if task.metric == "perplexity":
            rows.append([name, str(len(task.ids)), f"{task.score:.2f}", "", "", "", ""])
            continue
        floor = task.chance if name.startswith("text_") else blind.tasks[name].score
        low = wilson_low(task.score, len(task.ids))
        passes = "yes" if low > floor else "no"
        figures = [f"{value:.1f}" for value in (task.score, low, floor)]
        rows.append([name, str(len(task.ids)), *figures, f"{task.chance:.0f}", passes])
    header = ["task", "n", "score", "95 % low", "blind floor", "chance", "above floor"]
    table = as_markdown(header, rows)
    table += f"\nAVG {seeing.average:.1f}, blind {blind.average:.1f}. {dtype}, "
    table += f"{platform.machine()}, torch {torch.__version__}, "
    table += f"transformers {transformers.__version__}.\n"
    (options.out / "floors.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
