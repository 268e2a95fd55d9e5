"""Tell tyro how to show and read the option classes."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, make_dataclass, replace
from functools import cache, partial
from inspect import Parameter, signature
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from slimvlm.core import options as core
from slimvlm.core.options import Options

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
USUAL = {  # help of parameters that mean the same for every verb that does not explain them
    "model": "Local folder, Hub id, or demo.",
    "out": "Checkpoint folder to write.",
    "limit": "Maximum number of questions per task.",
    "force": "Overwrite existing output.",
    "json": "Print JSON.",
}
REGISTRY = tyro.constructors.ConstructorRegistry()
FIRST = (  # options that help shows first in their group
    *("ratio", "data", "images", "axis", "train", "loss", "tasks", "samples", "vocab_size"),
    *("epochs", "learning_rate", "limit", "test_samples", "criterion", "low_memory"),
)


def name_of(verb: Callable[..., object]) -> str:
    """Return the name of a verb on the command line."""
    return verb.__name__.replace("_", "-")


def parse(
    verb: Callable[..., object], words: list[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the options of a verb, with defaults by parameter name; return its arguments by name."""
    texts = USUAL | _texts(verb)
    rows, grouped = [], dict[str, Any]()
    for name, parameter in signature(verb).parameters.items():
        default, hint = defaults.get(name, parameter.default), parameter.annotation
        parts = [(name, hint, default)]
        if groups := getattr(hint, "groups", None):  # shown one by one, read as one
            grouped[name] = hint
            of = {"training": default.recover}
            parts = [(n, kind, of.get(n, default).part(kind)) for n, kind in groups.items()]
        for key, kind, usual in parts:
            text = texts.get(key, "")
            if isinstance(kind, type) and issubclass(kind, Options):  # its fields are a group
                text = text or docstring_parser.parse_from_object(kind).short_description or ""
                kind = Annotated[kind, tyro.conf.OmitArgPrefixes]
            kind = _described(kind, text, usual)
            rows.append((key, kind, field() if usual is Parameter.empty else field(default=usual)))
    arguments: Any = tyro.cli(
        make_dataclass("Arguments", rows, kw_only=True),
        prog=f"slimvlm {name_of(verb)}",
        description=docstring_parser.parse(verb.__doc__ or "").description,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=REGISTRY,
    )
    found = dict(vars(arguments))
    for name, kind in grouped.items():
        values: dict[str, Any] = {}
        for key in kind.groups:
            part = found.pop(key)
            values |= {"recover": part} if key == "training" else vars(part)
        found[name] = kind(**values)
    return found


@REGISTRY.struct_rule
def options(info: Any) -> tyro.constructors.StructConstructorSpec | None:
    """Show the fields of an option class, each text as one paragraph."""
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, Options)):
        return None
    hints, texts = get_type_hints(kind, include_extras=True), _texts(info.type)
    rows, from_file, without_flag = [], {}, core.file_only(kind)
    rank = {name: number for number, name in enumerate(FIRST)}
    every: Any = fields(kind)  # type: ignore[arg-type]
    for row in sorted(every, key=lambda row: rank.get(row.name, len(FIRST))):
        default = getattr(info.default, row.name, row.default)
        if row.name in without_flag:
            if info.default is not tyro.MISSING and hasattr(info.default, row.name):
                from_file[row.name] = default
            continue
        hint = _described(hints[row.name], texts.get(row.name, ""), default)
        if row.name in kind.flags:
            hint = Annotated[hint, tyro.conf.arg(name=kind.flags[row.name])]
        default = tyro.MISSING if default is MISSING else default
        rows.append(tyro.constructors.StructFieldSpec(row.name, hint, default))
    return tyro.constructors.StructConstructorSpec(partial(kind, **from_file), tuple(rows))


@cache
def _texts(declared: Any) -> dict[str, str]:
    """Read the help of every parameter or field, each as one paragraph."""
    texts: dict[str, str] = {}
    for each in reversed(getattr(declared, "__mro__", (declared,))):
        params = docstring_parser.parse_from_object(each).params if each is not object else []
        texts |= {row.arg_name: " ".join((row.description or "").split()) for row in params}
    return texts


def _described(hint: Any, text: str, default: Any) -> Any:
    """Add help to a type, and the form of its values where tyro's own would name ``None``."""

    def form(kind: Any) -> str:
        if get_origin(kind) is Annotated:
            return form(kind.__origin__)
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        return {str: "TEXT"}.get(kind, getattr(kind, "__name__", "VALUE").upper())

    kind = hint
    while get_origin(kind) is Annotated:
        kind = kind.__origin__
    parts = get_args(kind) if get_origin(kind) in (UnionType, Union) else ()
    forms = "|".join(form(part) for part in parts if part is not type(None)) or None
    hidden = "" if default is None or default is False or default == () else None
    return Annotated[hint, tyro.conf.arg(help=text, metavar=forms, help_behavior_hint=hidden)]


def defaults_from(file: str, verb: str, is_untrained: bool = False) -> dict[str, Any]:
    """Read a configuration file as values of the parameters of `compress` or `recover`.

    ``is_untrained`` drops its training options, which ``--train none`` replaces.
    """
    from slimvlm.runs.compress import read_config

    model, config = read_config(file)
    if verb == "recover":
        given = {} if config.recover.train == "none" else vars(config.recover)
        given = {name: value for name, value in given.items() if value is not None}
        given["seed"] = config.seed
        data = {} if config.data is None else {"source": config.part(core.RecoverData)}
        return {"teacher": model, "training": core.RecoverConfig(**given), **data}
    if is_untrained:
        config = replace(config, recover=core.RunTraining(), training_samples=None)
    own = core.RunTraining(**vars(config.recover) | {"seed": None})  # the run's, which flags change
    return {"model": model, "options": replace(config, recover=own)}
