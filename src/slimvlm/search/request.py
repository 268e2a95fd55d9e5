"""What every candidate of a search has in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimvlm.errors import ImpossiblePlanError
from slimvlm.geometry import Anatomy
from slimvlm.plan import Plan
from slimvlm.planning import Budget, make_plan
from slimvlm.search.divergence import Batch
from slimvlm.values import Scores


@dataclass(frozen=True)
class Request:
    """The arguments that every candidate shares."""

    anatomy: Anatomy
    scores: list[Scores]
    ratio: float
    axis: str
    options: Mapping[str, Any]

    @property
    def budget(self) -> Budget:
        """How much to remove and where."""
        return Budget(self.anatomy, self.ratio, self.axis, **self.options)

    @property
    def scored(self) -> dict[str, Scores]:
        """The scores of each kind of unit that may become fewer."""
        if self.axis == "depth":
            return {}
        firsts = {
            unit: next((s for s in self.scores if s.of(unit) is not None), None)
            for unit in self.budget.units
        }
        return {unit: scores for unit, scores in firsts.items() if scores is not None}

    def plan(self, **options: Any) -> Plan:
        """`make_plan` for this request, with further options."""
        return make_plan(
            self.anatomy, self.scores, self.ratio, self.axis, **{**self.options, **options}
        )

    def splits(self) -> list[tuple[str, Plan]]:
        """Equally wide plans, one for each number of KV groups that permits the ratio."""
        plans = []
        counts = self.anatomy.legal_kv_heads() if "kv_group" in self.scored else []
        for kv_heads in counts:
            try:
                plans.append((f"{kv_heads} KV groups", self.plan(kv_heads=kv_heads)))
            except ImpossiblePlanError:
                continue
        return plans or [("uniform", self.plan())]


def fingerprint(request: Request, asked: Mapping[str, Any], batches: Sequence[Batch]) -> str:
    """A short name for everything that a search depends on, but for the model's weights."""
    digest = hashlib.sha256()
    about = [request.anatomy.to_dict(), request.ratio, request.axis, dict(request.options), asked]
    digest.update(json.dumps(about, default=list).encode())
    tensors = [
        values
        for scores in request.scores
        for values in (scores.layer, *(scores.kv_group or ()), *(scores.neuron or ()))
    ]
    tensors += [value for batch in batches for value in batch.values()]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()
