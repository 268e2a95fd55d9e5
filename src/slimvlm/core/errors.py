"""Errors that a user can cause and mend; each message names the field, value and choices."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from slimvlm.core.tables import read_table


class SlimError(Exception):
    """Base of every error that a user can cause and mend. The CLI prints it and exits with 2."""


class RegressionError(SlimError):
    """A model that does not meet what is required of it; the command line exits with 3."""


class ConfigError(SlimError, ValueError):
    """An option, a path or a file that cannot be used as given."""


class UnsupportedModelError(SlimError):
    """A model that no row of :mod:`slimvlm.models.families` describes."""


class ImpossiblePlanError(SlimError):
    """A shape that the model's own configuration class cannot write down."""


class DataError(SlimError):
    """Samples that cannot be read, or too many bad ones."""


class NumericalError(SlimError):
    """NaN or infinity in a statistic, a loss or a weight, with the place where it arose."""


class ReloadError(SlimError):
    """A written checkpoint that does not load back to the same model."""


class OutputError(SlimError):
    """An output that cannot be written: the disk is full or read-only, or another run is there."""


class InUseError(OutputError):
    """An output that another run is writing."""


WORDS: Mapping[str, Mapping[str, str]] = read_table(__file__, "words.yaml")
"""Parts of messages; ``words.yaml`` says what each is for."""
_NO_MEMORY = ("out of memory", "alloc_failed", "allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host has no memory left, whatever library says so."""
    told = str(error).lower()
    is_theirs = isinstance(error, RuntimeError) and any(words in told for words in _NO_MEMORY)
    return is_theirs or type(error).__name__ in ("OutOfMemoryError", "MemoryError")


@contextmanager
def panics_raised() -> Iterator[None]:
    """Raise a panic of Rust code, which is no `Exception`, as a RuntimeError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Return the whole message of an error in one line, or its class if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def raised_as(
    kind: type[SlimError], of: type[Exception] | tuple[type[Exception], ...], told: str
) -> Iterator[None]:
    """Raise errors of some kinds as one of ours: what is ``told``, then their message."""
    try:
        yield
    except of as error:
        why = getattr(error, "strerror", None) or one_line(error)
        why = why if isinstance(error, SlimError) else why[:LONGEST]  # others quote foreign values
        raise kind(f"{told} {why}" if told.endswith(":") else f"{told} ({why})") from error


def first_mistake(kind: Any, error: ValidationError, where: str = "") -> str:
    """Describe one mistake in a line; an unknown key first, as others often follow from it."""
    unknown, found = "unexpected_keyword_argument", error.errors(include_url=False)
    telling = [unknown, "range"]
    if isinstance(found[0]["input"], str):  # of a union of words and numbers
        telling.append("literal_error")
    mistake = min(found, key=lambda each: each["type"] not in telling)
    sort, steps, context = mistake["type"], mistake["loc"], mistake.get("ctx", {})
    if sort == "missing" and isinstance(steps[-1], int):
        sort = "too_long"  # or too short
    keys: list[str] = []
    owner = holder = kind  # the dataclass at the keys, and that of the last; None in a mapping
    for step in (step for step in steps if isinstance(step, str)):
        keys.append(step[:LONGEST])
        holder = owner
        if owner is None or (hint := get_type_hints(owner).get(step)) is None:
            continue
        owner = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
        if owner is None and get_origin(hint) is not Mapping:
            break  # what follows names a member of a union
    place, around = (": ".join(filter(None, [where, *some])) for some in (keys, keys[:-1]))
    if sort == "value_error":  # what options say of their own values
        return f"{place}: {context['error']}".removeprefix(": ")
    names = [row.name for row in fields(holder)] if holder else []
    default = getattr(holder, keys[-1], None) if keys else None
    return (
        WORDS["mistakes"]
        .get(sort, "{place} {value}: {words}")
        .format(
            words=mistake["msg"],
            place=place or "the file",
            within=f"{around}: " if around else "",
            key=keys[-1] if keys else "",
            value=shortened(mistake["input"]),
            allowed=", ".join(names),
            choices=", ".join(re.findall(r"'(.*?)'", str(context.get("expected")))),
            count=len(default) if isinstance(default, tuple) else 0,
        )
    )


LONGEST = 200  # characters of a foreign value that a message shows


def shortened(value: object) -> str:
    """Return the ``repr`` of a value, cut off after `LONGEST` characters."""
    told = repr(value)
    return told if len(told) <= LONGEST else f"{told[:LONGEST]}..."


class PrintableStream:
    """A text stream that shows control characters of others' texts in place of obeying them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        # what colours a text or draws a progress bar passes if the stream is a terminal
        self._kept = re.compile(_OF_BARS if stream.isatty() else r"([\r])")

    def write(self, text: str) -> int:
        """Write a text."""
        pieces = self._kept.split(text)
        pieces[::2] = map(printable, pieces[::2])
        return self._raised("write", "".join(pieces)) or 0

    def flush(self) -> None:
        """Write what is held back."""
        self._raised("flush")

    def _raised(self, method: str, *values: str) -> Any:
        try:
            return getattr(self._stream, method)(*values)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"stdout or stderr cannot be written ({error.strerror})") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_OF_BARS = r"(\r|\x1b\[[0-9;]*[mK]|\x1b\[\d*A|\x1b\[\?25[lh])"
_HARMLESS = "\n\t\xa0\u2002\u2003\u2009\u202f\u3000\u200c\u200d"  # spaces, and joiners of letters


def printable(text: str) -> str:
    """Write out the control characters of a text, so that no terminal obeys them."""
    return "".join(c if c.isprintable() or c in _HARMLESS else repr(c)[1:-1] for c in text)
