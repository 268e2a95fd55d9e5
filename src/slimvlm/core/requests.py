"""Resume: an output folder stores its request as JSON; only an equal request may continue it.

Where outcomes of several requests share a folder, each has a place of its own, named by the
`digest` of its request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimvlm.core.documents import read_object
from slimvlm.core.errors import ConfigError
from slimvlm.core.files import write_text
from slimvlm.core.removed import same_without_removed


def asked(options: Any) -> dict[str, Any]:
    """Convert a dataclass to dictionaries without empty mappings and ``device``."""

    def named(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key != "device" and value != {}}

    return asdict(options, dict_factory=named)


def note_request(file: Path, request: Mapping[str, Any]) -> None:
    """Store a request as JSON."""
    write_text(file, json.dumps(request, indent=2) + "\n")


def noted_request(file: Path) -> dict[str, Any] | None:
    """Read the stored request; None if there is none or if it is incomplete."""
    try:
        return read_object(file, "request")
    except ConfigError:
        return None


def is_begun_for(file: Path, request: Mapping[str, Any]) -> bool:
    """Whether the stored request equals this one."""
    return bool(_comparable(noted_request(file)) == _comparable(request))


def require_same_request(
    noted: Mapping[str, Any] | None, request: Mapping[str, Any], what: str, cure: str
) -> None:
    """Refuse another request than the noted one, name the options that differ, and the cure."""
    if noted is None:
        return
    if differing := list(_differing(_comparable(noted), _comparable(request))):
        raise ConfigError(f"{what} with other {' and '.join(differing)}. {cure}")


def _differing(
    noted: Mapping[str, Any], request: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Yield the names of the values that differ, also inside dictionaries."""
    for name in dict.fromkeys([*request, *noted]):
        ours, theirs = request.get(name), noted.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differing(theirs, ours, f"{prefix}{name}.")
        elif ours != theirs or (name in request) != (name in noted):
            yield prefix + name


def _comparable(request: Mapping[str, Any] | None) -> Any:
    """Convert a request as JSON would (tuples become lists), without options that are removed."""
    return same_without_removed(json.loads(json.dumps(request)))


def digest(parts: Iterable[Any]) -> str:
    """Compute the SHA-256 of several parts, as hex; what is not bytes is hashed as sorted JSON."""
    found = hashlib.sha256()
    for part in parts:
        is_raw = isinstance(part, bytes | memoryview)
        found.update(part if is_raw else json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


NUM_BLOCKS, BLOCK_BYTES = 64, 2**20
"""Blocks of a larger file that `identity_of_files` reads."""


def identity_of_files(name: str, source: str) -> str:
    """Hash the names, sizes and content of a model's or data source's files; a hub id is its name.

    Of a file over 64 MiB 64 blocks of 1 MiB are read, evenly spaced. ``name`` is the user's name of
    ``source``, the folder or file.
    """
    path = Path(source)
    if not path.exists():
        return name
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    contents = (part for file in files if file.is_file() for part in _content(file, path))
    return f"{name} {digest(contents)[:16]}"


def _content(file: Path, folder: Path) -> Iterator[bytes]:
    """Yield a file's path and size, then its content in blocks."""
    size = file.stat().st_size
    yield f"{file.relative_to(folder)} {size}".encode()
    with file.open("rb") as handle:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            yield handle.read()
            return
        for number in range(NUM_BLOCKS):
            handle.seek((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
            yield handle.read(BLOCK_BYTES)
