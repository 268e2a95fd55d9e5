"""The table in docs/serving.md of what engines said; ``make test-engines`` writes it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from slimvlm.core.files import write_text
from slimvlm.export.engines.compare import ENGINES, Compared

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
AXES = ("as it is", "depth", "width", "both", "tokens")
SAME = "same"
WRITES = "SLIMVLM_WRITE_ENGINE_TABLE"
"""Set by ``make test-engines``; other runs of the tests leave the page alone."""
_LONGEST = 120
_BEGIN, _END = "<!-- written by make test-engines -->\n", "<!-- end -->\n"

Table = dict[tuple[str, str], dict[str, str]]
"""What was said on each axis, by engine with its version, and model."""


def read(page: Path = PAGE) -> Table:
    """The table of the page."""
    text = page.read_text()
    lines = text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)].splitlines()
    assert _cells(lines[0]) == ["engine", "model", *AXES]
    found: Table = {}
    for line in lines[2:]:
        engine, model, *said = _cells(line)
        found[engine, model] = dict(zip(AXES, said, strict=True))
    return found


def record(model: str, compared: Mapping[str, Compared], page: Path = PAGE) -> None:
    """Put what an engine said of a model, by axis, in the place of what stands there.

    Rows of another version of the engine with this model go.
    """
    if WRITES not in os.environ:
        return
    table = read(page)
    for axis, one in compared.items():
        title = ENGINES[one.engine].title
        engine = f"{title} {one.version}"
        older = [key for key in table if key[1] == model and key[0].startswith(f"{title} ")]
        for key in older:
            if key[0] != engine:
                del table[key]
        table.setdefault((engine, model), dict.fromkeys(AXES, ""))[axis] = _cell(one)
    text = page.read_text()
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    write_text(page, text[:begin] + _rendered(table) + text[end:])


def kinds_in(model: str) -> list[str]:
    """The kinds that a row names, between backticks."""
    return re.findall("`([^`]+)`", model)


def _cell(found: Compared) -> str:
    if found.error:
        return found.error[:_LONGEST].replace("|", "/").replace("`", "'")
    return SAME if found.is_same else f"{found.same} of {len(found.found)}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _rendered(table: Table) -> str:
    rows = [["engine", "model", *AXES], ["---"] * (2 + len(AXES))]
    rows += [[*key, *said.values()] for key, said in sorted(table.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
