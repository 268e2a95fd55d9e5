"""A study as written in YAML, read strictly: what may not stand there is named in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from slimvlm.core.checked import AT_LEAST_0, AT_LEAST_1, Options
from slimvlm.core.errors import ConfigError, one_line
from slimvlm.core.options import Questions

T = TypeVar("T")
NONE = "none"
"""The recovery that trains nothing."""
DEFAULT = "default"
"""The criterion that is chosen for the axis, by `slimvlm.runs.request.criteria_of`."""


def _listed(value: Any) -> tuple[Any, ...]:
    """Where a list is wanted, one value needs none."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Listed = Annotated[tuple[T, ...], BeforeValidator(_listed), Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells: every combination of the values listed here. In YAML one value needs no list."""

    ratio: Listed[float]
    """Shares of the backbone's parameters to remove."""
    model: Listed[str] = ("demo",)
    """Folders, hub ids, or demo."""
    axis: Listed[str] = ("depth", "width")
    """depth, width or both."""
    criterion: Listed[str] = (DEFAULT,)
    """Criteria; of several kinds of unit joined by +. default chooses for the axis."""
    allocation: Listed[str] = ("balanced",)
    """How widths share the ratio."""
    repair: Listed[str] = ("auto",)
    """Repairs in closed form; none for the bare cut, as in the paper."""
    recovery: Listed[str] = (NONE,)
    """Names from the study's recoveries, or none."""
    fraction: Listed[float] = (1.0,)
    """Shares of the training data."""
    seed: Listed[int] = (0,)
    """Each draws other calibration and training samples and seeds the training."""
    prune: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `slimvlm.PruneConfig` for these cells."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """A published number for the cells that agree with every key given here."""

    retention: float
    """AVG-%."""
    model: str | None = None
    axis: str | None = None
    ratio: float | None = None
    criterion: str | None = None
    recovery: str | None = None
    fraction: float | None = None
    source: str = ""
    """Where in the publication it stands."""

    def matches(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell has every value that this row names."""
        keys = ("model", "axis", "ratio", "criterion", "recovery", "fraction")
        given = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        return all(cell[key] == value for key, value in given.items())


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Published numbers beside the measured ones."""

    source: str
    """The publication."""
    rows: Listed[ReferenceRow] = ()

    def row_for(self, cell: Mapping[str, Any]) -> ReferenceRow | None:
        """The first row that matches a cell."""
        return next((row for row in self.rows if row.matches(cell)), None)


@dataclass(frozen=True, kw_only=True)
class Resources(Options):
    """What one stage needs where an engine shares out a machine or a cluster."""

    cpus: Annotated[float, AT_LEAST_0] = 1.0
    """CPU cores."""
    gpus: Annotated[float, AT_LEAST_0] = 0.0
    """GPUs, or a share of one: 0.5 lets two stages share it."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Questions):
    """A study: grids of cells, and what they share: questions among others.

    Raises:
        ConfigError: If a key is unknown or a value is not allowed; the message names it.
    """

    grids: Listed[Grid]
    """Cells; those that stand in two grids are measured once."""
    recoveries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of `slimvlm.RecoverConfig` by a name that grids use."""
    data: str | None = None
    """Conversations for calibration and training, as for ``slimvlm compress``."""
    images: str | None = None
    """Folder that image paths in the data start from."""
    training_samples: Annotated[int | None, AT_LEAST_1] = None
    """Samples to train on at most, beside those for calibration; by default all."""
    prune: Mapping[str, Any] = field(default_factory=dict)
    """Options of `slimvlm.PruneConfig` for every cell."""
    recover: Mapping[str, Any] = field(default_factory=dict)
    """Options of `slimvlm.RecoverConfig` for every recovery."""
    floors: bool = True
    """Ask the original a second time with the wrong pictures, for floor-corrected retention."""
    resources: Resources = field(default_factory=Resources)
    """What one stage needs, for ``--engine ray``."""
    keep_checkpoints: bool = False
    """Keep the models of all cells; else a model goes when no open cell needs it any more."""
    reference: Reference | None = None
    """Published numbers to stand beside ours."""


def read_study(path: str | Path) -> StudyConfig:
    """Read a study file.

    Raises:
        ConfigError: If the file cannot be read or anything in it is unknown or not allowed.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"study {str(path)!r}: cannot be read ({one_line(error)})") from error
    try:
        return built(StudyConfig, values)
    except ConfigError as error:
        raise ConfigError(f"study {str(path)!r}: {error}") from error


def built(kind: type[T], values: Any, where: str = "") -> T:
    """A dataclass from plain values, as YAML gives them: types must fit, and no key be unknown.

    Args:
        kind: The dataclass, of this file or of `slimvlm.core.options`.
        values: A mapping of its fields. Where a tuple is wanted, one value needs no list.
        where: What the mapping is, for messages.

    Raises:
        ConfigError: If anything does not fit; the message names the key, the value and what is
            allowed.
    """
    if isinstance(values, Mapping):
        tuples = {f.name for f in fields(kind) if isinstance(f.default, tuple)}  # type: ignore[arg-type]
        values = {k: _listed(v) if k in tuples else v for k, v in values.items()}
    try:
        text = json.dumps(values, default=str)
    except TypeError as error:
        raise ConfigError(f"{where or 'the file'}: {error}") from error
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        raise ConfigError(_first_mistake(kind, error, where)) from error


_MISTAKES = {
    "unexpected_keyword_argument": "{within}key {key!r} is unknown. Allowed: {allowed}",
    "missing": "{within}key {key!r} is missing",
    "dataclass_type": "{place} must map keys to values, not {value!r}",
    "dict_type": "{place} must map names to values, not {value!r}",
    "too_short": "{place}: give at least one value",
    "too_long": "{place} {value!r} must be {count} values",
    "literal_error": "{place} {value!r} must be one of: {choices}",
    "int_type": "{place} {value!r} must be a whole number",
    "float_type": "{place} {value!r} must be a number",
    "string_type": "{place} {value!r} must be text",
    "bool_type": "{place} {value!r} must be true or false",
}
"""What is said for pydantic's types of errors."""


def _first_mistake(kind: type, error: ValidationError, where: str) -> str:
    """One line; an unknown key comes before all else, which often follows from it."""
    mistake = min(error.errors(), key=lambda found: found["type"] != "unexpected_keyword_argument")
    sort, steps, context = mistake["type"], mistake["loc"], mistake.get("ctx", {})
    if sort == "missing" and isinstance(steps[-1], int):
        sort = "too_long"  # or too short
    keys = [step for step in steps if isinstance(step, str)]
    place, around = (": ".join(filter(None, [where, *some])) for some in (keys, keys[:-1]))
    if sort == "value_error":  # what options say of their own values
        return f"{place}: {context['error']}".removeprefix(": ")
    owner = _kind_at(kind, keys[:-1])
    default = getattr(owner, keys[-1], None) if keys else None
    return _MISTAKES.get(sort, "{place} {value!r}: {words}").format(
        words=mistake["msg"],
        place=place or "the file",
        within=f"{around}: " if around else "",
        key=keys[-1] if keys else "",
        value=mistake["input"],
        allowed=", ".join(f.name for f in fields(owner)) if owner else "",
        choices=", ".join(re.findall(r"'(.*?)'", str(context.get("expected")))),
        count=len(default) if isinstance(default, tuple) else 0,
    )


def _kind_at(kind: Any, keys: Sequence[str]) -> Any:
    """The dataclass that stands behind some keys; None where names of the user's stand."""
    for key in keys:
        hint = get_type_hints(kind)[key]
        kind = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
    return kind
