"""How fast a model runs, and how near its speed-up over another one comes to the ideal."""

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
from slimvlm.evaluation.memory import PeakMemory, stored_bytes
from slimvlm.evaluation.timing import Run, timed_run, timed_runs
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import decode_flops, kv_cache_bytes_per_token, prefill_flops, slow_widths
from slimvlm.models.load import anatomy as anatomy_of
from slimvlm.models.parts import decoder_layers, final_norm


@dataclass(frozen=True)
class Speed:
    """One model at one batch size; medians over the repeats.

    Attributes:
        batch_size: Prompts answered at once.
        prefill_ms: Time to the first new token, in milliseconds.
        decode_ms: Time of one further token of every answer.
        tokens_per_second: New tokens of all answers in a second, reading included.
        peak_bytes: Weights and the most that other tensors took at once.
    """

    batch_size: int
    prefill_ms: float
    decode_ms: float
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class Measured:
    """What one model takes.

    Attributes:
        model: Name or path.
        total_params: Parameters of the whole model.
        backbone_params: Parameters of its language backbone.
        weight_bytes: Bytes of all weights as they are in memory.
        prefill_flops: FLOPs of the backbone for one prompt.
        decode_flops: FLOPs of the backbone for one further token after the prompt.
        speeds: Times at each batch size.
        warnings: Widths that hardware is slow with.
    """

    model: str
    total_params: int
    backbone_params: int
    weight_bytes: int
    prefill_flops: int
    decode_flops: int
    speeds: tuple[Speed, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class SpeedUp:
    """How much faster one model is than another, and how much faster it could be at best.

    The ideal of reading is the ratio of FLOPs. The ideal of writing is the ratio of bytes that
    every new token has to read: decoder layers, final norm and head as they are stored, and the
    keys and values of the prompt.

    Attributes:
        batch_size: Prompts answered at once.
        prefill: Median over the repeats of baseline time / model time.
        prefill_ideal: Ratio of FLOPs.
        decode: As ``prefill``, for one further token.
        decode_ideal: Ratio of bytes.
    """

    batch_size: int
    prefill: float
    prefill_ideal: float
    decode: float
    decode_ideal: float

    @property
    def prefill_share(self) -> float:
        """Part of the ideal that is reached in reading."""
        return self.prefill / self.prefill_ideal

    @property
    def decode_share(self) -> float:
        """Part of the ideal that is reached in writing."""
        return self.decode / self.decode_ideal


@dataclass(frozen=True)
class Bench:
    """A measured model, and its baseline if there is one.

    Attributes:
        workload: What was timed.
        device: Where.
        dtype: Data type of the weights that are not quantised.
        threads: Threads of the CPU.
        model: The model.
        baseline: What it is compared with.
        speed_ups: One for each batch size; empty without a baseline.
    """

    workload: Workload
    device: str
    dtype: str
    threads: int
    model: Measured
    baseline: Measured | None = None
    speed_ups: tuple[SpeedUp, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the shares of the ideal."""
        values = asdict(self)
        for row, speed_up in zip(values["speed_ups"], self.speed_ups, strict=True):
            row["prefill_share"] = speed_up.prefill_share
            row["decode_share"] = speed_up.decode_share
        return values


def bench(
    model: PreTrainedModel,
    baseline: PreTrainedModel | None = None,
    workload: Workload | None = None,
    names: Sequence[str] = ("model", "baseline"),
) -> Bench:
    """Time reading and writing; with a baseline, both in turn in this process.

    Prompts are random tokens: every one costs the same, whatever it says, and the vision tower,
    which pruning leaves alone, is not timed. Answers have a fixed length. A shared machine that is
    slow for a while slows both models, and a speed-up is the median of the ratios of neighbouring
    runs.

    Args:
        model: The model, on the device where it shall run.
        baseline: Usually the model before pruning; on the same device.
        workload: What to time.
        names: Names of the model and of the baseline in the result.

    Raises:
        ConfigError: If the workload is out of range or the two are on different devices.
    """
    workload = workload or Workload()
    models = [model] if baseline is None else [model, baseline]
    if len({one.device for one in models}) > 1:
        raise ConfigError(f"baseline is on {models[1].device}, the model on {model.device}")
    shapes = [anatomy_of(one.config) for one in models]
    batches = {
        size: [_prompts(shape, workload, size, model.device) for shape in shapes]
        for size in dict.fromkeys(workload.batch_sizes)
    }
    peaks = {size: _peaks(models, batches[size], workload) for size in batches}
    runs = {
        size: timed_runs(models, batches[size], workload.new_tokens, workload.repeats)
        for size in progress(list(batches), "bench")
    }
    speeds = [
        tuple(_speed(size, workload, runs[size][i], peaks[size][i]) for size in runs)
        for i in range(len(models))
    ]
    measured = [
        _measured(name, one, shape, workload, its)
        for name, one, shape, its in zip(names, models, shapes, speeds, strict=False)
    ]
    return Bench(
        workload=workload,
        device=_device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        model=measured[0],
        baseline=measured[1] if baseline is not None else None,
        speed_ups=tuple(
            _speed_up(models, shapes, size, runs[size], workload)
            for size in (runs if baseline is not None else ())
        ),
    )


def bench_rows(result: Bench) -> tuple[list[str], list[list[str]]]:
    """A row for each figure, a column for each model; with a baseline, speed-up and ideal too."""
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
        read = _gain_cells(found.prefill, found.prefill_ideal) if found else []
        write = _gain_cells(found.decode, found.decode_ideal) if found else []
        at = f"batch {size}: "
        rows += [
            [at + "prefill ms", *(f"{s.prefill_ms:.1f}" for s in speeds), *read],
            [at + "decode ms a token", *(f"{s.decode_ms:.1f}" for s in speeds), *write],
            [at + "new tokens/s", *(f"{s.tokens_per_second:.1f}" for s in speeds), *pad],
            [at + "peak MiB", *(f"{s.peak_bytes / 2**20:.1f}" for s in speeds), *pad],
        ]
    header = ["", *(m.model for m in models)]
    return header + ["speed-up", "ideal", "share of ideal"] * bool(result.speed_ups), rows


def _gain_cells(found: float, ideal: float) -> list[str]:
    return [f"{found:.2f}x", f"{ideal:.2f}x", f"{found / ideal:.2f}"]


def _prompts(
    shape: Anatomy, workload: Workload, batch_size: int, device: torch.device
) -> dict[str, Tensor]:
    """Random ordinary tokens: special ones stand at the ends of a vocabulary."""
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, workload.prompt_tokens)
    ids = torch.randint(shape.vocab_size // 4, shape.vocab_size // 2, size, generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def _peaks(
    models: Sequence[PreTrainedModel], batches: Sequence[Mapping[str, Tensor]], workload: Workload
) -> list[int]:
    """Weights and the most that other tensors took at once, for each model."""
    peaks = []
    for model, batch in zip(models, batches, strict=True):
        with PeakMemory().without(model) as memory:
            timed_run(model, batch, min(workload.new_tokens, MIN_NEW_TOKENS))
        peaks.append(stored_bytes(model) + memory.peak_bytes)
    return peaks


def _speed(batch_size: int, workload: Workload, runs: Sequence[Run], peak_bytes: int) -> Speed:
    new_tokens = batch_size * workload.new_tokens
    return Speed(
        batch_size=batch_size,
        prefill_ms=median(run.prefill_ms for run in runs),
        decode_ms=median(run.decode_ms for run in runs),
        tokens_per_second=median(1e3 * new_tokens / run.total_ms for run in runs),
        peak_bytes=peak_bytes,
    )


def _measured(
    name: str, model: PreTrainedModel, shape: Anatomy, workload: Workload, speeds: tuple[Speed, ...]
) -> Measured:
    return Measured(
        model=name,
        total_params=shape.total_params,
        backbone_params=shape.backbone_params,
        weight_bytes=stored_bytes(model),
        prefill_flops=prefill_flops(shape, workload.prompt_tokens),
        decode_flops=decode_flops(shape, _mean_context(workload)),
        speeds=speeds,
        warnings=tuple(slow_widths(shape)),
    )


def _speed_up(
    models: Sequence[PreTrainedModel],
    shapes: Sequence[Anatomy],
    batch_size: int,
    runs: Sequence[Sequence[Run]],
    workload: Workload,
) -> SpeedUp:
    pairs = list(zip(*runs, strict=True))
    read = [prefill_flops(shape, workload.prompt_tokens, batch_size) for shape in shapes]
    context = _mean_context(workload)
    written = [
        _bytes_read(model, shape, context, batch_size)
        for model, shape in zip(models, shapes, strict=True)
    ]
    return SpeedUp(
        batch_size=batch_size,
        prefill=median(slow.prefill_ms / fast.prefill_ms for fast, slow in pairs),
        prefill_ideal=read[1] / read[0],
        decode=median(slow.decode_ms / fast.decode_ms for fast, slow in pairs),
        decode_ideal=written[1] / written[0],
    )


def _mean_context(workload: Workload) -> int:
    """Tokens that a new one attends to, halfway through the answer."""
    return workload.prompt_tokens + workload.new_tokens // 2


def _bytes_read(model: PreTrainedModel, shape: Anatomy, context: int, batch_size: int) -> int:
    """Bytes that one further token of every answer reads from memory."""
    head: Any = model.get_output_embeddings()
    weights = stored_bytes(decoder_layers(model), final_norm(model), head)
    dtype = str(model.dtype).removeprefix("torch.")
    return weights + batch_size * context * kv_cache_bytes_per_token(shape, dtype)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
