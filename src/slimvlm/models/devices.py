"""Find devices, what they compute and how much memory is free; hash tensors on any of them."""

import gc
import inspect
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from slimvlm.core.documents import digest
from slimvlm.core.errors import ConfigError
from slimvlm.core.progress import local_rank, num_ranks

_CGROUP = Path("/sys/fs/cgroup")
CONTAINER_LIMITS = [
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
]
"""Files of a container's memory limit and use, on Linux."""
CPU_LIMIT = _CGROUP / "cpu.max"
"""File of the processor time that a container may take in a period, in microseconds."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLED = 64  # values of a weight that are hashed one by one


def device_named(name: str | torch.device | None = None) -> torch.device:
    """Find the device of a user's name.

    By default, and for a kind alone, it is this process's accelerator (CUDA, MPS, XPU, ...), or the
    CPU where there is none.
    """
    usual = torch.device("cpu")
    if torch.accelerator.is_available():
        found: Any = torch.accelerator.current_accelerator()
        usual = torch.device(found.type, local_rank() % torch.accelerator.device_count())
    if name is None or str(name) == usual.type:
        return usual
    cards = [] if usual.type == "cpu" else [usual.type]
    cards += [f"{usual.type}:{index}" for index in range(torch.accelerator.device_count())]
    if str(name) not in ("cpu", *cards):
        raise ConfigError(f"device {str(name)!r} must be one of: {', '.join(['cpu', *cards])}")
    if num_ranks() > 1 and str(name) in cards:
        raise ConfigError(
            f"device {str(name)!r}: each of {num_ranks()} processes takes one of its own. Give cpu "
            f"or {usual.type}"
        )
    return torch.device(name)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    lacks = device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps" and not lacks


def with_float64(values: Tensor) -> Tensor:
    """Move values to where float64 sums are possible: their device, or else the CPU."""
    return values if has_float64(values.device) else values.cpu()


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively, and does not emulate that."""
    if device.type == "mps":
        return False  # float32 is as fast on the first chips, and torch cannot tell which one it is
    if device.type == "cuda":  # it answers for the current card
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        supported: Any = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        if supported is None:
            return False
        knows_emulation = "including_emulation" in inspect.signature(supported).parameters
        return bool(supported(including_emulation=False) if knows_emulation else supported())
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.8 on
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def weight_of(owner: Any, name: str = "weight") -> Tensor:
    """Return a parameter, fetched to its module's device if accelerate has offloaded it."""
    weight: Tensor = getattr(owner, name).detach()
    if weight.is_meta:
        weight = owner._hf_hook.weights_map[name].to(owner._hf_hook.execution_device)
    return weight


def digest_of_weights(model: nn.Module) -> str:
    """Hash shapes, data types, sums of the bits and 64 evenly spaced values of every weight."""
    parts = []
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:  # accelerate has offloaded it
            place, _, own = name.rpartition(".")
            tensor = weight_of(model.get_submodule(place), own)
        flat = tensor.detach().flatten()
        bits = flat.view(_INTEGERS[flat.itemsize]).split(2**24)
        total = sum(int(part.sum()) for part in bits)  # any one change changes it
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}".encode())
        parts.append(flat[:: max(len(flat) // _SAMPLED, 1)].float().cpu().numpy().tobytes())
    return digest(parts)


def digest_of_tensors(values: Mapping[str, Any]) -> str:
    """Hash the tensors among some named values, such as a batch."""
    tensors = ((name, each) for name, each in sorted(values.items()) if isinstance(each, Tensor))
    return digest(
        part
        for name, each in tensors
        for part in (
            f"{name} {each.dtype} {list(each.shape)}".encode(),
            each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data,
        )
    )


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


def end_of_processes() -> None:
    """Leave the group of a distributed run.

    Threads that still listen when the interpreter ends can abort a process, and with it torchrun.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
