"""A pretended CUDA card, so that any machine runs what would run on a GPU.

Import it before torch: as a plugin (``pytest -p tests.pretended_gpu``), or for a command of its own
(``python -m tests.pretended_gpu slimvlm inspect demo``). ``PRETENDED_GPUS=2`` makes two cards.

Values are the CPU's: every operator runs the CPU's kernel. Mixing devices, a CPU generator for a
device tensor and ``.numpy()`` raise as on a GPU. `torch.cuda.max_memory_allocated` is what tensors
held at most, and allocations beyond `limit` raise `torch.OutOfMemoryError`. `waits` counts what a
program would wait for the card for. Not pretended: speed, streams, Triton, NCCL, the workspaces and
the rounding of real kernels.

``card.cpp`` is compiled once for each version of torch (``g++``, half a minute).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TRIED_WITH = ("2.13",)
"""Versions of torch whose inner places this file knows."""
AMPERE, TURING = (8, 0), (7, 5)
"""Compute capabilities: with bfloat16 in hardware, and without."""

_capability = AMPERE


def why_not() -> str | None:
    """Why no card can be pretended here; None if one can."""
    if "torch" in sys.modules:
        return "torch was imported first: run pytest with -p tests.pretended_gpu"
    version = importlib.util.find_spec("torch")
    if version is None or version.origin is None:
        return "torch is not installed"
    text = (Path(version.origin).parent / "version.py").read_text()
    found = text.partition("__version__ = '")[2].partition("'")[0]
    if not found.startswith(TRIED_WITH):
        return f"a card is pretended for torch {', '.join(TRIED_WITH)}, this is {found}"
    if "+cpu" not in found and "cuda = None" not in text and ": Optional[str] = None" not in text:
        return "this torch is built for real cards"
    return None


def _built() -> ctypes.CDLL:
    """The compiled card, from the cache if it is there."""
    root = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
    source = Path(__file__).with_name("card.cpp")
    contents = source.read_bytes() + (root / "version.py").read_bytes()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimvlm-tests"
    library = folder / f"card-{hashlib.sha256(contents).hexdigest()[:16]}.so"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w", str(source)]
        command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        command += [f"-L{root}/lib", "-lc10", "-ltorch_cpu", "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(library)
    found = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    for name in ("card_held", "card_peak", "card_total", "card_waits"):
        getattr(found, name).restype = ctypes.c_size_t
    found.card_limit.argtypes = [ctypes.c_int, ctypes.c_size_t]
    return found


REASON = why_not()
"""Why there is no pretended card in this process; None if there is one."""
_card: Any = None
if REASON is None:
    try:
        _card = _built()  # torch looks for its hooks when it is imported
    except OSError as error:
        REASON = f"a pretended card needs g++: {error}"
    except subprocess.CalledProcessError as error:
        REASON = f"g++ could not compile the pretended card: {error.stderr.strip()[:400]}"


def _index(device: Any = None) -> int:
    import torch

    index = device if isinstance(device, int | None) else torch.device(device).index
    return int(_card.card_active() if index is None or index < 0 else index)


def set_limit(size: int, device: Any = None) -> None:
    """Let allocations beyond so many bytes on a card raise `torch.OutOfMemoryError`.

    A size of 0 is no limit (24 GiB are reported then); by default it is the active card's.
    """
    _card.card_limit(_index(device), size)


@contextmanager
def limit(size: int, device: Any = None) -> Iterator[None]:
    """Inside, a card has so many bytes more than it holds now."""
    set_limit(_card.card_held(_index(device)) + size, device)
    try:
        yield
    finally:
        set_limit(0, device)


def waits() -> int:
    """How often a program has waited for a card so far.

    Counted are numbers that are read (``.item()``, ``.tolist()``), copies to the host, copies from
    memory that is not pinned, and operators whose size of result depends on values (``nonzero``,
    indexing by a mask).
    """
    return int(_card.card_waits())


def waits_of(run: Callable[[], object]) -> int:
    """How often something waits for a card."""
    before = waits()
    run()
    return waits() - before


@contextmanager
def capability(found: tuple[int, int]) -> Iterator[None]:
    """Inside, cards have another compute capability."""
    global _capability
    before, _capability = _capability, found
    try:
        yield
    finally:
        _capability = before


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    total = _card.card_total(_index(device))
    return max(total - _card.card_held(_index(device)), 0), total


def _properties(device: Any = None) -> SimpleNamespace:
    major, minor = _capability
    size = {"total_memory": _card.card_total(_index(device)), "multi_processor_count": 1}
    return SimpleNamespace(name="pretended", major=major, minor=minor, **size)


def _activate(device: Any) -> int:
    before = int(_card.card_active())
    if (index := _index(device)) >= 0:
        _card.card_activate(index)
    return before


def _install() -> None:
    """Let torch's Python half answer as it does with cards."""
    import torch

    def nothing() -> Any:  # a new function each time: torch._dynamo keeps them apart by identity
        return lambda *args, **kwargs: None

    held = lambda device=None: _card.card_held(_index(device))  # noqa: E731
    peak = lambda device=None: _card.card_peak(_index(device))  # noqa: E731
    answers = {
        "_lazy_init": nothing(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: _card.card_count(),
        "current_device": lambda: _card.card_active(),
        "set_device": lambda device: _card.card_activate(_index(device)),
        "_exchange_device": lambda device: _activate(device),
        "_maybe_exchange_device": lambda device: _activate(device),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "ipc_collect": nothing(),
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or _capability >= AMPERE
        ),
        "mem_get_info": _mem_get_info,
        "memory_allocated": held,
        "memory_reserved": lambda device=None: held(device),
        "max_memory_allocated": peak,
        "max_memory_reserved": lambda device=None: peak(device),
        "reset_peak_memory_stats": lambda device=None: _card.card_reset_peak(_index(device)),
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: _capability,
        "get_device_properties": _properties,
        "get_arch_list": lambda: ["sm_80"],
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for module in (torch.cuda, torch.cuda.random):
        for name, answer in {
            "get_rng_state": lambda device="cuda": torch.get_rng_state(),
            "get_rng_state_all": lambda: [torch.get_rng_state()] * _card.card_count(),
            "set_rng_state": nothing(),
            "set_rng_state_all": nothing(),
            "manual_seed": nothing(),
            "manual_seed_all": nothing(),
        }.items():
            setattr(module, name, answer)
    for name, answer in {
        "_cuda_getDevice": lambda: _card.card_active(),
        "_cuda_setDevice": lambda device: _card.card_activate(device),
        "_cuda_exchangeDevice": lambda device: _activate(device),
        "_cuda_maybeExchangeDevice": lambda device: _activate(device),
        "_cuda_synchronize": nothing(),
        "_cuda_getCompiledVersion": lambda: 12080,
        "_cuda_getCurrentRawStream": lambda device: 0,
    }.items():
        setattr(torch._C, name, answer)

    _let_storages_travel()


def _let_storages_travel() -> None:
    """Copy storages as tensors: by themselves they know only devices of torch's own build."""
    import torch

    storage_to, storage_clone = torch.storage._to, torch.storage._StorageBase.clone  # type: ignore[attr-defined]

    def as_bytes(storage: Any) -> Any:
        return torch.tensor([], dtype=torch.uint8, device=storage.device).set_(storage)

    def to(storage: Any, device: Any, non_blocking: bool = False) -> Any:
        device = torch.device(device)
        if storage.device == device or device.type != "cuda":
            return storage_to(storage, device, non_blocking)
        return as_bytes(storage).to(device).untyped_storage()

    def clone(storage: Any) -> Any:
        if storage.device.type != "cuda":
            return storage_clone(storage)
        return as_bytes(storage).clone().untyped_storage()

    torch.storage._to = to  # type: ignore[attr-defined]
    torch.storage._StorageBase.clone = clone  # type: ignore[method-assign]
    torch.UntypedStorage.clone = clone  # type: ignore[method-assign]


if REASON is None:
    _install()
