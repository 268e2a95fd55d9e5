"""What recovers a pruned model: which loss, what trains, how much data. T4 to T10, demo model.

Command:  .venv/bin/python benchmarks/recovery.py --out runs/recovery-study
Expect:   what the study's file says; a stopped run goes on, and several may work on one folder.

Runs a study and prints its answers with the spread over seeds: AVG-% and log perplexity of every
kind of cell, then what the table says on the claims of arXiv:2507.20749. The study's own page of
results is one command further, ``slimvlm report runs/recovery-study``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from retention import spread
from slimvlm.runs.study import run_study
from slimvlm.runs.tables import as_markdown
from slimvlm_tools.claims import claims_of, claims_text

STUDY = Path(__file__).parent.parent / "studies" / "recovery.yaml"
FIGURES = [
    ("AVG-%", "avg_percent", "{:.1f}"),
    ("Log perplexity", "log_perplexity", "{:.2f}"),
]
KINDS = ["axis", "repair", "options", "recovery", "fraction"]


def rows_of(
    cells: pd.DataFrame, ratios: list[float], figure: str, pattern: str
) -> Iterator[list[str]]:
    """A row for each kind of cell, a column for each ratio."""
    for kind, alike in cells.groupby(KINDS, sort=False):
        row = [str(value) for value in kind[:-1]] + [f"{kind[-1]:.0%}"]
        for ratio in ratios:
            found = alike[alike["ratio"] == ratio][figure]
            row.append(spread(found, pattern) if len(found) else "")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=STUDY)
    parser.add_argument("--out", type=Path, default=Path("runs/recovery-study"))
    options = parser.parse_args()
    table = run_study(options.study, options.out)
    table["log_perplexity"] = table["perplexity"].map(math.log, na_action="ignore")
    original = table[table["axis"] == "original"].iloc[0]
    cells = table[(table["axis"] != "original") & (table["status"] == "done")]
    ratios = sorted(cells["ratio"].unique())
    header = [*KINDS, *(f"{ratio:.0%}" for ratio in ratios)]
    print(f"Unpruned: AVG {original['avg']:.1f}, log perplexity {original['log_perplexity']:.2f}.")
    for title, figure, pattern in FIGURES:
        print(f"\n{title}, mean ± 95 % t-interval over seeds.\n")
        print(as_markdown(header, list(rows_of(cells, ratios, figure, pattern))))
    print(claims_text(claims_of(table)))


if __name__ == "__main__":
    main()
