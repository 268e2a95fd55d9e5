"""Progress of a study and estimates of its time: in advance, as a live table, as plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimvlm.core.errors import printable
from slimvlm.core.progress import duration
from slimvlm.models.load import device_named
from slimvlm.runs.cost import speed_of
from slimvlm.runs.study.cache import Cache, Outcome, Stage
from slimvlm.runs.study.schedule import STAGE_KINDS

Basis = Literal["measured", "rough"]


class Clock:
    """Estimated seconds of stages, by done ones of their kind, else by their FLOP."""

    def __init__(self, flops: Mapping[str, float], cache: Cache) -> None:
        self.flops = flops  # estimated, by stage name
        self.done = dict.fromkeys(STAGE_KINDS, (0.0, 0.0))  # seconds and FLOP of done stages
        for kind in STAGE_KINDS:
            for record in cache.records(kind):
                self.learn(kind, record["seconds"], record["flops"])

    def learn(self, kind: str, seconds: float, flops: float) -> None:
        """Count a stage that was done."""
        before = self.done[kind]
        self.done[kind] = before[0] + seconds, before[1] + flops

    def basis(self, kind: str) -> Basis:
        """Return whether expected seconds of a kind are measured or rough."""
        return "measured" if self.done[kind][1] else "rough"

    def expected(self, stages: Iterable[Stage]) -> float:
        """Estimate the seconds of stages, one after another."""
        total = 0.0
        for stage in stages:
            flops, (seconds, done) = self.flops[stage.name], self.done[stage.kind]
            if done:
                total += flops * seconds / done
            else:
                total += flops / speed_of(device_named(stage.request.prune.device), "bfloat16")[0]
        return total


@dataclass(frozen=True)
class Forecast:
    """Stages that a start would do, and their time."""

    cells: Mapping[str, tuple[str, ...]]  # open stages by label of the cell
    stages: Mapping[str, tuple[int, int]]  # numbers of open and done stages by kind
    seconds: float  # of open stages, one after another
    basis: Mapping[str, Basis]  # of each kind: measured if the cache has such stages, else rough


@dataclass
class Progress:
    """Counter of done stages, with an estimate of the remaining time.

    A terminal shows a table; elsewhere lines are printed as stages begin and end.
    """

    missing: Sequence[Stage]
    clock: Clock
    console: Console
    measured: Callable[[], object]  # called after each evaluation
    ended: dict[str, Outcome] = field(default_factory=dict)
    now: Stage | None = None
    announced: set[str] = field(default_factory=set)
    busy: float = 0.0  # seconds of all work done
    start: float = field(default_factory=time.monotonic)

    def started(self, stage: Stage) -> None:
        """Note that a stage begins, or that another worker is doing it."""
        self.now = stage
        if not self.console.is_terminal and stage.name not in self.announced:
            self._print(stage, len(self.ended) + 1)
        self.announced.add(stage.name)

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        """Note that a stage has ended."""
        self.ended[stage.name] = outcome
        self.now = None
        self.busy += outcome.seconds
        if outcome.error:
            self._print(stage, len(self.ended), f": failed ({outcome.error})")
        elif outcome.seconds:
            self.clock.learn(stage.kind, outcome.seconds, self.clock.flops[stage.name])
        if not outcome.error and not self.console.is_terminal:
            took = duration(outcome.seconds) if outcome.seconds else "done by another worker"
            left = duration(self.seconds_left())
            self._print(stage, len(self.ended), f": {took}; about {left} left")
        if stage.kind == "evaluate":
            self.measured()

    def seconds_left(self) -> float:
        """Estimate the wall time of the rest, at as many stages at once as so far."""
        left = [stage for stage in self.missing if stage.name not in self.ended]
        seconds = self.clock.expected(left)
        elapsed = time.monotonic() - self.start
        return seconds / max(self.busy / elapsed, 1.0) if elapsed else seconds

    def __rich__(self) -> Table:
        left = duration(self.seconds_left())
        elapsed = duration(time.monotonic() - self.start)
        table = Table(title=f"{elapsed} gone, about {left} left", title_justify="left")
        for name in ("stage", "to do", "done", "failed", "now"):
            table.add_column(name, justify="left" if name in ("stage", "now") else "right")
        for kind in STAGE_KINDS:
            mine = [stage for stage in self.missing if stage.kind == kind]
            ends = [self.ended[s.name] for s in mine if s.name in self.ended]
            bad = sum(bool(outcome.error) for outcome in ends)
            counts = (len(mine) - len(ends), len(ends) - bad, bad)
            now = self.now.label if self.now is not None and self.now.kind == kind else ""
            table.add_row(kind, *map(str, counts), Text(printable(now)))
        return table

    def _print(self, stage: Stage, number: int, end: str = "") -> None:
        line = f"[{number}/{len(self.missing)}] {stage.kind} {stage.label}{end}"
        self.console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
