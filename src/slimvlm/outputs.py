"""Outputs appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimvlm.errors import ConfigError


def require_free(path: str | Path, force: bool = False) -> Path:
    """Check that an output may be written, before any work is done.

    Raises:
        ConfigError: If it exists and ``force`` is not given, or its parent cannot be written.
    """
    path = Path(path)
    if path.exists() and not force:
        raise ConfigError(f"output {str(path)!r} exists. Use --force to replace it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output {str(path)!r}: {str(parent)!r} cannot be written")
    return path


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its name only when the block ends without an error.

    A kill leaves the old state and a sibling named ``.<name>.partial``, which the next run
    removes.

    Raises:
        ConfigError: As `require_free`.
    """
    path = require_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole: a reader sees the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _replace(partial: Path, path: Path) -> None:
    """Put the new folder in place of an old one, which stays until the new one is there."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
