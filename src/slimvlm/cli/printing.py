"""How verbs talk: results on stdout, remarks on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from slimvlm.core.processes import is_first_rank

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Where tables go; as wide as a table needs if nobody looks at a terminal."""
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)


def note(line: str) -> None:
    """Say something that is not the result; of several processes the first one says it."""
    if is_first_rank():
        print(line, file=sys.stderr)


def print_json(values: Any) -> None:
    """Print a result for programs."""
    print(json.dumps(values, indent=2))
