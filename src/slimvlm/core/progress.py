"""How far something is: lines for whoever is told, bars on stderr where somebody watches.

Where nobody does, stderr is a log: it gets a line when a stage begins, one when it ends and at most
one every half minute between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from slimvlm.core.errors import printable
from slimvlm.core.processes import is_first_rank

T = TypeVar("T")
_HIDDEN = ContextVar("hidden", default=False)
_STAGE = ContextVar("stage", default="")

LOG_EVERY = 30.0
"""Seconds between two lines of a log on the same stage, at least."""

Say = Callable[[str], None]
"""Who is told how far something is, in one line."""


def silent(line: str) -> None:
    """Say nothing."""


def to_log(line: str) -> None:
    """Write a line to stderr, unless it is hidden; of several processes the first one does."""
    if is_first_rank() and not _HIDDEN.get():
        print(printable(line), file=sys.stderr, flush=True)


def current_stage() -> str:
    """The name of the stage that runs, or that an error came out of; empty between stages."""
    return _STAGE.get()


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Name the stage that runs inside; the name stays if an error ends it."""
    around = _STAGE.get()
    _STAGE.set(what)
    yield
    _STAGE.set(around)


@contextmanager
def own_stages() -> Iterator[None]:
    """Inside, `current_stage` knows only stages that begin there."""
    token = _STAGE.set("")
    try:
        yield
    finally:
        _STAGE.reset(token)


def is_watched() -> bool:
    """Whether stderr is a terminal, where bars can move."""
    return sys.stderr.isatty()


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 7 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class LoggedStage:
    """A stage in a log: how far it is when it begins, every half minute, and when it ends.

    A stage that is left early has no last line.

    Attributes:
        what: Its name.
        total: How many steps it has.
        done: How many are done.
        say: Receives the lines.
        clock: Seconds from any time on.
    """

    what: str
    total: int
    done: int = 0
    say: Say = to_log
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._first, self._start = self.done, self.clock()
        self._told = self._start
        self._around = _STAGE.get()
        _STAGE.set(self.what)
        self._tell("")

    def reached(self, done: int, more: str = "") -> None:
        """So many steps are done; ``more`` is said behind it."""
        self.done, now = done, self.clock()
        if now - self._told >= LOG_EVERY and self._first < done < self.total:
            self._told = now
            left = (now - self._start) / (done - self._first) * (self.total - done)
            self._tell(f", {duration(left)} left{more}")

    def end(self) -> None:
        """Nothing is left to do."""
        _STAGE.set(self._around)
        self._tell(f" in {duration(self.clock() - self._start)}")

    def _tell(self, more: str) -> None:
        self.say(f"{self.what}: {self.done} of {self.total}{more}")


def progress(
    items: Sequence[T],
    description: str,
    say: Say = to_log,
    clock: Callable[[], float] = time.monotonic,
) -> Iterable[T]:
    """Go through items and show how far that is and how long the rest takes.

    In a terminal this is a bar that disappears at the end, elsewhere a `LoggedStage`.

    Args:
        items: What to go through.
        description: What is done with them, in a word or two.
        say: Receives the lines of a log.
        clock: Seconds, for these lines.
    """
    if not is_watched():
        return _logged(items, description, say, clock)
    return _barred(items, description)


def _barred(items: Sequence[T], what: str) -> Iterator[T]:
    around, console = _STAGE.get(), Console(stderr=True)
    _STAGE.set(what)
    described, hidden = escape(printable(what)), _HIDDEN.get()
    yield from track(items, description=described, transient=True, console=console, disable=hidden)
    _STAGE.set(around)


def _logged(items: Sequence[T], what: str, say: Say, clock: Callable[[], float]) -> Iterator[T]:
    if not items:
        return
    stage = LoggedStage(what, len(items), say=say, clock=clock)
    for done, item in enumerate(items, 1):
        yield item
        stage.reached(done)
    stage.end()


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, `progress` shows nothing: something larger shows how far it is."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)
