"""How differently a pruned model answers: a mask in place of a plan, no weight touched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, DataError
from slimvlm.core.files import write_text
from slimvlm.core.requests import digest, require_same_request
from slimvlm.data.roles import IGNORE
from slimvlm.models import losses
from slimvlm.planning.mask import masked
from slimvlm.planning.plan import Plan
from slimvlm.scoring.batches import on_device

Batch = Mapping[str, Any]


class Divergence:
    """Mean KL(original ‖ candidate) over the positions that predict labelled tokens.

    The original's logits there are computed once and kept in the model's data type: positions
    times vocabulary, about 100 kB for a position in bfloat16 with 50,000 tokens.

    Args:
        model: The original; it stays as it is.
        batches: Model inputs with ``labels``; without them the whole text counts.

    Raises:
        DataError: If there is no batch, or no labelled token.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = [on_device(model, batch) for batch in batches]
        self._counted = [_predicts_label(batch) for batch in self._batches]
        if not any(bool(counted.any()) for counted in self._counted):
            raise DataError("no labelled token in the batches to measure on")
        self._original: list[Tensor] = []

    @torch.no_grad()
    def of(self, plan: Plan) -> float:
        """The divergence of what a plan leaves, in nats for each position."""
        self._original = self._original or list(self._logits())
        total, positions = 0.0, 0
        with masked(self._model, plan):
            for original, candidate in zip(self._original, self._logits(), strict=True):
                if len(original):
                    mean = losses.kl(candidate[None], original[None], temperature=1.0)
                    total += float(mean) * len(original)
                    positions += len(original)
        return total / positions

    @torch.no_grad()
    def _logits(self) -> Iterator[Tensor]:
        """Logits of each batch at the counted positions."""
        was_training = self._model.training
        self._model.eval()
        try:
            for batch, counted in zip(self._batches, self._counted, strict=True):
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                yield self._model(**inputs, use_cache=False).logits[counted]
        finally:
            self._model.train(was_training)


def _predicts_label(batch: Batch) -> Tensor:
    """Positions whose next token is labelled and no padding."""
    labels: Tensor = batch["labels"] if "labels" in batch else batch["input_ids"]
    counted = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    counted[:, :-1] = labels[:, 1:] != IGNORE
    if "attention_mask" in batch:
        counted[:, :-1] &= batch["attention_mask"][:, 1:].bool()
    return counted


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
        request: The search.
        known: Divergences by plan, also those of an earlier start.
        trials: What this start has asked for, by plan.
        best: The smallest divergence and its plan.
    """

    divergence: Divergence
    passes: int
    path: Path | None
    request: dict[str, Any]
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
            noted, known = dict(values["request"]), dict(values["divergence"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"state_file {str(self.path)!r}: cannot be read ({error})") from error
        what = f"state_file {str(self.path)!r} is of a search"
        require_same_request(noted, self.request, what, "Delete it or name another")
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
    return digest([[plan.layers, plan.kv_groups, plan.neurons]])[:24]
