"""Outputs appear whole or not at all: written beside their place, then renamed.

Whatever stops a run (an error, a full disk, a kill, a power cut) leaves the old state. Only one run
at a time writes in a place; the lock goes with its process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from slimvlm.core.errors import ConfigError, InUseError, OutputError, shortened
from slimvlm.core.processes import is_first_rank

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than this system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission to write",
    errno.EPERM: "there is no permission to write",
    errno.EIO: "the disk reports an error",
    errno.EISDIR: "a folder is in the way",
    errno.EEXIST: "something is in the way",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "links lead in a circle",
}

LONGEST_NAME = 200
"""Bytes of a name that still leave room for what stands beside it (``.NAME.partial``)."""

MARKS = {
    "slimvlm_checkpoint.json": "slimvlm-checkpoint",
    "slimvlm_manifest.json": "slimvlm-manifest",  # of an earlier version
    "config.json": '"made_from"',
    "index.json": "slimvlm-teacher",
    "answers.json": '"max_new_tokens"',
    "stage.json": '"request"',
    "slimvlm_demo.json": '"stamp"',
}
"""What makes a folder ours: a file that every checkpoint, run, teacher's cache or answers, stage of
a study or demo model has, and words that stand in it."""


def mark_checkpoint(folder: Path) -> None:
    """Mark a folder as a checkpoint of slimvlm's, which ``--force`` may replace."""
    write_text(folder / "slimvlm_checkpoint.json", '{"format": "slimvlm-checkpoint/1"}\n')


def require_free(path: str | Path, force: bool = False) -> Path:
    """Check that an output may be written, before any work is done.

    Raises:
        ConfigError: If it exists and ``force`` is not given, it is a folder that slimvlm did not
            write, or its parent cannot be written.
    """
    path = Path(path)
    require_place(path)
    if path.exists() and not force:
        raise ConfigError(f"output {str(path)!r} exists. Use --force to replace it")
    require_ours(path)
    return path


def require_ours(path: Path) -> None:
    """Refuse to replace a folder that slimvlm did not write; an empty one belongs to nobody.

    Raises:
        ConfigError: If none of `MARKS` is in it.
    """
    if (
        path.is_dir()
        and any(path.iterdir())
        and not any(_has_mark(path / n, MARKS[n]) for n in MARKS)
    ):
        raise ConfigError(
            f"output {str(path)!r} is a folder that slimvlm did not write: --force replaces "
            "only its own. Remove it, or choose another place"
        )


def file_name(name: str) -> str:
    """A file name for any name: of a task, a model or a log. It never leads to another folder.

    What is not a letter, digit, dot, ``-`` or ``_`` of ASCII becomes ``_``; a name that had to be
    changed ends with eight digits of its hash, so that two names never share a file.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:100]
    if safe == name and safe:
        return name
    return f"{safe}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"


@contextmanager
def held(path: str | Path, wait: float = 0.0) -> Iterator[None]:
    """Inside, no other run writes to a place.

    The lock is a file beside it, ``.<name>.lock``, with the pid and host of its holder. The system
    lets go of it when the process ends, however it ends. A process may hold a place several times;
    ranks of one distributed run count as one.

    Args:
        path: The output.
        wait: Seconds to wait for another run to end; -1 is as long as it takes.

    Raises:
        ConfigError: If the place cannot be written.
        InUseError: If another run holds it.
    """
    path = Path(path)
    require_place(path)
    if not is_first_rank():
        yield
        return
    with ExitStack() as stack:
        for parent in reversed(path.absolute().parents):
            if not parent.exists():
                stack.callback(_remove_if_empty, parent)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(path, wait))
        _put_back(path)
        yield


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its name only when the block ends without an error.

    A kill leaves the old state and a sibling named ``.<name>.partial``, which the next run
    removes.

    Raises:
        ConfigError: As `require_free`.
        OutputError: If another run writes there, or the disk is full or read-only.
    """
    path = Path(path)
    with held(path), explained(path):
        require_free(path, force)
        partial = _beside(path, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _sync_tree(partial)
            _replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacement(path: str | Path) -> Iterator[Path]:
    """A folder to fill, over several starts if need be, that takes its name when the block ends.

    Unlike what is left of a `new_folder`, an unfinished one stays for the next start to go on with.
    Whoever fills it holds the place (`held`).

    Raises:
        ConfigError: If it would replace a folder that slimvlm did not write.
        OutputError: If the disk is full or read-only.
    """
    path = Path(path)
    require_place(path)
    require_ours(path)
    partial = _beside(path, "partial")
    yield partial
    with explained(path):
        _sync_tree(partial)
        _replace(partial, path)


def discard_replacement(path: str | Path) -> None:
    """Remove what an unfinished `replacement` left."""
    shutil.rmtree(_beside(Path(path), "partial"), ignore_errors=True)


@contextmanager
def new_file(path: str | Path, outlives_power_cut: bool = True) -> Iterator[Path]:
    """A file to write that takes its name, in place of an old one, when the block ends well.

    Args:
        path: The file.
        outlives_power_cut: Whether to wait until it is on the disk itself.

    Raises:
        OutputError: If the disk is full or read-only.
    """
    path = Path(path)
    partial = _beside(path, "partial")
    with explained(path):
        try:
            yield partial
            if outlives_power_cut:
                _sync(partial)
            partial.replace(path)
            if outlives_power_cut:
                _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole: a reader sees the old content or the new.

    Raises:
        OutputError: If the disk is full or read-only.
    """
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Say in one line why an output could not be written.

    Raises:
        OutputError: In place of what the system, safetensors or torch raise for a full disk, a
            read-only one, or a lack of permission. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OutputError(
            f"output {str(path)!r} cannot be written: {reason}. What was there before is unchanged"
        ) from error


def _reason(error: Exception) -> str | None:
    """Why writing failed, if it is not our mistake. Libraries in Rust and C++ tell in words."""
    if isinstance(error, OSError):
        return _REASONS.get(error.errno or 0)
    if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
        return "the disk is probably full"
    told = re.search(r"\(os error (\d+)\)", str(error))
    return _REASONS.get(int(told[1])) if told else None


def require_place(path: Path) -> None:
    """An output has a name that a file can have, and a parent that can be written.

    Raises:
        ConfigError: If it has not.
    """
    place = path.absolute()
    too_long = any(len(os.fsencode(part)) > LONGEST_NAME for part in place.parts)
    if place.name in ("", "..") or too_long or "\0" in str(place):
        shown = shortened(str(path))
        raise ConfigError(f"output {shown} must end in a name of at most {LONGEST_NAME} bytes")
    parent = place.parent
    with explained(path):
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"output {str(path)!r}: {str(parent)!r} cannot be written")


def _beside(path: Path, what: str) -> Path:
    """A place beside an output, which no link may lead away from.

    Raises:
        ConfigError: If a link is there.
    """
    path = path.absolute()
    beside = path.with_name(f".{path.name}.{what}")
    if beside.is_symlink():
        raise ConfigError(f"output {str(path)!r}: {beside.name!r} is a link; remove it")
    return beside


def _has_mark(file: Path, mark: str) -> bool:
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as opened:
        return mark in opened.read(2**22)
    return False


@contextmanager
def _locked(path: Path, wait: float) -> Iterator[None]:
    file = _beside(path, "lock")
    lock = FileLock(file.absolute(), is_singleton=True)
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise InUseError(
            f"output {str(path)!r} is in use by another run ({_holder(file)}). Wait for its "
            "end, or choose another place"
        ) from error
    try:
        file.write_text(f"pid {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            file.unlink(missing_ok=True)  # while it is held: whoever opened it looks again
        lock.release()


def _holder(file: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8") or "not yet known which"
    return "just ended"


def _put_back(path: Path) -> None:
    """Mend what a kill between two renames left: the old output has stepped aside."""
    old = _beside(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)
    _remove(old)


def _replace(partial: Path, path: Path) -> None:
    """Put the new folder in place of an old one, which stays until the new one is there."""
    old = _beside(path, "old")
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
