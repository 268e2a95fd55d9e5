"""Outputs appear whole or not at all, whatever happens while they are written."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from slimvlm.core.errors import ConfigError, InUseError, OutputError, SlimError
from slimvlm.core.files import file_name, held, new_file, new_folder, require_free, write_text
from slimvlm.scoring.unit_scores import Scores


def contents(folder):
    """Every file below a folder, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_a_folder_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        assert folder.parent == out.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        save_file({"weight": torch.zeros(1)}, folder / "sub" / "a.safetensors")
        assert not out.exists()
    weights = out / "sub" / "a.safetensors"
    assert weights.stat().st_mode == (out / "sub" / "file").stat().st_mode
    weights.unlink()
    assert contents(tmp_path) == {"deep/out/sub/file": "new"}


OURS = '{"format": "slimvlm-stage/1"}'
"""What makes a folder one that slimvlm wrote."""


@pytest.fixture
def old(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    (out / "stage.json").write_text(OURS)
    return out


def test_an_existing_folder_is_replaced_whole_and_only_with_force(old, tmp_path):
    with pytest.raises(ConfigError, match=r"out' exists.*--force"), new_folder(old):
        raise AssertionError("the block must not run")
    assert contents(tmp_path) == {"out/file": "old", "out/stage.json": OURS}
    (tmp_path / "other").write_text("a file")
    for place, before in ((old, "old"), (tmp_path / "other", None)):
        with new_folder(place, force=True) as folder:
            (folder / "file").write_text("new")
            assert before is None or (old / "file").read_text() == before
    assert contents(tmp_path) == {"out/file": "new", "other/file": "new"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_of_a_link_its_target_is_replaced_and_no_folder_is_named_tilde(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    old.rename(tmp_path / ".out.old")  # as a kill between two renames leaves it
    with held(link):
        assert (old / "file").read_text() == "old"
    for _ in range(2):
        with new_folder(link, force=True) as folder:
            (folder / "file").write_text("new")
        assert link.is_symlink()
        assert contents(old) == {"file": "new"}
        shutil.rmtree(old)
    with pytest.raises(ConfigError, match=r"'~/out'.*only a shell knows '~'"):
        require_free("~/out")


@pytest.mark.parametrize("has_old", [True, False])
def test_a_block_that_raises_leaves_the_old_state(has_old, tmp_path, request):
    out = request.getfixturevalue("old") if has_old else tmp_path / "out"
    before = contents(tmp_path)

    def fails():
        with new_folder(out, force=True) as folder:
            (folder / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * has_old


KILLED = """
import os, signal, sys
from pathlib import Path
from slimvlm.core.files import new_folder
def dies(self, target):
    if self.name.endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
if sys.argv[2] == "between the renames":
    rename, Path.rename = Path.rename, dies
with new_folder(sys.argv[1], force=True) as folder:
    (folder / "file").write_text("half")
    (folder / "rest").write_text("half")
    if sys.argv[2] == "in the block":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("at", "has_old"), [("in the block", False), ("between the renames", True)]
)
def test_a_kill_leaves_the_old_state_and_the_next_run_works(at, has_old, tmp_path, request):
    """Between the renames the old folder has stepped aside: the next run mends it."""
    out = request.getfixturevalue("old") if has_old else tmp_path / "out"
    before = contents(out) if has_old else {}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), at], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert ("old" in contents(tmp_path).values()) == has_old
    if at == "in the block":
        assert (contents(out) if out.exists() else {}) == before
    with pytest.raises(KeyError), new_folder(out, force=True):
        raise KeyError
    assert out.exists() == has_old
    assert (contents(out) if has_old else {}) == before, "the old folder is not back"
    with new_folder(out, force=has_old) as folder:
        assert [path.name for path in folder.iterdir()] == [".slimvlm"]
        (folder / "file").write_text("new")
    assert contents(tmp_path) == {"out/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_unwritable_place_is_refused_before_work(kind, tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    parent.mkdir() if kind == "folder" else parent.write_text("")
    monkeypatch.setattr(os, "access", lambda path, how: path != parent)  # root may write anywhere
    for check in (require_free, lambda path: new_folder(path).__enter__()):
        with pytest.raises(ConfigError, match=f"'{parent}' cannot be written"):
            check(parent / "deep" / "out")


# Disks that are full, or read-only.
SAID = {
    "safetensors": SafetensorError("Error while serializing: I/O error: no space (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
}
"""What libraries in other languages raise where a disk is full."""


def fails_after(half, error):
    half.write_text("half")
    raise error


@pytest.mark.parametrize("library", SAID)
def test_a_full_disk_is_told_and_leaves_what_was_there(library, old):
    file = old.parent / "file.json"
    write_text(file, "old")
    for place, write in ((old, new_folder(old, True)), (file, new_file(file))):
        told = re.escape(str(place)) + ".*cannot be written: the disk is (probably )?full"
        with pytest.raises(OutputError, match=told), write as partial:
            fails_after((partial / "half" if place == old else partial), SAID[library])
    found = {"out/file": "old", "out/stage.json": OURS, "file.json": "old"}
    assert contents(old.parent) == found
    write_text(file, "new")
    assert contents(old.parent) == found | {"file.json": "new"}


REASONS = {
    **{errno.ENOSPC: "the disk is full", errno.EDQUOT: "quota", errno.EROFS: "read-only"},
    **{errno.EACCES: "no permission", errno.EIO: "reports an error"},
}
CALLS = {"mkdir": "", "rename": "", "rename, of the new folder alone": ".partial"}
"""A method of paths, and how the names end of those that it refuses."""


@pytest.mark.parametrize(("code", "reason"), REASONS.items())
@pytest.mark.parametrize("call", CALLS)
def test_what_the_system_refuses_is_told(code, reason, call, old, monkeypatch):
    name = call.partition(",")[0]
    honest = getattr(Path, name)

    def refuses(self, *args, **kwargs):
        if self.name.endswith(CALLS[call]):
            raise OSError(code, os.strerror(code), str(self))
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(Path, name, refuses)
    with pytest.raises(OutputError, match=reason), new_folder(old, force=True) as folder:
        (folder / "file").write_text("new")
    monkeypatch.undo()
    assert contents(old) == {"file": "old", "stage.json": OURS}
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "no" / "such" / "file").read_text()
    with pytest.raises(RuntimeError, match="mine"), new_file(tmp_path / "out"):
        raise RuntimeError("mine")


def test_scores_of_two_runs_are_no_pair(tmp_path):
    """A kill between the two files of a forced second run."""
    Scores("first", layer=torch.ones(2)).save(tmp_path / "scores")
    about = (tmp_path / "scores.json").read_text()
    Scores("second", layer=torch.ones(2)).save(tmp_path / "scores")
    (tmp_path / "scores.json").write_text(about)
    with pytest.raises(ConfigError, match=r"scores.*different runs"):
        Scores.load(tmp_path / "scores")


# Two runs in one place.

HOLDS = """
import sys, time
from slimvlm.core.files import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path / "out"``."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_who_is_there(holder, tmp_path):
    told = rf"' is in use by another run \(pid {holder.pid} on {socket.gethostname()}\)"
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to(out)  # a link and its target are one place
    for use in (held(out), held(out), held(link), new_folder(out, force=True)):
        with pytest.raises(OutputError, match=told), use:
            raise AssertionError("the block must not run")


def test_other_ranks_of_a_run_do_not_wait_others_may_and_a_killed_run_holds_nothing(
    holder, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        with pytest.raises(InUseError), held(tmp_path / "out"):  # one process has no other rank
            pass
        patch.setenv("WORLD_SIZE", "2")
        with held(tmp_path / "out"):
            pass
    holder.kill()
    with held(tmp_path / "out", wait=30), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_holding_leaves_nothing_behind_and_the_folder_that_one_is_in_is_a_place(
    tmp_path, monkeypatch
):
    with held(tmp_path / "a" / "deep" / "out"):
        assert [path.name for path in (tmp_path / "a" / "deep").iterdir()] == [".out.lock"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="exists"), new_folder("."):
        pass
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}*")] == []


# Names and links that lead elsewhere.
@pytest.mark.parametrize("name", ["/", "..", "a/..", "x" * 201, f"{'y' * 300}/out", "deep/" * 2000])
def test_what_is_no_name_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (require_free, lambda path: new_folder(path, True).__enter__(), held_once):
        with pytest.raises(SlimError) as caught:
            use(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 10_500
    assert list(tmp_path.iterdir()) == []


def held_once(path):
    with held(path):
        pass


@pytest.mark.parametrize("what", ["lock", "partial"])
def test_a_link_where_we_work_is_refused(what, tmp_path):
    target, out = tmp_path / "precious", tmp_path / "out"
    target.mkdir() if what == "partial" else target.write_text("precious")
    (tmp_path / f".out.{what}").symlink_to(target)
    with pytest.raises(ConfigError, match=rf"'\.out\.{what}' is a link"), new_folder(out):
        raise AssertionError("the block must not run")
    if what == "partial":
        with pytest.raises(ConfigError, match="is a link"):
            write_text(out, "new")
    assert target.is_dir() or target.read_text() == "precious"


@given(names=st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True))
def test_a_name_of_any_kind_gives_a_file_of_its_own(names):
    files = [file_name(name) for name in names]
    assert files[0] != files[1]
    for name, file in zip(names, files, strict=True):
        assert Path(file).name == file
        assert file not in ("", ".", "..")
        assert len(file) < 120
        assert (file == name) == bool(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name))


MARKS = yaml.safe_load(Path(__file__).with_name("marks.yaml").read_text())


@pytest.mark.parametrize(("name", "text"), [*MARKS, ("slimvlm_checkpoint.json", "[" * 5000)])
def test_files_that_others_write_too_are_no_marks(name, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    require_free(out, force=True)  # empty, nobody's
    (out / name).write_text(text)
    for use in (require_free, lambda path, force: new_folder(path, force).__enter__()):
        with pytest.raises(ConfigError, match="slimvlm did not write"):
            use(out, True)
    assert contents(out) == {name: text}


@pytest.mark.parametrize("what", ["old", "partial", "lock"])
def test_a_user_s_own_hidden_files_stay(what, old, tmp_path):
    own = tmp_path / f".out.{what}"
    file = own if what == "lock" else own / "precious"
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(ConfigError, match="in the way"), new_folder(old, force=True) as folder:
        (folder / "file").write_text("new")
    assert (old / "file").read_text() == "old"
    if what == "old":  # which is in nobody's way where there is no output
        old.rename(tmp_path / "elsewhere")
        with new_folder(old) as folder:
            (folder / "file").write_text("new")
        assert (old / "file").read_text() == "new"
    assert file.read_text() == "precious"
