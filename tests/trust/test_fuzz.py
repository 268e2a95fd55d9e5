"""Commands on spoiled files of every class end well, or in one line, and change nothing else."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slimvlm import cli
from tests.tiers import tiered
from tests.trust import fuzz

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name",
    tiered(
        ["names", "plan", "data", "tokenizer", "weights"],
        lambda name: name in ("names", "plan", "data"),
    ),
)
def test_one_input_of_a_class_ends_well(name, tmp_path):
    assert not fuzz.attempt(name, "tier/0", tmp_path)[0]


@pytest.mark.parametrize(
    ("deed", "event"),
    [
        (lambda: Path("/etc/passwd").read_text(), "open ('/etc/passwd'"),
        (lambda: Path("../secret.jsonl").read_text(), "open ('../secret.jsonl'"),
        (lambda: Path("../victim").mkdir(), "os.mkdir"),
        (lambda: socket.create_connection(("127.0.0.1", 9), 0.1), "socket"),
        (lambda: subprocess.run(["true"], check=False), "subprocess.Popen"),
    ],
)
def test_what_leaves_its_folder_is_noticed(deed, event, tmp_path, monkeypatch):
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setitem(cli.VERBS, "inspect", lambda: deed() and None)
    monkeypatch.setitem(fuzz.CLASSES, "own", lambda folder, draw: "inspect")
    assert event in fuzz.attempt("own", "0", tmp_path)[0]


@pytest.mark.slow
def test_spoiled_inputs_of_every_class_end_well():
    """In a process of its own, as each input is a fork of it.

    By hand thousands: ``python -m tests.trust.fuzz --minutes 60 --inputs 2400 --seed 3``.
    """
    words = ["-m", "tests.trust.fuzz", "--minutes", "4", "--inputs", "62", "--seed", "tier"]
    ran = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    tried, bad = map(int, re.search(r"^all: (\d+) inputs, (\d+) bad", ran.stdout, re.M).groups())
    assert tried >= len(fuzz.CLASSES)
    assert bad == 0
