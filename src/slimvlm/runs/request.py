"""Make, resolve and check the `Request` to the stages before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from slimvlm.core.errors import ConfigError, ImpossiblePlanError, SlimError
from slimvlm.core.options import Axis, PruneConfig, Questions, RecoverConfig, SizeOptions
from slimvlm.core.progress import Say, silent
from slimvlm.data.general import SHARE as GENERAL_TEXT
from slimvlm.data.roles import parse_token_weights
from slimvlm.data.samples import Sample
from slimvlm.data.vocabulary import Vocabulary, choose_vocabulary
from slimvlm.evaluation.lmms import check_names, split_names
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models import load as models
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import prefill_flops
from slimvlm.models.devices import device_named
from slimvlm.models.pictures import PictureBudget
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan
from slimvlm.pruning.tokens import token_ids_of
from slimvlm.pruning.walk.walk import WALKING, require_choosable
from slimvlm.runs.recipes import recipe_for, rules
from slimvlm.scoring import criteria as scoring
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.unit_scores import Scores, Statistics

_OF_DATA = (
    "images",
    "max_bad_rows",
    "max_length",
    "too_long",
    "repair",
    "local_steps",
    "general_text",
)
_RATIO_STEP = 1e-3  # how much further a ratio goes at least while it is too small


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that determines the output of the stages, apart from the content of files."""

    model: str  # the original: folder, hub id or demo
    prune: PruneConfig
    hold_out: bool = False  # every fourth calibration sample validates; set by `resolved`
    recover: RecoverConfig | None = None  # None for no recovery
    training_samples: int | None = None  # at most; None for all outside the calibration set
    test_samples: int = 0  # at most
    questions: Questions | None = None
    require: tuple[str, ...] = ()  # of the result
    made_from: tuple[str, ...] = ()  # hashes of model and data, so that exchanged files are noticed
    tokens: tuple[int, ...] | None = None  # ids to keep, once they are chosen
    # ids to keep in a further trial of axis auto, () for none
    fewer_tokens: tuple[int, ...] | None = None
    latency: float | None = None  # share of the original's time, which gives each axis its ratio
    image_tokens: float | None = None  # share of the image tokens
    pictures: PictureBudget | None = None  # the settings that give it, once they are chosen

    @property
    def trains(self) -> bool:
        """Whether training follows."""
        return self.recover is not None and self.prune.data is not None

    @property
    def tries_tokens(self) -> bool:
        """Whether the validation loss also decides on a trimmed vocabulary."""
        is_open = self.prune.axis == "auto" and self.prune.vocab_size is None
        return is_open and self.latency is None  # tokens make nothing faster


def resolved(request: Request, say: Say = silent, shape: Anatomy | None = None) -> Request:
    """Decide the open options: axis, criteria, allocation, repair, training.

    Without a ratio, as for an existing plan, only repair is decided. ``shape`` is for neurons of
    experts, which have a criterion of their own, and for a latency, which becomes a ratio.
    """
    config = request.prune
    if request.latency is not None:
        assert shape is not None
        config = replace(config, ratio=_ratio_for_latency(request, request.latency, shape))
    if config.ratio is None and config.tokens_first:  # nothing goes along any axis
        is_open = config.axis in (None, "chart", "auto")
        config = replace(config, ratio=0.0, axis="width" if is_open else config.axis)
    if config.ratio is not None:
        if config.axis in (None, "chart") or (config.axis == "auto" and config.data is None):
            config = replace(config, axis=recipe_for(config.ratio, request.trains).axis)
            return resolved(replace(request, prune=config), say, shape)  # a latency has its ratio
        criteria = criteria_of(config)
        reads = {name for name in criteria if name in CRITERIA and CRITERIA[name].needs_data}
        needs_tokens = config.vocab_size == "auto" and config.vocab_text is None
        chosen = (config.ratio or config.experts) and reads and not reads & set(config.criterion)
        if chosen and config.data is None and not needs_tokens:  # default criteria choose
            config.refuse(("images",), "needs --data")
            say("no --data: calibrating on the demo's samples")
            config = replace(config, data="demo", images=None, too_long="truncate")
            request = replace(request, recover=None, test_samples=0)
        has_experts = shape is not None and any(s.expert_neuron_params for s in shape.layers)
        if has_experts and config.ratio and not config.criterion:  # no walk chooses their neurons
            own = {WALKING: scoring.EXPERT_NEURON_CRITERION}
            criteria = tuple(own.get(name, name) for name in criteria)
        config = replace(config, criterion=criteria)
        if config.allocation in (None, "balanced"):
            reasons = {
                "axis depth removes no widths": config.axis == "depth",
                "there is no data to try it on": config.data is None,
                f"only the walk's own choice, by {WALKING!r}, tries it": WALKING not in criteria,
            }
            reason = next((why for why, holds in reasons.items() if holds), None)
            if reason is not None and config.allocation is not None:
                say(f"allocation 'balanced' becomes 'uniform': {reason}")
            config = replace(config, allocation="balanced" if reason is None else "uniform")
    if config.data is None and config.repair == "auto":
        config = replace(config, repair="none")
    if config.local_steps is None and config.repair != "auto":
        config = replace(config, local_steps=0)
    if config.general_text is None:
        config = replace(config, general_text=0.0 if config.repair == "none" else GENERAL_TEXT)
    judges = config.repair == "auto" or config.local_steps != 0 or config.axis == "auto"
    recover = request.recover if config.data is not None else None
    recover = None if recover is None else replace(recover, seed=config.seed)
    return replace(request, prune=config, hold_out=judges, recover=recover)


def _ratio_for_latency(request: Request, share: float, shape: Anatomy) -> float:
    """Find about the smallest ratio whose prefill takes a share of the work, on the first axis."""
    known = rules().constants
    prompt = known.text_tokens + (known.image_tokens if shape.vision_params else 0)
    whole = prefill_flops(shape, prompt)
    in_layers = sum(layer.params for layer in shape.layers) / shape.backbone_params
    named = [axis for axis in get_args(Axis) if axis == request.prune.axis]
    axes: list[Axis] = named or ["width", "depth", "both"]
    for axis in axes:
        ratio = 0.9 * (1 - share) * in_layers  # a little less than it takes
        while True:
            asked = replace(request.prune, axis=axis, ratio=min(ratio, 1 - _RATIO_STEP))
            try:
                plan = dry_plan(asked, shape, request.tokens)
            except ImpossiblePlanError:
                break
            excess = prefill_flops(plan.after, prompt) / whole - share
            if excess <= 0:
                return ratio
            if ratio >= 1:
                break
            ratio += max(excess * in_layers, _RATIO_STEP)
    raise ImpossiblePlanError(f"target_latency {share} cannot be reached on {' or '.join(axes)}")


def along(request: Request, axis: Axis, shape: Anatomy | None = None) -> Request:
    """Resolve a request along one axis."""
    return resolved(replace(request, prune=replace(request.prune, axis=axis)), shape=shape)


def requests_by_axis(request: Request, anatomy: Anatomy) -> dict[Axis, Request]:
    """Resolve an ``auto`` request along each axis that removes the ratio within a tenth.

    If none comes so near, the nearest one; if none is possible, the last one's error is raised.
    """
    found: dict[Axis, Request] = {}
    apart: dict[Axis, float] = {}
    for axis in get_args(Axis):
        try:
            candidate = along(request, axis, anatomy)
            plan = dry_plan(candidate.prune, anatomy, request.tokens)
        except SlimError as error:
            failure = error
            continue
        found[axis], apart[axis] = candidate, abs(plan.ratio - ratio_of(candidate.prune))
    if not found:
        raise failure
    near = max(0.1 * ratio_of(request.prune), min(apart.values()))
    return {axis: candidate for axis, candidate in found.items() if apart[axis] <= near}


def ratio_of(config: PruneConfig) -> float:
    """Return the ratio; 0 where only tokens and experts go."""
    if config.ratio is None and not config.tokens_first:
        raise ConfigError("ratio is required: the share of the backbone to remove, such as 0.3")
    return config.ratio or 0.0


def criteria_of(config: PruneConfig) -> tuple[str, ...]:
    """Return the criteria for the axis and for experts; none if neither layers nor widths go."""
    axis = "both" if config.axis == "auto" else config.axis or "width"
    goes = config.ratio != 0 and (config.ratio is not None or config.data is not None)
    chosen = config.criterion or (scoring.DEFAULT_CRITERIA[axis] if goes else ())
    has_experts = any("expert" in CRITERIA[name].units for name in chosen if name in CRITERIA)
    if not config.experts or has_experts:
        return chosen
    return (*chosen, scoring.EXPERT_CRITERION)


def scored_by(config: PruneConfig) -> tuple[str, ...]:
    """Return the criteria that score before the walk, which may choose by one itself."""
    chooses = not (config.ratio is None or config.data is None or config.axis == "depth")
    return tuple(name for name in config.criterion if name != WALKING or not chooses)


def check_options(config: PruneConfig) -> None:
    """Check the options as far as possible without model and data."""
    device_named(config.device)
    rows = {name: scoring.criterion_named(name, {}) for name in criteria_of(config)}
    data_bound = [name for name, row in rows.items() if row.needs_data]
    given = [name for name in data_bound if name in config.criterion]
    if given and config.data is None:
        raise ConfigError(f"criterion {given[0]!r} needs --data")
    if config.token_weights is not None:
        parse_token_weights(config.token_weights)
        if not data_bound:
            raise ConfigError(f"token_weights {config.token_weights!r}: no criterion reads data")
    if config.vocab_size == "auto" and config.data is None and config.vocab_text is None:
        raise ConfigError("vocab_size 'auto' needs --data or --vocab-text")
    if config.data is None:
        config.refuse(_OF_DATA, "needs --data")


def require_possible(request: Request, anatomy: Anatomy, say: Say) -> None:
    """Refuse a resolved request that a model's shape does not allow; say how it is scored."""
    if request.prune.axis == "auto":
        requests_by_axis(request, anatomy)
    else:
        dry_plan(request.prune, anatomy, request.tokens)
    if request.prune.data is None and request.prune.criterion:
        say(f"no data: scoring by {' and '.join(request.prune.criterion)}")


def dry_plan(config: PruneConfig, anatomy: Anatomy, tokens: tuple[int, ...] | None = None) -> Plan:
    """Make a plan from random scores, to raise the errors that `make_plan` would after scoring."""
    if (
        tokens is None and config.trims_vocabulary
    ):  # not chosen yet: the first so many stand for them
        asked = config.vocab_size
        count = asked if isinstance(asked, int) else anatomy.vocab_size // 3
        tokens = tuple(range(min(count, anatomy.vocab_size)))
    plan = ranked_plan(config, anatomy, [dummy_scores(anatomy, criteria_of(config))], tokens)
    if config.data is not None and WALKING in criteria_of(config):
        require_choosable(plan)
    return plan


def dummy_scores(anatomy: Anatomy, criteria: Sequence[str]) -> Scores:
    """Draw random scores for the units of criteria, to find out whether a plan is possible."""
    drawn = scoring.score_random(Statistics(), anatomy)
    units = {unit for name in criteria for unit in CRITERIA[name].units}
    values = {at: v for at, v in drawn.items() if (at if isinstance(at, str) else at[1]) in units}
    return Scores.of_units(", ".join(criteria), units, anatomy.num_layers, values)


def check_questions(questions: Questions, blind: bool = False, log: bool = False) -> dict[str, Any]:
    """Check the tasks and their options before a model is loaded; return the tasks by name."""
    own, theirs = split_names(questions.tasks)
    tasks = find_tasks(own) if own or not theirs else []
    found: dict[str, Any] = {task.name: task for task in tasks}
    if theirs:
        found |= check_names(theirs, questions.limit, questions.task_folder)
        if blind or questions.floors or log:
            raise ConfigError(f"--blind, --floors and --replies do not work with {theirs[0]!r}")
    elif questions.task_folder is not None:
        raise ConfigError(
            f"task_folder {questions.task_folder!r} is only for benchmarks such as mme"
        )
    if blind and questions.floors:
        raise ConfigError(
            "--floors conflicts with --blind, whose result is the floor: leave one of them out"
        )
    return found


def criterion_options(config: PruneConfig, criterion: str) -> dict[str, Any]:
    """Return those options of a request that a criterion has, beside weights of tokens."""
    return {name: getattr(config, name) for name in CRITERIA[criterion].from_request}


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
    even = "protect" if config.allocation == "protect" else "uniform"
    kept = {**config.of_units, "tokens": tokens}
    return make_plan(anatomy, scores, ratio_of(config), config.axis or "width", even, **kept)


def vocabulary_for(
    model: str,
    options: SizeOptions,
    samples: Sequence[Sample],
    trust_remote_code: bool = False,
    fewest: int = 0,
) -> Vocabulary:
    """Choose the tokens that a model keeps; where their number is open, at least ``fewest``."""
    config, name = models.load_config(model, trust_remote_code), models.resolve(model)
    processor = models.load_processor(name, config, trust_remote_code)
    if processor is None:
        raise ConfigError(f"vocab_size {options.vocab_size}: the model has no tokenizer")
    size = options.vocab_size if isinstance(options.vocab_size, int) else None
    texts = [] if options.vocab_text is None else [Path(options.vocab_text)]
    named = token_ids_of(config, models.generation_of(name))
    return choose_vocabulary(processor, samples, size, texts, named, fewest)


def with_tokens(request: Request, samples: Sequence[Sample], say: Say = silent) -> Request:
    """Choose the tokens of a request that has none yet, or those of a further trial.

    A trial keeps all that the data needs, more by rank, up to a third, and as the ratio allows.
    There is none where too little is known of other text, or tokens weigh little or must stay.
    """
    config, model = request.prune, request.model
    if not request.tries_tokens or request.fewer_tokens is not None:
        if not config.trims_vocabulary or request.tokens is not None:
            return request
        chosen = vocabulary_for(model, config, samples, config.trust_remote_code)
        say(chosen.line())
        return replace(request, tokens=chosen.tokens)
    shape, none = models.anatomy(model), replace(request, fewer_tokens=())
    fewest = tokens_to_try(shape, ratio_of(config))
    if fewest is None or shape.why_tokens_stay is not None:
        return none
    try:
        chosen = vocabulary_for(model, config, samples, config.trust_remote_code, fewest)
    except SlimError as error:
        say(f"the vocabulary stays whole: {error}")
        return none
    if chosen.coverage is None or len(chosen.tokens) == chosen.total:
        return none
    say(f"also trying a trimmed vocabulary; used only if validation loss drops: {chosen.line()}")
    return replace(request, fewer_tokens=chosen.tokens)


def tokens_to_try(shape: Anatomy, ratio: float) -> int | None:
    """Return how many tokens a trial keeps at least; None where they weigh too little."""
    rule, weigh = rules().tokens_first, shape.token_params * shape.vocab_size
    if weigh < rule.from_share * shape.backbone_params:
        return None
    most = math.ceil(ratio * shape.backbone_params / shape.token_params)  # that the ratio takes
    return max(int(shape.vocab_size // rule.one_of), shape.vocab_size - most)


def tokens_alone(request: Request, anatomy: Anatomy) -> Plan | None:
    """Make the plan where a request's tokens reach its ratio; None if more must be removed."""
    if request.tokens is None or request.prune.experts:
        return None
    plan = make_plan(anatomy, [], 0.0, tokens=request.tokens)
    asked = ratio_of(request.prune)
    return replace(plan, asked_ratio=asked) if plan.ratio >= asked else None
