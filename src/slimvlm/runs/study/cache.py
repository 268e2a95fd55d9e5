"""Outcomes of stages on disk: whole or not at all, made by one worker at a time, found by name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from pydantic import Field

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import InUseError
from slimvlm.core.files import held, new_folder, write_text
from slimvlm.runs.study.graph import Stage

ABOUT = "stage.json"
CHECKPOINT = "checkpoint"
_LONGEST_ERROR = 300

Work = Callable[[Stage, Sequence[Path], Path, Path], None]
"""``(stage, folders of its inputs, folder to fill, folder that a restart finds again)``."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        name: The stage's.
        seconds: How long it took, 0 if another start or worker had done it.
        error: One line on what went wrong, empty if nothing did.
    """

    name: str
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class _About:
    """What is written beside an outcome."""

    label: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    flops: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    request: Mapping[str, Any]


def _about(path: Path) -> Mapping[str, Any]:
    values = read_object(path, "stage")
    return vars(built(_About, values, f"stage {str(path)!r}"))


class Cache:
    """The folder of a study.

    ``cache/KIND/NAME/`` holds what a stage made, ``work/`` what a restart of a stopped one needs,
    ``failed/`` the last error of stages that failed. Who works on a stage holds its folder.

    Args:
        root: The folder, on storage that all workers share.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._opened = time.time()

    def folder(self, stage: Stage) -> Path:
        """Where a stage's outcome is."""
        return self.root / "cache" / stage.kind / stage.name

    def path(self, stage: Stage, name: str) -> Path:
        """Where something that a stage made is."""
        return self.folder(stage) / name

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage has an outcome; its checkpoint may have been removed since."""
        return (self.folder(stage) / ABOUT).is_file()

    def is_ready(self, stage: Stage) -> bool:
        """Whether another stage could read the outcome."""
        if not self.is_done(stage):
            return False
        return not stage.makes_checkpoint or (self.folder(stage) / CHECKPOINT).is_dir()

    def about(self, stage: Stage) -> Mapping[str, Any]:
        """What was written beside an outcome: request, seconds, work."""
        return _about(self.folder(stage) / ABOUT)

    def records(self, kind: str) -> list[Mapping[str, Any]]:
        """What was written beside all outcomes of a kind."""
        found = sorted((self.root / "cache" / kind).glob(f"[!.]*/{ABOUT}"))
        return [_about(path) for path in found]

    def error_of(self, stage: Stage) -> str:
        """The error that a stage's last attempt ended with; empty if there is none."""
        path = self._failure(stage)
        return str(read_object(path, "stage").get("error")) if path.is_file() else ""

    def run(
        self,
        stage: Stage,
        work: Work,
        flops: float,
        wait: bool,
        is_needed: Callable[[], bool] = lambda: True,
    ) -> Outcome | None:
        """Do a stage, unless it is done; an error becomes part of the outcome.

        Args:
            stage: What to do. Its inputs must be ready.
            work: How.
            flops: Estimated size of the work, for later estimates of time.
            wait: Whether to wait for another worker that is at it.
            is_needed: Whether anybody still wants the model of a stage that is done.

        Returns:
            The outcome; None if another worker is at it and this one does not wait.
        """
        try:
            with held(self.folder(stage), wait=-1 if wait else 0):
                if self.is_ready(stage) or (self.is_done(stage) and not is_needed()):
                    return Outcome(stage.name)
                if error := self._error_since_opened(stage):
                    return Outcome(stage.name, error=error)
                return self._done_now(stage, work, flops)
        except InUseError:
            return None

    def drop_checkpoint(self, stage: Stage) -> None:
        """Remove a stage's model and keep the rest of its outcome, unless another worker did."""
        path = self.folder(stage) / CHECKPOINT
        gone = path.with_name(f".{CHECKPOINT}.gone.{uuid4().hex}")
        with suppress(FileNotFoundError):
            path.rename(gone)
        for left in path.parent.glob(f".{CHECKPOINT}.gone.*"):  # also by a worker that was killed
            shutil.rmtree(left, ignore_errors=True)

    def sweep(self, stages: Iterable[Stage]) -> None:
        """Remove what restarts of stages need that were killed when their outcome was there."""
        for stage in stages:
            if self._scratch(stage).is_dir() and self.is_ready(stage):
                with suppress(InUseError), held(self.folder(stage)):
                    shutil.rmtree(self._scratch(stage), ignore_errors=True)

    def _done_now(self, stage: Stage, work: Work, flops: float) -> Outcome:
        inputs = [self.folder(i) for i in stage.inputs]
        scratch = self._scratch(stage)
        scratch.mkdir(parents=True, exist_ok=True)
        self._failure(stage).unlink(missing_ok=True)
        start = time.perf_counter()
        try:
            with new_folder(self.folder(stage), force=True) as folder:
                work(stage, inputs, folder, scratch)
                seconds = time.perf_counter() - start
                about = {"label": stage.label, "seconds": seconds, "flops": flops}
                about["request"] = json.loads(json.dumps(asdict(stage.request)))
                write_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
        except Exception as error:
            return self.failed(stage, error, time.perf_counter() - start)
        shutil.rmtree(scratch, ignore_errors=True)
        return Outcome(stage.name, seconds)

    def failed(self, stage: Stage, error: Exception, seconds: float = 0.0) -> Outcome:
        """Write down what a stage ended with."""
        text = " ".join(str(error).split()) or "no message"
        line = f"{type(error).__name__}: {text}"[:_LONGEST_ERROR]
        path = self._failure(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"label": stage.label, "error": line}) + "\n")
        return Outcome(stage.name, seconds, line)

    def _error_since_opened(self, stage: Stage) -> str:
        """The error of another worker that tried a stage meanwhile; empty if there is none."""
        path = self._failure(stage)
        tried = path.is_file() and path.stat().st_mtime > self._opened
        return self.error_of(stage) if tried else ""

    def _scratch(self, stage: Stage) -> Path:
        return self.root / "work" / f"{stage.kind}-{stage.name}"

    def _failure(self, stage: Stage) -> Path:
        return self.root / "failed" / f"{stage.kind}-{stage.name}.json"
