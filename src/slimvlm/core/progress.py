"""Show progress: bars in a terminal, lines in a log when a stage ends and every half minute."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from slimvlm.core.errors import ConfigError, printable


def num_ranks() -> int:
    """Count all processes, on all machines; 1 without ``torchrun``."""
    return _number("WORLD_SIZE", 1)


def is_first_rank() -> bool:
    """Whether this process writes and prints; the others compute the same and stay silent."""
    return num_ranks() == 1 or _number("RANK", 0) == 0


def local_rank() -> int:
    """Return the rank of this process on its machine, which is the index of its GPU."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"environment variable {name} {text[:100]!r} must be a number")
    return int(text)


T = TypeVar("T")
_HIDDEN = ContextVar("hidden", default=False)
_STAGE = ContextVar("stage", default="")

LOG_EVERY = 30.0  # seconds between two lines of a log on the same stage, at least
Say = Callable[[str], None]  # receives one line for a person


def silent(line: str) -> None:
    """Say nothing."""


def to_log(line: str) -> None:
    """Write a line to stderr, unless it is hidden; of several processes the first one does."""
    if is_first_rank() and not _HIDDEN.get():
        print(printable(line), file=sys.stderr, flush=True)


def current_stage() -> str:
    """Return the name of the stage that runs or that raised the error; empty between stages."""
    return _STAGE.get()


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Name the stage that runs inside; the name stays if an error ends it."""
    around = _STAGE.get()
    _STAGE.set(what)
    yield
    _STAGE.set(around)


def duration(seconds: float) -> str:
    """Format seconds: 42 s, 7 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class LoggedStage:
    """Log a stage: a line every half minute, and one when it ends; none if it is left early."""

    what: str
    total: int
    done: float = 0  # steps; a part of one counts as a fraction

    def __post_init__(self) -> None:
        self._first, self._start = self.done, time.monotonic()
        self._told = self._start
        self._around = _STAGE.get()
        _STAGE.set(self.what)

    def reached(self, done: float, more: str = "") -> None:
        """Note how many steps are done; ``more`` ends the line, if one is due."""
        self.done, now = done, time.monotonic()
        if now - self._told >= LOG_EVERY and self._first < done < self.total:
            self._told = now
            left = (now - self._start) / (done - self._first) * (self.total - done)
            to_log(f"{self.what}: {int(done)} of {self.total}, {duration(left)} left{more}")

    def end(self) -> None:
        """Write the last line."""
        _STAGE.set(self._around)
        took = duration(time.monotonic() - self._start)
        to_log(f"{self.what}: {int(self.done)} of {self.total} in {took}")


@contextmanager
def steps(what: str, total: int, done: float = 0) -> Iterator[Callable[..., None]]:
    """Show progress as a bar or a `LoggedStage` from the steps done; yield its ``reached``."""
    if not sys.stderr.isatty():  # bars move on terminals only
        logged = LoggedStage(what, total, done)
        yield logged.reached
        logged.end()
        return
    console = Console(stderr=True)
    hidden, shown = _HIDDEN.get() or not is_first_rank(), escape(printable(what))
    plain: Any = {
        "redirect_stdout": False,
        "redirect_stderr": False,
    }  # of processes that are forked
    with stage(what), Progress(console=console, transient=True, disable=hidden, **plain) as bar:
        task = bar.add_task(shown, total=total)
        yield lambda done, more="": bar.update(task, completed=done, description=shown + more)


def progress(
    items: Sequence[T], description: str, reached: Callable[[float], None] | None = None
) -> Iterator[T]:
    """Yield items and show progress; a part of a larger stage reports its share to ``reached``."""
    if not items:
        return
    shown: Any = steps(description, len(items)) if reached is None else stage(description)
    with shown as show:
        for done, item in enumerate(items, 1):
            yield item
            show(done) if reached is None else reached(done / len(items))


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide `progress` inside the block: a larger stage shows the progress."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)
