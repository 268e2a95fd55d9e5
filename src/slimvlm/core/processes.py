"""Which of the processes that ``torchrun`` started this one is."""

from __future__ import annotations

import os


def num_ranks() -> int:
    """All processes, on all machines; 1 without ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process writes and talks; the others compute the same and stay silent."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
