"""Does each demo task measure what it is about? Scores of a demo model against its floors.

Command:  .venv/bin/python benchmarks/demo_floors.py --limit 300 --out runs/floors
Expect:   about 25 minutes on 2 cores with bfloat16 units; a stopped run goes on.

Floors of a task: luck (chance), the best constant answer to these questions (majority), and the
same model shown the pictures of other questions (blind; text tasks have none). A task passes if
the lower end of its 95 % Wilson interval lies above the highest of them.

--model FOLDER makes the same table for another model, for example another training seed.
--untouched sets perplexity against the language model that the demo model grew from: "build" takes
it from its package, anything else is a folder. With --tasks text_ppl nothing else is asked.
"""

from __future__ import annotations

import argparse
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import slimvlm as sv
from slimvlm.demo.build import make_base
from slimvlm.evaluation.results import Result, TaskResult
from slimvlm.models.devices import computes_bfloat16, device_named
from slimvlm.runs.tables import as_markdown

HEADER = ["task", "n", "score", "95 % low", "chance", "majority", "blind", "above floor"]


def wilson_low(percent: float, count: int, z: float = 1.96) -> float:
    """Lower end of the Wilson score interval, in percent."""
    p = percent / 100
    centre = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return 100 * (centre - spread) / (1 + z * z / count)


def floor_of(task: TaskResult) -> float:
    """The highest floor of a task, in percent."""
    return max(task.chance, task.majority or 0.0, task.blind or 0.0)


def row_of(name: str, task: TaskResult) -> list[str]:
    """A row of the table."""
    count = str(len(task.ids))
    if task.metric == "perplexity":
        return [name, count, f"{task.score:.2f}", "", "", "", "", ""]
    low = wilson_low(task.score, len(task.ids))
    blind = "" if task.blind is None else f"{task.blind:.1f}"
    floors = [f"{task.chance:.1f}", f"{task.majority:.1f}", blind]
    passes = "yes" if low > floor_of(task) else "no"
    return [name, count, f"{task.score:.1f}", f"{low:.1f}", *floors, passes]


def averages(result: Result) -> str:
    """AVG beside the average of the highest floors, or nothing without tasks that count."""
    counted = [task for task in result.tasks.values() if task.in_average]
    if not counted:
        return ""
    mean = sum(map(floor_of, counted)) / len(counted)
    return f"AVG {result.average:.1f}, average of the highest floors {mean:.1f}. "


def untouched_model(source: str, dtype: str) -> tuple[Any, Any]:
    """The language model before the demo's training, and its tokenizer."""
    if source != "build":
        return sv.load(source, dtype)
    model, tokenizer = make_base()
    return model.to(device_named(), getattr(torch, dtype)).eval(), tokenizer


def compare_perplexity(result: Result, source: str, options: argparse.Namespace, dtype: str) -> str:
    """Lines that set each perplexity against the untouched language model's."""
    names = [name for name, task in result.tasks.items() if task.metric == "perplexity"]
    model, tokenizer = untouched_model(source, dtype)
    log = options.out / "answers"
    found = sv.evaluate(
        model, tokenizer, ",".join(names), options.limit, name="untouched", log_folder=log
    )
    found.save(options.out / "untouched.json")
    lines = []
    for name in names:
        ours, theirs = result.tasks[name].score, found.tasks[name].score
        lines.append(
            f"{name}: {ours:.2f} against {theirs:.2f} of the untouched language model, "
            f"{ours / theirs:.3f}x.\n"
        )
    return "\n" + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="folder, hub id or demo")
    parser.add_argument("--tasks", default="demo")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--untouched", help="build, or a folder")
    parser.add_argument("--out", type=Path, default=Path("runs/floors"))
    options = parser.parse_args()
    dtype = "bfloat16" if computes_bfloat16(device_named()) else "float32"
    model, processor = sv.load(options.model, dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    result = sv.evaluate(
        model,
        processor,
        options.tasks,
        options.limit,
        name=options.model,
        log_folder=options.out / "answers",
        floors=True,
    )
    result.save(options.out / "floors.json")
    table = as_markdown(HEADER, [row_of(name, task) for name, task in result.tasks.items()])
    table += f"\n{averages(result)}{options.model}, {dtype}, "
    table += f"{platform.machine()}, torch {torch.__version__}, "
    table += f"transformers {transformers.__version__}.\n"
    if options.untouched:
        table += compare_perplexity(result, options.untouched, options, dtype)
    (options.out / "floors.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
