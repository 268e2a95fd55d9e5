"""Print results on stdout, as a table or as JSON, and remarks on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from slimvlm.core.errors import printable
from slimvlm.core.processes import is_first_rank

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from slimvlm.evaluation.bench import Bench
    from slimvlm.evaluation.compare import Comparison
    from slimvlm.evaluation.on_data import DataResult
    from slimvlm.evaluation.results import Result
    from slimvlm.evaluation.timing import PairedTimes
    from slimvlm.planning.plan import Plan
    from slimvlm.runs.advise import Advice, DryRun
    from slimvlm.runs.study.display import Forecast

_OF_A_CELL = (
    *("model", "axis", "ratio", "recovery", "fraction"),
    *("seed", "avg", "avg_percent", "status"),
)


def console() -> Console:
    """Return the console for tables; wide where stdout is no terminal."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


def note(line: str) -> None:
    """Print a remark on stderr; of several processes the first one does."""
    if is_first_rank():
        print(printable(line), file=sys.stderr)


def print_json(values: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(values, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a result as a table."""
    from slimvlm.runs.tables import as_table

    console().print(as_table(header, rows, title=title))


def show(
    as_json: bool,
    values: Callable[[], Any],
    rows: Callable[[], tuple[Sequence[str], Sequence[Sequence[str]]]],
    title: str = "",
    notes: Iterable[str] = (),
) -> None:
    """Print plain values as JSON, or a table with its notes on stderr; only one is computed."""
    if as_json:
        print_json(values())
        return
    print_table(*rows(), title=title)
    for line in notes:
        note(line)


def print_results(results: Mapping[str, Result], as_json: bool, title: str = "") -> None:
    """Print the scores of models; no table if no task was asked."""
    from slimvlm.runs.tables import result_json, result_rows

    if results or as_json:
        show(as_json, lambda: result_json(results), lambda: result_rows(results), title)


def print_held_out(results: Mapping[str, DataResult]) -> None:
    """Print the figures of held-out samples as a table; nothing if nothing was measured."""
    from slimvlm.runs.tables import held_out_notes, held_out_rows

    if results:
        print_table(*held_out_rows(results), title="what was kept on unseen samples")
        for line in held_out_notes(results):
            print(printable(line))


def print_on_data(results: Mapping[str, DataResult], as_json: bool) -> None:
    """Print the figures of a user's own samples."""
    from slimvlm.runs.tables import held_out_json, held_out_notes, held_out_rows

    rows, notes = partial(held_out_rows, results), held_out_notes(results)
    show(as_json, partial(held_out_json, results), rows, notes=notes)


def print_run(
    results: Mapping[str, Result],
    held_out: Mapping[str, DataResult],
    times: PairedTimes | None,
    as_json: bool,
    title: str,
) -> None:
    """Print the scores of a run's models, the figures of held-out samples, and the speed."""
    from slimvlm.runs.tables import held_out_json, result_json

    if as_json:
        plain = None if times is None else asdict(times)
        figures = {"held_out": held_out_json(held_out), "times": plain}
        print_json({**result_json(results), **figures})
        return
    print_results(results, False, title)
    print_held_out(held_out)
    if times is not None:
        print(f"the smaller model {times}")


def print_plan(made: Plan, as_json: bool) -> None:
    """Print the size that a plan keeps."""
    if not as_json:
        print(made.summary())
        return
    sizes = {name: getattr(made.after, name) for name in ("backbone_params", "total_params")}
    ratios = {"ratio": made.ratio, "asked_ratio": made.asked_ratio}
    print_json({**ratios, **sizes, "summary": made.summary()})


def print_comparison(found: Comparison, as_json: bool) -> None:
    """Print the answers that one model lost and gained over another."""
    from slimvlm.evaluation.compare import comparison_json, comparison_rows

    title = f"A: {found.name_a}   B: {found.name_b}"
    notes = [f"{name} is not compared: {why}" for name, why in found.left_out.items()]
    notes = [found.note, *notes] if found.note else notes
    values, rows = partial(comparison_json, found), partial(comparison_rows, found)
    show(as_json, values, rows, title, notes)


def print_bench(found: Bench, as_json: bool) -> None:
    """Print times, and on stderr which widths are slow."""
    from slimvlm.evaluation.bench import bench_rows

    title = f"{found.dtype} on {found.device}, {found.threads} CPU threads"
    sides = filter(None, (found.baseline, found.model))
    notes = [f"{side.model}: {line}" for side in sides for line in side.warnings]
    show(as_json, found.to_dict, partial(bench_rows, found), title, notes)


def print_forecast(found: Forecast, as_json: bool) -> None:
    """Print the stages that a study would do."""
    from slimvlm.core.progress import duration

    if as_json:
        print_json(asdict(found))
        return
    cells = [[label, ", ".join(stages) or "nothing"] for label, stages in found.cells.items()]
    print_table(["cell", "to do"], cells, title=f"{len(cells)} cells")
    counts = [
        [kind, str(to_do), str(done), found.basis.get(kind, "")]
        for kind, (to_do, done) in found.stages.items()
    ]
    print_table(["stage", "to do", "in the cache", "time is"], counts)
    print(f"about {duration(found.seconds)}, one stage after another")


def print_study(table: pd.DataFrame, as_json: bool) -> None:
    """Print the cells of a study and the verdicts on the claims."""
    from slimvlm.runs.study import as_json as study_json
    from slimvlm_tools.claims import claims_of

    if as_json:
        print_json(study_json(table))
        return
    print_table(_OF_A_CELL, [[_cell(row[n]) for n in _OF_A_CELL] for _, row in table.iterrows()])
    claims = [[claim.name, claim.statement, claim.verdict] for claim in claims_of(table)]
    print_table(["claim", "says", "here"], claims)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return "" if value is None else str(value)


def print_advice(advice: Advice, as_json: bool) -> None:
    """Print a recipe, its expected score and cost, and its command."""
    from slimvlm.runs.advise import advice_rows

    if as_json:
        print_json(asdict(advice))
        return
    _print_grid(advice_rows(advice))
    print(f"\n{advice.command}")


def print_dry_run(found: DryRun, as_json: bool) -> None:
    """Print the plan of a compression and its needs of memory and time."""
    from slimvlm.runs.advise import dry_run_rows

    if as_json:
        values = {name: value for name, value in vars(found).items() if name != "plan"}
        plan = {"ratio": found.plan.ratio, "total_params": found.plan.after.total_params}
        print_json({**values, **plan, "cost": asdict(found.cost)})
        return
    _print_grid(dry_run_rows(found))


def _print_grid(rows: Sequence[Sequence[str]]) -> None:
    """Print names and values without lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)
