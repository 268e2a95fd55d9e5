"""Out of memory is one line: where, during what, how much was missing, and which option helps."""

from __future__ import annotations

import pytest

from slimvlm.cli.memory import memory_explained
from slimvlm.core.errors import SlimError
from slimvlm.core.progress import progress

CUDA = (
    "CUDA out of memory. Tried to allocate 1.20 GiB. GPU 1 has a total capacity of 24.00 GiB of "
    "which 307.00 MiB is free. Including non-PyTorch memory, this process has 23.69 GiB in use."
)
MPS = (
    "MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1.00 GiB, max allowed: "
    "9.07 GiB). Tried to allocate 512.00 MiB on private pool."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
FREE = "1.20 GiB more was needed, 307.0 MiB of 24.00 GiB was free"
CASES = {
    "cuda": (CUDA, "prune", f"out of memory on cuda:1 during prune: {FREE}. What helps: --low-m"),
    "xpu": (CUDA.replace("CUDA", "XPU"), "score", f"on xpu:1 during score: {FREE}"),
    "rocm": (CUDA.replace("CUDA", "HIP"), "recover", f"on cuda:1 during recover: {FREE}"),
    "mps": (MPS, "chat", "on mps during chat: 512.0 MiB more was needed. What helps: --device"),
    "cpu": (
        CPU,
        "evaluate",
        "on cpu during evaluate: 4.00 GiB more was needed. What helps: a sm",
    ),
    "driver": ("CUDA error: out of memory", "bench", "on cuda during bench. What helps: smaller"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_library_s_words_are_understood(case: str) -> None:
    message, verb, told = CASES[case]
    with pytest.raises(SlimError) as caught, memory_explained([verb, "demo"]):
        raise RuntimeError(message)
    assert told in str(caught.value)


def test_the_stage_that_ran_is_named() -> None:
    def run() -> None:
        for _ in progress(range(2), "walk"):
            for _ in progress(range(2), "within"):
                pass
            raise RuntimeError(CUDA)

    with (
        pytest.raises(SlimError, match="during compress, stage 'walk'"),
        memory_explained(["compress", "demo"]),
    ):
        run()


def test_what_is_done_already_is_no_advice() -> None:
    with pytest.raises(SlimError) as caught, memory_explained(["prune", "demo", "--low-memory"]):
        raise RuntimeError(CUDA)
    assert "--low-memory" not in str(caught.value)
    assert "--samples" in str(caught.value)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="same device"), memory_explained(["prune"]):
        raise RuntimeError("Expected all tensors to be on the same device")
