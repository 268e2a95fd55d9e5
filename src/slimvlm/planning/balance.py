"""KV groups against neurons: the split of a ratio that changes the model's answers least.

Candidates are compared by the divergence from the original's next-token distributions at answer
positions, measured under a mask: no weight is touched, nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.core.errors import DataError, ImpossiblePlanError
from slimvlm.core.progress import progress
from slimvlm.data.roles import predicts_label
from slimvlm.models import losses
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.hidden import evaluating, head_of, hidden_states
from slimvlm.planning.make import make_plan
from slimvlm.planning.mask import masked
from slimvlm.planning.plan import Plan
from slimvlm.scoring.batches import Batch, labels_of, on_device, without_labels
from slimvlm.scoring.unit_scores import WIDTH_UNITS, Scores

_FIRST_TRIALS = 8
"""Where more numbers of KV groups are legal, so many come first, and then those near the best."""


@dataclass(frozen=True)
class Trial:
    """One plan that was measured.

    Attributes:
        name: How many KV groups its layers keep.
        ratio: Its achieved ratio.
        divergence: Its `PlanDivergence`, in nats for each position.
    """

    name: str
    ratio: float
    divergence: float


@dataclass(frozen=True)
class Balance:
    """What was measured.

    Attributes:
        plan: The plan with the smallest divergence.
        divergence: That divergence.
        trials: Everything that was measured, in order.
    """

    plan: Plan
    divergence: float
    trials: tuple[Trial, ...]


def balanced_plan(
    model: PreTrainedModel,
    scores: Scores | Sequence[Scores],
    batches: Sequence[Batch],
    ratio: float,
    axis: str = "width",
    **options: Any,
) -> Balance:
    """Find the equally wide plan whose model answers most like the original.

    Scores say which units of a layer stay. Every legal number of KV groups is a candidate; neurons,
    equally many in each layer, give the rest of the ratio.

    Args:
        model: The original; its weights are never changed.
        scores: As for `make_plan`.
        batches: Model inputs with ``labels``, best not those that the scores come from. Every
            candidate reads all of them.
        ratio: As for `make_plan`; every candidate meets it.
        axis: ``width`` or ``both``; along ``depth`` there is one candidate.
        **options: ``protect``, ``round_to``, ``depth_share`` and ``units`` of `make_plan`.

    Raises:
        ConfigError: If an argument is out of range.
        ImpossiblePlanError: If no legal shape comes near the ratio.
        DataError: If the batches have no labelled token.
    """
    given = [scores] if isinstance(scores, Scores) else list(scores)
    candidates = _candidates(read_anatomy(model), given, ratio, axis, options)
    divergence = PlanDivergence(model, batches)
    trials: dict[int, Trial] = {}
    last, stride = len(candidates) - 1, 1
    while len(candidates) / stride > _FIRST_TRIALS:
        stride *= 2
    wanted = [*range(0, last, stride), last]
    while wanted:
        for index in progress(wanted, "KV groups against neurons"):
            name, plan = candidates[index]
            trials[index] = Trial(name, plan.ratio, divergence.of(plan))
        best = min(trials, key=lambda index: trials[index].divergence)
        stride //= 2
        near = (best - stride, best + stride) if stride else ()
        wanted = [index for index in near if 0 <= index <= last and index not in trials]
    return Balance(candidates[best][1], trials[best].divergence, tuple(trials.values()))


def _candidates(
    anatomy: Anatomy, scores: list[Scores], ratio: float, axis: str, options: dict[str, Any]
) -> list[tuple[str, Plan]]:
    """Equally wide plans, one for each number of KV groups that permits the ratio."""
    units = options.get("units", WIDTH_UNITS)
    is_free = axis != "depth" and "kv_group" in units
    has_scores = any(given.of("kv_group") is not None for given in scores)
    plans = []
    for kv_heads in anatomy.legal_kv_heads() if is_free and has_scores else ():
        try:
            plan = make_plan(anatomy, scores, ratio, axis, kv_heads=kv_heads, **options)
        except ImpossiblePlanError:
            continue
        plans.append((f"{kv_heads} KV groups", plan))
    return plans or [("uniform", make_plan(anatomy, scores, ratio, axis, **options))]


class PlanDivergence:
    """Mean KL(original ‖ candidate) over the positions that predict labelled tokens.

    The original's final hidden states there are computed once and kept. The head runs over them
    and over the candidate's, a chunk at a time.

    Args:
        model: The original; it stays as it is.
        batches: Model inputs with ``labels``; without them the whole text counts.

    Raises:
        DataError: If there is no batch, or no labelled token.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = [on_device(model, batch) for batch in batches]
        self._counted = [predicts_label(labels_of(batch)) for batch in self._batches]
        if not any(bool(counted.any()) for counted in self._counted):
            raise DataError("no labelled token in the batches to measure on")
        self._original: list[Tensor] = []

    @torch.no_grad()
    def of(self, plan: Plan) -> float:
        """The divergence of what a plan leaves, in nats for each position."""
        self._original = self._original or list(self._hidden())
        head, total, positions = head_of(self._model), 0.0, 0
        with masked(self._model, plan):
            for original, candidate in zip(self._original, self._hidden(), strict=True):
                found = losses.row_divergences(candidate, original, head, head)
                total += float(found.sum(dtype=torch.float64))
                positions += len(original)
        return total / positions

    @torch.no_grad()
    def _hidden(self) -> Iterator[Tensor]:
        """Final hidden states of each batch at the counted positions."""
        with evaluating(self._model):
            for batch, counted in zip(self._batches, self._counted, strict=True):
                (hidden,) = hidden_states(self._model, without_labels(batch))
                yield hidden[counted.to(hidden.device)]
