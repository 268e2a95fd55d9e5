"""A study as written in YAML: strict dataclasses that refuse an unknown key by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from slimvlm.core.errors import ConfigError
from slimvlm.runs.study.reading import built

NONE = "none"
"""The recovery that trains nothing."""
DEFAULT = "default"
"""The criterion that is chosen for the axis, by `slimvlm.runs.stages.criteria_of`."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells: every combination of the values listed here. In YAML one value needs no list."""

    ratio: tuple[float, ...]
    """Shares of the backbone's parameters to remove."""
    model: tuple[str, ...] = ("demo",)
    """Folders, hub ids, or demo."""
    axis: tuple[str, ...] = ("depth", "width")
    """depth, width or both."""
    criterion: tuple[str, ...] = (DEFAULT,)
    """Criteria; of several kinds of unit joined by +. default chooses for the axis."""
    allocation: tuple[str, ...] = ("balanced",)
    """How widths share the ratio."""
    repair: tuple[str, ...] = ("none",)
    """Repairs in closed form."""
    recovery: tuple[str, ...] = (NONE,)
    """Names from the study's recoveries, or none."""
    fraction: tuple[float, ...] = (1.0,)
    """Shares of the training data."""
    seed: tuple[int, ...] = (0,)
    """Each draws other calibration and training samples and seeds the training."""
    prune: Mapping[str, Any] = field(default_factory=dict)
    """Further options of `slimvlm.PruneConfig` for these cells."""


GRID_AXES = tuple(f.name for f in fields(Grid) if f.name != "prune")
"""The keys of a grid that are multiplied."""


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
    rows: tuple[ReferenceRow, ...] = ()

    def row_for(self, cell: Mapping[str, Any]) -> ReferenceRow | None:
        """The first row that matches a cell."""
        return next((row for row in self.rows if row.matches(cell)), None)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one stage needs where an engine shares out a machine or a cluster."""

    cpus: float = 1.0
    """CPU cores."""
    gpus: float = 0.0
    """GPUs, or a share of one: 0.5 lets two stages share it."""

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"resources: {name} {getattr(self, name)} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: grids of cells and what they share.

    Raises:
        ConfigError: If a key is unknown or a value is not allowed; the message names it.
    """

    grids: tuple[Grid, ...]
    """Cells; those that stand in two grids are measured once."""
    recoveries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of `slimvlm.RecoverConfig` by a name that grids use."""
    data: str | None = None
    """Conversations for calibration and training, as for ``slimvlm compress``."""
    images: str | None = None
    """Folder that image paths in the data start from."""
    training_samples: int | None = None
    """Samples to train on at most, beside those for calibration; by default all."""
    prune: Mapping[str, Any] = field(default_factory=dict)
    """Options of `slimvlm.PruneConfig` for every cell."""
    recover: Mapping[str, Any] = field(default_factory=dict)
    """Options of `slimvlm.RecoverConfig` for every recovery."""
    tasks: str = "demo"
    """What every model is asked, as for ``slimvlm evaluate``."""
    task_folder: str | None = None
    """Folder with local copies of the benchmarks' task files."""
    limit: int | None = None
    """Only the first so many questions of each task."""
    batch_size: int = 16
    """Questions answered at once."""
    floors: bool = True
    """Ask the original a second time with the wrong pictures, for floor-corrected retention."""
    resources: Resources = field(default_factory=Resources)
    """What one stage needs, for ``--engine ray``."""
    keep_checkpoints: bool = False
    """Keep the models of all cells; else a model goes when no open cell needs it any more."""
    reference: Reference | None = None
    """Published numbers to stand beside ours."""

    def __post_init__(self) -> None:
        for name in ("training_samples", "limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value} must be at least 1")


def read_study(path: str | Path) -> StudyConfig:
    """Read a study file.

    Raises:
        ConfigError: If the file cannot be read or anything in it is unknown or not allowed.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"study {str(path)!r}: cannot be read ({reason})") from error
    try:
        return built(StudyConfig, values)
    except ConfigError as error:
        raise ConfigError(f"study {str(path)!r}: {error}") from error
