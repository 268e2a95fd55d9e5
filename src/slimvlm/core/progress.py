"""Show progress: bars in a terminal, lines in a log when a stage ends and every half minute."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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


@contextmanager
def _logged(what: str, total: int, done: float) -> Iterator[Callable[..., None]]:
    """Log a stage: a line every half minute, and one when it ends; none if it is left early."""
    first, start = done, time.monotonic()
    told = start

    def reached(number: float, more: str = "") -> None:
        nonlocal done, told
        done, now = number, time.monotonic()
        if now - told >= LOG_EVERY and first < done < total:
            told = now
            left = (now - start) / (done - first) * (total - done)
            to_log(f"{what}: {int(done)} of {total}, {duration(left)} left{more}")

    yield reached
    to_log(f"{what}: {int(done)} of {total} in {duration(time.monotonic() - start)}")


@contextmanager
def steps(what: str, total: int, done: float = 0) -> Iterator[Callable[..., None]]:
    """Show progress from the steps done, a part of one as a fraction; yield what to tell it to.

    It takes how many steps are done, and what ends a line, if one is due.
    """
    if not sys.stderr.isatty():  # bars move on terminals only
        with stage(what), _logged(what, total, done) as reached:
            yield reached
        return
    console = Console(stderr=True)
    hidden, shown = _HIDDEN.get() or not is_first_rank(), escape(printable(what))
    plain: Any = dict.fromkeys(("redirect_stdout", "redirect_stderr"), False)  # for forks
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
