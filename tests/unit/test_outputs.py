"""Outputs appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slimvlm.errors import ConfigError
from slimvlm.outputs import new_folder, require_free, write_text


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        assert folder.parent == out.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        assert not out.exists()
    assert contents(tmp_path) == {"deep/out/sub/file": "new"}


def test_nothing_appears_when_the_block_raises(tmp_path: Path) -> None:
    def fails() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def old(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    (out / "only-old").write_text("old")
    return out


def test_an_existing_folder_is_not_overwritten(old: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out' exists.*--force"), new_folder(old):
        raise AssertionError("the block must not run")
    assert contents(tmp_path) == {"out/file": "old", "out/only-old": "old"}


def test_force_replaces_the_whole_folder(old: Path, tmp_path: Path) -> None:
    with new_folder(old, force=True) as folder:
        (folder / "file").write_text("new")
        assert (old / "file").read_text() == "old"
    assert contents(tmp_path) == {"out/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_that_fails_leaves_the_old_folder(old: Path, tmp_path: Path) -> None:
    def fails() -> None:
        with new_folder(old, force=True) as folder:
            (folder / "file").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert contents(tmp_path) == {"out/file": "old", "out/only-old": "old"}


def test_force_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "file").write_text("new")
    assert contents(tmp_path) == {"out/file": "new"}


def test_a_failing_rename_leaves_the_old_folder(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new folder cannot take its place: the old one must be there again, or still."""
    rename = Path.rename

    def refuses(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("rename failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match="rename failed"), new_folder(old, force=True) as folder:
        (folder / "file").write_text("new")
    assert contents(old) == {"file": "old", "only-old": "old"}


KILLED = """
import os, signal, sys, time
from pathlib import Path
from slimvlm.outputs import new_folder
with new_folder(sys.argv[1], force=True) as folder:
    (folder / "file").write_text("half")
    (folder / "rest").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("has_old", [True, False])
def test_a_kill_leaves_the_old_state_and_the_next_run_works(
    has_old: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue("old") if has_old else tmp_path / "out"
    before = contents(out) if has_old else {}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert out.exists() == has_old
    assert (contents(out) if has_old else {}) == before
    with new_folder(out, force=has_old) as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("new")
    assert contents(tmp_path) == {"out/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(old: Path, tmp_path: Path) -> None:
    """The old folder has stepped aside, the new one is not there yet: the next run mends it."""
    script = KILLED.split("with new_folder")[0] + (
        "rename = Path.rename\n"
        "def dies(self, target):\n"
        "    if self.name.endswith('.partial'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rename(self, target)\n"
        "Path.rename = dies\n"
        "with new_folder(sys.argv[1], force=True) as folder:\n"
        "    (folder / 'file').write_text('new')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(old)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert "old" in contents(tmp_path).values()
    with pytest.raises(KeyError), new_folder(old, force=True):
        raise KeyError
    assert "old" in contents(tmp_path).values(), "a run that failed has thrown the last copy away"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_refused_before_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        require_free(tmp_path / "deep" / "out")


def test_a_file_cannot_be_a_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        require_free(tmp_path / "file" / "out")


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")

    def refuses(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuses)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "new")
    assert contents(tmp_path) == {"file.json": "new"}
