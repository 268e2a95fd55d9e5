"""Time a model and its original in an engine that serves them, in turn."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from slimvlm.core.errors import LONGEST, ConfigError, ReloadError, one_line
from slimvlm.core.options import Workload
from slimvlm.core.progress import progress
from slimvlm.evaluation.bench import Bench, Side, random_prompts, summarised
from slimvlm.evaluation.measure import Timing, in_turn
from slimvlm.export.engines.compare import (
    ENGINES,
    Engine,
    command_of,
    ended_early,
    interpreter_of,
    readable_by,
)
from slimvlm.models.anatomy import read_anatomy
from slimvlm.models.classes import empty_model, is_quantized
from slimvlm.models.cost import BYTES, kv_cache_bytes_per_token, weight_bytes
from slimvlm.models.load import load_config

GIB = 2**30
_Line = TypeVar("_Line")


@dataclass(frozen=True)
class _Loaded:
    """What the asking program says when it has loaded a checkpoint."""

    version: str


@dataclass(frozen=True)
class _Came:
    """When each step of each reply came, in seconds, and the most memory that the process took."""

    seconds: tuple[tuple[float, ...], ...]
    peak_bytes: int


def bench_engine(
    name: str,
    model: str,
    baseline: str | None = None,
    workload: Workload | None = None,
    dtype: str = "auto",
    clock: Literal["wall", "cpu"] = "wall",
) -> Bench:
    """Time reading and writing in an engine; with a baseline, both in turn.

    Each model has a process of its own, and only one computes at a time. Prompts are random tokens,
    a batch is sent at once, and answers have a fixed length. The time to read is that to the first
    new token, the mean over the batch; the time to write is that from there to the last token. The
    ideal is `SpeedUp`'s. Peak memory is that of the whole process, with the room that an engine
    takes for keys and values beforehand.

    Args:
        name: A key of `ENGINES`.
        model: Folder, hub id, or demo.
        baseline: Usually the model before pruning.
        workload: What to time.
        dtype: Data type of the weights; auto is the checkpoint's own.
        clock: How time passes; ``cpu``, the time that the engine's process computes, serves one
            thread on a core that others use, too.

    Raises:
        ConfigError: If the engine is not there, or a checkpoint is quantised.
        ReloadError: If it does not load a model; with its own last words.
    """
    workload = workload or Workload()
    python, engine = interpreter_of(name), ENGINES[name]
    names = (model, *((baseline,) if baseline is not None else ()))
    sides = [_side(each, dtype) for each in names]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slimvlm-engine-")))
        served = []
        for number, side in enumerate(sides):
            work = folder / str(number)
            work.mkdir()
            _write_request(engine, side, workload, work)
            served.append(stack.enter_context(_Served(engine, python, work, clock)))
            version = served[-1].wait()
        for one, side in zip(served, sides, strict=True):  # to warm up
            one.time(random_prompts(side.shape, workload, 1).tolist(), 2)
        runs, peaks = {}, {}
        for size in progress(workload.sizes, "bench"):
            prompts = [random_prompts(side.shape, workload, size).tolist() for side in sides]
            runs[size] = in_turn(
                [
                    partial(one.time, asked, workload.new_tokens)
                    for one, asked in zip(served, prompts, strict=True)
                ],
                workload.repeats,
            )
            peaks[size] = [one.peak_bytes for one in served]
    device = f"{engine.title} {version}"
    return summarised(sides, workload, runs, peaks, device, sides[0].dtype)


def _side(name: str, dtype: str) -> Side:
    """What a configuration tells of a model."""
    config = load_config(name)
    if is_quantized(config):
        raise ConfigError(f"model {name!r} is quantised, and its ideal in an engine is not known")
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    shape = read_anatomy(empty_model(config))
    layers = sum(layer.params for layer in shape.layers)
    read = layers + shape.final_norm_params + (shape.head_params or shape.embedding_params)
    return Side(name, shape, dtype, weight_bytes(shape, dtype), read * BYTES[dtype])


def _write_request(engine: Engine, side: Side, workload: Workload, work: Path) -> None:
    """Write down what an engine is to load, and for how much to make room."""
    length = workload.prompt_tokens + workload.new_tokens + 1
    at_once = max(workload.sizes)
    cache = at_once * length * kv_cache_bytes_per_token(side.shape, side.dtype)
    request = {
        **readable_by(engine, side.name, side.dtype, work),
        "dtype": side.dtype,
        "max_length": length,
        "at_once": at_once,
        "cache_gib": ceil(1.25 * cache / GIB),
        "sees": side.shape.vision_params > 0,
    }
    (work / "request.json").write_text(json.dumps(request))


class _Served:
    """An engine's process that has loaded one checkpoint and waits for prompts."""

    def __init__(self, engine: Engine, python: Path, work: Path, clock: str) -> None:
        self._engine, self._clock = engine, clock
        self._log = work / "log"
        with self._log.open("w") as log:
            how = command_of(engine, python, "time", work)
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(stdin=pipe, stdout=pipe, stderr=log, **how)
        self.peak_bytes = 0

    def wait(self) -> str:
        """Wait until it has loaded the checkpoint; returns the engine's version."""
        return self._read(_Loaded).version

    def time(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """Let it answer a batch."""
        assert self._process.stdin is not None
        request = {"prompts": prompts, "new_tokens": new_tokens, "clock": self._clock}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._ended() from error
        came = self._read(_Came)
        self.peak_bytes = came.peak_bytes
        first, last = (fmean(steps[at] for steps in came.seconds) for at in (0, -1))
        step = 1e3 * (last - first) / (new_tokens - 1)
        return Timing(1e3 * first, (step,) * (new_tokens - 1))

    def _read(self, kind: type[_Line]) -> _Line:
        """The next line that it says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        try:
            return TypeAdapter(kind).validate_json(line)
        except ValidationError as error:
            raise ReloadError(
                f"{self._engine.module}: its times cannot be read ({one_line(error)[:LONGEST]})"
            ) from error

    def _ended(self) -> ReloadError:
        self._process.wait()
        return ended_early(self._engine, self._log.read_text(errors="replace"))

    def __enter__(self) -> _Served:
        return self

    def __exit__(self, *error: Any) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
