"""Explain an out-of-memory error: the device, the stage, and the option that helps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from slimvlm.core.errors import LESS_TO_TRAIN, SlimError, is_out_of_memory, one_line
from slimvlm.core.progress import current_stage, own_stages

_LESS_AT_ONCE = "a smaller --batch-size"
_LAYER_BY_LAYER = "--low-memory keeps one layer on the device at a time"
_CURES = {
    "train": LESS_TO_TRAIN,
    "recover": LESS_TO_TRAIN,
    "score": _LAYER_BY_LAYER,
    "prune": _LAYER_BY_LAYER,
    "compress": "fewer --samples, a smaller --task-batch-size, or prune --low-memory and recover",
    "evaluate": _LESS_AT_ONCE,
    "bench": "smaller --batch-sizes or --prompt-tokens",
}
"""Options that lower the memory of a stage, or else of a verb."""
_BYTES = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@contextmanager
def memory_explained(words: Sequence[str]) -> Iterator[None]:
    """Turn an out-of-memory error, of a CPU or any accelerator, into a SlimError of one line."""
    with own_stages():
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SlimError(_out_of_memory(one_line(error), words)) from error


def _out_of_memory(told: str, words: Sequence[str]) -> str:
    """Format an out-of-memory error for a user."""
    kind = re.search(r"(\w+)(?: backend| error:)? out of memory", told)
    kind = kind or re.search(r"(CU)\w+_ALLOC_FAILED", told)
    number = re.search(r"GPU (\d+)", told)
    name = (
        {"HIP": "cuda", "CU": "cuda"}.get(kind[1], kind[1].lower()) if kind is not None else "cpu"
    )
    where = f"{name}:{number[1]}" if number is not None else name
    stage = current_stage() or words[0]
    needed = re.search(r"tried to allocate ([\d.]+) (\w+)", told, re.IGNORECASE)
    room = re.search(r"capacity of ([\d.]+) (\w+) of which ([\d.]+) (\w+)", told)
    facts = [f"{_size(*needed.groups())} more was needed"] if needed is not None else []
    if room is not None:
        facts.append(f"{_size(room[3], room[4])} of {_size(room[1], room[2])} was free")
    cure = _CURES.get(stage) or _CURES.get(words[0])
    if cure == _LAYER_BY_LAYER and "--low-memory" in words:
        cure = "fewer --samples"
    if cure is None:
        cure = "a smaller model" if name == "cpu" else "--device cpu uses the memory of the host"
    about = f": {', '.join(facts)}" if facts else ""
    doing = words[0] if stage == words[0] else f"{words[0]}, stage {stage!r}"
    return f"out of memory on {where} during {doing}{about}. What helps: {cure}"


def _size(number: str, unit: str) -> str:
    from slimvlm.runs.tables import size

    return size(float(number) * _BYTES.get(unit.lower(), 1))
