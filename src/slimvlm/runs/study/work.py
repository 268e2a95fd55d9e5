"""What each kind of stage does: one function a kind, from its inputs' folders to its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from slimvlm.core.checked import part_of
from slimvlm.core.options import DataConfig
from slimvlm.core.progress import without_bars
from slimvlm.data.samples import Sample
from slimvlm.models.cost import release_memory
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import save
from slimvlm.runs import stages
from slimvlm.runs.request import Request
from slimvlm.runs.stages import Calibration, samples_for, split
from slimvlm.runs.study.cache import CHECKPOINT, Work
from slimvlm.runs.study.graph import Stage
from slimvlm.scoring.unit_scores import Scores

PLAN = "plan.json"
SCORES = "scores"
RESULT = "result.json"
HISTORY = "history.json"
WALK = "walk.json"


def work(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    """Do a stage, in silence: the study shows how far it is. Its models are let go of afterwards.

    Args:
        stage: What to do.
        inputs: Folders of its inputs' outcomes.
        folder: Where the outcome goes.
        scratch: Folder that outlives a kill, for what a restart goes on from.
    """
    try:
        with without_bars():
            _WORK[stage.kind](stage, inputs, folder, scratch)
    finally:
        release_memory()


def samples_of(request: Request) -> list[Sample]:
    """All samples of a request's data, as `load_samples` reads them."""
    return [] if request.prune.data is None else _rows_of(request)[0]


def notes_on(request: Request) -> list[str]:
    """What is to be said on the request's data, such as rows that are skipped."""
    return [] if request.prune.data is None else _rows_of(request)[1]


def _rows_of(request: Request) -> tuple[list[Sample], list[str]]:
    return _all_rows(request.model, part_of(request.prune, DataConfig), request.made_from)


@lru_cache(maxsize=1)
def _all_rows(
    model: str, source: DataConfig, made_from: tuple[str, ...]
) -> tuple[list[Sample], list[str]]:
    """All rows of the data; ``made_from`` only tells exchanged files apart."""
    notes: list[str] = []
    return samples_for(model, source, None, notes.append), notes


def _original(request: Request) -> tuple[Any, Calibration]:
    """The unpruned model and its calibration data."""
    model, processor = stages.load_original(request)
    shown = split(samples_of(request), request).calibration
    return model, Calibration(processor, shown, request.hold_out)


def _calibrate(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    (scores,) = stages.calibrate(stage.request, *_original(stage.request)).values()
    scores.save(folder / SCORES)


def _prune(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    model, calibration = _original(stage.request)
    given = [Scores.load(path / SCORES) for path in inputs]
    walked = stages.prune_(stage.request, model, calibration, given, scratch=scratch / "walk")
    if walked.scores is not None:
        walked.scores.save(folder / SCORES)
    (folder / WALK).write_text(json.dumps(asdict(walked.report), indent=1) + "\n")
    _save(model, calibration.processor, walked.plan, folder)


def _recover(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    request, plan = stage.request, Plan.load(inputs[0] / PLAN)
    model, processor = load(inputs[0] / CHECKPOINT, request.prune.dtype, request.prune.device)
    training = split(samples_of(request), request).training
    history = stages.recover_(request, model, processor, plan, training, scratch)
    (folder / HISTORY).write_text(json.dumps(asdict(history), indent=1) + "\n")
    _save(model, processor, plan, folder)


def _save(model: Any, processor: Any, plan: Plan, folder: Path) -> None:
    save(model, processor, folder / CHECKPOINT, plan)
    plan.save(folder / PLAN)


def _evaluate(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    request = stage.request
    if inputs:
        model, processor = load(inputs[0] / CHECKPOINT, request.prune.dtype, request.prune.device)
    else:
        model, processor = stages.load_original(request)
    stages.evaluate(request, model, processor, stage.label, scratch).save(folder / RESULT)


_WORK: dict[str, Work] = {
    "calibrate": _calibrate,
    "prune": _prune,
    "recover": _recover,
    "evaluate": _evaluate,
}
