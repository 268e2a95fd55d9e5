"""Measure how fast a model runs."""

from __future__ import annotations

from typing import Annotated

from slimvlm.config import LoadConfig, Workload
from slimvlm.verbs.options import INLINE, Model, check_model, load_model
from slimvlm.verbs.printing import console, note, print_json


def bench(
    model: Model,
    baseline: str | None = None,
    workload: Annotated[Workload, INLINE] = Workload(),
    loading: Annotated[LoadConfig, INLINE] = LoadConfig(),
    device: str | None = None,
    json: bool = False,
) -> None:
    """Time reading and writing, count FLOPs and memory; with a baseline, against the ideal.

    Prompts are random tokens, so the vision tower is not timed. Model and baseline run in turn in
    one process, and speed-ups are medians of neighbouring runs.

    Args:
        model: Folder, hub id, or demo.
        baseline: The model before pruning.
        workload: What to time.
        loading: How models are read.
        device: Where to run, such as cpu or cuda:1; default the first GPU, else the CPU.
        json: Print JSON.
    """
    from slimvlm import summary
    from slimvlm.speed import bench as run
    from slimvlm.speed import bench_rows

    names = (model, *((baseline,) if baseline is not None else ()))
    for name in names:
        check_model(name, loading)
    small, *large = (load_model(name, loading, device)[0] for name in names)
    result = run(small, large[0] if large else None, workload, names)
    if json:
        print_json(result.to_dict())
        return
    title = f"{result.dtype} on {result.device}, {result.threads} CPU threads"
    console().print(summary.as_table(*bench_rows(result), title=title))
    for measured in filter(None, (result.baseline, result.model)):
        for line in measured.warnings:
            note(f"{measured.model}: {line}")
