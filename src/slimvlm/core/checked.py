"""Check the values of options against their types: choices, and ranges of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from slimvlm.core.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Numbers that an option may have; stands in its type."""

    holds: Callable[[float], bool]
    meaning: str  # continues "must be"


ABOVE_0 = Range(lambda value: 0 < value < math.inf, "above 0")
AT_LEAST_0 = Range(lambda value: 0 <= value < math.inf, "at least 0")
AT_LEAST_1 = Range(lambda value: value >= 1, "at least 1")
SHARE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
FRACTION = Range(lambda value: 0 < value <= 1, "above 0 and at most 1")
INSIDE = Range(lambda value: 0 < value < 1, "above 0 and below 1")
STEPS = Range(lambda value: value == -1 or value > 0, "above 0, or -1 for no limit")
FILE_ONLY = "file only"
"""In an option's type: it has no flag on the command line."""
SEED = Range(lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")


class Options:
    """A group of options whose values are checked against their types.

    Raises:
        ConfigError: If a value is not allowed; the message names option, value and what is allowed.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, (choices, ranges) in _allowed(kind).items():
            value = getattr(self, name)
            if choices and value not in choices and not (ranges and isinstance(value, int)):
                names = ", ".join(choice for choice in choices if choice is not None)
                raise ConfigError(f"{name} {value!r} must be one of: {names}")
            for row in ranges:
                if not isinstance(value, str | None) and not row.holds(value):
                    raise ConfigError(f"{name} {value} must be {row.meaning}")


def file_only(kind: Any) -> set[str]:
    """List the options of a class that have no flag on the command line."""
    hints = get_type_hints(kind, include_extras=True)
    return {n for n, hint in hints.items() if FILE_ONLY in getattr(hint, "__metadata__", ())}


@cache
def _allowed(kind: Any) -> Mapping[str, tuple[tuple[str | None, ...], tuple[Range, ...]]]:
    """Collect the choices and the number ranges of each option that has them."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for row in fields(kind):
        hint, ranges = hints[row.name], tuple[Range, ...]()
        if get_origin(hint) is Annotated:
            ranges = tuple(extra for extra in hint.__metadata__ if isinstance(extra, Range))
            hint = hint.__origin__
        parts = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
        choices = [name for p in parts if get_origin(p) is Literal for name in get_args(p)]
        if choices and type(None) in parts:
            choices.append(None)
        if choices or ranges:
            found[row.name] = (tuple(choices), ranges)
    return found


T = TypeVar("T")


def part_of(config: Any, kind: type[T]) -> T:
    """Take the options of a smaller configuration out of one that has more."""
    names = [row.name for row in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(config, name) for name in names})
