"""Write outputs atomically: to a temporary name in the same folder, then rename.

An error, a full disk, a kill or a power cut leaves the old state. A lock, which ends with its
process, lets one run at a time write in a place.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from slimvlm.core import errors
from slimvlm.core.errors import WORDS, ConfigError, OutputError, raised_as, shortened
from slimvlm.core.progress import is_first_rank

_REASONS = {getattr(errno, name): told for name, told in WORDS["reasons"].items()}

LONGEST_NAME = 200  # bytes of a name that leave room for ``.NAME.partial``
_MARK, _UNFINISHED = ".slimvlm", {"written_by": "slimvlm", "is": "unfinished"}
MARKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    _MARK: lambda values: values == _UNFINISHED,
    "slimvlm_checkpoint.json": lambda values: values.get("format") == "slimvlm-checkpoint/1",
    # of a run, and of a stage of a study
    "run.yaml": lambda values: {"model", "made_from", "version"} <= values.keys(),
    "stage.json": lambda values: values.get("format") == "slimvlm-stage/1",
    "slimvlm_demo.json": lambda values: values.keys() == {"stamp"},
}
"""Files that mark a folder as written by slimvlm, and what they must contain."""


def cache_dir() -> Path:
    """Return the cache folder: $SLIMVLM_CACHE or ~/.cache/slimvlm."""
    return Path(os.environ.get("SLIMVLM_CACHE") or "~/.cache/slimvlm").expanduser()


def mark_checkpoint(folder: Path) -> None:
    """Mark a folder as a checkpoint written by slimvlm, which ``--force`` may replace."""
    write_text(folder / "slimvlm_checkpoint.json", '{"format": "slimvlm-checkpoint/1"}\n')


def path_of(word: str | Path, what: str) -> Path:
    """Convert a user's word to a path; raise ConfigError if the system cannot look it up."""
    path = Path(word)
    told = f"{what} {shortened(str(word))}: cannot be read"
    absent = suppress(FileNotFoundError, NotADirectoryError)
    with raised_as(ConfigError, (OSError, ValueError), told), absent:
        path.lstat()
    return path


def require_free(path: str | Path, force: bool = False) -> Path:
    """Refuse an output that exists without ``force``, or that cannot or must not be written."""
    path = Path(path)
    require_place(path)
    if path.exists() and not force:
        raise ConfigError(f"output {str(path)!r} exists. Use --force to replace it")
    if path.is_dir() and not _is_ours(path):
        told = "is a folder that slimvlm did not write: --force replaces only its own"
        raise ConfigError(f"output {str(path)!r} {told}. Remove it, or choose another place")
    return path.resolve() if path.is_symlink() else path  # the target of a link is replaced


def _is_ours(folder: Path, marks: Iterable[str] = tuple(MARKS)) -> bool:
    """Whether a folder has no file or one of the `MARKS`."""
    for name in marks:
        is_yaml = name.endswith(".yaml")  # which people copy, but not with what is beside it
        if is_yaml and not all((folder / part).is_dir() for part in ("scores", "results")):
            continue
        with suppress(Exception):  # YAML's constructors raise almost anything
            if (folder / name).stat().st_size < 2 ** (20 if is_yaml else 24):
                text = (folder / name).read_bytes()
                values = (yaml.safe_load if is_yaml else json.loads)(text)
                if isinstance(values, dict) and MARKS[name](values):
                    return True
    return folder.is_dir() and all(part.is_dir() for part in folder.rglob("*"))


def file_name(name: str) -> str:
    """Make a name without separators; a changed one ends with digits of its hash."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:100]
    if safe == name and safe:
        return name
    return f"{safe}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"


@contextmanager
def held(path: str | Path, wait: float = 0.0) -> Iterator[None]:
    """Lock an output against other runs; wait up to ``wait`` seconds, -1 for no limit."""
    path = Path(path)
    require_place(path)
    if not is_first_rank():  # ranks of one distributed run count as one
        yield
        return
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        with explained(path):
            with raised_as(OutputError, FileNotFoundError, f"output {str(path)!r} has no folder:"):
                path.parent.mkdir(parents=True, exist_ok=True)  # none can be made below /proc
            place = path.resolve()  # of a link, its target is locked
            place.parent.mkdir(parents=True, exist_ok=True)
            file = beside(place, "lock")
            with suppress(FileNotFoundError):  # its holder may remove it at any time
                if file.read_bytes()[:4] not in (b"", b"pid "):  # it is emptied
                    raise ConfigError(f"output {str(path)!r}: {file.name!r} is in the way; move it")
            lock = FileLock(file.absolute(), is_singleton=True)
            try:
                lock.acquire(timeout=wait)
            except Timeout as error:
                holder = "just ended"
                with suppress(OSError, UnicodeDecodeError):
                    holder = file.read_text(encoding="utf-8") or "not yet known which"
                told = f"output {str(path)!r} is in use by another run ({holder})"
                cure = "Wait for its end, or choose another place"
                raise errors.InUseError(f"{told}. {cure}") from error
        try:
            with explained(path):
                file.write_text(f"pid {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            old = beside(place, "old")  # a kill between two renames leaves the old output there
            if old.exists() and _is_ours(old):
                shutil.rmtree(old) if place.exists() else old.rename(place)
            yield
        finally:
            if lock.lock_counter == 1:
                file.unlink(missing_ok=True)  # while it is held: whoever opened it looks again
            lock.release()
    finally:
        for parent in made:  # the deepest one first
            with suppress(OSError):  # unless something is in it
                parent.rmdir()


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which gets its name when the block ends without an error."""
    with held(path), explained(path):
        path = require_free(path, force)
        partial = beside(path, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        working_folder(partial)
        try:
            yield partial
            usual = (partial / _MARK).stat().st_mode
            for file in partial.rglob("*.safetensors"):  # the library lets only its owner read it
                file.chmod(usual)
            _replace(partial, path)
            (path / _MARK).unlink(missing_ok=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def working_folder(path: Path) -> Path:
    """Make a folder for unfinished work, which may be emptied, or reuse a marked one."""
    with explained(path):
        found = [path] if path.is_symlink() else path.rglob("*")
        if link := next(filter(Path.is_symlink, found), None):
            raise ConfigError(f"working folder: {str(link)!r} is a link; remove it")
        path.mkdir(parents=True, exist_ok=True)
        if {each.name for each in path.iterdir()} <= {_MARK}:
            (path / _MARK).write_text(json.dumps(_UNFINISHED))
        elif not _is_ours(path, [_MARK]):
            told = "is in the way, which slimvlm did not write; move it, or choose another place"
            raise ConfigError(f"working folder: {str(path)!r} {told}")
    return path


@contextmanager
def replacement(path: str | Path) -> Iterator[Path]:
    """As `new_folder`, but an unfinished one is kept for the next start; the caller locks it."""
    path = require_free(path, force=True)
    partial = beside(path, "partial")
    yield partial
    with explained(path):
        _replace(partial, path)


@contextmanager
def new_file(path: str | Path, outlives_power_cut: bool = True) -> Iterator[Path]:
    """Yield a file to write, which gets its name when the block ends without an error."""
    path = Path(path)
    partial = beside(path, "partial")
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
    """Write a file atomically."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Raise OutputError for a full or read-only disk or a lack of permission; others pass."""
    try:
        yield
    except Exception as error:  # libraries in Rust and C++ give the reason only in the message
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        reason = _REASONS.get(number or 0)
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
            reason = "the disk is probably full"
        if reason is None:
            raise
        why = f"cannot be written: {reason}. What was there before is unchanged"
        raise OutputError(f"output {str(path)!r} {why}") from error


def require_place(path: Path) -> None:
    """Refuse an output with an impossible name or in a folder that cannot be written."""
    place = path.absolute()
    too_long = any(len(os.fsencode(part)) > LONGEST_NAME for part in place.parts)
    if place.name in ("", "..") or too_long or "\0" in str(place):
        shown = shortened(str(path))
        raise ConfigError(f"output {shown} must end in a name of at most {LONGEST_NAME} bytes")
    if "~" in place.parts:
        raise ConfigError(f"output {str(path)!r}: only a shell knows '~'; write the whole path")
    told = f"output {shortened(str(path))} is no usable path"
    with raised_as(ConfigError, (RuntimeError, UnicodeEncodeError), told):
        str(place.resolve()).encode()  # a circle of links; libraries need UTF-8
    with explained(path):
        parent = next(filter(Path.exists, place.parents))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ConfigError(f"output {str(path)!r}: {str(parent)!r} cannot be written")


def beside(path: Path, what: str) -> Path:
    """Return the path ``.<name>.<what>`` in the output's folder, which must not be a link."""
    path = path.absolute()
    beside = path.with_name(f".{path.name}.{what}")
    if beside.is_symlink():
        raise ConfigError(f"output {str(path)!r}: {beside.name!r} is a link; remove it")
    if what == "partial" and beside.is_dir() and not _is_ours(beside):
        told = "is in the way, which slimvlm did not write"
        raise ConfigError(f"output {str(path)!r}: {beside.name!r} {told}")
    return beside


def _replace(partial: Path, path: Path) -> None:
    """Sync the new folder and replace an old one, which is removed last."""
    for file in (partial, *partial.rglob("*")):
        _sync(file)
    old = beside(path, "old")
    if had_one := path.exists():
        if old.exists():
            raise ConfigError(f"output {str(path)!r}: {old.name!r} is in the way; move it")
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if had_one:
            old.rename(path)
        raise
    _sync(path.parent)
    if had_one and old.is_dir():
        shutil.rmtree(old)
    elif had_one:
        old.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
