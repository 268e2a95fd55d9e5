"""How far something is: lines for whoever is told, bars on stderr where somebody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
_HIDDEN = ContextVar("hidden", default=False)

Say = Callable[[str], None]
"""Who is told how far something is, in one line."""


def silent(line: str) -> None:
    """Say nothing."""


def progress(items: Sequence[T], description: str) -> Iterable[T]:
    """Go through items with a bar that shows the time left and disappears at the end."""
    console = Console(stderr=True)
    return track(
        items,
        description=description,
        transient=True,
        console=console,
        disable=_HIDDEN.get() or not console.is_terminal,
    )


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, `progress` shows nothing: something larger shows how far it is."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)
