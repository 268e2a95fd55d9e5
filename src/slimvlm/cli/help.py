"""What ``--help`` and ``--help-all`` print: verbs, and a verb's options in groups, with meanings.

Everything is read off the declarations: names, types and defaults of the verb's parameters and of
the option classes among them, the texts below their fields, and each class's title.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from slimvlm.cli.options import INLINE

FEW = 14
"""A verb with at most so many options has them all in ``--help``."""
FIRST = (
    *("out", "ratio", "data", "images", "axis", "train", "tasks", "plan", "scores", "teacher"),
    *("vocab_size", "dry_run", "samples", "baseline", "low_memory", "limit", "loss", "fraction"),
    *("epochs", "learning_rate", "criterion"),
)
"""The options that matter most; ``--help`` explains the first `SHOWN` of these that a verb has."""
SHOWN = 10
OWN = "Files and output"
"""The group of a verb's own parameters."""
ORDER = (
    *("What to remove", "How to score", "How to mend", "Training", "Evaluation", "What is timed"),
    *("Data", "Models and files", OWN),
)
"""Groups in the order in which they are shown."""
_INDENT = 26
_BESIDE_VERBS = 17


@dataclass(frozen=True)
class Option:
    """One option or argument of a verb.

    Attributes:
        name: As it is written: ``--max-bad``, or ``MODEL`` for one without a flag.
        key: Its name in Python.
        value: What follows it; empty for a flag.
        about: What it means, with its default.
        group: The title of its group.
    """

    name: str
    key: str
    value: str
    about: str
    group: str

    @property
    def is_flagged(self) -> bool:
        """Whether it is written with a name."""
        return self.name.startswith("-")


def help_text(name: str, verb: Callable[..., Any], everything: bool) -> str:
    """The help of a verb.

    Args:
        name: Of the verb.
        verb: The function behind it.
        everything: Whether every option is explained.
    """
    options = list(options_of(verb))
    arguments = [option for option in options if not option.is_flagged]
    flagged = [option for option in options if option.is_flagged]
    words = [option.name for option in arguments]
    about = docstring_parser.parse(inspect.getdoc(verb) or "")
    text = [about.short_description or "", about.long_description or ""]
    lines = [f"usage: slimvlm {' '.join([name, *words])} [options]", ""]
    for paragraph in "\n\n".join(filter(None, text)).split("\n\n"):
        lines += [*_wrapped(paragraph, 0), ""]
    lines += [line for option in arguments for line in _explained(option)]
    lines += [""] * bool(arguments)
    if everything or len(flagged) <= FEW:
        return "\n".join([*lines, *_groups(flagged)])
    rank = {key: place for place, key in enumerate(FIRST)}
    first = sorted((o for o in flagged if o.key in rank), key=lambda o: rank[o.key])[:SHOWN]
    rest = [option for option in flagged if option not in first]
    lines += ["The options that matter most:", ""]
    lines += [line for option in first for line in _explained(option)]
    lines += ["", f"{len(rest)} more; slimvlm {name} --help-all explains them:", ""]
    for group, of_group in _by_group(rest).items():
        names = " ".join(option.name for option in of_group)
        listed = textwrap.wrap(names, _width() - _INDENT, break_on_hyphens=False)
        lines += _beside(f"  {group}", listed)
    return "\n".join(lines)


def overview(about: str, groups: Mapping[str, Mapping[str, Callable[..., Any]]]) -> str:
    """What there is: every verb in a line, by what it is for.

    Args:
        about: What all of it is for.
        groups: Verbs by name, by the title of their group.
    """
    lines = ["usage: slimvlm VERB [options]", "", about, ""]
    for title, verbs in groups.items():
        lines += [f"{title}:", ""]
        for name, verb in verbs.items():
            said = docstring_parser.parse(inspect.getdoc(verb) or "").short_description or ""
            lines += textwrap.wrap(
                said,
                _width(),
                initial_indent=f"  {name}".ljust(_BESIDE_VERBS),
                subsequent_indent=" " * _BESIDE_VERBS,
            )
        lines.append("")
    return "\n".join([*lines, "slimvlm VERB --help explains its options."])


def options_of(verb: Callable[..., Any]) -> Iterator[Option]:
    """The arguments and options of a verb, in order."""
    function = inspect.unwrap(verb)
    hints = get_type_hints(function, include_extras=True)
    meanings = _meanings(docstring_parser.parse(inspect.getdoc(function) or ""))
    for name, parameter in inspect.signature(function).parameters.items():
        kind, marks = _taken_apart(hints[name])
        if INLINE in marks:
            yield from _options_in(kind)
            continue
        default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
        is_flagged = tyro.conf.Positional not in marks
        title = f"--{name.replace('_', '-')}" if is_flagged else _metavar(name, marks)
        value = _value_of(kind) if is_flagged else ""
        yield Option(title, name, value, _with_default(meanings.get(name, ""), default), OWN)


def _options_in(kind: type) -> Iterator[Option]:
    """The options of a class; each belongs to the group of the class that declares it."""
    hints = get_type_hints(kind, include_extras=True)
    for row in fields(kind):
        of_field, marks = _taken_apart(hints[row.name])
        if tyro.conf.Suppress in marks:
            continue
        owners = [
            each for each in kind.__mro__ if row.name in vars(each).get("__annotations__", {})
        ]
        named = next((mark.name for mark in marks if getattr(mark, "name", None)), row.name)
        meaning = _meanings_in(owners[0]).get(row.name, "")
        about = _with_default(meaning, row.default)
        title: str = getattr(owners[0], "title", OWN)
        yield Option(f"--{named.replace('_', '-')}", row.name, _value_of(of_field), about, title)


@cache
def _meanings_in(kind: type) -> dict[str, str]:
    return _meanings(docstring_parser.parse_from_object(kind))


def _meanings(doc: docstring_parser.Docstring) -> dict[str, str]:
    return {row.arg_name: " ".join((row.description or "").split()) for row in doc.params}


def _taken_apart(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type, and the marks that stand beside it."""
    if get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _metavar(name: str, marks: Sequence[Any]) -> str:
    given = [mark.metavar for mark in marks if getattr(mark, "metavar", None)]
    return str(given[0]) if given else name.upper()


def _value_of(kind: Any) -> str:
    """What a value of a type looks like on the command line; nothing for a flag."""
    kind, _ = _taken_apart(kind)
    if kind is bool:
        return ""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (UnionType, Union):
        return "|".join(filter(None, (_value_of(k) for k in get_args(kind) if k is not type(None))))
    if get_origin(kind) is tuple:
        inner = [_value_of(each) for each in get_args(kind) if each is not Ellipsis]
        return " ".join(inner) + (" ..." if Ellipsis in get_args(kind) else "")
    return {int: "INT", float: "FLOAT", Path: "PATH"}.get(kind, "TEXT")


def _with_default(about: str, default: Any) -> str:
    if default is MISSING:
        return f"{about} (required)"
    if default is None or default is False or default == ():
        return about
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{about} (default: {shown})"


def _by_group(options: Sequence[Option]) -> dict[str, list[Option]]:
    groups: dict[str, list[Option]] = {}
    for option in sorted(options, key=lambda option: ORDER.index(option.group)):
        groups.setdefault(option.group, []).append(option)
    return groups


def _groups(options: Sequence[Option]) -> Iterator[str]:
    for group, of_group in _by_group(options).items():
        yield f"{group}:"
        yield ""
        for option in of_group:
            yield from _explained(option)
        yield ""


def _explained(option: Option) -> list[str]:
    """An option and its meaning beside it, or below where it is long."""
    return _beside(f"  {option.name} {option.value}".rstrip(), _wrapped(option.about, _INDENT))


def _beside(left: str, right: Sequence[str]) -> list[str]:
    first, *more = right or [""]
    beside = [left.ljust(_INDENT) + first]
    below = [left, " " * _INDENT + first]
    lines = beside if len(left) < _INDENT else below
    return [*lines, *(" " * _INDENT + line for line in more)]


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _width() - indent)


def _width() -> int:
    return max(min(shutil.get_terminal_size().columns, 110), 60)
