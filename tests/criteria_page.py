"""The table of criteria in the documents."""

from slimvlm.scoring.criteria import CRITERIA


def criteria_table() -> str:
    """Print the table of criteria as Markdown."""
    rows = [
        "| criterion | units | needs data | what it measures | source |",
        "|---|---|---|---|---|",
    ]
    for name, row in CRITERIA.items():
        needs = "yes" if row.needs_data else "no"
        units = ", ".join(row.units)
        rows.append(f"| `{name}` | {units} | {needs} | {row.about} | {row.paper} |")
    return "\n".join(rows)
