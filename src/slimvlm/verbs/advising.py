"""Which recipe for which budget, without running it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from slimvlm.config import Dtype
from slimvlm.errors import ConfigError
from slimvlm.verbs.options import Model
from slimvlm.verbs.printing import console, print_json

if TYPE_CHECKING:
    from slimvlm.advice import Advice


def advise(
    model: Model,
    ratio: float | None = None,
    target_params: str | None = None,
    target_memory: str | None = None,
    target_latency: float | None = None,
    data: bool = False,
    no_data: bool = False,
    gpu: bool = False,
    no_gpu: bool = False,
    samples: int | None = None,
    dtype: Dtype = "auto",
    json: bool = False,
) -> None:
    """Say which recipe fits a budget, what it should keep, what it costs, and the command.

    Reads the configuration only, and runs nothing. Rules and numbers are those of recipes.yaml.

    Args:
        model: Folder, hub id, or demo.
        ratio: Share of the backbone's parameters to remove.
        target_params: Instead: parameters of the whole smaller model, such as 5B or 90M.
        target_memory: Instead: memory of its weights, such as 8GiB.
        target_latency: Instead: time to read a question, as a share of the original's.
        data: There are conversations to train on; so it is unless --no-data is given.
        no_data: There are none.
        gpu: There is a GPU; by default this machine is looked at.
        no_gpu: There is none.
        samples: How many conversations there are; by default as many as the study had.
        dtype: Data type of the weights (bfloat16 for auto).
        json: Print JSON.
    """
    from slimvlm.advice import advise as find

    for name, yes, no in (("data", data, no_data), ("gpu", gpu, no_gpu)):
        if yes and no:
            raise ConfigError(f"--{name} and --no-{name} contradict each other")
    advice = find(
        model,
        ratio=ratio,
        target_params=target_params,
        target_memory=target_memory,
        target_latency=target_latency,
        data=not no_data,
        gpu=True if gpu else False if no_gpu else None,
        samples=samples,
        dtype="bfloat16" if dtype == "auto" else dtype,
    )
    if json:
        print_json(asdict(advice))
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for row in _rows(advice):
        table.add_row(*row)
    console().print(table)
    print(f"\n{advice.command}")


def _rows(advice: Advice) -> list[list[str]]:
    """A name and its value in every row."""
    from slimvlm.summary import size

    recipe, cost = advice.recipe, advice.cost
    before, after = advice.params
    held, smaller = advice.weight_bytes
    learns = f"{recipe.train}, loss {recipe.loss}" if recipe.train else "nothing"
    kept = [
        f"{row.percent:.1f} % ({row.model}{', this model' if row.same else ''}; {row.source})"
        for row in advice.expected
    ]
    rows = [
        ["remove", f"{advice.ratio:.1%} of the backbone, along {recipe.axis}"],
        ["train", learns],
        ["parameters", f"{after / 1e9:.3g} B of {before / 1e9:.3g} B"],
        ["weights", f"{size(smaller)} of {size(held)}"],
        *(["expected AVG-%" if i == 0 else "", line] for i, line in enumerate(kept)),
        *([] if kept else [["expected AVG-%", "not measured for this recipe at this ratio"]]),
    ]
    if advice.latency is not None:
        rows.append(["time to read a question", f"{advice.latency:.0%} of the original's"])
    rows.append(["memory of scoring", f"about {size(cost.calibration_bytes)}"])
    if recipe.train:
        rows += [
            ["training data", f"{cost.samples:,} conversations"],
            ["memory of training", f"about {size(cost.training_bytes)}"],
            ["time of training", f"about {cost.training_hours:.2g} h"],
        ]
    rows += [["why" if i == 0 else "", note] for i, note in enumerate(advice.notes)]
    rows += [["estimates rest on" if i == 0 else "", n] for i, n in enumerate(cost.rests_on)]
    return rows
