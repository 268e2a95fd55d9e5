"""Small studies of tiny models, and a way to run them without measuring times."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from slimvlm.core.documents import built
from slimvlm.runs.study import schedule
from slimvlm.runs.study.config import StudyConfig
from slimvlm.runs.study.schedule import STAGE_KINDS, Stage
from tests import tiny_folder as folders

VOLATILE = ("prefill_ms", "decode_ms", *(f"seconds_{kind}" for kind in STAGE_KINDS))
"""Columns of a results table that differ between two runs of the same study."""
RECOVER = {
    **{"max_steps": 2, "batch_size": 2, "lora_rank": 4, "lora": {"lora_alpha": 8}},
    **{"learning_rate": 5e-3, "bf16": False, "trainer": {"save_steps": 1}},
}
RECOVERIES = {
    "sft": {"train": "lora", "loss": "sft"},
    "sft+hidden": {"train": "lora", "loss": "sft+hidden"},
}


def study(data: Path | None, grid: dict[str, Any] | None = None, **changes: Any) -> StudyConfig:
    """A text model along two axes at 40 %, without recovery and with."""
    model, recovery = str(folders.folder("text")), ["none", "sft+hidden"]
    values: dict[str, Any] = {
        "grids": [{"model": model, "ratio": 0.4, "recovery": recovery, **(grid or {})}],
        **{"recoveries": RECOVERIES, "recover": RECOVER, "prune": {"samples": 4}},
        **{"data": data and str(data), "tasks": "text_odd,text_ppl", "limit": 2, "floors": False},
    }
    return built(StudyConfig, {**values, **changes})


def watch_work(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[Stage], object] = bool,
    after: Callable[[Stage], object] = bool,
) -> Counter[str]:
    """From here on count the stages that are really done, by kind.

    ``before`` and ``after`` are called with each of them.
    """
    done: Counter[str] = Counter()
    honest = schedule.work

    def watched(stage: Stage, *rest: Any) -> None:
        done[stage.kind] += 1
        before(stage)
        honest(stage, *rest)
        after(stage)

    monkeypatch.setattr(schedule, "work", watched)
    return done


def stable(table: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns that hold times."""
    return table.drop(columns=[name for name in VOLATILE if name in table])
