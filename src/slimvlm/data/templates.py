"""Render untrusted chat templates in transformers' sandbox, with limits on time and output size.

A template is a program that comes with a model. The sandbox keeps it from Python's internals. The
limits end endless loops, and refuse texts and numbers that would fill the memory.

Relies on: transformers compiles every template with `_compile_jinja_template`. Tried with 5.24.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import SandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from slimvlm.core.errors import ConfigError

MAX_SECONDS = 10.0
"""Processor time of one rendering, which takes a millisecond normally; a busy machine adds none."""
MAX_LENGTH = 2**26
"""Characters of a text, items of a list, bits of a number."""
_MAX_ARGUMENT = 2**20
"""Largest number that may be passed to a function, such as a width."""
_WIDE = re.compile(r"\d{5,}|%[^%a-z]*\*", re.IGNORECASE)
"""Part of a format string that asks for many characters."""


@contextmanager
def limited() -> Iterator[None]:
    """Let transformers render chat templates under limits; a `ConfigError` says which is passed."""
    module: Any = chat_template_utils
    plain = module._compile_jinja_template
    _environment(plain).deadline = time.thread_time() + MAX_SECONDS
    module._compile_jinja_template = functools.partial(_compiled, plain)
    try:
        yield
    finally:
        module._compile_jinja_template = plain


@functools.cache
def _environment(compile_plain: Callable[[str], Any]) -> Any:
    """Return transformers' environment, with its filters and globals, under limits."""
    environment = compile_plain("").environment
    kind = type(environment)
    environment.__class__ = type(kind.__name__, (_Limits, kind), {})
    environment.globals.pop("lipsum", None)
    for name, function in environment.filters.items():
        environment.filters[name] = _measured(function)
    return environment


@functools.lru_cache(64)
def _compiled(compile_plain: Callable[[str], Any], template: str) -> Any:
    return _environment(compile_plain).from_string(template)


class _Limits(SandboxedEnvironment):
    """Methods that are put before those of transformers' environment class."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    deadline = 0.0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Parse a template; each iteration of its loops checks the clock."""
        tree: nodes.Template = _Watched().visit(super()._parse(source, name, filename))
        return tree

    def look_at_clock(self) -> str:
        """Return an empty text; raise after the deadline."""
        if time.thread_time() > self.deadline:
            raise _refusal(f"takes more than {MAX_SECONDS:g} seconds of computing")
        return ""

    def concat(self, pieces: Iterable[str]) -> str:
        """Join pieces, of which there may be endlessly many."""
        return "".join(_counted(pieces))

    def joined(self, *values: Any) -> str:
        """Evaluate ``~``."""
        return self.concat(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate an operation if its result is within the limits."""
        if operator == "%" and isinstance(left, str):
            _require_narrow(left)
        elif operator == "**":
            _require_length(_size(left) * abs(right))
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            _require_length(_times(left) * _times(right))
        elif operator in "*+":
            _require_length(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function if its arguments and its result are within the limits."""
        self.look_at_clock()
        owner = function.__self__ if isinstance(function, BuiltinMethodType) else None
        _require_affordable(owner, [*args, *kwargs.values()])
        result = super().call(context, function, *args, **kwargs)
        _require_length(_size(result))
        return result

    def wrap_str_format(self, value: Any) -> Any:
        """Wrap ``str.format``; refuse a text that asks for a large width."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _require_narrow(value.__self__)
        return wrapped


class _Watched(NodeTransformer):
    """Add a check of the clock to loops, and join texts by a function that counts."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802  (Jinja's name)
        self.generic_visit(node)
        look = nodes.Output([_asked("look_at_clock", [], node)])
        node.body.insert(0, look.set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _asked("joined", node.nodes, node)


def _asked(name: str, arguments: list[nodes.Expr], at: nodes.Node) -> nodes.Call:
    """Return a call of one of the environment's own functions."""
    function = nodes.EnvironmentAttribute(name)
    call = nodes.Call(function, arguments, [], None, None).set_lineno(at.lineno)
    assert isinstance(call, nodes.Call)
    return call


def _measured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter: its arguments and its result must be within the limits."""

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        texts = [a for a in args if isinstance(a, str)]
        _require_affordable(texts[0] if texts else None, [*args, *kwargs.values()])
        if texts and function.__name__ == "do_format":
            _require_narrow(texts[0])
        counted = (_counted(a) if isinstance(a, Iterator) else a for a in args)
        result = function(*counted, **kwargs)
        _require_length(_size(result))
        return result

    return inner


def _counted(pieces: Iterable[Any]) -> Iterator[Any]:
    length = 0
    for piece in pieces:
        length += _size(piece)
        _require_length(length)
        yield piece


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _times(value: Any) -> int:
    return abs(value) if isinstance(value, int) else _size(value)


def _require_affordable(text: object, arguments: list[Any]) -> None:
    """Refuse large numbers, lists of long texts, and one long text to be repeated in another."""
    for value in arguments:
        if isinstance(value, int) and abs(value) > _MAX_ARGUMENT:
            raise _refusal(f"gives a function a number beyond {_MAX_ARGUMENT:,}")
        if isinstance(value, list | tuple):
            _require_length(sum(map(_size, value)))
        if isinstance(text, str) and value is not text:
            _require_length(len(text) * _times(value) // 16)


def _require_length(length: float) -> None:
    if length > MAX_LENGTH:
        raise _refusal(f"makes something of more than {MAX_LENGTH:,} characters")


def _require_narrow(text: str) -> None:
    if _WIDE.search(text):
        raise _refusal("formats something to an endless width")


def _refusal(what: str) -> ConfigError:
    return ConfigError(f"model: its chat template {what}")
