"""Search for the plan that changes the model's answers least: model + scores → `Plan`.

Candidates are compared by the divergence from the original's next-token distributions at answer
positions, measured under a mask: no weight is touched, nothing is trained.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimvlm.errors import ConfigError, ImpossiblePlanError
from slimvlm.geometry import read_anatomy
from slimvlm.plan import Plan
from slimvlm.planning import WIDTH_UNITS
from slimvlm.progress import progress
from slimvlm.search.divergence import Batch, Divergence
from slimvlm.search.moves import Moves
from slimvlm.search.request import Request, fingerprint
from slimvlm.search.trials import Found, Log, Trial
from slimvlm.values import Scores

__all__ = ["LEVELS", "Divergence", "Found", "Trial", "search_plan"]

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
    asked = {"level": level, "seed": seed}
    log = Log(
        divergence=Divergence(model, batches),
        passes=passes,
        path=None if state_file is None else Path(state_file),
        request=fingerprint(request, asked, batches),
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
