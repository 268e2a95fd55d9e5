"""Progress bars on stderr, silent where nobody watches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(items: Sequence[T], description: str) -> Iterable[T]:
    """Go through items with a bar that shows the time left and disappears at the end."""
    console = Console(stderr=True)
    return track(
        items,
        description=description,
        transient=True,
        console=console,
        disable=not console.is_terminal,
    )
