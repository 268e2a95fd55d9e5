"""What each kind of stage does: one function a kind, from its inputs' folders to its own."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from slimvlm.core.options import DataConfig
from slimvlm.data.samples import Sample
from slimvlm.evaluation.lmms import evaluate_all
from slimvlm.models.load import load
from slimvlm.planning.plan import Plan
from slimvlm.pruning.save import save
from slimvlm.runs.stages import Calibration, choose_plan, cut_, samples_for, score_by
from slimvlm.runs.study.cache import CHECKPOINT, Work
from slimvlm.runs.study.stages import Request, Stage
from slimvlm.scoring.unit_scores import Scores
from slimvlm.training.recover import recover

PLAN = "plan.json"
SCORES = "scores"
RESULT = "result.json"
HISTORY = "history.json"
REPAIR = "repair.json"


def work(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    """Do a stage; its models are let go of afterwards.

    Args:
        stage: What to do.
        inputs: Folders of its inputs' outcomes.
        folder: Where the outcome goes.
        scratch: Folder that outlives a kill, for what a restart goes on from.
    """
    try:
        _WORK[stage.kind](stage, inputs, folder, scratch)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def split_samples(request: Request) -> tuple[list[Sample], list[Sample]]:
    """The samples of a request in the order that its seed gives: to calibrate on, to train on.

    Where the data has no more than the calibration samples, training uses them as well.
    """
    samples, count = samples_of(request), request.prune.samples
    order = random.Random(request.seed).sample(range(len(samples)), len(samples))
    shown, rest = order[:count], order[count:]
    training = (rest or shown)[: request.training_samples]
    return [samples[i] for i in shown], [samples[i] for i in training]


def samples_of(request: Request) -> list[Sample]:
    """All samples of a request's data, in the order of the file."""
    return [] if request.prune.data is None else _rows_of(request)[0]


def notes_on(request: Request) -> list[str]:
    """What is to be said on the request's data, such as rows that are skipped."""
    return [] if request.prune.data is None else _rows_of(request)[1]


def _rows_of(request: Request) -> tuple[list[Sample], list[str]]:
    return _all_rows(request.model, DataConfig(**request.prune.reading), request.identity)


@lru_cache(maxsize=1)
def _all_rows(
    model: str, source: DataConfig, identity: tuple[str, ...]
) -> tuple[list[Sample], list[str]]:
    """All rows of the data; ``identity`` only tells exchanged files apart."""
    notes: list[str] = []
    return samples_for(model, source, None, notes.append), notes


def _ignore(line: str) -> None:
    """A stage's own words, which the study's progress takes the place of."""


def _original(request: Request) -> tuple[Any, Calibration]:
    """The unpruned model and its calibration data."""
    config = request.prune
    model, processor = load(request.model, config.dtype, trust_remote_code=config.trust_remote_code)
    return model, Calibration(config, processor, split_samples(request)[0])


def _calibrate(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    model, calibration = _original(stage.request)
    (criterion,) = stage.request.prune.criterion
    score_by(stage.request.prune, model, calibration, criterion).save(folder / SCORES)


def _plan(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    model, calibration = _original(stage.request)
    given = [Scores.load(path / SCORES) for path in inputs]
    config = stage.request.prune
    choose_plan(config, model, calibration, _ignore, scratch, given).save(folder / PLAN)


def _prune(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    model, calibration = _original(stage.request)
    plan = Plan.load(inputs[0] / PLAN)
    config = stage.request.prune
    report = cut_(config, model, plan, calibration)
    if report is not None:
        (folder / REPAIR).write_text(json.dumps(asdict(report), indent=1) + "\n")
    save(model, calibration.processor, folder / CHECKPOINT, plan, pad=config.pad)
    plan.save(folder / PLAN)


def _recover(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    request, config = stage.request, stage.request.recover
    assert config is not None
    dtype, trusted = request.prune.dtype, request.prune.trust_remote_code
    model, processor = load(inputs[0] / CHECKPOINT, dtype)
    teacher = None
    if config.needs_teacher:
        teacher, _ = load(request.model, dtype, "cpu", trusted)  # what it shares stays there
    plan = Plan.load(inputs[0] / PLAN)
    _, training = split_samples(request)
    history = recover(model, teacher, training, config, processor, scratch, plan)
    (folder / HISTORY).write_text(json.dumps(asdict(history), indent=1) + "\n")
    save(model, processor, folder / CHECKPOINT, plan)
    plan.save(folder / PLAN)


def _evaluate(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    request, asked = stage.request, stage.request.asked
    assert asked is not None
    source = inputs[0] / CHECKPOINT if inputs else request.model
    trusted = request.prune.trust_remote_code and not inputs
    model, processor = load(source, request.prune.dtype, trust_remote_code=trusted)
    result = evaluate_all(
        model,
        processor,
        asked.tasks,
        limit=asked.limit,
        batch_size=asked.batch_size,
        name=stage.label,
        log_folder=scratch,
        floors=asked.floors,
        task_folder=asked.task_folder,
    )
    result.save(folder / RESULT)


_WORK: dict[str, Work] = {
    "calibrate": _calibrate,
    "plan": _plan,
    "prune": _prune,
    "recover": _recover,
    "evaluate": _evaluate,
}
