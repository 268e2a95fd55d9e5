"""Tables: of cases, in YAML files beside the tests that run them, and of criteria in the docs."""

from pathlib import Path
from typing import Any

import yaml

from slimvlm.scoring.criteria import CRITERIA


def tables(test: str) -> dict[str, Any]:
    """Read the tables of a test module, given its ``__file__``."""
    return yaml.safe_load(Path(test).with_suffix(".yaml").read_text(encoding="utf-8"))


def criteria_table() -> str:
    """Print the table of criteria as Markdown."""
    rows = [
        "| criterion | units | needs data | what it measures | source |",
        "|---|---|---|---|---|",
    ]
    for name, row in CRITERIA.items():
        cells = ", ".join(row.units), "yes" if row.needs_data else "no", row.about, row.paper
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)
