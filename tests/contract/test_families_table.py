"""Check the table of the battery in docs/families.md; ``--update-golden`` rewrites it."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimvlm.models.anatomy import Anatomy
from slimvlm.models.load import anatomy
from slimvlm.runs.tables import as_markdown
from tests import tiny
from tests.contract.test_families import FAMILIES, has_experts

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
HEADER = (
    "battery",
    "model",
    "backbone",
    "layers",
    "KV groups",
    "neurons",
    "uneven",
    "reload",
    "input",
)


def table() -> str:
    return as_markdown(HEADER, [row(name, anatomy(tiny.CONFIGS[name]())) for name in FAMILIES])


def row(name: str, shape: Anatomy) -> list[str]:
    """Describe the units of the tiny model that can be removed."""
    sees = shape.family.vision is not None and shape.model_type not in tiny.TEXT_ONLY
    pinned = ", ".join(map(str, shape.pinned_layers))
    return [
        name,
        f"`{shape.model_type}`",
        f"`{shape.text_type}`",
        f"all but {pinned} of {shape.num_layers}" if pinned else "any",
        _groups(shape),
        _neurons(shape),
        "yes" if shape.backbone.can_be_uneven else "no",
        "1e-5" if has_experts(shape) else "bit-equal",
        "picture and text" if sees else "text",
    ]


def _groups(shape: Anatomy) -> str:
    legal = shape.legal_kv_heads()
    if not legal:
        return "none"
    if len(legal) == 1:
        return "fixed"
    as_other = " (as Mistral)" if shape.retypable else ""
    is_any = legal == list(range(1, legal[-1] + 1))
    return ("any" if is_any else "of 4: " + ", ".join(map(str, legal))) + as_other


def _neurons(shape: Anatomy) -> str:
    if not shape.mlp_widths:
        return "none"
    if shape.fixed_neurons is not None:
        return "fixed"
    multiple = shape.backbone.neuron_multiple
    return "any" if multiple == 1 else f"multiples of {multiple}"


def test_the_page_has_the_table_of_the_battery(pytestconfig: pytest.Config) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    if pytestconfig.getoption("--update-golden"):
        PAGE.write_text(before + BEGIN + table() + END + after)
    else:
        assert written == table(), "run pytest with --update-golden and look at the difference"
