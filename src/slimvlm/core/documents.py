"""Read JSON and YAML files under limits, check them against dataclasses, and compare requests.

Every error is one line that names the file, the field, its value and the allowed values. An output
folder stores its request as JSON; only an equal one may resume it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from slimvlm.core.errors import ConfigError, first_mistake, one_line, raised_as, shortened
from slimvlm.core.files import path_of, write_text
from slimvlm.core.options import NO_RESULT, listed
from slimvlm.core.progress import progress

T = TypeVar("T")

MAX_BYTES = 512 * 2**20  # largest JSON file that is read: results hold every answer
MAX_YAML_BYTES = 2**20  # largest YAML file; people write these
MAX_DEPTH = 64  # nested lists and mappings
VERSION = "version"  # key of a stored request: what `identity_of_code` gives


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without aliases, of which a few lines can stand for terabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        _unique([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep=deep)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Make a mapping of pairs; refuse a key that stands there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {shortened(twice)} stands there twice")
    return found


def read_text(path: str | Path, what: str, most: int = MAX_BYTES) -> str:
    """Read a text file of at most ``most`` bytes; messages begin with ``what``: ``plan``."""
    file = Path(path)
    with _readable(what, path):
        if not file.is_file():
            raise ValueError("no such file")
        if (size := file.stat().st_size) > most:
            raise ValueError(f"it has {size:,} bytes; at most {most:,} are read")
        return file.read_text(encoding="utf-8")


def read_object(path: str | Path, what: str, most: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON file that must hold an object; see `read_text`."""
    text = read_text(path, what, most)
    with _readable(what, path):
        if isinstance(values := parse_json(text), dict):
            return values
        raise ValueError(f"it must map names to values, not {shortened(values)}")


def parse_json(text: str) -> Any:
    """Parse JSON; raise ValueError if it is none or too deep."""
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(f"more than {MAX_DEPTH} levels inside one another") from error
    _require_shallow(values)
    return values


def read_yaml(path: str | Path, what: str) -> Any:
    """Read a YAML file without aliases; see `read_text`. Raise ConfigError if it is no YAML."""
    text = read_text(path, what, MAX_YAML_BYTES)
    with _readable(what, path):
        return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """Parse YAML without aliases; raise ValueError if it is none or too deep."""
    try:
        values = yaml.load(text, _Loader)
        _require_shallow(values)
    except Exception as error:  # its constructors raise almost anything for a wrong value
        raise ValueError(one_line(error)) from error
    return values


def _readable(what: str, path: str | Path) -> AbstractContextManager[None]:
    """Raise what a file's reading or content raises as a ConfigError."""
    return raised_as(ConfigError, (OSError, ValueError), f"{what} {str(path)!r}: cannot be read")


def _require_shallow(values: Any) -> None:
    level = [values]
    for _ in range(MAX_DEPTH + 1):
        several = [v for v in level if isinstance(v, dict | list)]
        level = [held for v in several for held in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} levels inside one another")


Listed = Annotated[tuple[T, ...], BeforeValidator(listed), Field(min_length=1)]  # one or several
Count = Annotated[int, Field(ge=0, le=2**50)]  # a field that counts parameters or bytes
Width = Annotated[int, Field(ge=0, le=2**20)]  # counts what a layer has: heads, channels, neurons


def built(kind: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass from YAML or JSON; ``where`` names the file in messages."""
    with raised_as(ConfigError, (TypeError, ValueError, RecursionError), f"{where or 'the file'}:"):
        text = json.dumps(values, default=str)
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise ConfigError(first_mistake(kind, error, where)) from error


def asked(options: Any) -> dict[str, Any]:
    """Convert a dataclass to dictionaries without empty mappings and what decides no result."""
    others = {*NO_RESULT, "require"}
    return asdict(
        options, dict_factory=lambda pairs: {k: v for k, v in pairs if k not in others and v != {}}
    )


def note_request(file: Path, request: Mapping[str, Any]) -> None:
    """Store a request as JSON, with the identity of slimvlm itself."""
    write_text(file, json.dumps(comparable(request), indent=2) + "\n")


def noted_request(file: Path) -> dict[str, Any] | None:
    """Read the stored request; None if there is none or if it is incomplete."""
    with suppress(ConfigError):
        return read_object(file, "request")
    return None


def is_begun_for(file: Path, request: Mapping[str, Any]) -> bool:
    """Whether the stored request equals this one."""
    return noted_request(file) == comparable(request)


def require_same(noted: Mapping[str, Any], new: Mapping[str, Any], what: str, cure: str) -> None:
    """Refuse other values than the noted ones, name the options that differ, and the cure."""
    if differing := list(_differing(noted, new)):
        raise ConfigError(f"{what} with another {' and another '.join(differing)}. {cure}")


def _differing(
    noted: Mapping[str, Any], request: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    for name in dict.fromkeys([*request, *noted]):
        ours, theirs = request.get(name), noted.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differing(theirs, ours, f"{prefix}{name}.")
        elif ours != theirs or (name in request) != (name in noted):
            yield prefix + name


def comparable(request: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a request as JSON would (tuples become lists), and add the `VERSION`."""
    found: dict[str, Any] = json.loads(json.dumps(request))
    return {**found, VERSION: identity_of_code()}


def digest(parts: Iterable[Any]) -> str:
    """Compute the SHA-256 of several parts, as hex; what is not bytes is hashed as sorted JSON."""
    found = hashlib.sha256()
    for part in parts:
        is_raw = isinstance(part, bytes | memoryview)
        found.update(part if is_raw else json.dumps(part, sort_keys=True).encode())
    return found.hexdigest()


MANY_BYTES = 2**32  # of files that are hashed with a progress bar


def identity_of_files(name: str, source: str) -> str:
    """Hash names and content of a source's files; a hub id is its ``name``."""
    path = path_of(source, "file")
    if not path.exists():
        return name
    found = [path]
    for top, folders, names in os.walk(path, followlinks=True):
        found += [Path(top, name) for name in names]
        here = Path(top).resolve()  # a link to a folder around it leads in a circle
        folders[:] = [f for f in folders if not here.is_relative_to(Path(top, f).resolve())]
    files = [f for f in sorted(found) if f.is_file() and "__pycache__" not in f.parts]
    is_much = sum(file.stat().st_size for file in files) > MANY_BYTES
    shown = progress(files, "hash files") if is_much else files
    return f"{name} {digest([str(file.relative_to(path)), _hash(file)] for file in shown)[:16]}"


def _hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@cache
def identity_of_code() -> str:
    """Hash the source of slimvlm: a mended bug makes other results."""
    return identity_of_files("slimvlm", str(Path(__file__).parent.parent))
