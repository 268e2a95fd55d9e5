"""The first hour of docs/quickstart.md: its very commands, on a text model and on one that sees."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from slimvlm import cli
from tests import tiny_folder as folders

pytestmark = pytest.mark.usefixtures("unhurried")
PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
SMALLER = "--samples 8 --training-samples 4 --local-steps 1 --max-steps 2"
"""Options that change how long a compression takes and nothing else."""


def first_hour():
    return PAGE.read_text().split("## The first hour")[1].split("\n## ")[0]


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", first_hour(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def write_rows(path, count, first=0):
    """Conversations of text in the form that the page shows."""
    rows = []
    for sample in folders.short_samples(first + count, sees=False)[first:]:
        (question, answer) = (message["content"][0]["text"] for message in sample.messages)
        asked = {"role": "user", "content": f"{sample.id}: {question}"}  # no two are the same
        turns = [asked, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows))


def run(command):
    words = shlex.split(command)
    if words[0] != "slimvlm":
        subprocess.run(words, check=True)
        return
    smaller = shlex.split(SMALLER) if words[1] == "compress" else []
    smaller += ["--axis", "depth"] if "--config" in words else []  # all axes were tried before
    cli.main([*words[1:], *smaller])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "llava"])
def test_the_first_hour(kind, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folders.copied(kind, tmp_path / "MODEL")
    write_rows(tmp_path / "mine.jsonl", 30)
    write_rows(tmp_path / "unseen.jsonl", 6, first=30)
    shown = {}
    for command in commands():
        run(command)
        shown[command] = capfd.readouterr().out
    verbs = [command.split()[1] for command in commands() if command.startswith("slimvlm")]
    assert verbs[0] == "advise"
    assert set(verbs) >= {"advise", "compress", "chat", "evaluate", "export", "report"}
    compressed = shown["slimvlm compress MODEL --ratio 0.3 --data mine.jsonl --out small"]
    assert "same next token as the original" in compressed
    summary = shown["cat small/summary.md"]
    kept = json.loads((tmp_path / "small" / "results" / "data-recovered.json").read_text())
    assert f"{kept['figures']['loss']['value']:.3f} [" in summary
    evaluated = next(text for command, text in shown.items() if " evaluate " in command)
    assert "6 samples" in evaluated
    assert (tmp_path / "smaller" / "checkpoint").is_dir()


def test_the_page_s_example_is_a_row_of_data(tmp_path):
    from slimvlm.data.read import load_samples

    (row,) = re.findall(r"```json\n(.*?)```", first_hour(), re.DOTALL)
    (tmp_path / "mine.jsonl").write_text(row)
    assert len(load_samples(tmp_path / "mine.jsonl")) == 1
