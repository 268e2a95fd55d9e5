"""Whatever happens on the way, the table at the end is the same: kills, two processes, Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests import tiny_folder as folders
from tests.runs.study.study_files import RECOVER, RECOVERIES, stable

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("SLIMVLM_KILLS", "3"))
"""Kills at random moments; SLIMVLM_KILLS=10 for the long form."""
NUM_STAGES = 10


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a model that sees, along both axes, without recovery and with."""
    home = tmp_path_factory.mktemp("study")
    folders.copied("llava", home / "model")
    values = {
        "grids": [{"model": str(home / "model"), "ratio": 0.4, "recovery": ["none", "sft+hidden"]}],
        "recoveries": RECOVERIES,
        "recover": RECOVER,
        "data": str(folders.write_llava_data(home / "data")),
        "prune": {"samples": 4},
        "tasks": "presence,text_ppl",
        "limit": 2,
    }
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def started(file: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "slimvlm", "study", str(file), "--out", str(out), *options]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finished(file: Path, out: Path, *options: str) -> pd.DataFrame:
    process = started(file, out, *options)
    assert process.wait(900) == 0, (out.parent / f"{out.name}.log").read_text()[-3000:]
    return pd.read_parquet(out / "results.parquet")


def done_in(out: Path) -> dict[str, Any]:
    """What is written beside every outcome, by its folder's name."""
    found = (out / "cache").glob("*/[!.]*/stage.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


@pytest.fixture(scope="module")
def expected(file: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    table = finished(file, tmp_path_factory.mktemp("runs") / "undisturbed")
    assert set(table["status"]) == {"done"}
    assert table["perplexity"].nunique() == 5
    return stable(table)


def test_kills_at_random_moments_change_nothing(
    file: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    out, draw = tmp_path / "killed", random.Random(0)
    targets = sorted(draw.sample(range(NUM_STAGES - 1), KILLS))
    for target in targets:
        process = started(file, out)
        while len(done_in(out)) < target and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    pd.testing.assert_frame_equal(stable(finished(file, out)), expected)
    assert list((out / "work").iterdir()) == []
    assert len(done_in(out)) == NUM_STAGES


def test_two_processes_share_the_work(file: Path, expected: pd.DataFrame, tmp_path: Path) -> None:
    both = [started(file, tmp_path / "shared") for _ in range(2)]
    assert [process.wait(900) for process in both] == [0, 0]
    table = pd.read_parquet(tmp_path / "shared" / "results.parquet")
    pd.testing.assert_frame_equal(stable(table), expected)
    assert len(done_in(tmp_path / "shared")) == NUM_STAGES


@pytest.mark.skipif(find_spec("ray") is None, reason="needs slimvlm[ray]")
def test_ray_gives_the_same_table(file: Path, expected: pd.DataFrame, tmp_path: Path) -> None:
    table = finished(file, tmp_path / "ray", "--engine", "ray", "--workers", "2")
    pd.testing.assert_frame_equal(stable(table), expected)
    assert len(done_in(tmp_path / "ray")) == NUM_STAGES
