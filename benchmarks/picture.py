"""The picture of the README: the score that stays at each ratio, and that of two baselines.

Command:  .venv/bin/python benchmarks/picture.py
Expect:   seconds. It draws the table under "The walk" in docs/results.md, whose commands stand
          there, into docs/images/kept.png.
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
LINES = {
    "AVG": ("slimvlm", "#0072b2", "o-"),
    "LLM-Pruner: AVG": ("LLM-Pruner's recipe", "#b84a00", "s--"),
    "ShortGPT: AVG": ("ShortGPT's recipe", "#5c5c5c", "^--"),
}


def rows_of(page: str, section: str) -> list[dict[str, str]]:
    """Read the first table of a section."""
    lines = page[page.index(f"\n### {section}\n") :].splitlines()
    table = [line for line in lines if line.startswith("|")]
    (head, _), body = table[:2], table[2:6]
    names, *values = ([cell.strip() for cell in row.split("|")[1:-1]] for row in (head, *body))
    return [dict(zip(names, row, strict=True)) for row in values]


def main() -> None:
    """Draw the picture."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    rows = rows_of(page, "The walk")
    unpruned = re.search(r"unpruned AVG ([\d.]+)", page[page.index("### The walk") :])
    assert unpruned is not None
    whole = float(unpruned[1])
    figure = Figure(figsize=(7.2, 3.3), dpi=150, layout="constrained")
    axes = figure.subplots()
    for column, (name, colour, style) in LINES.items():
        found = [(row["ratio"], row[column]) for row in rows if row[column]]
        shares = [0.0, *(float(ratio.rstrip("%")) for ratio, _ in found)]
        scores = [whole, *(float(score.split()[0]) for _, score in found)]
        axes.plot(shares, scores, style, color=colour, label=name)
        if column == "AVG":
            for share, score in zip(shares, scores, strict=True):
                axes.annotate(
                    f"{score:g}", (share, score), (0, 7), textcoords="offset points", ha="center"
                )
    axes.set(
        xlabel="removed share of the language backbone (%)",
        ylabel="mean score of 8 tasks (%)",
        title="Demo model, not trained after pruning",
        ylim=(0, 108),
        xticks=[0, 15, 30, 45, 60],
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.3))
    figure.savefig(DOCS / "images" / "kept.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
