"""Whose a piece of work is: its request stands beside it as plain JSON, and only that one goes on.

Where pieces of work on several requests lie side by side, each has a place of its own instead,
named by the `digest` of its request; then there is nothing to compare.
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
    """List options by name, without empty mappings and ``device``, which another run may change.

    Args:
        options: A dataclass; those inside it become dictionaries, too.
    """

    def named(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key != "device" and value != {}}

    return asdict(options, dict_factory=named)


def note_request(file: Path, request: Mapping[str, Any]) -> None:
    """Write down whose the work beside a file is, in place of an older note.

    Args:
        file: Where.
        request: What was asked for, by name; values that JSON can hold.

    Raises:
        OutputError: If the file cannot be written.
    """
    write_text(file, json.dumps(request, indent=2) + "\n")


def noted_request(file: Path) -> dict[str, Any] | None:
    """The request that `note_request` wrote; None if there is none, or only a part of it."""
    try:
        return read_object(file, "request")
    except ConfigError:
        return None


def is_begun_for(file: Path, request: Mapping[str, Any]) -> bool:
    """Whether the work beside a file was begun for this very request."""
    return bool(same_without_removed(noted_request(file)) == same_without_removed(_plain(request)))


def require_same_request(
    noted: Mapping[str, Any] | None, request: Mapping[str, Any], what: str, cure: str
) -> None:
    """Refuse to go on with another request's work.

    Args:
        noted: From `noted_request`; None is nobody's work.
        request: What is asked for now.
        what: Beginning of the message: the work and where it is.
        cure: Its end: what to do about it.

    Raises:
        ConfigError: If they differ; the message names where, such as ``config.max_steps``.
    """
    before, now = same_without_removed(_plain(noted or {})), same_without_removed(_plain(request))
    differing = [] if noted is None else list(_differing(before, now))
    if differing:
        raise ConfigError(f"{what} with other {' and '.join(differing)}. {cure}")


def _differing(
    noted: Mapping[str, Any], request: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Names of the values that are not the same; inside dictionaries those of their values."""
    for name in dict.fromkeys([*request, *noted]):
        ours, theirs = request.get(name), noted.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differing(theirs, ours, f"{prefix}{name}.")
        elif ours != theirs or (name in request) != (name in noted):
            yield prefix + name


def _plain(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request as it comes back from JSON: tuples are lists, keys are words."""
    values: dict[str, Any] = json.loads(json.dumps(request))
    return values


def digest(parts: Iterable[Any]) -> str:
    """SHA-256 over several parts, one after the other, as hexadecimal digits.

    Args:
        parts: Bytes as they are; anything else as JSON with sorted keys.
    """
    found = hashlib.sha256()
    for part in parts:
        is_raw = isinstance(part, bytes | memoryview)
        found.update(part if is_raw else json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


NUM_BLOCKS, BLOCK_BYTES = 64, 2**20
"""What `identity_of_files` reads of a file that is larger than all of these blocks."""


def identity_of_files(name: str, source: str) -> str:
    """What tells a model or data source apart from another one that takes its place.

    Names, sizes and content of its files; of one over 64 MiB 64 blocks of 1 MiB, evenly spaced. A
    hub id stands for itself.

    Args:
        name: What the user calls it.
        source: The folder or file.
    """
    path = Path(source)
    if not path.exists():
        return name
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    contents = (part for file in files if file.is_file() for part in _content(file, path))
    return f"{name} {digest(contents)[:16]}"


def _content(file: Path, folder: Path) -> Iterator[bytes]:
    """A file's place, size and content; of a large one blocks from its beginning to its end."""
    size = file.stat().st_size
    yield f"{file.relative_to(folder)} {size}".encode()
    with file.open("rb") as handle:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            yield handle.read()
            return
        for number in range(NUM_BLOCKS):
            handle.seek((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
            yield handle.read(BLOCK_BYTES)
