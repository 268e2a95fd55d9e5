"""Grids → cells: pruned how, recovered how, with which seed; checked before any of them runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from slimvlm.core.errors import ConfigError
from slimvlm.core.options import PruneConfig, RecoverConfig
from slimvlm.runs.stages import criteria_of
from slimvlm.runs.study.config import DEFAULT, GRID_AXES, NONE, Grid, StudyConfig
from slimvlm.runs.study.reading import built

_OWN_PRUNE = {"data", "images"}
"""Options of `PruneConfig` that are keys of the study."""
_WITHOUT_EFFECT = {"pad", "compat"}
"""Options of `PruneConfig` that change how a checkpoint is written, and no result."""
_OWN_RECOVER = {"fraction", "seed"}
"""Options of `RecoverConfig` that are keys of a grid."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of a study.

    Attributes:
        model: The original.
        seed: Seed of samples and training.
        prune: What is removed, and how.
        recovery: Name of the recovery.
        recover: Its options, None if nothing is trained.
        options: Options of pruning that its grid sets otherwise than the study, in words.
    """

    model: str
    seed: int
    prune: PruneConfig
    recovery: str = NONE
    recover: RecoverConfig | None = None
    options: str = ""

    @property
    def criterion(self) -> str:
        """The criteria, joined by +."""
        return "+".join(criteria_of(self.prune))

    @property
    def label(self) -> str:
        """A few words for people."""
        prune = self.prune
        parts = [self.model.rstrip("/").rpartition("/")[2], prune.axis, f"{prune.ratio:.0%}"]
        parts += [self.criterion, *([f"repair {prune.repair}"] if prune.repair != "none" else [])]
        parts += [self.options] if self.options else []
        parts.append(self.recovery if self.recover else "no recovery")
        if self.recover and self.recover.fraction < 1:
            parts.append(f"{self.recover.fraction:.0%} of the data")
        return " ".join([*map(str, parts), f"seed {self.seed}"])

    def values(self) -> dict[str, Any]:
        """What the cell asks for, as columns of the results table."""
        recover = self.recover
        return {
            "model": self.model,
            "axis": self.prune.axis,
            "ratio": self.prune.ratio,
            "criterion": self.criterion,
            "allocation": self.prune.allocation,
            "repair": self.prune.repair,
            "options": self.options,
            "recovery": self.recovery,
            "train": recover.train if recover else NONE,
            "loss": recover.loss if recover else NONE,
            "fraction": recover.fraction if recover else 1.0,
            "seed": self.seed,
        }


def expand(study: StudyConfig) -> list[Cell]:
    """All cells of a study, each once.

    Raises:
        ConfigError: If a combination is not allowed; the message names the cell.
    """
    cells: dict[Cell, None] = {}
    for grid in study.grids:
        for values in product(*(getattr(grid, name) for name in GRID_AXES)):
            cell = _cell(study, grid, dict(zip(GRID_AXES, values, strict=True)))
            cells.setdefault(cell)
    _check_reference(study, list(cells))
    return list(cells)


def _cell(study: StudyConfig, grid: Grid, chosen: dict[str, Any]) -> Cell:
    where = ", ".join(f"{name} {value}" for name, value in chosen.items())
    try:
        return Cell(
            model=chosen["model"],
            seed=chosen["seed"],
            prune=_prune_config(study, grid, chosen),
            recovery=chosen["recovery"],
            recover=_recover_config(study, chosen),
            options=_own_options(study, grid),
        )
    except ConfigError as error:
        raise ConfigError(f"cell ({where}): {error}") from error


def _own_options(study: StudyConfig, grid: Grid) -> str:
    usual = {f.name: f.default for f in fields(PruneConfig)} | dict(study.prune)
    return " ".join(f"{k} {v}" for k, v in grid.prune.items() if v != usual.get(k))


def _prune_config(study: StudyConfig, grid: Grid, chosen: dict[str, Any]) -> PruneConfig:
    axes = {f.name for f in fields(PruneConfig)} & set(GRID_AXES)
    options = {**study.prune, **grid.prune}
    for name in _WITHOUT_EFFECT & options.keys():
        raise ConfigError(f"prune: {name!r} changes no result, and a study keeps only results")
    _check_home("prune", options, axes | _OWN_PRUNE)
    criterion = chosen["criterion"]
    named = {} if criterion == DEFAULT else {"criterion": criterion.split("+")}
    own = {name: chosen[name] for name in ("ratio", "axis", "allocation", "repair")}
    source = {"data": study.data, "images": study.images}
    return built(PruneConfig, {**options, **own, **named, **source})


def _recover_config(study: StudyConfig, chosen: dict[str, Any]) -> RecoverConfig | None:
    name = chosen["recovery"]
    if name == NONE:
        return None
    if name not in study.recoveries:
        known = ", ".join([NONE, *study.recoveries])
        raise ConfigError(f"recovery {name!r} must be one of the study's recoveries: {known}")
    if study.data is None:
        raise ConfigError(f"recovery {name!r} needs the study's key 'data'")
    options = {**study.recover, **study.recoveries[name]}
    _check_home(f"recovery {name!r}", options, _OWN_RECOVER)
    if options.get("keep_adapter"):
        raise ConfigError("keep_adapter True: a study keeps results, not adapters")
    own = {"fraction": chosen["fraction"], "seed": chosen["seed"]}
    return built(RecoverConfig, {**options, **own}, f"recovery {name!r}")


def _check_home(where: str, options: dict[str, Any], elsewhere: set[str]) -> None:
    """Refuse options that have a key of their own."""
    for name in options:
        if name in elsewhere:
            raise ConfigError(f"{where}: {name!r} is a key of the grid or of the study")


def _check_reference(study: StudyConfig, cells: list[Cell]) -> None:
    """A published number that stands beside no cell is a slip of the pen."""
    if study.reference is None:
        return
    columns = [cell.values() for cell in cells]
    for row in study.reference.rows:
        if not any(row.matches(values) for values in columns):
            raise ConfigError(f"reference: {row} matches no cell of the grids")
