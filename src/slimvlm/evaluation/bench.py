"""Time models, and compare the speed-up of one over another with the ideal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import MIN_NEW_TOKENS, Workload
from slimvlm.core.progress import progress
from slimvlm.evaluation.timing import (
    PeakMemory,
    Share,
    Timing,
    stored_bytes,
    timed_run,
    timed_runs,
)
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import decode_flops, kv_cache_bytes_per_token, prefill_flops, slow_widths
from slimvlm.models.hidden import hidden_states, require_finite_values
from slimvlm.models.load import anatomy as anatomy_of
from slimvlm.models.parts import Parts


@dataclass(frozen=True)
class Speed:
    """Times of one model at one batch size; medians over the repeats."""

    batch_size: int
    prefill_ms: float  # to the first new token
    decode_ms: float  # of one further token of every answer
    tokens_per_second: float  # new tokens of all answers, prefill included
    peak_bytes: int  # weights and the most that other tensors took at once


@dataclass(frozen=True)
class Footprint:
    """Size, FLOPs and times of one model."""

    model: str  # name or path
    total_params: int
    backbone_params: int
    weight_bytes: int
    prefill_flops: int  # of the backbone, for one prompt
    decode_flops: int  # of the backbone, for one further token after the prompt
    speeds: tuple[Speed, ...]
    warnings: tuple[str, ...]  # widths that are slow on hardware


@dataclass(frozen=True)
class SpeedUp:
    """Speed-up over a baseline at one batch size, and the ideal.

    The ideal of prefill is the ratio of FLOPs. The ideal of decoding is the ratio of bytes that
    every new token has to read: decoder layers, final norm and head as they are stored, and the
    keys and values of the prompt.
    """

    batch_size: int
    prefill: float  # median over the repeats of baseline time / model time
    prefill_ideal: float
    decode: float
    decode_ideal: float

    @property
    def prefill_share(self) -> float:
        """Part of the ideal that is reached in prefill."""
        return self.prefill / self.prefill_ideal

    @property
    def decode_share(self) -> float:
        """Part of the ideal that is reached in decoding."""
        return self.decode / self.decode_ideal


@dataclass(frozen=True)
class Bench:
    """Times of a model, and of its baseline if there is one."""

    workload: Workload
    device: str
    dtype: str  # of the weights that are not quantised
    threads: int
    model: Footprint
    baseline: Footprint | None = None
    speed_ups: tuple[SpeedUp, ...] = ()  # one for each batch size

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the shares of the ideal."""
        values = asdict(self)
        for row, speed_up in zip(values["speed_ups"], self.speed_ups, strict=True):
            row["prefill_share"] = speed_up.prefill_share
            row["decode_share"] = speed_up.decode_share
        return values


@dataclass(frozen=True)
class Side:
    """Shape, data type and bytes of a model, for its benchmark."""

    name: str  # or path
    shape: Anatomy  # of the configuration: quantised weights are packed
    dtype: str  # of keys and values
    weight_bytes: int
    read_bytes: int  # weights that every new token reads: layers, final norm and head


def bench(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None = None,
    workload: Workload | None = None,
    names: Sequence[str] = ("model", "baseline"),
) -> Bench:
    """Time prefill and decoding; with a baseline, both in turn in this process.

    Prompts are random tokens, so the vision tower, which pruning does not change, is not timed.
    Answers have a fixed length. A shared machine that is slow for a while slows both models, and a
    speed-up is the median of the ratios of neighbouring runs.

    Args:
        model: The model, on its device.
        baseline: Usually the model before pruning; on the same device.
        workload: What to time.
        names: Names of the model and of the baseline in the result.

    Raises:
        ConfigError: If the workload is out of range or the two are on different devices.
        NumericalError: If a model computes NaN or infinity.
    """
    workload = workload or Workload()
    models = [model] if baseline is None else [model, baseline]
    if len({one.device for one in models}) > 1:
        raise ConfigError(f"baseline is on {models[1].device}, the model on {model.device}")
    sides = []
    for name, one in zip(names, models, strict=False):
        head: Any = one.get_output_embeddings()
        read = stored_bytes(Parts(one).layers, Parts(one).norm, head)
        shape = anatomy_of(one.config)  # of the configuration: quantised weights are packed
        sides.append(Side(name, shape, _dtype_name(one), stored_bytes(one), read))

    def prompts(index: int, batch_size: int) -> dict[str, Tensor]:
        ids = random_prompts(sides[index].shape, workload, batch_size).to(models[index].device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    for index, one in enumerate(models):
        (hidden,) = hidden_states(one, prompts(index, 1))
        require_finite_values(hidden, f"the hidden states of {sides[index].name!r}")
    peaks: dict[int, list[int]] = {size: [] for size in workload.sizes}
    for size in workload.sizes:
        for index, one in enumerate(models):
            batch = prompts(index, size)
            with PeakMemory(one) as memory:
                timed_run(one, batch, min(workload.new_tokens, MIN_NEW_TOKENS))
            peaks[size].append(stored_bytes(one) + memory.peak_bytes)
    runs = {}
    for size in progress(workload.sizes, "bench"):
        batches = [prompts(index, size) for index in range(len(models))]
        runs[size] = timed_runs(models, batches, workload.new_tokens, workload.repeats)
    name_of = getattr(torch.get_device_module(model.device), "get_device_name", str)
    return summarised(sides, workload, runs, peaks, str(name_of(model.device)), _dtype_name(model))


def summarised(
    sides: Sequence[Side],
    workload: Workload,
    runs: Mapping[int, Sequence[Sequence[Timing]]],
    peaks: Mapping[int, Sequence[int]],
    device: str,
    dtype: str,
) -> Bench:
    """Summarise runs of a model, and of its baseline if there is one.

    By batch size, ``runs`` has each side's runs in the order of their rounds, ``peaks`` its peak
    bytes.
    """
    measured = []
    for i, side in enumerate(sides):
        speeds = [
            Speed(
                batch_size=size,
                prefill_ms=median(run.prefill_ms for run in its[i]),
                decode_ms=median(run.decode_ms for run in its[i]),
                tokens_per_second=median(
                    1e3 * size * workload.new_tokens / run.total_ms for run in its[i]
                ),
                peak_bytes=peaks[size][i],
            )
            for size, its in runs.items()
        ]
        footprint = Footprint(
            model=side.name,
            total_params=side.shape.total_params,
            backbone_params=side.shape.backbone_params,
            weight_bytes=side.weight_bytes,
            prefill_flops=prefill_flops(side.shape, workload.prompt_tokens),
            decode_flops=decode_flops(side.shape, workload.mean_context),
            speeds=tuple(speeds),
            warnings=tuple(slow_widths(side.shape)),
        )
        measured.append(footprint)
    speed_ups = []
    for size, (fast, slow) in runs.items() if len(sides) > 1 else ():
        read = [prefill_flops(side.shape, workload.prompt_tokens, size) for side in sides]
        context = size * workload.mean_context
        written = [
            side.read_bytes + context * kv_cache_bytes_per_token(side.shape, side.dtype)
            for side in sides
        ]
        speed_up = SpeedUp(
            batch_size=size,
            prefill=Share.of((r.prefill_ms for r in slow), (r.prefill_ms for r in fast)).value,
            prefill_ideal=read[1] / read[0],
            decode=Share.of((r.decode_ms for r in slow), (r.decode_ms for r in fast)).value,
            decode_ideal=written[1] / written[0],
        )
        speed_ups.append(speed_up)
    return Bench(
        workload=workload,
        device=device,
        dtype=dtype,
        threads=torch.get_num_threads(),
        model=measured[0],
        baseline=measured[1] if len(sides) > 1 else None,
        speed_ups=tuple(speed_ups),
    )


def bench_rows(result: Bench) -> tuple[list[str], list[list[str]]]:
    """Make a row for each figure, and a column for each model, speed-up and ideal."""
    models = [m for m in (result.baseline, result.model) if m is not None]
    pad = [""] * 3 if result.speed_ups else []
    rows = [
        ["all parameters", *(f"{m.total_params / 1e6:.1f} M" for m in models), *pad],
        ["backbone parameters", *(f"{m.backbone_params / 1e6:.1f} M" for m in models), *pad],
        ["weights MiB", *(f"{m.weight_bytes / 2**20:.1f}" for m in models), *pad],
        ["GFLOP to read a prompt", *(f"{m.prefill_flops / 1e9:.2f}" for m in models), *pad],
        ["GFLOP of a further token", *(f"{m.decode_flops / 1e9:.3f}" for m in models), *pad],
    ]
    for index, size in enumerate(speed.batch_size for speed in result.model.speeds):
        speeds = [m.speeds[index] for m in models]
        found = result.speed_ups[index] if result.speed_ups else None
        read, write = [], []
        if found is not None:
            pairs = (found.prefill, found.prefill_ideal), (found.decode, found.decode_ideal)
            read, write = ([f"{g:.2f}x", f"{i:.2f}x", f"{g / i:.2f}"] for g, i in pairs)
        at = f"batch {size}: "
        rows += [
            [at + "prefill ms", *(f"{s.prefill_ms:.1f}" for s in speeds), *read],
            [at + "decode ms a token", *(f"{s.decode_ms:.1f}" for s in speeds), *write],
            [at + "new tokens/s", *(f"{s.tokens_per_second:.1f}" for s in speeds), *pad],
            [at + "peak MiB", *(f"{s.peak_bytes / 2**20:.1f}" for s in speeds), *pad],
        ]
    header = ["", *(m.model for m in models)]
    return header + ["speed-up", "ideal", "share of ideal"] * bool(result.speed_ups), rows


def random_prompts(shape: Anatomy, workload: Workload, batch_size: int) -> Tensor:
    """``[B, T]``: random ordinary tokens; special ones are at the ends of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    low, high = shape.vocab_size // 4, shape.vocab_size // 2
    size = (batch_size, workload.prompt_tokens)
    return torch.randint(low, high, size, generator=generator)


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
