"""Rank of this process among those that ``torchrun`` started."""

from __future__ import annotations

import os


def num_ranks() -> int:
    """Count all processes, on all machines; 1 without ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process writes and prints; the others compute the same and stay silent."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Return the rank of this process on its machine, which is the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
