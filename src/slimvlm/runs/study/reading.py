"""Plain values → dataclasses, strictly: unknown keys and wrong types are refused by their name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from slimvlm.core.errors import ConfigError

T = TypeVar("T")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def built(kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass from a mapping, as YAML gives it.

    Fields may be numbers, text, booleans, choices, mappings, dataclasses, and tuples of these.
    Where a tuple is wanted, one value needs no list.

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
    if get_origin(hint) in (UnionType, Union):
        if value is None and NoneType in get_args(hint):
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    origin = get_origin(hint)
    if origin is tuple:
        return _read_tuple(get_args(hint), value, where)
    if origin is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{where} {value!r} must be one of: {choices}")
        return value
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


def _read_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    if kinds[-1] is not Ellipsis and len(items) != len(kinds):
        raise ConfigError(f"{where} {value!r} must be {len(kinds)} values")
    if not items:
        raise ConfigError(f"{where}: give at least one value")
    return tuple(_read(kinds[0], item, where) for item in items)


def _plain(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} {value!r} must be {_WORDS[kind]}")
    return value
