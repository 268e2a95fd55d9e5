"""Count memory and FLOPs of an `Anatomy` from its shapes.

FLOPs are those of the matrix products, two for each multiplication with its addition: weights, and
attention scores and their weighted values, in prefill over the whole square of positions. Norms,
softmax, rotary embeddings, the look-up of tokens, convolutions, the scan of linear attention, cross
attention, scores of Gemma 3n and 4 and matrices outside the layers are left out. The head counts
for one position, as in generation. Otherwise this is what `torch.utils.flop_counter` counts;
Hoffmann et al. 2022, arXiv:2203.15556, Appendix F, also count softmax, the look-up and the head at
every position.
"""

import gc
import re
import sys
from importlib import import_module
from pathlib import Path

import psutil
import torch

from slimvlm.core.errors import ConfigError
from slimvlm.models.anatomy import Anatomy

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_SIZES = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}

_CGROUP = Path("/sys/fs/cgroup")
CONTAINER_LIMITS = [
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
]
"""Files of a container's memory limit and use, on Linux."""
CPU_LIMIT = _CGROUP / "cpu.max"
"""File of the processor time that a container may take in a period, in microseconds."""

ROW_MULTIPLE = 8  # weights of a 16-byte row in bfloat16; kernels without it fall back or fail
TILE_MULTIPLE = 64  # width of a tile of common matrix kernels
WIDTH_MULTIPLE = 128  # group of common 4-bit formats and block of fp8 ones
OFF_ROWS_ADVICE = (
    "rows end off a 16-byte boundary, which can cost a third of the speed: plan with "
    f"--round-to {WIDTH_MULTIPLE}"
)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes of one weight by data type


def weight_bytes(anatomy: Anatomy, dtype: str = "bfloat16") -> int:
    """Count bytes of all weights of the model."""
    return int(anatomy.total_params * getattr(torch, dtype).itemsize)


def kv_cache_bytes(anatomy: Anatomy, tokens: int, dtype: str = "bfloat16") -> int:
    """Count bytes of keys and values of so many tokens; layers with a window hold no more of it."""
    values = sum(
        min(tokens, s.window or tokens) * (2 * s.num_kv_heads * s.head_dim + s.fixed_cache)
        for s in anatomy.layers
    )
    return int(values * getattr(torch, dtype).itemsize)


def prefill_flops(anatomy: Anatomy, tokens: int, batch_size: int = 1) -> int:
    """Count FLOPs of the backbone for the first answer token; ``tokens`` includes image tokens."""
    return batch_size * _forward_flops(anatomy, tokens, tokens)


def decode_flops(anatomy: Anatomy, context: int, batch_size: int = 1) -> int:
    """Count FLOPs of the backbone for one more token that attends to ``context``, itself too."""
    return batch_size * _forward_flops(anatomy, 1, context)


def _forward_flops(anatomy: Anatomy, tokens: int, context: int) -> int:
    """Count FLOPs of tokens that attend to a context, with the head for one of them."""
    flops = 2 * anatomy.hidden_size * anatomy.vocab_size
    rows, experts = (*anatomy.backbone.attention, *anatomy.backbone.mlp), anatomy.backbone.experts
    if experts is not None:
        rows = tuple(row for row in rows if not row.path.startswith(f"{experts.module}."))
    for shape in anatomy.layers:
        blocks = [shape.block(segment) for row in rows for segment in row.segments]
        channels = sum(count * width for count, width in blocks)
        of_expert = max(shape.expert_params // anatomy.hidden_size - 1, 0)  # but its router's row
        channels += anatomy.experts_per_token * of_expert + shape.num_experts
        flops += tokens * 2 * anatomy.hidden_size * channels  # one side is the hidden size
        flops += tokens * 2 * shape.fixed_weights
        reach = max(tokens, min(context, shape.window or context))
        flops += 4 * tokens * reach * shape.num_heads * shape.head_dim  # scores and values
    return flops


def slow_widths(anatomy: Anatomy) -> list[str]:
    """Describe the widths that hardware is slow with; empty if there are none."""
    widths = sorted({layer.intermediate_size for layer in anatomy.layers})
    advice = f"no multiple of {TILE_MULTIPLE}, the tile of matrix kernels: plan with "
    advice += f"--round-to {WIDTH_MULTIPLE}"
    if any(width % ROW_MULTIPLE for width in widths):
        advice = OFF_ROWS_ADVICE
    elif not any(width % TILE_MULTIPLE for width in widths):
        return []
    return [f"{', '.join(map(str, widths))} neurons: {advice}"]


def params_of_target(params: str | None, memory: str | None, dtype: str) -> int | None:
    """Return the parameters of a target: ``params`` as ``5B``, or else ``memory`` as ``8GiB``."""
    text, name, units, size = params, "target_params", _COUNTS, 1
    allowed = "a number such as 5B, 90M or 1200000"
    if text is None:
        text, name, units, size = memory, "target_memory", _SIZES, BYTES[dtype]
        allowed = "a size such as 8GiB or 500MB"
    if text is None:
        return None
    match = re.fullmatch(rf"(\d+\.?\d*)\s*({'|'.join(units)})", text.strip().lower())
    if match is None:
        raise ConfigError(f"{name} {text!r} must be {allowed}")
    return round(float(match[1]) * units[match[2]]) // size


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate, within a container's limit."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        card = torch.get_device_module(device)
        held: int = card.memory_allocated(device)
        try:
            spare: int = card.memory_reserved(device) - held  # torch caches it and can reuse it
            return int(card.mem_get_info(device)[0]) + spare
        except RuntimeError:  # some Intel GPUs do not say
            return int(card.get_device_properties(device).total_memory) - held
    free: int = psutil.virtual_memory().available
    for limit, used in CONTAINER_LIMITS:
        if limit.is_file() and (most := limit.read_text().strip()).isdecimal():
            stat = used.with_name("memory.stat")  # files that were read and can be dropped
            text = stat.read_text() if stat.is_file() else ""
            pages: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", text, re.M))
            cached = int(pages.get("total_inactive_file", pages.get("inactive_file", "0")))
            free = min(free, int(most) - int(used.read_text()) + cached)
    return free


def usable_cores() -> float:
    """Count the cores that torch computes on, within a container's limit."""
    cores = float(torch.get_num_threads())
    if CPU_LIMIT.is_file() and (words := CPU_LIMIT.read_text().split())[0].isdecimal():
        cores = min(cores, int(words[0]) / int(words[1]))
    return cores


def load_of_others() -> str:
    """Say how much longer work on the CPU takes with a fair share of it; empty if hardly longer."""
    load, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
    longer = (load + torch.get_num_threads()) / cores
    if longer < 1.2:
        return ""
    busy = f"this machine is busy: load {load:.1f} on {cores} cores"
    return f"{busy}; expect at least {longer:.1f} times as long"


def release_memory() -> None:
    """Free the memory of accelerators that no tensor holds any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()


def peak_memory() -> str:
    """Format the peak memory of this process and of its accelerator."""
    resource = import_module("resource")  # not on every system
    unit = 1 if sys.platform == "darwin" else 1024
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    text = f"{held / 2**30:.1f} GiB"
    if torch.accelerator.is_available():
        card = torch.get_device_module(torch.accelerator.current_accelerator())
        peak = getattr(card, "max_memory_allocated", lambda index: 0)  # MPS counts none
        if on_card := max(map(peak, range(torch.accelerator.device_count()))):
            text += f", {on_card / 2**30:.1f} GiB on the accelerator"
    return text
