"""What a live model takes: milliseconds to read and to write, bytes of its tensors."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Timing:
    """One greedy generation of a fixed length.

    Attributes:
        prefill_ms: From the call to the first new token, in milliseconds.
        step_ms: Time of each further token.
    """

    prefill_ms: float
    step_ms: tuple[float, ...]

    @property
    def decode_ms(self) -> float:
        """Median time of one further token."""
        return median(self.step_ms)

    @property
    def total_ms(self) -> float:
        """Time of the whole answer, reading included."""
        return self.prefill_ms + sum(self.step_ms)


class _Clock(BaseStreamer):
    """Writes down when the prompt and each new token come by."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        """One step is done; transformers hands over tokens on the CPU, so a GPU is done too."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to write."""


def timed_run(model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int) -> Timing:
    """Generate exactly so many tokens for a batch, and time each step.

    Args:
        model: The model, in evaluation mode.
        inputs: A batch on its device, as for `generate`.
        new_tokens: Length of the answers; at least 2.
    """
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
    models: Sequence[PreTrainedModel],
    inputs: Sequence[Mapping[str, Any]],
    new_tokens: int,
    repeats: int,
) -> list[list[Timing]]:
    """Runs of several models in turn, forwards and backwards by turns, after one to warm up.

    What slows the machine down for a while then slows all of them, and their ratios stay.

    Args:
        models: The models.
        inputs: A batch for each.
        new_tokens: Length of the answers.
        repeats: Measured runs of each model.

    Returns:
        The runs of each model, in the order of their rounds.
    """
    pairs = list(zip(models, inputs, strict=True))
    for model, batch in pairs:
        timed_run(model, batch, 2)
    return in_turn(
        [partial(timed_run, model, batch, new_tokens) for model, batch in pairs], repeats
    )


def in_turn(runs: Sequence[Callable[[], Timing]], repeats: int) -> list[list[Timing]]:
    """Repeat some runs, forwards and backwards by turns; the times of each, by round."""
    found: list[list[Timing]] = [[] for _ in runs]
    for repeat in range(repeats):
        order = range(len(runs)) if repeat % 2 == 0 else reversed(range(len(runs)))
        for index in order:
            found[index].append(runs[index]())
    return found


def stored_bytes(*modules: nn.Module) -> int:
    """Bytes of all weights and of what stands beside quantised ones (scales); shared ones once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(modules)}
    return sum(storages.values())


class PeakMemory(TorchDispatchMode):
    """Counts bytes of the tensors that operations make while it is active, and their peak.

    It sees every tensor on every device, but not what a kernel allocates for itself. Operations are
    slow meanwhile.

    Args:
        modules: Their weights are not counted when operations return views of them.

    Attributes:
        peak_bytes: Most bytes that were alive at once.
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
        """Run an operation and count what it made."""
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
    """What a checkpoint would hold; for quantised modules that is more than parameters."""
    for module in modules:
        yield from _storages_of(module.state_dict().values())


def _storages_of(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """The memory behind the tensors among some values, and behind what those are made of."""
    for value in values:
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages_of(getattr(value, name) for name in names)
        elif isinstance(value, Tensor):
            yield value.untyped_storage()
