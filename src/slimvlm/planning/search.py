"""Search for the plan that changes the model's answers least: model + scores → `Plan`.

Candidates are compared by the divergence from the original's next-token distributions at answer
positions, measured under a mask: no weight is touched, nothing is trained.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimvlm.core.errors import ConfigError, ImpossiblePlanError
from slimvlm.core.progress import progress
from slimvlm.core.requests import digest
from slimvlm.models.anatomy import Anatomy, read_anatomy
from slimvlm.models.load import digest_of_tensors
from slimvlm.planning.budget import Budget
from slimvlm.planning.divergence import Batch, Divergence, Found, Log
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.planning.ranking import can_be_written
from slimvlm.planning.widths import with_widths
from slimvlm.scoring.unit_scores import WIDTH_UNITS, Scores

LEVELS = ("uniform", "layer")


def search_plan(
    model: PreTrainedModel,
    scores: Scores | Sequence[Scores],
    batches: Sequence[Batch],
    ratio: float,
    axis: str = "width",
    *,
    level: str = "uniform",
    passes: int = 200,
    seed: int = 0,
    state_file: str | Path | None = None,
    **options: Any,
) -> Found:
    """Find the plan whose model answers most like the original.

    Scores say which units of a layer stay; the search says how many.

    Args:
        model: The original; its weights are never changed.
        scores: As for `make_plan`.
        batches: Model inputs with ``labels``, best not those that the scores come from. Every
            candidate reads all of them.
        ratio: As for `make_plan`; every candidate meets it.
        axis: ``depth``, ``width`` or ``both``.
        level: ``uniform`` tries every number of KV groups and lets neurons, equally many in each
            layer, give the rest: a few candidates. ``layer`` starts from the best of these and of
            the rankings of all layers; then it moves neurons and KV groups between layers and
            swaps layers, and keeps what helps.
        passes: How many candidates are measured at most; each is one pass over the batches.
        seed: Seed of the moves. The same seed and inputs give the same plan.
        state_file: JSON file that keeps what was measured. A search that was stopped goes on from
            it and ends as it would have without the stop.
        **options: ``protect``, ``round_to``, ``depth_share`` and ``units`` of `make_plan`.

    Raises:
        ConfigError: If an argument is out of range, or the state file is of another search.
        ImpossiblePlanError: If no legal shape comes near the ratio.
        DataError: If the batches have no labelled token.
    """
    if level not in LEVELS:
        raise ConfigError(f"level {level!r} must be one of: {', '.join(LEVELS)}")
    if passes < 1:
        raise ConfigError(f"passes {passes} must be at least 1")
    unknown = set(options) - {"protect", "round_to", "depth_share", "units"}
    if unknown:
        raise ConfigError(f"a search has no option {unknown.pop()!r}; it chooses the widths itself")
    anatomy = read_anatomy(model)
    given = [scores] if isinstance(scores, Scores) else list(scores)
    request = Request(anatomy, given, ratio, axis, options)
    splits = request.splits()
    log = Log(
        divergence=Divergence(model, batches),
        passes=passes,
        path=None if state_file is None else Path(state_file),
        request={**request.noted(batches), "level": level, "seed": seed},
    )
    log.load()
    _measure_splits(log, splits)
    if level == "layer":
        _measure_rankings(log, request)
        _climb(log, request, random.Random(seed))
    return log.found()


def _measure_splits(log: Log, splits: list[tuple[str, Plan]]) -> None:
    """Find the best number of KV groups: coarsely first if there are many, then around the best."""
    stride = 1
    while len(splits) / stride > 8:
        stride *= 2
    last = len(splits) - 1
    values: dict[int, float] = {}
    wanted = [*range(0, last, stride), last]
    while wanted and not log.is_full:
        for index in progress(wanted, "search KV groups"):
            if not log.is_full:
                values[index] = log.measure(*splits[index])
        best = min(values, key=lambda index: values[index])
        stride //= 2
        near = (best - stride, best + stride) if stride else ()
        wanted = [index for index in near if 0 <= index <= last and index not in values]


def _measure_rankings(log: Log, request: Request) -> None:
    """Measure the plans of the ranking of all layers, with all kinds of unit and neurons only."""
    kinds = {"global": request.budget.units}
    if set(request.scored) == set(WIDTH_UNITS):
        kinds["global, neurons only"] = ("neuron",)
    for name, units in kinds.items():
        if not request.scored or log.is_full:
            return
        try:
            plan = request.plan(allocation="global", units=units)
        except ImpossiblePlanError:  # where only equal widths come near the ratio
            continue
        log.measure(name, plan)


def _climb(log: Log, request: Request, rng: random.Random) -> None:
    """Propose changes of the best plan until the passes are used up."""
    moves = Moves(request, rng)
    for number in progress(range(log.passes - len(log.trials)), "search layers"):
        assert log.best is not None
        for _ in range(100):
            plan = moves.changed(log.best[1])
            if plan is not None and not log.has(plan):
                log.measure(f"move {number + 1}", plan)
                break
        else:
            return


class Moves:
    """Random changes of a plan; neurons, where they may change, make up for other differences."""

    def __init__(self, request: Request, rng: random.Random) -> None:
        self._request, self._rng = request, rng
        self._budget, self._scored = request.budget, request.scored
        self._kinds = [
            *(["neurons", "neurons"] if "neuron" in self._scored else []),
            *(["groups"] if "kv_group" in self._scored else []),
            *(["layers"] if request.axis != "width" else []),
        ]

    def changed(self, plan: Plan) -> Plan | None:
        """A neighbour of a plan, or None if the move that was drawn is not possible."""
        kind = self._rng.choice(self._kinds)
        widths = {i: (len(plan.kv_groups[i]), len(plan.neurons[i])) for i in plan.layers}
        moved = {
            "neurons": self._move_neurons,
            "groups": self._move_groups,
            "layers": self._swap_layers,
        }[kind](widths)
        if not moved or ("neuron" in self._scored and not self._balance(widths)):
            return None
        candidate = _reshaped(plan, self._scored, widths)
        is_equally_large = "neuron" in self._scored or candidate.ratio == plan.ratio
        return candidate if is_equally_large and can_be_written(candidate, widths) else None

    def _open(self, widths: Mapping[int, Any]) -> list[int]:
        return [i for i in widths if self._budget.is_open(i)]

    def _move_neurons(self, widths: dict[int, tuple[int, int]]) -> bool:
        """From one layer to another, by a power of two of multiples."""
        layers = self._open(widths)
        if len(layers) < 2:
            return False
        giver, taker = self._rng.sample(layers, 2)
        most = max(self._request.anatomy.layers[giver].intermediate_size // 8, 1)
        sizes = [1 << k for k in range(max(most // self._budget.multiple, 1).bit_length())]
        size = self._rng.choice(sizes)
        for _ in range(size):
            if not (self._step(widths, giver, -1) and self._step(widths, taker, 1)):
                return False
        return True

    def _move_groups(self, widths: dict[int, tuple[int, int]]) -> bool:
        """A KV group from one layer to another, or against neurons."""
        layers = self._open(widths)
        if not layers:
            return False
        takes = "neuron" in self._scored and self._rng.random() < 0.5
        changes = (self._rng.choice((-1, 1)),) if takes or len(layers) < 2 else (-1, 1)
        for index, change in zip(self._rng.sample(layers, len(changes)), changes, strict=True):
            groups, neurons = widths[index]
            if not 1 <= groups + change <= self._request.anatomy.layers[index].num_kv_heads:
                return False
            widths[index] = groups + change, neurons
        return True

    def _swap_layers(self, widths: dict[int, tuple[int, int]]) -> bool:
        """A removed layer comes back for a kept one and takes over its widths."""
        removable = self._budget.removable_layers
        gone = [i for i in removable if i not in widths]
        kept = [i for i in removable if i in widths]
        shapes = self._request.anatomy.layers
        if not gone or not kept:
            return False
        back, out = self._rng.choice(gone), self._rng.choice(kept)
        if shapes[back] != shapes[out]:
            return False
        widths[back] = widths.pop(out)
        return True

    def _step(self, widths: dict[int, tuple[int, int]], index: int, change: int) -> bool:
        """One multiple of neurons more or fewer in a layer, if it has them."""
        multiple, full = (
            self._budget.multiple,
            self._request.anatomy.layers[index].intermediate_size,
        )
        groups, neurons = widths[index]
        if change > 0:
            wanted = min((neurons // multiple + 1) * multiple, full)
        else:
            wanted = (neurons - 1) // multiple * multiple
        if wanted == neurons or wanted < 1:
            return False
        widths[index] = groups, wanted
        return True

    def _balance(self, widths: dict[int, tuple[int, int]]) -> bool:
        """Give or take neurons, one multiple a layer in turn, until the budget is met."""
        shapes, order = self._request.anatomy.layers, self._open(widths)
        self._rng.shuffle(order)
        kept = sum(
            shapes[i].fixed_params + g * shapes[i].kv_group_params + n * shapes[i].neuron_params
            for i, (g, n) in widths.items()
        )
        whole = sum(shape.params for shape in shapes)
        excess = kept - (whole - self._budget.params)
        stuck = 0
        while order and stuck < len(order):
            index = order.pop(0)
            order.append(index)
            if abs(excess) <= 0.5 * self._budget.multiple * shapes[index].neuron_params:
                return True
            before = widths[index][1]
            moved = self._step(widths, index, -1 if excess > 0 else 1)
            stuck = 0 if moved else stuck + 1
            excess += (widths[index][1] - before) * shapes[index].neuron_params
        return False


def _reshaped(
    plan: Plan, scored: Mapping[str, Scores], widths: Mapping[int, tuple[int, int]]
) -> Plan:
    """The plan that keeps these layers, each with so many of its best units."""
    everything = Plan.everything(plan.before)
    whole = replace(
        plan,
        layers=tuple(sorted(widths)),
        kv_groups=tuple(k if i in widths else () for i, k in enumerate(everything.kv_groups)),
        neurons=tuple(k if i in widths else () for i, k in enumerate(everything.neurons)),
    )
    return with_widths(whole, scored, widths)


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

    def noted(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """What divergences depend on, but for the model's weights, as plain values."""
        ranked = [
            {"layer": scores.layer}
            | {f"kv_group.{i}": row for i, row in enumerate(scores.kv_group or ())}
            | {f"neuron.{i}": row for i, row in enumerate(scores.neuron or ())}
            for scores in self.scores
        ]
        return {
            **{"ratio": self.ratio, "axis": self.axis, **self.options},
            "anatomy": digest([self.anatomy.to_dict()]),
            "scores": [digest_of_tensors(values) for values in ranked],
            "batches": [digest_of_tensors(batch) for batch in batches],
        }
