"""What each part of recovery is worth, and each axis: everything else alike, one thing changed.

Command:  .venv/bin/python benchmarks/ingredients.py --out runs/ingredients
          .venv/bin/python benchmarks/ingredients.py --out runs/axes --ratios 0.15 0.3 0.45 0.6
          --recipes "depth" "depth, trained" "both" "both, trained" "width" "width, trained" "auto"
Expect:   4 minutes for most recipes of a seed and ratio, 6 for those that walk first, on one of two
          busy cores with bfloat16 units. A stopped run goes on, and two that name other seeds or
          ratios may share a folder. Recipes that differ in training share a walk, whose time is
          that of the first of them.
Result:   results.md in the folder.

The demo model is walked on 64 conversations and trained on 96 others; each seed draws its own. Then
64 conversations that neither saw say how far the answers' distributions are from the original's
(KL), and the demo's tasks are asked: AVG-% and the logarithm of the perplexity of help texts.
"auto" trains nothing: it says which axis ``compress --axis auto`` goes on with, and after how long.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import slimvlm as sv
from retention import spread
from slimvlm.core.files import write_text
from slimvlm.data.samples import Sample
from slimvlm.evaluation.on_data import predictions_of
from slimvlm.evaluation.results import Result
from slimvlm.models.devices import computes_bfloat16, device_named
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import PLAN_FILE
from slimvlm.runs import stages
from slimvlm.runs.recipe import Recipe as Decided
from slimvlm.runs.recipe import decide
from slimvlm.runs.stages import Calibration
from slimvlm.runs.tables import as_markdown
from slimvlm.scoring.layerwise import Live
from slimvlm.scoring.stores import Memory

MODEL = "demo"
BEST: Mapping[str, Any] = {
    "train": "full",
    "loss": "kl+cosine",
    "batch_size": 2,
    "trainer": {"warmup_steps": 0.1},
    "epochs": 1,
}


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes:
        axis: What goes.
        local_steps: Steps on each layer; None for the default, 0 for refitted weights alone.
        train: Changes to `BEST`; None trains nothing.
    """

    axis: str = "width"
    local_steps: int | None = None
    train: Mapping[str, Any] | None = None


RECIPES = {
    "refitted": Recipe(local_steps=0),
    "refitted, trained": Recipe(local_steps=0, train={}),
    "width": Recipe(),
    "width, trained": Recipe(train={}),
    "width, trained in batches of 8": Recipe(train={"batch_size": 8}),
    "width, trained from answers (sft)": Recipe(train={"loss": "sft"}),
    "width, trained from answers as well": Recipe(train={"loss": "sft+kl+cosine"}),
    "width, trained with LoRA from answers as well": Recipe(
        train={"train": "lora", "loss": "sft+kl+cosine"}
    ),
    "width, trained with LoRA": Recipe(train={"train": "lora"}),
    "width, trained as the study's chart says": Recipe(
        train={"train": "lora", "loss": "sft+hidden"}
    ),
    "width, trained three times as long": Recipe(train={"epochs": 3}),
    "depth": Recipe("depth"),
    "depth, trained": Recipe("depth", train={}),
    "both": Recipe("both"),
    "both, trained": Recipe("both", train={}),
}
AUTO = "auto"
AXES = ("depth", "depth, trained", "both", "both, trained")
INGREDIENTS = [name for name in RECIPES if name not in AXES]


class Sitting:
    """One seed: its conversations, and models that several recipes start from."""

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self.seed, self.options = seed, options
        self.dtype = "bfloat16" if computes_bfloat16(device_named()) else "float32"
        drawn = random.Random(seed).sample(
            sv.load_samples(MODEL), 64 + options.samples + options.training
        )
        self.unseen, self.shown = drawn[:64], drawn[64 : 64 + options.samples]
        self.training = drawn[64 + options.samples :]

    def measure(self, name: str, ratio: float) -> dict[str, Any]:
        """Make a model and measure it; what was measured before is read back."""
        folder = self.options.out / f"{ratio:g} {self.seed}"
        path = folder / f"{name}.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            found = self._auto(ratio) if name == AUTO else self._made(RECIPES[name], ratio, folder)
            write_text(path, json.dumps(found, indent=1) + "\n")
            print(f"{ratio:.0%}, seed {self.seed}, {name}: {found}", flush=True)
        known: dict[str, Any] = json.loads(path.read_text())
        return known

    def _made(self, recipe: Recipe, ratio: float, folder: Path) -> dict[str, Any]:
        started = time.monotonic()
        model, processor, plan = self._walked(recipe, ratio, folder)
        if recipe.train is not None:
            self._train(model, processor, plan, self.training, recipe)
        return {**self._judged(model, processor), "seconds": time.monotonic() - started}

    def _walked(self, recipe: Recipe, ratio: float, folder: Path) -> tuple[Any, Any, Plan]:
        """A walked model; recipes that differ in training alone share it."""
        kept = folder / f"walked {recipe.axis} {ratio:g} {recipe.local_steps}"
        if not kept.exists():
            model, processor = sv.load(MODEL, self.dtype)
            plan = self._walk(model, processor, recipe, ratio)
            sv.save(model, processor, kept, plan)
        return *sv.load(kept, self.dtype), Plan.load(kept / PLAN_FILE)

    def _decided(self, axis: str, ratio: float, **options: Any) -> Decided:
        given = {"axis": axis, "ratio": ratio, "samples": len(self.shown), "recover": None}
        config = sv.CompressConfig(data=MODEL, **given | options)
        return decide(MODEL, config, sv.anatomy(MODEL))

    def _walk(self, model: Any, processor: Any, recipe: Recipe, ratio: float) -> Plan:
        request = self._decided(recipe.axis, ratio, local_steps=recipe.local_steps)
        calibration = Calibration(processor, self.shown, request.hold_out)
        scores = list(stages.calibrate(request, model, calibration).values())
        walked = stages.walk(request, Live(model), Memory(), model.device, calibration, scores)
        walked.apply_(model)
        return walked.plan

    def _train(
        self, model: Any, processor: Any, plan: Plan, samples: Sequence[Sample], recipe: Recipe
    ) -> None:
        teacher, _ = sv.load(MODEL, self.dtype)
        config = sv.RecoverConfig(**{**BEST, **(recipe.train or {})}, seed=self.seed)
        sv.recover(model, teacher, samples, config, processor, plan=plan)

    def _judged(self, model: Any, processor: Any) -> dict[str, float]:
        original, _ = sv.load(MODEL, self.dtype)
        kept = predictions_of(original, processor, self.unseen)
        apart = sv.evaluate_data(model, processor, self.unseen, kept).figures.divergence
        result = sv.evaluate(model, processor, "demo", self.options.limit)
        text = math.log(result.tasks["text_ppl"].score)
        return {"kl": apart.value, "avg": result.average, "text": text}

    def _auto(self, ratio: float) -> dict[str, Any]:
        """Losses of the tries along each axis, and their time."""
        started = time.monotonic()
        model, processor = sv.load(MODEL, self.dtype)
        request = self._decided(AUTO, ratio, recover=BEST)
        calibration = Calibration(processor, self.shown, request.hold_out)
        scores = list(stages.calibrate(request, model, calibration).values())
        losses = stages.try_axes(request, model, calibration, scores, self.training)
        return {"losses": losses, "seconds": time.monotonic() - started}


def rows_of(
    cells: Mapping[tuple[str, float], Sequence[Mapping[str, Any]]], original: float
) -> Iterator[list[str]]:
    """A row for each recipe and ratio, from its results by seed."""
    for (name, ratio), found in cells.items():
        minutes = f"{statistics.fmean(each['seconds'] for each in found) / 60:.1f}"
        if name == AUTO:
            said = "; ".join(_ranked(each["losses"]) for each in found)
            yield [f"{ratio:.0%}", name, said, "", "", "", minutes]
            continue
        shares = [100 * each["avg"] / original for each in found]
        yield [
            *(f"{ratio:.0%}", name, spread((each["kl"] for each in found), "{:.3f}")),
            *(", ".join(f"{share:.1f}" for share in shares), spread(shares, "{:.1f}")),
            *(spread((each["text"] for each in found), "{:.2f}"), minutes),
        ]


def _ranked(losses: Mapping[str, float]) -> str:
    return " < ".join(
        f"{axis} {losses[axis]:.3f}" for axis in sorted(losses, key=losses.__getitem__)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ingredients"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=INGREDIENTS, choices=[*RECIPES, AUTO])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--training", type=int, default=96)
    parser.add_argument("--limit", type=int, default=20)
    options = parser.parse_args()
    original = average_of_original(options)
    cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for seed in options.seeds:
        sitting = Sitting(seed, options)
        for ratio, name in product(options.ratios, options.recipes):
            cells[name, ratio].append(sitting.measure(name, ratio))
    header = ["ratio", "recipe", "KL", "AVG-% by seed", "AVG-%", "log perplexity", "minutes"]
    text = as_markdown(header, list(rows_of(cells, original)))
    write_text(options.out / "results.md", text)
    print(text)


def average_of_original(options: argparse.Namespace) -> float:
    """AVG of the unpruned model; what was measured before is read back."""
    path = options.out / "original.json"
    if not path.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        sv.evaluate(*sv.load(MODEL), "demo", options.limit).save(path)
    return Result.load(path).average


if __name__ == "__main__":
    main()
