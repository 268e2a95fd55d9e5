"""A study's YAML file, read strictly, and the cells of its grids."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from slimvlm.core import options as core
from slimvlm.core.documents import Listed, built, read_yaml
from slimvlm.core.errors import ConfigError, raised_as
from slimvlm.core.options import (
    AT_LEAST_0,
    CompressConfig,
    Options,
    PruneConfig,
    RecoverConfig,
)
from slimvlm.runs.recipe import criteria_of

NONE = "none"  # the recovery that trains nothing
DEFAULT = "default"  # the criterion that `slimvlm.runs.recipe.criteria_of` chooses for the axis


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells: every combination of the values listed here. In YAML one value needs no list."""

    ratio: Listed[float]
    """Shares of the backbone's parameters to remove."""
    model: Listed[str] = ("demo",)
    """Folders, hub ids, or demo."""
    axis: Listed[core.Axis] = ("depth", "width")
    """depth, width or both."""
    criterion: Listed[str] = (DEFAULT,)
    """Criteria; of several kinds of unit joined by +. default chooses for the axis."""
    tower_ratio: Listed[float] = (0.0,)
    """Shares of the vision tower's parameters to remove as well."""
    allocation: Listed[core.Allocation | None] = (None,)
    """How widths share the ratio; by default balanced where obs chooses, else uniform."""
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
    """Table or figure of the publication."""

    def matches(self, cell: Mapping[str, Any]) -> bool:
        """Whether a cell has every value that this row names."""
        given = {key: v for key, v in vars(self).items() if key not in ("retention", "source")}
        return all(cell[key] == value for key, value in given.items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Published numbers to compare the measured ones with."""

    source: str
    """The publication."""
    rows: Listed[ReferenceRow] = ()


class Resources(Options):
    """CPUs and GPUs of one stage, where an engine divides a machine or a cluster."""

    cpus: Annotated[float, AT_LEAST_0] = 1.0
    """CPU cores."""
    gpus: Annotated[float, AT_LEAST_0] = 0.0
    """GPUs, or a share of one: 0.5 lets two stages share it."""


class StudyConfig(core.Questions, core.TrainingShare):
    """A study: grids of cells, and what they share: questions among others."""

    grids: Listed[Grid]
    """Cells; one that is in two grids is measured once."""
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
    """CPUs and GPUs of one stage, for ``--engine ray``."""
    keep_checkpoints: bool = False
    """Keep the models of all cells; else a model is removed once no open cell needs it."""
    reference: Reference | None = None
    """Published numbers to add to the table."""


def read_study(path: str | Path) -> StudyConfig:
    """Read a study file; raise ConfigError if anything in it is unknown or not allowed."""
    return built(StudyConfig, read_yaml(path, "study"), f"study {str(path)!r}")


_SWEPT = tuple(f.name for f in fields(Grid) if f.name != "prune")  # keys that are multiplied
# options that are keys of the grid or of the study
_PRUNE_KEYS = {f.name for f in fields(PruneConfig)} & {*_SWEPT, "data", "images"}
_RECOVER_KEYS = {f.name for f in fields(RecoverConfig)} & {*_SWEPT}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of a study."""

    model: str
    seed: int
    options: CompressConfig
    """Once they are decided, a `Recipe`."""
    recovery: str = NONE
    words: str = ""
    """Options of pruning that its grid sets otherwise than the study."""

    @property
    def criterion(self) -> str:
        """The criteria as they stand in a grid."""
        return "+".join(criteria_of(self.options, self.options.axis, self.options.ratio))

    @property
    def label(self) -> str:
        """The options of the cell as a short text."""
        given = self.options
        parts = [short_name(self.model), given.axis, percent(given.ratio or 0), self.criterion]
        parts += [f"tower {percent(given.tower_ratio)}"] if given.tower_ratio else []
        parts += [given.allocation] if given.allocation and given.axis != "depth" else []
        parts += [f"repair {given.repair}"] if given.repair != "none" else []
        parts += [self.words] if self.words else []
        parts.append(self.recovery if self.recovery != NONE else "no recovery")
        if self.recovery != NONE and given.recover.fraction < 1:
            parts.append(f"{percent(given.recover.fraction)} of the data")
        return " ".join([*map(str, parts), f"seed {self.seed}"])

    def values(self) -> dict[str, Any]:
        """Return the options of the cell as columns of the results table."""
        trained = {"train": NONE, "loss": NONE, "fraction": 1.0}
        if self.recovery != NONE:
            trained = {name: getattr(self.options.recover, name) for name in trained}
        return {
            "model": self.model,
            **{name: getattr(self.options, name) for name in ("axis", "ratio", "tower_ratio")},
            "criterion": self.criterion,
            **{name: getattr(self.options, name) for name in ("allocation", "repair")},
            "options": self.words,
            "recovery": self.recovery,
            **trained,
            "seed": self.seed,
        }


def percent(share: float) -> str:
    """Format a ratio, without rounding it: 12.4 % is not 12 %."""
    return f"{100 * share:.6g}%"


def short_name(model: str) -> str:
    """Return the last part of a folder or hub id."""
    return model.rstrip("/").rpartition("/")[2]


def expand(study: StudyConfig) -> list[Cell]:
    """List all cells of a study, each once; an error names the cell."""
    cells: dict[Cell, None] = {}
    for grid in study.grids:
        for values in product(*(getattr(grid, name) for name in _SWEPT)):
            chosen = dict(zip(_SWEPT, values, strict=True))
            where = ", ".join(f"{name} {value}" for name, value in chosen.items())
            with raised_as(ConfigError, ConfigError, f"cell ({where}):"):
                cells.setdefault(_cell(study, grid, chosen))
    columns = [cell.values() for cell in cells]
    for row in study.reference.rows if study.reference else ():
        if not any(row.matches(values) for values in columns):
            raise ConfigError(f"reference: {row} matches no cell of the grids")
    return list(cells)


def _cell(study: StudyConfig, grid: Grid, chosen: dict[str, Any]) -> Cell:
    options = {**study.prune, **grid.prune}
    for name in options.keys() & {*core.NO_RESULT}:
        raise ConfigError(f"prune: {name!r} changes no result, and a study keeps only results")
    if "trust_remote_code" in options:
        raise ConfigError("prune: 'trust_remote_code' is not taken from a file; load such a model")
    _check_home("prune", options, _PRUNE_KEYS)
    options |= {name: chosen[name] for name in _PRUNE_KEYS & chosen.keys() - {"criterion"}}
    if chosen["criterion"] != DEFAULT:
        options["criterion"] = chosen["criterion"].split("+")
    usual = {f.name: f.default for f in fields(PruneConfig)} | dict(study.prune)
    name, trained = chosen["recovery"], dict[str, Any](recover=NONE)
    if name != NONE:
        if name not in study.recoveries:
            known = ", ".join([NONE, *study.recoveries])
            raise ConfigError(f"recovery {name!r} must be one of the recoveries: {known}")
        if study.data is None:
            raise ConfigError(f"recovery {name!r} needs the key 'data'")
        where, training = f"recovery {name!r}", {**study.recover, **study.recoveries[name]}
        _check_home(where, training, _RECOVER_KEYS)
        if training.get("keep_adapter"):
            raise ConfigError("keep_adapter True: a study keeps results, not adapters")
        training |= {key: chosen[key] for key in _RECOVER_KEYS}
        trained = {"recover": built(RecoverConfig, training, where)}
        trained["training_samples"] = study.training_samples
    pruning = built(PruneConfig, {**options, "data": study.data, "images": study.images})
    return Cell(
        model=chosen["model"],
        seed=chosen["seed"],
        options=CompressConfig(**vars(pruning), **trained, test_samples=0),
        recovery=name,
        words=" ".join(f"{k} {v}" for k, v in grid.prune.items() if v != usual.get(k)),
    )


def _check_home(where: str, options: dict[str, Any], elsewhere: set[str]) -> None:
    """Refuse options that have a key of their own."""
    for name in options.keys() & elsewhere:
        raise ConfigError(f"{where}: {name!r} is a key of the grid or of the study")
