"""The example on easy-vqa, in its short form: a user's own fine-tuned model, from data to table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "easy_vqa" / "run.py"


def test_the_short_form_ends_with_a_table_and_goes_on_from_what_is_there(tmp_path):
    pytest.importorskip("easy_vqa")
    command = [sys.executable, str(EXAMPLE), "--short", "--out", str(tmp_path)]
    quiet = {**os.environ, "MPLBACKEND": "agg"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| 30% |")]
    assert [row.split(" | ")[1] for row in rows] == ["slimvlm", "ShortGPT"]
    found = json.loads((tmp_path / "results" / "slimvlm-0.3-0.json").read_text())
    asked = {name: len(task["scores"]) for name, task in found["tasks"].items()}
    assert asked == dict.fromkeys(("yes or no", "negated yes or no", "colour", "shape"), 8)
    assert (tmp_path / "easy_vqa.png").is_file()

    again = subprocess.run(command, capture_output=True, text=True, env=quiet, check=True)
    assert "$ slimvlm" not in again.stdout  # nothing is made twice
    assert again.stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]
