"""What a search has measured, in memory and in its state file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from slimvlm.errors import ConfigError
from slimvlm.outputs import write_text
from slimvlm.plan import Plan
from slimvlm.search.divergence import Divergence


@dataclass(frozen=True)
class Trial:
    """One candidate that was measured.

    Attributes:
        name: Where it came from.
        ratio: Its achieved ratio.
        divergence: Its `Divergence`, in nats for each position.
    """

    name: str
    ratio: float
    divergence: float


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        plan: The plan with the smallest divergence.
        divergence: That divergence.
        trials: Everything that was measured, in order.
    """

    plan: Plan
    divergence: float
    trials: tuple[Trial, ...]


@dataclass
class Log:
    """What was measured, in memory and in the state file.

    A search is a function of the divergences that it reads here. So a second start walks the same
    way, takes what the first one measured from the file, and goes on.

    Attributes:
        divergence: Measures a plan.
        passes: How many plans may be measured.
        path: The state file, if any.
        request: Fingerprint of the search.
        known: Divergences by plan, also those of an earlier start.
        trials: What this start has asked for, by plan.
        best: The smallest divergence and its plan.
    """

    divergence: Divergence
    passes: int
    path: Path | None
    request: str
    known: dict[str, float] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    best: tuple[float, Plan] | None = None

    def load(self) -> None:
        """Read the state file, if there is one.

        Raises:
            ConfigError: If it cannot be read or is of another search.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            values = json.loads(self.path.read_text())
            request, known = values["request"], dict(values["divergence"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"state_file {str(self.path)!r}: cannot be read ({error})") from error
        if request != self.request:
            raise ConfigError(
                f"state_file {str(self.path)!r} is of another search. Delete it or name another"
            )
        self.known = known

    @property
    def is_full(self) -> bool:
        """Whether the passes are used up."""
        return len(self.trials) >= self.passes

    def has(self, plan: Plan) -> bool:
        """Whether a plan was measured."""
        return _key(plan) in self.trials

    def measure(self, name: str, plan: Plan) -> float:
        """The divergence of a plan, which becomes the result if it is the smallest so far."""
        key = _key(plan)
        if key not in self.known:
            self.known[key] = self.divergence.of(plan)
            if self.path is not None:
                state = {"request": self.request, "divergence": self.known}
                write_text(self.path, json.dumps(state) + "\n")
        value = self.known[key]
        self.trials.setdefault(key, Trial(name, plan.ratio, value))
        if self.best is None or value < self.best[0]:
            self.best = value, plan
        return value

    def found(self) -> Found:
        """The result so far."""
        assert self.best is not None
        return Found(self.best[1], self.best[0], tuple(self.trials.values()))


def _key(plan: Plan) -> str:
    kept = json.dumps([plan.layers, plan.kv_groups, plan.neurons])
    return hashlib.sha256(kept.encode()).hexdigest()[:24]
