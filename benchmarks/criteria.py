"""What each criterion keeps of the demo model without any training.

Command:  .venv/bin/python benchmarks/criteria.py --limit 40 --out runs/criteria
Expect:   about 15 minutes on 2 cores with bfloat16 units; finished rows are not asked again.

Scores are calibrated on the same 64 demo conversations. AVG-% is relative to the unpruned model on
the same questions, with a paired bootstrap interval; "above chance" takes the chance levels off.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import slimvlm as sv
from slimvlm.models.devices import computes_bfloat16, device_named
from slimvlm.runs.tables import as_markdown

SCORED = {
    "depth": (
        ("block_influence", {}),
        ("angular", {}),
        ("magnitude", {}),
        ("spacing", {}),
        ("random", {}),
    ),
    "width": (
        ("activation", {}),
        ("gate", {}),
        ("taylor", {"gradient": "per_sample"}),
        ("taylor", {"gradient": "batch"}),
        ("taylor_second", {}),
        ("magnitude", {}),
        ("random", {}),
    ),
}
FURTHER = ((0.6, "width", "activation"), (0.6, "depth", "block_influence"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3])
    parser.add_argument("--out", type=Path, default=Path("runs/criteria"))
    options = parser.parse_args()
    dtype = "bfloat16" if computes_bfloat16(device_named()) else "float32"
    model, processor = sv.load("demo", dtype)
    anatomy, samples = sv.anatomy(model), sv.load_samples("demo", limit=64)
    log = options.out / "answers"
    original = sv.evaluate(model, processor, "demo", options.limit, log_folder=log)
    rows = []
    for axis, criteria in SCORED.items():
        for criterion, how in criteria:
            batches = sv.calibration_batches(processor, samples)
            scores = sv.score(model, batches, criterion, **how)
            more = [r for r, a, c in FURTHER if (a, c) == (axis, criterion)]
            for ratio in (*options.ratios, *more):
                plan = sv.make_plan(anatomy, scores, ratio, axis)
                pruned = copy.deepcopy(model)
                sv.prune_(pruned, plan)
                result = sv.evaluate(pruned, processor, "demo", options.limit, log_folder=log)
                kept = result.retention(original)
                rows.append(
                    [
                        axis,
                        " ".join([criterion, *how.values()]),
                        f"{plan.ratio:.1%}",
                        f"{result.average:.1f}",
                        f"{kept.percent:.1f} [{kept.low:.1f}, {kept.high:.1f}]",
                        f"{kept.above_chance:.1f}",
                        f"{result.tasks['text_ppl'].score:.0f}",
                    ]
                )
                print(rows[-1], flush=True)
    header = ["axis", "criterion", "removed", "AVG", "AVG-% [95 %]", "above chance", "perplexity"]
    dense = f"Unpruned: AVG {original.average:.1f}, perplexity "
    dense += (
        f"{original.tasks['text_ppl'].score:.1f}. {options.limit} questions a task, {dtype}.\n\n"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "criteria.md").write_text(dense + as_markdown(header, rows))
    print(dense + as_markdown(header, rows))


if __name__ == "__main__":
    main()
