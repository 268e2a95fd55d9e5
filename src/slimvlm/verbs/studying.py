"""Measure a grid of compressions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from slimvlm.verbs.printing import console, note, print_json

if TYPE_CHECKING:
    import pandas as pd

    from slimvlm.study import Forecast

_SHOWN = ("model", "axis", "ratio", "recovery", "fraction", "seed", "avg", "avg_percent", "status")


def study(
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.yaml")],
    out: Path,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Measure a grid of compressions, doing each piece of work once.

    Whatever is in the folder already is used again: a stopped study goes on, a larger one adds what
    is new, and what failed is tried again.

    Args:
        file: The study; see docs/studies.md.
        out: Folder for results.parquet, results.csv, claims.md and the cache.
        engine: local does one stage after another; ray shares them out over a Ray cluster.
        workers: Stages at once, for a Ray that is started here.
        address: A running Ray cluster; by default the one in RAY_ADDRESS.
        dry_run: Only show the cells, what is in the cache and how long the rest would take.
        json: Print JSON.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # one table shows how far it is; before imports
    from dataclasses import asdict

    from slimvlm.study import as_json, forecast, run_study

    if dry_run:
        found = forecast(file, out)
        if json:
            print_json(asdict(found))
        else:
            _print_forecast(found)
        return
    table = run_study(file, out, engine, workers, address)
    if json:
        print_json(as_json(table))
    else:
        _print_results(table)
        note(f"results: {out}/results.csv, claims: {out}/claims.md")


def _print_forecast(found: Forecast) -> None:
    from slimvlm.study.display import duration
    from slimvlm.summary import as_table

    cells = [[label, ", ".join(stages) or "nothing"] for label, stages in found.cells.items()]
    console().print(as_table(["cell", "to do"], cells, title=f"{len(cells)} cells"))
    counts = [
        [kind, str(to_do), str(done), found.basis.get(kind, "")]
        for kind, (to_do, done) in found.stages.items()
    ]
    console().print(as_table(["stage", "to do", "in the cache", "time is"], counts))
    print(f"about {duration(found.seconds)}, one stage after another")


def _print_results(table: pd.DataFrame) -> None:
    from slimvlm.study import claims_of
    from slimvlm.summary import as_table

    rows = [[_cell(row[name]) for name in _SHOWN] for _, row in table.iterrows()]
    console().print(as_table(_SHOWN, rows))
    claims = [[claim.name, claim.statement, claim.verdict] for claim in claims_of(table)]
    console().print(as_table(["claim", "says", "here"], claims))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None else str(value)
