"""Commands on spoiled files of every class end well, or in one line, and change nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_three_hundred_spoiled_inputs_end_well():
    """In a process of its own, as each input is a fork of it."""
    words = ["-m", "tests.trust.fuzz", "--minutes", "15", "--inputs", "300", "--seed", "tier"]
    ran = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert "| **all** | 300 | 0 |" in ran.stdout
