"""One measurement in a process of its own, on this machine or on the card that tests pretend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


def measured(script: str, words: Sequence[str], pretend: bool, card_gib: float = 0.0) -> Any:
    """Run a script; what it prints last, read as JSON.

    Args:
        script: Its file.
        words: Its arguments.
        pretend: Whether there is a card for it, pretended by tests/pretended_gpu: what that holds
            is counted exactly and is memory of the process, too; its times mean nothing.
        card_gib: How large that card is; 24 GiB by default.
    """
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    if card_gib:
        environment["PRETENDED_GPU_LIMIT"] = str(round(card_gib * 2**30))
    command = [sys.executable, *(["-m", "tests.pretended_gpu"] * pretend), script, *words]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=HERE.parent, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def card_peak() -> float:
    """GiB that tensors on a card held at most since this was asked last; 0 without a card."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return float(peak)
