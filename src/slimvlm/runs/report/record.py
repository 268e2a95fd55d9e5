"""What a report shows, whether of a run or of a study: `Record`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimvlm.evaluation.compare import Comparison
from slimvlm.planning.plan import Plan
from slimvlm.scoring.unit_scores import Scores


@dataclass(frozen=True)
class Entry:
    """One measured model.

    Attributes:
        name: Of the model in this report.
        axis: Where it was pruned; empty for an original.
        ratio: Share of the backbone that was removed.
        recovery: What was trained, in a few words; ``none``, or empty for an original.
        average: AVG in percent.
        percent: AVG-%, 100 for an original; None if there is none.
        low: Lower end of its 95 % interval.
        high: Upper end.
        total_params: Parameters of the whole model.
        prefill_ms: Time to read a question.
        decode_ms: Time to write a token.
        train: What learned: ``projector``, ``lora``, ``full`` or None.
        loss: From which loss.
        model: The original that it comes from.
        fraction: Share of the training data that was used.
        variant: What else sets it apart from others of its axis, ratio and recovery, but for the
            seed; in a few words.
        link: Id of its row in a table, that marks of charts lead to; empty for none.
        columns: Further columns of the table, by name.
    """

    name: str
    axis: str
    ratio: float
    recovery: str
    average: float
    percent: float | None
    low: float | None
    high: float | None
    total_params: int
    prefill_ms: float
    decode_ms: float
    train: str | None = None
    loss: str = ""
    model: str = ""
    fraction: float = 1.0
    variant: str = ""
    link: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_original(self) -> bool:
        """Whether nothing was removed."""
        return not self.axis

    @property
    def differs(self) -> bool:
        """Whether the interval excludes what the original keeps: all."""
        return self.low is not None and self.high is not None and not self.low <= 100 <= self.high

    @property
    def interval(self) -> str:
        """AVG-% with its interval, as text."""
        if self.percent is None:
            return ""
        bounds = "" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.percent:.1f}{bounds}"


@dataclass(frozen=True)
class Pruning:
    """A plan and the scores that led to it."""

    title: str
    plan: Plan
    scores: Sequence[Scores] = ()


@dataclass(frozen=True)
class Training:
    """Log rows of a recovery: step and losses."""

    title: str
    steps: Sequence[Mapping[str, float]]
    about: str = ""


@dataclass(frozen=True)
class Table:
    """Text cells below a header.

    Attributes:
        caption: What it shows.
        header: Names of the columns.
        rows: Cells; those that end with `slimvlm.runs.tables.MARK` are significant.
        note: What stands beneath, each line by itself.
        folded: Whether it is closed until asked for.
        wraps: Whether cells are words, which break into lines.
        ids: An id for each row, that marks of charts lead to; empty for none.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False
    wraps: bool = False
    ids: Sequence[str] = ()


@dataclass(frozen=True)
class Record:
    """Everything that a report shows.

    Attributes:
        title: Heading.
        lead: A sentence on what was done.
        cards: Figures to read first: label, value, and a line on it.
        command: What made it; empty if not known.
        config: Its options.
        entries: The measured models, originals first.
        prunings: Plans.
        trainings: Recoveries.
        tables: Further tables.
        comparison: The original and one smaller model, answer by answer.
        notes: What a reader should know.
    """

    title: str
    lead: str
    cards: Sequence[tuple[str, str, str]]
    command: str
    config: Mapping[str, Any]
    entries: Sequence[Entry] = ()
    prunings: Sequence[Pruning] = ()
    trainings: Sequence[Training] = ()
    tables: Sequence[Table] = ()
    comparison: Comparison | None = None
    notes: Sequence[str] = ()
