"""Odd streams, words and environments end in one line."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from slimvlm.cli import VERBS, main
from slimvlm.core.errors import PrintableStream
from tests import tiny_folder as folders
from tests.handmade import refused
from tests.tables import tables
from tests.tiers import tiered

TABLES = tables(__file__)

LONG, MODEL = "x" * 300, folders.folder("text")
WORDS = TABLES["words"]


def run(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "path"),
    tiered(
        product(WORDS, [LONG, "a\0b", "loop", "\udcff"]),
        lambda words, path: path == LONG or words == WORDS[0],
    ),
)
def test_a_word_that_is_no_path_is_named(words, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    folders.copied("text", tmp_path / "model")
    folders.write_llava_data(tmp_path / "data", pictures=False)
    (data,) = (tmp_path / "data").glob("*.json")
    named = {"PATH": path, "MODEL": "model", "DATA": str(data)}
    code, said = run([named.get(word, word) for word in words.split()], capsys)
    assert code == 2, said
    *notes, told = said.splitlines()
    assert told.startswith("slimvlm: ")
    assert len(told) < 1000
    assert len(notes) <= 3


def slimvlm(script, folder):
    """Run a shell line in which ``slimvlm`` is the command."""
    program = f'slimvlm() {{ {sys.executable} -m slimvlm "$@"; }}\n{script}'
    return subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_streams_that_are_closed_or_full_or_of_another_alphabet(tmp_path):
    model = folders.folder("text")
    assert slimvlm(f"slimvlm inspect {model} >&- 2>&-", tmp_path).returncode == 0
    if Path("/dev/full").exists():
        full = slimvlm(f"slimvlm inspect {model} > /dev/full", tmp_path)
        assert (full.returncode, full.stderr.count("\n")) == (2, 1)
        assert "cannot be written" in full.stderr
    (tmp_path / "\u732b").symlink_to(model)
    latin = "export PYTHONIOENCODING=latin-1; slimvlm inspect \u732b"
    assert (told := slimvlm(latin, tmp_path)).returncode == 0, told.stderr
    assert "\\u732b" in told.stdout


def test_a_folder_that_is_gone_and_an_odd_environment_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert "WORLD_SIZE 'abc' must be a number" in refused("inspect", MODEL, alone=True)
    monkeypatch.undo()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert refused("inspect", MODEL, alone=True)


@pytest.mark.parametrize(
    "error", [KeyError("\x1b[2J"), ZeroDivisionError("a\nb"), AssertionError()]
)
def test_what_nobody_foresaw_is_one_line(error, monkeypatch, capsys):
    def fails(**_):
        raise error

    monkeypatch.setitem(VERBS, "inspect", fails)
    monkeypatch.setattr("slimvlm.cli.parsed", lambda *_: {})
    code, said = run(["inspect", "x"], capsys)
    assert code == 1
    assert said.startswith(f"slimvlm: internal error ({type(error).__name__}")
    assert said.endswith("SLIMVLM_DEBUG=1 shows all\n")
    assert said.count("\n") == 1
    assert "\x1b" not in said
    monkeypatch.setenv("SLIMVLM_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["inspect", "x"])


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_stream_obeys_bars_alone(is_terminal, tmp_path):
    with (tmp_path / "file").open("w+") as file:
        file.isatty = lambda: is_terminal
        stream = PrintableStream(file)
        stream.write("a\x1b[2Jb\x1b]0;t\x07\u202e\rc\x1b[31md\x1b[0m\n")
        stream.flush()
        file.seek(0)
        said = file.buffer.read().decode()
    kept = "\x1b[31md\x1b[0m" if is_terminal else r"\x1b[31md\x1b[0m"
    assert said == r"a\x1b[2Jb\x1b]0;t\x07\u202e" + "\rc" + kept + "\n"


@pytest.mark.parametrize("name", ["model_type", "rope_scaling"])
def test_no_word_of_a_model_moves_the_cursor_of_a_terminal(name, tmp_path, monkeypatch, capfd):
    """A terminal gets bars and colours, but in errors and logs of libraries not those of files."""
    model, word = folders.copied("text", tmp_path / "m"), "x\x1b[5A\x1b[2Ky"
    values = {"model_type": word, "rope_scaling": {"rope_type": word}}
    folders.edit_json(model / "config.json", lambda v: v.update({name: values[name]}))
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    code, said = run(["inspect", str(model)], capfd)
    assert code == 2
    assert "\x1b" not in said
    assert r"x\x1b[5A\x1b[2Ky" in said
