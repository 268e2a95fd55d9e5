"""Tell tyro how to show and read the option classes."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, fields, make_dataclass
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


def name_of(verb: Callable[..., None]) -> str:
    """Return the name of a verb on the command line."""
    return verb.__name__.replace("_", "-")


def parse(
    verb: Callable[..., None], words: list[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the options of a verb, with defaults by parameter name; return its arguments by name."""
    texts, hints = USUAL | _texts(verb), get_type_hints(verb, include_extras=True)
    rows = []
    for name, parameter in signature(verb).parameters.items():
        default, hint = defaults.get(name, parameter.default), hints[name]
        text = texts.get(name, "")
        if isinstance(hint, type) and issubclass(hint, Options):  # its fields are a group
            text = text or docstring_parser.parse_from_object(hint).short_description or ""
            hint = Annotated[hint, tyro.conf.OmitArgPrefixes]
        hint = _described(hint, text, default)
        rows.append((name, hint, field() if default is Parameter.empty else field(default=default)))
    arguments: Any = tyro.cli(
        make_dataclass("Arguments", rows, kw_only=True),
        prog=f"slimvlm {name_of(verb)}",
        description=docstring_parser.parse(verb.__doc__ or "").description,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff,),
        registry=REGISTRY,
    )
    return dict(vars(arguments))


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


class RunFlags(core.RunOptions):
    """Evaluation, image tokens and training data."""

    batch_size: Annotated[int, tyro.conf.arg(name=core.TASK_BATCH_SIZE)] = 16
    """Questions per batch."""


class SourceFlags(core.FileLoading, core.TrainingData):
    """Training data, and model loading."""


class TrainingFlags(core.TrainingConfig):
    """Training; the extended paper's decision chart gives what is left out."""

    train: Literal["projector", "lora", "full", "none"] | None = None
    """Weights to train: the projector; LoRA on the backbone, plus the projector; full, all but the
    vision tower; or none."""
    loss: str | None = None
    """Weighted sum of the losses sft, hidden, cosine, kl, rkl and jsd."""
    paper_exact: Annotated[bool, core.FILE_ONLY] = False
    seed: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0  # a run has one, among those of pruning


class SizeFlags(core.TargetOptions, core.LatencyOptions):
    """Target size or prefill time."""


def defaults_from(file: str, verb: str) -> dict[str, Any]:
    """Read a configuration file as values of the parameters of `compress` or `recover`."""
    from slimvlm.runs.compress import read_config

    model, config, learning = read_config(file)
    if verb == "recover":
        untrained = core.RecoverConfig(seed=config.seed)
        data = {} if config.data is None else {"source": config.part(SourceFlags)}
        return {"teacher": model, "training": config.recover or untrained, **data}
    given: dict[str, Any] = {"train": "none"} if learning is None else {}
    if config.recover is not None:
        names = {row.name for row in fields(TrainingFlags)} & set(learning or {}) - {"seed"}
        given = {name: getattr(config.recover, name) for name in names}
    parts = {"pruning": config.part(core.RunPruning), "evaluation": config.part(RunFlags)}
    return {"model": model, "training": TrainingFlags(**given), **parts}
