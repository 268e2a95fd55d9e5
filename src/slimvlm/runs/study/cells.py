"""Grids → cells: pruned how, recovered how, with which seed; checked before any of them runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from slimvlm.core.documents import built
from slimvlm.core.errors import ConfigError
from slimvlm.core.options import PruneConfig, RecoverConfig
from slimvlm.runs.request import criteria_of
from slimvlm.runs.study.config import DEFAULT, NONE, Grid, StudyConfig

_SWEPT = tuple(f.name for f in fields(Grid) if f.name != "prune")
"""The keys of a grid that are multiplied."""
_PRUNE_KEYS = {f.name for f in fields(PruneConfig)} & {*_SWEPT, "data", "images"}
_RECOVER_KEYS = {f.name for f in fields(RecoverConfig)} & {*_SWEPT}
"""Options that are keys of the grid or of the study."""
_WITHOUT_EFFECT = {"pad", "device"}
"""Options of `PruneConfig` that change how a checkpoint is written or where, and no result."""


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
        for values in product(*(getattr(grid, name) for name in _SWEPT)):
            cells.setdefault(_cell(study, grid, dict(zip(_SWEPT, values, strict=True))))
    _check_reference(study, cells)
    return list(cells)


def _cell(study: StudyConfig, grid: Grid, chosen: dict[str, Any]) -> Cell:
    usual = {f.name: f.default for f in fields(PruneConfig)} | dict(study.prune)
    own = [f"{k} {v}" for k, v in grid.prune.items() if v != usual.get(k)]
    try:
        return Cell(
            model=chosen["model"],
            seed=chosen["seed"],
            prune=_prune_config(study, {**study.prune, **grid.prune}, chosen),
            recovery=chosen["recovery"],
            recover=_recover_config(study, chosen),
            options=" ".join(own),
        )
    except ConfigError as error:
        where = ", ".join(f"{name} {value}" for name, value in chosen.items())
        raise ConfigError(f"cell ({where}): {error}") from error


def _prune_config(
    study: StudyConfig, options: dict[str, Any], chosen: dict[str, Any]
) -> PruneConfig:
    for name in _WITHOUT_EFFECT & options.keys():
        raise ConfigError(f"prune: {name!r} changes no result, and a study keeps only results")
    _check_home("prune", options, _PRUNE_KEYS)
    own = {name: chosen[name] for name in _PRUNE_KEYS & chosen.keys()}
    if own.pop("criterion") != DEFAULT:
        own["criterion"] = chosen["criterion"].split("+")
    return built(PruneConfig, {**options, **own, "data": study.data, "images": study.images})


def _recover_config(study: StudyConfig, chosen: dict[str, Any]) -> RecoverConfig | None:
    name = chosen["recovery"]
    if name == NONE:
        return None
    if name not in study.recoveries:
        known = ", ".join([NONE, *study.recoveries])
        raise ConfigError(f"recovery {name!r} must be one of the study's recoveries: {known}")
    if study.data is None:
        raise ConfigError(f"recovery {name!r} needs the study's key 'data'")
    where, options = f"recovery {name!r}", {**study.recover, **study.recoveries[name]}
    _check_home(where, options, _RECOVER_KEYS)
    if options.get("keep_adapter"):
        raise ConfigError("keep_adapter True: a study keeps results, not adapters")
    own = {name: chosen[name] for name in _RECOVER_KEYS}
    return built(RecoverConfig, {**options, **own}, where)


def _check_home(where: str, options: dict[str, Any], elsewhere: set[str]) -> None:
    """Refuse options that have a key of their own."""
    for name in options:
        if name in elsewhere:
            raise ConfigError(f"{where}: {name!r} is a key of the grid or of the study")


def _check_reference(study: StudyConfig, cells: Iterable[Cell]) -> None:
    """A published number that stands beside no cell is a slip of the pen."""
    columns = [cell.values() for cell in cells]
    for row in study.reference.rows if study.reference else ():
        if not any(row.matches(values) for values in columns):
            raise ConfigError(f"reference: {row} matches no cell of the grids")
