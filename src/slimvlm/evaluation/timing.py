"""Time models in turn, and count the bytes of their tensors."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from slimvlm.core.documents import built, read_object
from slimvlm.core.files import write_text
from slimvlm.data import chat
from slimvlm.data.samples import Question
from slimvlm.evaluation.results import Times
from slimvlm.models.hidden import as_inputs, evaluating

REPEATS, NEW_TOKENS = 6, 8
"""Runs of each model, and new tokens after the first."""


@dataclass(frozen=True)
class Timing:
    """Times of one greedy generation of a fixed length, in milliseconds."""

    prefill_ms: float  # from the call to the first new token
    step_ms: tuple[float, ...]  # each further token

    @property
    def decode_ms(self) -> float:
        """Median time of one further token."""
        return median(self.step_ms)

    @property
    def total_ms(self) -> float:
        """Time of the whole answer, prefill included."""
        return self.prefill_ms + sum(self.step_ms)


class _Clock(BaseStreamer):
    """Record when the prompt and each new token are done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record a step; transformers hands over tokens on the CPU, so a GPU is done too."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def timed_run(model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int) -> Timing:
    """Generate exactly so many tokens for a batch, at least 2, and time each step."""
    clock = _Clock()
    generator: Any = model
    with torch.inference_mode():
        generator.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            streamer=clock,
        )
    times = clock.seconds
    steps = tuple(1e3 * (b - a) for a, b in pairwise(times[1:]))
    return Timing(1e3 * (times[1] - times[0]), steps)


def timed_runs(
    models: Sequence[Any],
    inputs: Sequence[Mapping[str, Any]],
    new_tokens: int,
    repeats: int,
) -> list[list[Timing]]:
    """Time several models in turn, each with its batch, after one run to warm up.

    A machine that is slow for a while then slows all of them, and their ratios stay.
    """
    pairs = list(zip(models, inputs, strict=True))
    for model, batch in pairs:
        timed_run(model, batch, 2)
    return in_turn([partial(timed_run, *pair, new_tokens) for pair in pairs], repeats)


def in_turn(runs: Sequence[Callable[[], Timing]], repeats: int) -> list[list[Timing]]:
    """Repeat runs, forwards in one round and backwards in the next; return the times of each."""
    found: list[list[Timing]] = [[] for _ in runs]
    for repeat in range(repeats):
        order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            found[index].append(runs[index]())
    return found


@dataclass(frozen=True)
class Share:
    """A time as a share of another one's: median, smallest and largest of all rounds.

    Of six rounds, smallest and largest are a 97 % interval of the median.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Iterable[float], others: Iterable[float]) -> Share:
        """Divide the times of the same rounds."""
        shares = [ours / theirs for ours, theirs in zip(times, others, strict=True)]
        return cls(median(shares), min(shares), max(shares))

    def __str__(self) -> str:
        """Format the share and its interval."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class PairedTimes:
    """Times of an original and a smaller model that ran in turn."""

    original: Times
    pruned: Times
    prefill: Share  # of the original's
    decode: Share

    def __str__(self) -> str:
        """Complete a sentence that begins "the smaller model"."""
        return (
            f"reads a question in {self.prefill} of the original's time "
            f"({self.pruned.prefill_ms:.1f} ms), writes a token in {self.decode} "
            f"({self.pruned.decode_ms:.1f} ms)"
        )

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_text(Path(path), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PairedTimes:
        """Read what `save` wrote."""
        return built(cls, read_object(path, "times"), f"times {str(path)!r}")


def plain_question(processor: Any) -> Question:
    """Ask about a grey picture, or about none if the model takes no pictures."""
    shown = (Image.new("RGB", (336, 336), "grey"),) if chat.can_see(processor) else ()
    return Question("latency", "What is shown here?", ("",), shown)


def times_of(model: PreTrainedModel, processor: Any, question: Question) -> Times:
    """Time one model by itself."""
    (runs,) = _runs([(model, processor)], question)
    return _summary(runs)


def paired_times(
    model: PreTrainedModel, processor: Any, original: PreTrainedModel, original_processor: Any
) -> PairedTimes:
    """Time a smaller model and its original in turn, each with its own processor."""
    pairs = [(original, original_processor), (model, processor)]
    theirs, ours = _runs(pairs, plain_question(original_processor))
    return PairedTimes(
        original=_summary(theirs),
        pruned=_summary(ours),
        prefill=Share.of([r.prefill_ms for r in ours], [r.prefill_ms for r in theirs]),
        decode=Share.of([r.decode_ms for r in ours], [r.decode_ms for r in theirs]),
    )


def _runs(pairs: Sequence[tuple[PreTrainedModel, Any]], question: Question) -> list[list[Timing]]:
    models = [model for model, _ in pairs]
    inputs = [as_inputs(m, chat.encode_questions(p, [question])) for m, p in pairs]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        return timed_runs(models, inputs, 1 + NEW_TOKENS, REPEATS)


def _summary(runs: Sequence[Timing]) -> Times:
    reading, writing = [run.prefill_ms for run in runs], [run.decode_ms for run in runs]
    return Times(
        prefill_ms=median(reading),
        decode_ms=median(writing),
        prefill_range_ms=(min(reading), max(reading)),
        decode_range_ms=(min(writing), max(writing)),
    )


def stored_bytes(*modules: nn.Module) -> int:
    """Count bytes of all weights, and of the scales of quantised ones; shared ones count once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(modules)}
    return sum(storages.values())


class PeakMemory(TorchDispatchMode):
    """Track the peak of the bytes that operations allocate, without the weights of ``modules``.

    It sees every tensor on every device, but not a kernel's own memory. Operations are slow
    meanwhile.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes: int = 0
        self._alive_bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(_storages(modules))

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        for storage in _storages_of(tree_leaves(result)):
            if storage not in self._known:
                self._known.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, num_bytes: int) -> None:
        self._alive_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)


def _storages(modules: Iterable[nn.Module]) -> Iterator[torch.UntypedStorage]:
    """Find the memory of a checkpoint's tensors, which includes scales of quantised modules."""
    for module in modules:
        yield from _storages_of(module.state_dict().values())


def _storages_of(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Find the memory of the tensors among values, and of their inner tensors."""
    for value in values:
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages_of(getattr(value, name) for name in names)
        elif isinstance(value, Tensor):
            yield value.untyped_storage()
