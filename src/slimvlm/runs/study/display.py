"""How far a study is: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table

from slimvlm.core.progress import without_bars
from slimvlm.runs.study.cache import Outcome
from slimvlm.runs.study.estimate import Estimator
from slimvlm.runs.study.schedule import Schedule
from slimvlm.runs.study.stages import KINDS, Stage


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 7 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclass
class Progress:
    """Counts what is done and tells how long the rest takes.

    Attributes:
        schedule: All stages.
        missing: Stages to do.
        estimator: Times by kind.
        console: Where lines go.
        ended: Outcomes so far, by name.
        running: Labels of what is being done.
        busy: Seconds of all work done.
    """

    schedule: Schedule
    missing: Sequence[Stage]
    estimator: Estimator
    console: Console
    ended: dict[str, Outcome] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)
    busy: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def started(self, stage: Stage) -> None:
        """A stage begins, or another worker is at it."""
        self.running = {stage.name: f"{stage.kind} {stage.label}"}

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        """A stage has ended."""
        self.ended[stage.name] = outcome
        self.running.pop(stage.name, None)
        self.busy += outcome.seconds
        if not outcome.error and outcome.seconds:
            flops = self.schedule.flops[stage.name]
            self.estimator.learn(stage.kind, outcome.seconds, flops)
        if not self.console.is_terminal or outcome.error:
            self.console.print(self._line(stage, outcome), highlight=False, soft_wrap=True)

    def seconds_left(self) -> float:
        """Expected wall time of what is left, at as many stages at once as so far."""
        left = [
            (stage.kind, self.schedule.flops[stage.name])
            for stage in self.missing
            if stage.name not in self.ended
        ]
        seconds, _ = self.estimator.total(left)
        elapsed = time.monotonic() - self.start
        return seconds / max(self.busy / elapsed, 1.0) if elapsed else seconds

    def __rich__(self) -> Table:
        left = duration(self.seconds_left())
        elapsed = duration(time.monotonic() - self.start)
        table = Table(title=f"{elapsed} gone, about {left} left", title_justify="left")
        for name in ("stage", "to do", "done", "failed", "now"):
            table.add_column(name, justify="left" if name in ("stage", "now") else "right")
        for kind in KINDS:
            mine = [stage for stage in self.missing if stage.kind == kind]
            ends = [self.ended[s.name] for s in mine if s.name in self.ended]
            bad = sum(bool(outcome.error) for outcome in ends)
            now = [label for label in self.running.values() if label.startswith(kind)]
            counts = (len(mine) - len(ends), len(ends) - bad, bad)
            table.add_row(kind, *map(str, counts), ", ".join(now).removeprefix(f"{kind} "))
        return table

    def _line(self, stage: Stage, outcome: Outcome) -> str:
        position = f"[{len(self.ended)}/{len(self.missing)}] {stage.kind} {stage.label}:"
        if outcome.error:
            return f"{position} failed ({outcome.error})"
        took = duration(outcome.seconds) if outcome.seconds else "done by another worker"
        return f"{position} {took}; about {duration(self.seconds_left())} left"


@contextmanager
def shown(progress: Progress) -> Iterator[Progress]:
    """Inside, a terminal shows the table; elsewhere lines come as stages end."""
    if not progress.console.is_terminal:
        yield progress
        return
    with without_bars(), Live(progress, console=progress.console, refresh_per_second=2):
        yield progress
