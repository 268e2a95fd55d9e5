"""What a study's models keep by questions that nobody had seen when its recipes were chosen.

Command:  .venv/bin/python benchmarks/fresh_questions.py --study studies/goal.yaml --out runs/goal
Expect:   a minute a model; a stopped run goes on.

The study must be done, with ``keep_checkpoints: true``; a cell whose model is gone is left out, and
said. Each model is asked as many questions of each task again, those which come after the study's.
Prints AVG-% of each seed, their mean with its 95 % t-interval, and log perplexity.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from retention import spread
from slimvlm import evaluate, load
from slimvlm.data.samples import Question, Task
from slimvlm.evaluation.results import Result
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.runs.study import prepared
from slimvlm.runs.study.config import StudyConfig, read_study
from slimvlm.runs.study.schedule import CHECKPOINT, Cache
from slimvlm.runs.tables import as_markdown


def next_questions(task: Task, asked: int) -> Task:
    """The same task from question number ``asked`` on."""

    def loaded(limit: int | None) -> Sequence[Question]:
        return task.load(None if limit is None else asked + limit)[asked:]

    return replace(task, load=loaded)


def answered(study: StudyConfig, model: str | Path, dtype: str, out: Path) -> Result:
    """What a model says to the questions after the study's, from disk if it was asked before."""
    if not out.is_file():
        tasks = [next_questions(task, study.limit) for task in find_tasks(study.tasks)]
        network, processor = load(str(model), dtype)
        evaluate(network, processor, tasks, study.limit, name=out.stem).save(out)
    return Result.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    study, cache = read_study(options.study), Cache(options.out)
    if study.limit is None:
        parser.error("the study asks all questions: there are none after them")
    fresh = options.out / "fresh"
    fresh.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {}
    for stages in prepared(study, print)[1].cells:
        cell = stages.cell
        made = stages.recover or stages.prune
        kept, dtype = cache.path(made, CHECKPOINT), cell.options.dtype
        if not kept.is_dir():
            print(f"left out, its model is gone: {cell.label}")
            continue
        original = answered(study, cell.model, dtype, fresh / f"{stages.original.name}.json")
        result = answered(study, kept, dtype, fresh / f"{stages.evaluate.name}.json")
        (text,) = (task.score for task in result.tasks.values() if task.metric == "perplexity")
        percent = result.retention(original).percent
        but_seed = cell.label.removesuffix(f" seed {cell.seed}")
        found.setdefault(but_seed, []).append((percent, math.log(text)))
    rows = []
    for label, by_seed in found.items():
        percents, losses = zip(*by_seed, strict=True)
        each = ", ".join(f"{percent:.1f}" for percent in percents)
        rows.append([label, each, spread(percents, "{:.1f}"), spread(losses, "{:.2f}")])
    print(as_markdown(["cell", "AVG-% by seed", "mean", "log perplexity"], rows))


if __name__ == "__main__":
    main()
