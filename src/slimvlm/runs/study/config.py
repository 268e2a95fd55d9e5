"""A study as written in YAML, read strictly: what may not stand there is named in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from slimvlm.core.checked import AT_LEAST_0, Options
from slimvlm.core.documents import Listed, built, read_yaml
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import Questions, TrainingShare

NONE = "none"
"""The recovery that trains nothing."""
DEFAULT = "default"
"""The criterion that is chosen for the axis, by `slimvlm.runs.request.criteria_of`."""


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
class StudyConfig(Questions, TrainingShare):
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
    values = read_yaml(path, "study")
    try:
        return built(StudyConfig, values)
    except ConfigError as error:
        raise ConfigError(f"study {str(path)!r}: {error}") from error
