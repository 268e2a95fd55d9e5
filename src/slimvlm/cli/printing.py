"""Print results on stdout, as a table or as JSON, and remarks on stderr."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from slimvlm.core.errors import printable
from slimvlm.core.progress import to_log

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and rows
_OF_KINDS = ("chosen_percent", "free_percent")  # where such answers were asked for
_OF_A_CELL = (
    *("model", "axis", "ratio", "recovery", "fraction"),
    *("seed", "avg", "avg_percent", *_OF_KINDS, "status"),
)


def print_json(values: Any) -> None:
    """Print a result as JSON."""
    print(json.dumps(values, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a result as a table, without a header as names and values without lines."""
    from rich.console import Console

    from slimvlm.runs.tables import as_table

    table, terminal = as_table(header, rows, title=title), Console()
    longest = Console(width=10**6).measure(table).minimum  # of the words of all columns
    width = max(terminal.width if terminal.is_terminal else 120, longest)  # no digit is cut
    Console(width=width).print(table)


def show(
    as_json: bool,
    values: Callable[[], Any],
    rows: Callable[[], Table],
    title: str = "",
    notes: Iterable[str] = (),
) -> None:
    """Print plain values as JSON, or a table with its notes on stderr; only one is computed."""
    if as_json:
        print_json(values())
        return
    print_table(*rows(), title=title)
    for line in notes:
        to_log(line)


def print_results(results: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Print results on tasks by model; no table if no task was asked."""
    from slimvlm.evaluation.results import guessed
    from slimvlm.runs.tables import result_json, result_rows

    known = guessed(next(iter(results.values()))) if len(results) > 1 else {}
    told = "the original is not clearly above guessing, yet it counts in AVG-%"
    notes = [f"{name}: {told} ({scores})" for name, scores in known.items()]
    if results or as_json:
        show(as_json, lambda: result_json(results), lambda: result_rows(results), title, notes)


def print_held_out(results: Mapping[str, Any]) -> None:
    """Print results on held-out samples by model; nothing if nothing was measured."""
    from slimvlm.runs.tables import held_out_notes, held_out_rows

    if results:
        print_table(*held_out_rows(results), title="what was kept on unseen samples")
        for line in held_out_notes(results):
            print(printable(line))


def print_study(table: Any, as_json: bool) -> None:
    """Print the cells of a study and the verdicts on the claims."""
    from slimvlm_tools.claims import claims_of

    claims = claims_of(table)
    if as_json:
        rows = json.loads(table.to_json(orient="records"))
        print_json({"rows": rows, "claims": [asdict(claim) for claim in claims]})
        return
    names = [n for n in _OF_A_CELL if n not in _OF_KINDS or table[n].notna().any()]
    absent = table[names].isna()
    cells = (
        table[names].astype(object).map(lambda v: f"{v:.4g}" if isinstance(v, float) else str(v))
    )
    print_table(names, cells.mask(absent, "").to_numpy().tolist())
    verdicts = [[claim.name, claim.statement, claim.verdict] for claim in claims]
    print_table(["claim", "says", "here"], verdicts)
