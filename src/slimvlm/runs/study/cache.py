"""Stages, and their outcomes on disk, written whole and by one worker at a time."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from pydantic import Field

from slimvlm.core.documents import built, read_object
from slimvlm.core.errors import InUseError
from slimvlm.core.files import held, new_folder, write_text
from slimvlm.core.progress import without_bars
from slimvlm.core.requests import asked, digest
from slimvlm.models.cost import release_memory

FORMAT = 3
"""Raised when a stage's outcome changes for the same request."""
RECORD = "stage.json"
"""Written last into an outcome: request, seconds, estimated work."""
CHECKPOINT = "checkpoint"
"""Output of the stages that make a model; the only output that may be removed later."""
_LONGEST_ERROR = 300

Function = Callable[["Stage", Sequence[Path], Path, Path], None]
"""``(stage, folders of its inputs, folder to fill, folder that a restart finds again)``."""


@dataclass(frozen=True)
class Stage:
    """One piece of work, named by a hash of everything that determines its outcome."""

    kind: str  # such as ``prune``
    request: Any  # options; with ``inputs`` they determine the outcome
    inputs: tuple[Stage, ...]  # stages whose outcomes are read
    function: Function = field(compare=False, repr=False)
    output: str  # file or folder that later stages read
    label: str = field(compare=False)

    @cached_property
    def name(self) -> str:
        """The hash; cells that need the same work get the same name."""
        values = {
            **{"format": FORMAT, "kind": self.kind, "request": asked(self.request)},
            "inputs": [stage.name for stage in self.inputs],
        }
        return digest([values])[:20]


@dataclass(frozen=True)
class Outcome:
    """The end of a stage."""

    name: str  # of the stage
    seconds: float = 0.0  # 0 if another start or worker had done it
    error: str = ""  # one line; empty without one


@dataclass(frozen=True)
class _Record:
    """Content of `RECORD`."""

    label: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    flops: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    request: Mapping[str, Any]


def work(stage: Stage, inputs: Sequence[Path], folder: Path, scratch: Path) -> None:
    """Do a stage without progress bars, then release the memory of its models."""
    try:
        with without_bars():
            stage.function(stage, inputs, folder, scratch)
    finally:
        release_memory()


class Cache:
    """Outcomes of stages in one folder, on storage that all workers share.

    ``cache/KIND/NAME/`` holds a stage's outcome, ``work/`` the state from which a stopped stage
    resumes, ``failed/`` the last error of failed stages. A worker locks the folder of its stage.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self._opened = time.time()

    def path(self, stage: Stage, name: str = "") -> Path:
        """Return the folder of a stage's outcome, or a file in it."""
        return self.root / "cache" / stage.kind / stage.name / name

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage has an outcome; its checkpoint may have been removed since."""
        return self.path(stage, RECORD).is_file()

    def is_ready(self, stage: Stage) -> bool:
        """Whether another stage could read the outcome."""
        return self.is_done(stage) and (
            stage.output != CHECKPOINT or self.path(stage, CHECKPOINT).is_dir()
        )

    def records(self, kind: str) -> list[Mapping[str, Any]]:
        """Read the records of all outcomes of a kind: request, seconds, estimated work."""
        return [
            _read(path) for path in sorted((self.root / "cache" / kind).glob(f"[!.]*/{RECORD}"))
        ]

    def seconds(self, stage: Stage) -> float:
        """Read the duration of a stage that is done."""
        return float(_read(self.path(stage, RECORD))["seconds"])

    def error_of(self, stage: Stage) -> str:
        """Read the error that a stage's last attempt ended with; empty if there is none."""
        path = self._failure(stage)
        return str(read_object(path, "stage").get("error")) if path.is_file() else ""

    def run(
        self,
        stage: Stage,
        flops: float,
        wait: bool,
        is_needed: Callable[[Stage], bool],
    ) -> Outcome | None:
        """Do a stage whose inputs are ready, unless it is done; the outcome holds any error.

        Returns None if another worker is doing it, unless ``wait``. ``flops`` serve later estimates
        of time; ``is_needed``: an open stage still reads a done stage's checkpoint.
        """
        failure, scratch = self._failure(stage), self._scratch(stage)
        try:
            with held(self.path(stage), wait=-1 if wait else 0):
                if self.is_ready(stage) or (self.is_done(stage) and not is_needed(stage)):
                    return Outcome(stage.name)
                if failure.is_file() and failure.stat().st_mtime > self._opened:
                    return Outcome(stage.name, error=self.error_of(stage))  # of another worker
                scratch.mkdir(parents=True, exist_ok=True)
                failure.unlink(missing_ok=True)
                start = time.perf_counter()
                try:
                    with new_folder(self.path(stage), force=True) as folder:
                        work(stage, [self.path(i) for i in stage.inputs], folder, scratch)
                        seconds = time.perf_counter() - start
                        record = _Record(stage.label, seconds, flops, asdict(stage.request))
                        write_text(folder / RECORD, json.dumps(vars(record), indent=1) + "\n")
                except Exception as error:
                    return self.failed(stage, error, time.perf_counter() - start)
                shutil.rmtree(scratch, ignore_errors=True)
                return Outcome(stage.name, seconds)
        except InUseError:
            return None

    def failed(self, stage: Stage, error: Exception, seconds: float = 0.0) -> Outcome:
        """Record the error that ended a stage."""
        text = " ".join(str(error).split()) or "no message"
        line = f"{type(error).__name__}: {text}"[:_LONGEST_ERROR]
        path = self._failure(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"label": stage.label, "error": line}) + "\n")
        return Outcome(stage.name, seconds, line)

    def drop_checkpoint(self, stage: Stage) -> None:
        """Remove a stage's model and keep the rest of its outcome, unless another worker did."""
        path = self.path(stage, CHECKPOINT)
        gone = path.with_name(f".{CHECKPOINT}.gone.{uuid4().hex}")
        with suppress(FileNotFoundError):
            path.rename(gone)
        for left in path.parent.glob(f".{CHECKPOINT}.gone.*"):  # also by a worker that was killed
            shutil.rmtree(left, ignore_errors=True)

    def sweep(self, stages: Iterable[Stage]) -> None:
        """Remove resume files of done stages, which killed workers left."""
        for stage in stages:
            scratch = self._scratch(stage)
            if scratch.is_dir() and self.is_ready(stage):
                with suppress(InUseError), held(self.path(stage)):
                    shutil.rmtree(scratch, ignore_errors=True)

    def _scratch(self, stage: Stage) -> Path:
        return self.root / "work" / f"{stage.kind}-{stage.name}"

    def _failure(self, stage: Stage) -> Path:
        return self.root / "failed" / f"{stage.kind}-{stage.name}.json"


def _read(path: Path) -> Mapping[str, Any]:
    return vars(built(_Record, read_object(path, "stage"), f"stage {str(path)!r}"))
