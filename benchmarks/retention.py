"""What stays without any training: our recipes against LLM-Pruner's and ShortGPT's.

Command:  .venv/bin/python benchmarks/retention.py --out runs/retention
Expect:   hours: the 24 cells of "width" and "width, no local steps" took two busy cores with
          bfloat16 units 50 minutes. A stopped run goes on, and two that name other recipes, ratios
          or seeds may share a folder.

Every recipe prunes the demo model at each ratio with each calibration seed (other conversations),
then answers the same questions. --model text prunes the untouched SmolLM2-135M instead, calibrated
on passages of Python's docstrings, and measures perplexity on Python's help texts. With --divide 8
it does so in another form, whose matrices are smaller. --model FOLDER repeats the demo's table on
another training seed.

A recipe is a `slimvlm.PruneConfig`, so each row is also a command line: ``slimvlm prune demo --data
demo`` with the options of `RECIPES`. "Lost" is AVG lost, or the logarithm of the perplexity gained;
"of baseline" divides it by what the better baseline loses at that ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import slimvlm as sv
from slimvlm.core.errors import ImpossiblePlanError
from slimvlm.core.files import write_text
from slimvlm.data.general import general_samples
from slimvlm.data.roles import IGNORE
from slimvlm.evaluation.results import Result
from slimvlm.models.devices import computes_bfloat16, device_named
from slimvlm.models.parts import Parts
from slimvlm.pruning.walk.result import Walked
from slimvlm.runs import stages
from slimvlm.runs.recipe import Recipe, decide
from slimvlm.runs.stages import Calibration
from slimvlm.runs.tables import as_markdown
from slimvlm.scoring.layerwise import Live
from slimvlm.scoring.stores import Memory
from slimvlm.scoring.unit_scores import Scores

BASELINES = ("ShortGPT", "LLM-Pruner")
RECIPES: dict[str, dict[str, Any]] = {
    "ShortGPT": {"axis": "depth", "criterion": ("block_influence",), "repair": "none"},
    "LLM-Pruner": {
        "axis": "width",
        "criterion": ("taylor",),
        "gradient": "batch",
        "allocation": "protect",
        "repair": "none",
    },
    "depth": {"axis": "depth", "criterion": ("block_influence",), "repair": "auto"},
    "width": {"axis": "width", "criterion": ("obs",), "repair": "auto"},
    "both": {"axis": "both", "criterion": ("block_influence", "obs"), "repair": "auto"},
}
"""The baselines and what `slimvlm compress` does along each axis; options that are not named have
their defaults."""
MAIN = list(RECIPES)
_CHANGES: dict[str, dict[str, Any]] = {
    "one-shot": {"local_steps": 0},
    "no local steps": {"local_steps": 0},
    "no repair": {"repair": "none"},
    "no repair, activation": {"repair": "none", "criterion": ("activation",)},
    "no repair, taylor": {"repair": "none", "criterion": ("taylor",)},
    "activation": {"criterion": ("activation",)},
    "gate": {"criterion": ("gate",)},
    "wanda": {"criterion": ("wanda",)},
    "flap": {"criterion": ("flap",)},
    "uniform": {"allocation": "uniform"},
    "image 0.1": {"token_weights": "image=0.1"},
    "image 0": {"token_weights": "image=0"},
    "data alone": {"general_text": 0.0},
    "data alone, no local steps": {"general_text": 0.0, "local_steps": 0},
    "general text 0.1, no local steps": {"general_text": 0.1, "local_steps": 0},
    "general text 0.3, no local steps": {"general_text": 0.3, "local_steps": 0},
    "answer 3": {"token_weights": "image=0.3,prompt=0.3,answer=1"},
}
ONE_SHOT = ("width, one-shot",)
"""Units chosen on what the original gives, for the widths that the walk settles on."""
RECIPES |= {f"width, {name}": {**RECIPES["width"], **new} for name, new in _CHANGES.items()}
TASKS = "name,object_letter,presence,locate,relation,read_digits,list_objects,text_odd,text_ppl"
POOL = 4000
"""Demo conversations that calibration seeds choose from."""


@dataclass(frozen=True)
class Subject:
    """What is pruned: a model and the data to calibrate it on."""

    model: Any
    processor: Any
    tasks: str
    samples: list[Any]


class TextCalibration(Calibration):
    """Plain passages, for a language model that is not asked to chat."""

    @property
    def fitted(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All but every fourth passage."""
        return encode(self.processor, [s for i, s in enumerate(self.samples, 1) if i % 4])

    @property
    def held_out(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Every fourth passage."""
        return encode(self.processor, self.samples[3::4])


def encode(tokenizer: Any, passages: Sequence[Any]) -> list[dict[str, Any]]:
    """Batches of four passages of similar length; every token but padding is labelled."""
    alike = sorted(passages, key=len)
    found = []
    for start in range(0, len(alike), 4):
        inputs = dict(tokenizer(alike[start : start + 4], return_tensors="pt", padding=True))
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
        found.append({**inputs, "labels": labels})
    return found


def demo_subject(name: str, dtype: str) -> Subject:
    model, processor = sv.load(name, dtype)
    return Subject(model, processor, TASKS, sv.load_samples("demo", limit=POOL))


def text_subject(dtype: str, divisor: int) -> Subject:
    from slimvlm.demo.build import make_base
    from slimvlm.demo.questions import load_passages

    model, tokenizer = make_base()
    tokenizer.padding_side = "right"
    passages: list[Any] = [text for _, text in load_passages() if len(text) > 200]
    model = model.to(device_named(), getattr(torch, dtype)).eval()
    for layer in Parts(model).layers:
        divide_(layer, divisor)
    return Subject(model, tokenizer, "text_ppl", passages)


@torch.no_grad()
def divide_(layer: torch.nn.Module, divisor: int) -> None:
    """Divide all matrices of a layer but v_proj and up_proj, and multiply its norms.

    The layer computes the same, by a power of two to the last bit: queries, keys and gates stay as
    they are, values and up become as many times larger as o_proj and down_proj smaller.
    """
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 1:
            parameter.mul_(divisor)
        elif "v_proj" not in name and "up_proj" not in name:
            parameter.div_(divisor)


class Sitting:
    """One calibration seed: its samples, and scores that all ratios share."""

    def __init__(self, subject: Subject, seed: int, options: argparse.Namespace) -> None:
        self._subject, self._seed, self._options = subject, seed, options
        self._shown = random.Random(seed).sample(subject.samples, options.samples)
        self._scores: dict[Any, list[Scores]] = {}

    def measure(self, recipe: str, ratio: float) -> Result | None:
        """Prune a copy by a recipe and ask it; what was measured before is read back.

        Returns:
            None if the recipe cannot reach the ratio.
        """
        subject, options = self._subject, self._options
        name = f"{recipe} {ratio:g} {self._seed}"
        path = options.out / Path(options.model).name / f"{name.replace(' ', '_')}.json"
        if path.exists():
            return Result.load(path)
        config = sv.PruneConfig(
            ratio=ratio, data="demo", samples=options.samples, **RECIPES[recipe]
        )
        kind = TextCalibration if subject.tasks == "text_ppl" else Calibration
        request = decide(options.model, config)
        shown = self._shown
        if kind is Calibration:
            share = request.general_text or 0.0
            count = round(len(shown) * share / (1 - share))
            usual = round(statistics.median(sample.tokens for sample in shown)) or None
            shown = [*shown, *general_samples(count, self._seed, None, usual)]
        calibration = kind(subject.processor, shown, request.hold_out)
        model = copy.deepcopy(subject.model)
        try:
            walked = self._walked(recipe, request, model, calibration)
        except ImpossiblePlanError as error:
            print(f"{name}: {error}")
            return None
        walked.apply_(model)
        result = sv.evaluate(model, subject.processor, subject.tasks, options.limit, name=name)
        print(f"{name}: {walked.summary()}")
        print(
            f"    {json.dumps({k: round(t.score, 1) for k, t in result.tasks.items()})}", flush=True
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
        return result

    def _walked(self, recipe: str, request: Recipe, model: Any, calibration: Any) -> Walked:
        scores = self._scored(request, calibration)
        source = Live(model)
        walked = stages.walk(request, source, Memory(), model.device, calibration, scores)
        if recipe not in ONE_SHOT:
            return walked
        key = ("one-shot", request.hold_out)
        if key not in self._scores:
            self._scores[key] = [sv.score(self._subject.model, calibration.fitted, "obs")]
        kv_heads = len(walked.plan.kv_groups[walked.plan.layers[0]])
        plan = sv.make_plan(
            sv.anatomy(model), self._scores[key], request.size, "width", kv_heads=kv_heads
        )
        return stages.walk(request, source, Memory(), model.device, calibration, plan=plan)

    def _scored(self, request: Recipe, calibration: Calibration) -> list[Scores]:
        of_data = (request.gradient, request.token_weights, request.general_text)
        key = (request.scored_by, *of_data, request.hold_out)
        if key not in self._scores:
            found = stages.calibrate(request, self._subject.model, calibration)
            self._scores[key] = list(found.values())
        return self._scores[key]


def measure_original(subject: Subject, options: argparse.Namespace) -> Result:
    """Ask the unpruned model; what was measured before is read back."""
    path = options.out / Path(options.model).name / "original.json"
    if not path.exists():
        result = sv.evaluate(
            subject.model, subject.processor, subject.tasks, options.limit, name="original"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
    return Result.load(path)


def lost(result: Result, original: Result, task: str) -> float:
    """AVG points, or the logarithm of perplexity, that a pruned model lost."""
    if task == "AVG":
        return original.average - result.average
    return math.log(result.tasks[task].score / original.tasks[task].score)


def spread(values: Iterable[float], pattern: str) -> str:
    """Mean and the 95 % t-interval over seeds."""
    values = list(values)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return pattern.format(mean)
    t = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return f"{pattern.format(mean)} ± {pattern.format(half)}"


def rows_of(
    found: dict[str, list[Result]], original: Result, figures: list[str]
) -> Iterator[list[str]]:
    """A row for each recipe at one ratio, from its results by seed."""
    means = {
        (recipe, figure): statistics.fmean(lost(r, original, figure) for r in results)
        for recipe, results in found.items()
        for figure in figures
    }
    for recipe, results in found.items():
        row = [recipe, f"{1 - results[0].backbone_params / original.backbone_params:.1%}"]
        for figure in figures:
            if figure == "AVG":
                row.append(spread((r.average for r in results), "{:.1f}"))
            else:
                row.append(spread((math.log(r.tasks[figure].score) for r in results), "{:.2f}"))
            best = min((means[b, figure] for b in BASELINES if b in found), default=math.nan)
            row.append(f"{means[recipe, figure] / best:.2f}")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, text, or another demo's folder")
    parser.add_argument("--divide", type=int, default=1, help="of text: see `divide_`")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15, 0.3, 0.45, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=MAIN, choices=RECIPES)
    parser.add_argument("--out", type=Path, default=Path("runs/retention"))
    options = parser.parse_args()
    dtype = "bfloat16" if computes_bfloat16(device_named()) else "float32"
    is_text = options.model == "text"
    if options.divide > 1:  # cells of the other form are others
        options.out /= f"divided-{options.divide}"
    subject = text_subject(dtype, options.divide) if is_text else demo_subject(options.model, dtype)
    figures = ["text_ppl"] if is_text else ["AVG", "text_ppl"]
    original = measure_original(subject, options)
    cells: dict[tuple[float, str], list[Result]] = defaultdict(list)
    for seed in options.seeds:
        sitting = Sitting(subject, seed, options)
        for recipe, ratio in product(options.recipes, options.ratios):
            if (result := sitting.measure(recipe, ratio)) is not None:
                cells[ratio, recipe].append(result)
    rows = []
    for ratio in options.ratios:
        found = {name: cells[ratio, name] for name in options.recipes if (ratio, name) in cells}
        rows += [[f"{ratio:.0%}", *row] for row in rows_of(found, original, figures)]
    header = ["ratio", "recipe", "removed"]
    for figure in figures:
        header += ["AVG" if figure == "AVG" else "log perplexity", "lost, of baseline"]
    dense = ", ".join(
        f"AVG {original.average:.1f}"
        if figure == "AVG"
        else f"log perplexity {math.log(original.tasks[figure].score):.2f}"
        for figure in figures
    )
    text = (
        f"Unpruned: {dense}. {options.limit} questions a task, {options.samples} calibration "
        f"samples, {len(options.seeds)} seeds (mean ± 95 % interval over seeds), {dtype}.\n\n"
        + as_markdown(header, rows)
    )
    write_text(options.out / f"{Path(options.model).name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
