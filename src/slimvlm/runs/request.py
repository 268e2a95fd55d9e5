"""The `Request` to the stages, resolved and checked once, before any work.

`compress`, studies and the verbs of the command line all make one, so that the same options mean
the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, get_args

from slimvlm.core.errors import ConfigError, ImpossiblePlanError, SlimError
from slimvlm.core.options import (
    Allocation,
    Axis,
    AxisChoice,
    PruneConfig,
    Questions,
    RecoverConfig,
)
from slimvlm.core.progress import Say, silent
from slimvlm.data.roles import parse_token_weights
from slimvlm.evaluation.lmms import check_names, split_names
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import prefill_flops
from slimvlm.models.load import device_named
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.walk.walk import WALKING, require_choosable
from slimvlm.runs.recipes import recipe_for, rules
from slimvlm.scoring.criteria import (
    CRITERIA,
    DEFAULT_CRITERIA,
    EXPERT_CRITERION,
    EXPERT_NEURON_CRITERION,
    criterion_named,
)
from slimvlm.scoring.statistics import Statistics
from slimvlm.scoring.unit_scores import Scores
from slimvlm.scoring.without_data import score_random

_RATIO_STEP = 1e-3
"""How much further a ratio goes at least while it is too small."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that determines the output of the stages, apart from the content of files."""

    model: str  # the original: folder, hub id or demo
    prune: PruneConfig
    hold_out: bool = False  # set aside every fourth calibration sample; set by `resolved`
    recover: RecoverConfig | None = None  # None for no recovery
    training_samples: int | None = None  # at most; None for all that do not calibrate
    report_samples: int = 0  # held out for the end, at most
    questions: Questions | None = None
    made_from: tuple[str, ...] = ()  # hashes of model and data, so that exchanged files are noticed
    # ids to keep, once they are chosen; see `slimvlm.runs.tokens`
    tokens: tuple[int, ...] | None = None
    # ids to keep in a further try of axis auto, () for none
    fewer_tokens: tuple[int, ...] | None = None
    latency: float | None = None  # share of the original's time, which gives each axis its ratio

    @property
    def trains(self) -> bool:
        """Whether training follows."""
        return self.recover is not None and self.prune.data is not None

    @property
    def tries_tokens(self) -> bool:
        """Whether held-out answers decide on fewer tokens, too."""
        is_open = self.prune.axis == "auto" and self.prune.vocab_size is None
        return is_open and self.latency is None  # tokens make nothing faster


def resolved(request: Request, say: Say = silent, shape: Anatomy | None = None) -> Request:
    """Decide the open options: axis, criteria, allocation, repair, training.

    Without a ratio, as for an existing plan, only repair is decided. With the anatomy ``shape``,
    neurons of experts get a criterion of their own, and a latency becomes a ratio. ``say`` receives
    a line where a given option is not possible.
    """
    config = request.prune
    if request.latency is not None:
        assert shape is not None
        config = replace(config, ratio=_ratio_for_latency(request, request.latency, shape))
        request = replace(request, prune=config)
    if config.ratio is None and config.tokens_first:
        is_open = config.axis in (None, "chart", "auto")  # and nothing goes along any axis
        config = replace(config, ratio=0.0, axis="width" if is_open else config.axis)
        request = replace(request, prune=config)
    if config.ratio is not None:
        config = replace(config, axis=axis_of(request))
        if _lacks_data(config):
            say("no --data: calibrating on the demo's conversations")
            config = replace(config, data="demo", images=None, too_long="cut")
            request = replace(request, recover=None, report_samples=0)
        if shape is not None and config.ratio and any(s.expert_neuron_params for s in shape.layers):
            config = replace(config, criterion=_for_neurons_of_experts(config))
        config = replace(
            config,
            criterion=criteria_of(config),
            allocation=_resolved_allocation(config, say),
        )
    if config.data is None and config.repair == "auto":
        config = replace(config, repair="none")
    if config.local_steps is None and config.repair != "auto":
        config = replace(config, local_steps=0)
    recover = request.recover if request.trains else None
    return replace(
        request,
        prune=config,
        hold_out=config.repair == "auto" or config.local_steps != 0 or config.axis == "auto",
        recover=None if recover is None else replace(recover, seed=config.seed),
    )


def _lacks_data(config: PruneConfig) -> bool:
    """Whether default criteria have to choose, and no data was given."""
    needs_tokens = config.vocab_size == "auto" and config.vocab_text is None
    if config.data is not None or needs_tokens or not (config.ratio or config.experts):
        return False
    reads = [name for name in criteria_of(config) if name in CRITERIA and CRITERIA[name].needs_data]
    return bool(reads) and not set(reads) & set(config.criterion)


def _for_neurons_of_experts(config: PruneConfig) -> tuple[str, ...]:
    """Choose the criteria; neurons of experts need one that scores, as no walk chooses them."""
    own = {} if config.criterion else {WALKING: EXPERT_NEURON_CRITERION}
    return tuple(own.get(name, name) for name in criteria_of(config))


def _resolved_allocation(config: PruneConfig, say: Say) -> Allocation:
    """Choose the allocation: ``balanced`` where the walk chooses, else ``uniform``."""
    if config.allocation not in (None, "balanced"):
        return config.allocation
    reasons = {
        "axis depth removes no widths": config.axis == "depth",
        "there is no data to try it on": config.data is None,
        f"only the walk's own choice, by {WALKING!r}, tries it": WALKING not in criteria_of(config),
    }
    reason = next((why for why, holds in reasons.items() if holds), None)
    if reason is None:
        return "balanced"
    if config.allocation is not None:
        say(f"allocation 'balanced' becomes 'uniform': {reason}")
    return "uniform"


def axis_of(request: Request) -> AxisChoice:
    """Choose the axis, by the study's chart if none was given; ``auto`` where data can decide."""
    config = request.prune
    if config.axis in (None, "chart") or (config.axis == "auto" and config.data is None):
        return recipe_for(ratio_of(config), request.trains).axis
    return config.axis


def _ratio_for_latency(request: Request, share: float, shape: Anatomy) -> float:
    """Find about the smallest ratio whose model reads a question in a share of the operations.

    With axis ``auto`` it is the ratio of the first axis that can reach the share.
    """
    named = [axis for axis in get_args(Axis) if axis == request.prune.axis]
    axes: list[Axis] = named or ["width", "depth", "both"]
    for axis in axes:
        config = replace(request.prune, axis=axis)
        with suppress(ImpossiblePlanError):
            return _ratio_along(config, request.tokens, share, shape)
    raise ImpossiblePlanError(f"target_latency {share} cannot be reached on {' or '.join(axes)}")


def _ratio_along(
    config: PruneConfig, tokens: tuple[int, ...] | None, share: float, shape: Anatomy
) -> float:
    """Find this ratio along one axis; an impossible one raises ImpossiblePlanError."""
    known = rules().constants
    prompt = known.text_tokens + (known.image_tokens if shape.vision_params else 0)
    whole = prefill_flops(shape, prompt)
    in_layers = sum(layer.params for layer in shape.layers) / shape.backbone_params
    ratio = 0.9 * (1 - share) * in_layers  # a little less than it takes
    while True:
        plan = rehearse(replace(config, ratio=min(ratio, 1 - _RATIO_STEP)), shape, tokens)
        excess = prefill_flops(plan.after, prompt) / whole - share
        if excess <= 0:
            return ratio
        if ratio >= 1:
            raise ImpossiblePlanError(f"target_latency {share}: nothing more can go")
        ratio += max(excess * in_layers, _RATIO_STEP)


def along(request: Request, axis: Axis, shape: Anatomy | None = None) -> Request:
    """Resolve a request along one axis."""
    return resolved(replace(request, prune=replace(request.prune, axis=axis)), shape=shape)


def requests_by_axis(request: Request, anatomy: Anatomy) -> dict[Axis, Request]:
    """Resolve an ``auto`` request along each axis that removes the ratio within a tenth.

    Like ratios make their losses comparable; if no axis comes so near, the nearest one is returned.
    Raises the last axis's error if none is possible.
    """
    found: dict[Axis, Request] = {}
    apart: dict[Axis, float] = {}
    for axis in get_args(Axis):
        try:
            candidate = along(request, axis, anatomy)
            plan = rehearse(candidate.prune, anatomy, request.tokens)
        except SlimError as error:
            failure = error
            continue
        found[axis], apart[axis] = candidate, abs(plan.ratio - ratio_of(candidate.prune))
    if not found:
        raise failure
    near = max(0.1 * ratio_of(request.prune), min(apart.values()))
    return {axis: candidate for axis, candidate in found.items() if apart[axis] <= near}


def ratio_of(config: PruneConfig) -> float:
    """Return the ratio; 0 where only tokens and experts go. Raises ConfigError without one."""
    if config.ratio is None and config.tokens_first:
        return 0.0
    if config.ratio is None:
        raise ConfigError("ratio: say which share of the backbone to remove")
    return config.ratio


def criteria_of(config: PruneConfig) -> tuple[str, ...]:
    """Return the criteria for the axis and for experts; none if neither layers nor widths go."""
    axis = "both" if config.axis == "auto" else config.axis or "width"
    goes = config.ratio != 0 and (config.ratio is not None or config.data is not None)
    chosen = config.criterion or (DEFAULT_CRITERIA[axis] if goes else ())
    has_experts = any("expert" in CRITERIA[name].units for name in chosen if name in CRITERIA)
    if not config.experts or has_experts:
        return chosen
    return (*chosen, EXPERT_CRITERION)


def scored_by(config: PruneConfig) -> tuple[str, ...]:
    """Return the criteria that score before the walk, which may choose by one itself."""
    if config.ratio is None or config.data is None or config.axis == "depth":
        return config.criterion
    return tuple(name for name in config.criterion if name != WALKING)


def check_options(config: PruneConfig) -> None:
    """Check the options as far as possible without model and data; raise ConfigError."""
    device_named(config.device)
    rows = {name: criterion_named(name, {}) for name in criteria_of(config)}
    data_bound = [name for name, row in rows.items() if row.needs_data]
    given = [name for name in data_bound if name in config.criterion]
    if given and config.data is None:
        raise ConfigError(f"criterion {given[0]!r} needs --data")
    if config.token_weights is not None:
        parse_token_weights(config.token_weights)
        if not data_bound:
            raise ConfigError(f"token_weights {config.token_weights!r}: no criterion reads data")
    if config.data is None and config.repair not in ("none", "auto"):
        raise ConfigError(f"repair {config.repair!r} needs --data")
    if config.vocab_size == "auto" and config.data is None and config.vocab_text is None:
        raise ConfigError("vocab_size 'auto' needs --data or --vocab-text")
    if config.data is None and config.local_steps:
        raise ConfigError(f"local_steps {config.local_steps} needs --data")


def check_request(request: Request, anatomy: Anatomy, say: Say) -> None:
    """Check a resolved request without weights; ``say`` receives its criteria if it has no data."""
    check_options(request.prune)
    if request.prune.axis == "auto":
        requests_by_axis(request, anatomy)
    else:
        rehearse(request.prune, anatomy, request.tokens)
    if request.prune.data is None and request.prune.criterion:
        say(f"no data: scoring by {' and '.join(request.prune.criterion)}")


def rehearse(config: PruneConfig, anatomy: Anatomy, tokens: tuple[int, ...] | None = None) -> Plan:
    """Make a plan from random scores, to find out whether a model can be pruned as requested.

    Raises the errors that `make_plan` would raise after scoring. Where ``tokens`` are not chosen
    yet, the first so many stand for them; for ``auto``, a third of all.
    """
    if tokens is None and config.loses_tokens:
        asked = config.vocab_size
        count = asked if isinstance(asked, int) else anatomy.vocab_size // 3
        tokens = tuple(range(min(count, anatomy.vocab_size)))
    pretended = pretended_scores(anatomy, criteria_of(config))
    plan = ranked_plan(config, anatomy, [pretended], tokens)
    if config.data is not None and WALKING in criteria_of(config):
        require_choosable(plan)
    return plan


def pretended_scores(anatomy: Anatomy, criteria: Sequence[str]) -> Scores:
    """Draw random scores for the units of criteria, to find out whether a plan is possible."""
    pretended = score_random(Statistics(), anatomy)
    units = {unit for name in criteria for unit in CRITERIA[name].units}
    return Scores(", ".join(criteria), **{unit: pretended.of(unit) for unit in units})


def check_questions(questions: Questions, blind: bool = False, log: bool = False) -> None:
    """Check the tasks and their options before a model is loaded; raise ConfigError.

    ``log``: replies must be kept as they come.
    """
    own, theirs = split_names(questions.tasks)
    if own or not theirs:
        find_tasks(own)
    if theirs:
        check_names(theirs, questions.limit, questions.task_folder)
        if blind or questions.floors or log:
            raise ConfigError(f"--blind, --floors and --log do not work with {theirs[0]!r}")
    if blind and questions.floors:
        raise ConfigError("--floors: a --blind result is the floor; leave out one of them")


def criterion_options(config: PruneConfig, criterion: str) -> dict[str, Any]:
    """Return those options of a request that a criterion has."""
    row = CRITERIA[criterion]
    options = {name: getattr(config, name) for name in row.from_request}
    if row.needs_data and config.token_weights is not None:
        options["token_weights"] = token_weights_of(config)
    return options


def token_weights_of(config: PruneConfig) -> dict[str, float] | None:
    """Return the weights of tokens by role, None where all count alike."""
    return None if config.token_weights is None else parse_token_weights(config.token_weights)


def ranked_plan(
    config: PruneConfig,
    anatomy: Anatomy,
    scores: Sequence[Scores],
    tokens: tuple[int, ...] | None = None,
) -> Plan:
    """Make the plan that scores alone give; a ``balanced`` walk begins at a ``uniform`` one."""
    axis = config.axis or "width"
    allocation = "protect" if config.allocation == "protect" else "uniform"
    options = config.of_widths
    options |= {"tokens": tokens, "experts": config.experts}
    return make_plan(anatomy, scores, ratio_of(config), axis, allocation, **options)
