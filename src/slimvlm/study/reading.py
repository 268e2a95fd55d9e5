"""Plain values → dataclasses, strictly: unknown keys and wrong types are refused by their name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from slimvlm.errors import ConfigError

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def built(kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass from a mapping, as YAML gives it.

    Fields may be numbers, text, booleans, mappings, dataclasses, and tuples of these; where a tuple
    is wanted, one value needs no list.

    Args:
        kind: The dataclass.
        values: The mapping.
        where: What the mapping is, for messages.

    Raises:
        ConfigError: If a key is unknown or missing, or a value has the wrong type.
    """
    place = f"{where}: " if where else ""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the file'} must map keys to values, not {values!r}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{place}key {key!r} is unknown. Allowed: {', '.join(known)}")
    for name, row in known.items():
        if name not in values and row.default is row.default_factory is MISSING:
            raise ConfigError(f"{place}key {name!r} is missing")
    hints = get_type_hints(kind)
    return kind(**{k: _read(hints[k], v, f"{place}{k}") for k, v in values.items()})


def _read(hint: Any, value: Any, where: str) -> Any:
    """A value of the type that a hint names."""
    if get_origin(hint) is UnionType:
        if value is None and NoneType in get_args(hint):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    origin = get_origin(hint)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        if not items:
            raise ConfigError(f"{where}: give at least one value")
        return tuple(_read(get_args(hint)[0], item, where) for item in items)
    if origin is Mapping or hint is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must map names to values, not {value!r}")
        inner = get_args(hint)[1]
        return {str(k): _read(inner, v, f"{where}: {k}") for k, v in value.items()}
    if hint is Any:
        return value
    if is_dataclass(hint):
        return built(hint, value, where)  # type: ignore[arg-type]
    return _plain(hint, value, where)


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} {value!r} must be {_WORDS[kind]}")
    return value
