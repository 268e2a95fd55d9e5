"""How long a model takes to read a prompt and to write one further token."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Run:
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


def timed_run(model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int) -> Run:
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
    return Run(1e3 * (times[1] - times[0]), steps)


def timed_runs(
    models: Sequence[PreTrainedModel],
    inputs: Sequence[Mapping[str, Any]],
    new_tokens: int,
    repeats: int,
) -> list[list[Run]]:
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
    runs: list[list[Run]] = [[] for _ in pairs]
    for repeat in range(repeats):
        order = range(len(pairs)) if repeat % 2 == 0 else reversed(range(len(pairs)))
        for index in order:
            runs[index].append(timed_run(*pairs[index], new_tokens))
    return runs
