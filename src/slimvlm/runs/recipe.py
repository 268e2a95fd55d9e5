"""Decide what a run does: from options, the model's shape and its samples to a `Recipe`.

`decide` fills in what options leave open. `resolve` checks it against model and data, reads the
samples, and decides what depends on them. Neither reads weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

from transformers import PreTrainedConfig

from slimvlm.core.documents import digest
from slimvlm.core.errors import ConfigError, ImpossiblePlanError, SlimError, raised_as
from slimvlm.core.options import (
    Axis,
    CompressConfig,
    DataConfig,
    PruneConfig,
    Questions,
    RecoverConfig,
    SizeOptions,
)
from slimvlm.core.progress import Say, silent
from slimvlm.data import read
from slimvlm.data.general import SHARE as GENERAL_TEXT
from slimvlm.data.general import general_samples
from slimvlm.data.roles import parse_token_weights
from slimvlm.data.samples import VALIDATION_EVERY, Sample, identifying_bytes, split_validation
from slimvlm.data.vocabulary import Vocabulary, choose_vocabulary
from slimvlm.evaluation import gates
from slimvlm.evaluation.lmms import check_names, split_names
from slimvlm.evaluation.tasks import find_tasks
from slimvlm.models import load as models
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import Picture, question_flops
from slimvlm.models.devices import device_named
from slimvlm.models.parts import context_of
from slimvlm.models.pictures import PictureBudget, budgets_for, knobs_of, picture_of
from slimvlm.planning.make import make_plan
from slimvlm.planning.plan import Plan, why_tower_stays
from slimvlm.pruning.cut import lost_heads
from slimvlm.pruning.tokens import token_ids_of
from slimvlm.pruning.walk.walk import WALKING, require_choosable
from slimvlm.runs.chart import chart_row, rules
from slimvlm.scoring import criteria as scoring
from slimvlm.scoring.criteria import CRITERIA
from slimvlm.scoring.unit_scores import Scores, Statistics
from slimvlm.training.trainer import prepare_training

TEST_SHARE, FEWEST_TESTS = 5, 2  # fewer than two have no interval
"""At most one of so many samples is a test sample, and there are so many at least or none."""
TRIMMED = " with a trimmed vocabulary"  # suffix of a trial of axis and vocabulary
_OF_DATA = (
    *("images", "max_bad_rows", "max_length", "too_long"),
    *("repair", "local_steps", "general_text"),
)
TOWER_RATIOS = (0.2, 0.4, 0.6)  # that are tried for a latency, beside none
_RATIO_STEP = 1e-3  # how much further a ratio goes at least while it is too small


class Recipe(CompressConfig):
    """A run with everything decided: what stages take, and what tells it from another run."""

    model: str
    """The original: folder, hub id or demo."""
    recover: RecoverConfig | None = None  # type: ignore[assignment]
    """Training; None for none."""
    test_samples: int = 0
    """At most."""
    hold_out: bool = False
    """Whether every fourth calibration sample validates."""
    tokens: tuple[int, ...] | None = None
    """Ids to keep; None for all, or while they are not chosen."""
    pictures: PictureBudget | None = None
    """Settings that give the share of the image tokens."""
    trials: "tuple[Recipe, ...]" = ()
    """What the validation loss chooses from, one for each axis, where the axis is ``auto``."""
    made_from: tuple[str, ...] = ()
    """Hashes of model and data, so that exchanged files are noticed."""

    def __post_init__(self) -> None:
        """Check nothing: the options were checked, and some are decided beside others now."""

    @property
    def name(self) -> str:
        """The name of a trial."""
        tower = f" and tower {self.tower_ratio:g}" if self.tower_ratio else ""
        return f"{self.axis}{tower}{TRIMMED * self.is_trimmed}"

    @property
    def is_trimmed(self) -> bool:
        """Whether it tries a trimmed vocabulary that nobody named."""
        return self.tokens is not None and self.vocab_size is None

    @property
    def tries_tokens(self) -> bool:
        """Whether the validation loss also decides on a trimmed vocabulary."""
        # tokens make nothing faster
        return self.axis == "auto" and self.vocab_size is None and self.target_latency is None

    @property
    def size(self) -> float:
        """The ratio; 0 where only tokens and experts are removed."""
        return self.ratio or 0.0

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The criteria that score before the walk, which may choose by one itself."""
        chooses = not (self.ratio is None or self.data is None or self.axis == "depth")
        return tuple(name for name in self.criterion if name != WALKING or not chooses)

    @property
    def weights_of_tokens(self) -> dict[str, float] | None:
        """The weights of tokens by role, None where all count alike."""
        return None if self.token_weights is None else parse_token_weights(self.token_weights)


def decide(
    model: str,
    options: PruneConfig,
    shape: Anatomy | None = None,
    say: Say = silent,
    tokens: tuple[int, ...] | None = None,
    tests: int = 0,
    tries: bool = True,
) -> Recipe:
    """Decide what options leave open: training, ratio, axis, criteria, allocation, repair.

    Without a ratio, as for an existing plan, only the repair is decided. ``tokens`` are those to
    keep, once they are chosen, ``tests`` the test samples of options without such a field. Without
    ``shape`` or ``tries`` no `Recipe.trials` are made.
    """
    axis, ratio, data, repair = options.axis, options.ratio, options.data, options.repair
    ratio = ratio or None if options.tokens_first else ratio  # 0 is none where others go
    given = {**vars(options), "model": model, "tokens": tokens}
    given |= {"recover": None, "test_samples": tests}
    latency = getattr(options, "target_latency", None)
    is_planned = ratio is None and latency is None and not options.tokens_first
    trains = False
    if isinstance(options, CompressConfig):
        check_options(options)
        trains = data is not None and options.recover.train != "none"
        most = options.most_test_samples(options.samples)
        given["test_samples"] = 0 if data is None else most
    axis = ("auto" if trains else "chart") if axis is None and not is_planned else axis
    # how much is removed, and along which axis
    of_tower = tuple[Recipe, ...]()
    if latency is not None:
        along = replace(options, axis=axis)
        ratio, of_tower = _within_latency(model, along, shape, tokens, tries)
        if ratio is None:  # the backbone alone is not enough
            return replace(of_tower[0], trials=of_tower if data else (), hold_out=True)
    if ratio is None and options.tokens_first:  # nothing else goes
        ratio, axis = 0.0, "width" if axis in ("chart", "auto") else axis
    if axis == "chart" or (axis == "auto" and data is None and ratio is not None):
        axis = chart_row(ratio or 0.0, trains).axis
        if latency is not None:  # whose ratio depends on the axis
            return decide(model, replace(options, axis=axis), shape, say, tokens, tests, tries)
    # how the pruned model is trained
    if isinstance(options, CompressConfig) and trains:
        training = _training(options, shape, ratio or 0.0)
        given["recover"], options = training, replace(options, recover=training)
    # by which criteria
    for name in options.criterion:
        scoring.criterion_named(name, {})
    criteria = criteria_of(options, axis, ratio, shape)
    reads = {name for name in criteria if CRITERIA[name].needs_data}
    counts = options.vocab_size == "auto" and options.vocab_text is None
    chosen = reads and not reads & set(options.criterion)  # by default
    if ratio is not None and data is None and not counts and chosen:
        options.refuse(("images",), "needs --data")
        say("no --data: calibrating on the demo's samples")
        data = "demo"
        given |= {"data": data, "images": None, "too_long": "truncate"}
    # how layers share the ratio
    allocation = options.allocation
    if ratio is not None and allocation in (None, "balanced"):
        why_not = _why_even(axis, data, criteria)
        if why_not is not None and allocation is not None:
            say(f"allocation 'balanced' becomes 'uniform': {why_not}")
        allocation = "balanced" if why_not is None else "uniform"
    # how the rest is repaired, and what judges it
    repair = "none" if data is None and repair == "auto" else repair
    steps, general = options.local_steps, options.general_text
    steps = 0 if steps is None and repair != "auto" else steps
    if general is None:
        general = 0.0 if repair == "none" else GENERAL_TEXT
    recipe = Recipe(
        **given
        | {"axis": axis, "ratio": ratio, "criterion": criteria, "allocation": allocation}
        | {"repair": repair, "local_steps": steps, "general_text": general}
        | {"hold_out": repair == "auto" or steps != 0 or axis == "auto"}
    )
    if shape is None or not tries:
        return recipe
    trials = _trials(recipe, options, shape, of_tower)
    return replace(recipe, trials=trials, hold_out=recipe.hold_out or bool(trials))


def criteria_of(
    options: PruneConfig, axis: str | None, ratio: float | None, shape: Anatomy | None = None
) -> tuple[str, ...]:
    """Choose the criteria for the axis and for experts; none if neither layers nor widths go."""
    criteria = options.criterion
    if ratio and not criteria:
        criteria = scoring.DEFAULT_CRITERIA["both" if axis == "auto" else axis or "width"]
        if shape is not None and any(each.expert_neuron_params for each in shape.layers):
            own = {WALKING: scoring.EXPERT_NEURON_CRITERION}  # no walk chooses their neurons
            criteria = tuple(own.get(name, name) for name in criteria)
    scored = {unit for name in criteria if name in CRITERIA for unit in CRITERIA[name].units}
    if options.experts and "expert" not in scored:
        criteria = (*criteria, scoring.EXPERT_CRITERION)
    return criteria


def _why_even(axis: str | None, data: str | None, criteria: Sequence[str]) -> str | None:
    """Say why no trial can balance widths; None if one can."""
    if axis == "depth":
        return "axis depth removes no widths"
    if data is None:
        return "there is no data to try it on"
    if WALKING not in criteria:
        return f"only the walk's own choice, by {WALKING!r}, tries it"
    return None


def check_options(options: CompressConfig) -> None:
    """Refuse options of a run that lack another one."""
    if options.ratio is None and options.target_latency is None and not options.tokens_first:
        raise ConfigError("ratio is required: the share of the backbone to remove, such as 0.3")
    if options.tasks is None:
        of_tasks = ("limit", "batch_size", "baseline", "task_folder", "floors")
        options.refuse(of_tasks, "needs --tasks")
    train, data = options.recover.train, options.data
    if data is None:
        options.refuse(("training_samples", "test_samples"), "needs --data")
        if train not in (None, "none"):
            raise ConfigError(f"train {train!r} needs --data")
    if data is None or train == "none":
        why = "needs --data" if data is None else "needs training"
        options.refuse(("training_samples",), why)
        options.recover.refuse(options.recover.given().keys() - {"train", "seed"}, why)
    elif options.device_map is not None:
        told = f"device_map {options.device_map!r} cannot be used with training"
        raise ConfigError(f"{told}: remove it or set train none")


def _training(options: CompressConfig, shape: Anatomy | None, ratio: float) -> RecoverConfig:
    """Decide how a pruned model is trained, by the extended paper's chart unless options say it."""
    given = options.recover
    can_learn = given.train is not None or shape is None or shape.projector_params > 0
    row = chart_row(ratio, True, has_projector=can_learn)
    chosen = {"train": given.train or row.train, "loss": given.loss or row.loss}
    return RecoverConfig(**vars(given) | chosen | {"seed": options.seed})


def _trials(
    recipe: Recipe, options: PruneConfig, shape: Anatomy, of_tower: tuple[Recipe, ...]
) -> tuple[Recipe, ...]:
    """List what the validation loss chooses from, those that also cut the vision tower among them.

    Of an ``auto`` recipe that is one along each axis that removes the ratio within a tenth. If none
    comes so near, the nearest one; if none is possible, the last one's error is raised.
    """
    of_tower = of_tower if recipe.data is not None else ()
    if recipe.axis != "auto":
        return (recipe, *of_tower) if of_tower else ()
    found: list[tuple[float, Recipe]] = []
    for axis in get_args(Axis):
        try:
            along = replace(options, axis=axis)
            trial = decide(recipe.model, along, shape, tokens=recipe.tokens, tries=False)
            found.append((abs(dry_plan(trial, shape).ratio - trial.size), trial))
        except SlimError as error:
            failure = error
    if not found:
        raise failure
    near = max(0.1 * recipe.size, min(apart for apart, _ in found))
    return (*(trial for apart, trial in found if apart <= near), *of_tower)


def _within_latency(
    model: str,
    options: PruneConfig,
    shape: Anatomy | None,
    tokens: tuple[int, ...] | None,
    tries: bool,
) -> tuple[float | None, tuple[Recipe, ...]]:
    """Find a latency's ratio, None if the backbone is too small a part; and `_tower_trials`."""
    assert shape is not None
    open_tower = tries and not options.tower_ratio
    of_tower = _tower_trials(model, options, shape, tokens) if open_tower else ()
    try:
        return _ratio_for_latency(model, options, shape, tokens), of_tower
    except ImpossiblePlanError:
        if not of_tower:
            raise
    return None, of_tower


def _tower_trials(
    model: str, options: PruneConfig, shape: Anatomy, tokens: tuple[int, ...] | None
) -> tuple[Recipe, ...]:
    """Decide recipes of the same latency that also take shares of the vision tower."""
    found = list[Recipe]()
    axis = options.axis if options.axis in get_args(Axis) else "width"
    for tower_ratio in () if why_tower_stays(shape) else TOWER_RATIOS:
        tried = replace(options, axis=axis, tower_ratio=tower_ratio)
        try:
            ratio = _ratio_for_latency(model, tried, shape, tokens)
        except SlimError:
            continue  # so much cannot go
        own: dict[str, Any] = {"target_latency": None, "ratio": ratio}
        found.append(decide(model, replace(tried, **own), shape, tokens=tokens))
        if not ratio:  # the tower alone is enough
            break
    return tuple(found)


def _ratio_for_latency(
    model: str, options: PruneConfig, shape: Anatomy, tokens: tuple[int, ...] | None
) -> float:
    """Find about the smallest ratio with a share of a question's work, on the first axis."""
    share = float(options.target_latency)  # type: ignore[attr-defined]
    picture = picture_of(model, options.trust_remote_code)
    in_backbone = (work := question_flops(shape, picture)).backbone / sum(work)
    in_layers = sum(layer.params for layer in shape.layers) / shape.backbone_params
    pace = in_layers / in_backbone  # ratio by which a share of the work is removed
    axes = [axis for axis in get_args(Axis) if axis == options.axis] or ["width", "depth", "both"]
    for axis in axes:
        begin = 1.0
        if options.tower_ratio:
            alone = make_plan(shape, [], 0.0, tower_ratio=options.tower_ratio, tokens=tokens)
            begin = prefill_share(alone, picture)
            if begin <= share:
                return 0.0
        ratio = max(0.9 * (begin - share) * pace, _RATIO_STEP)  # a little less than it takes
        while True:
            tried: dict[str, Any] = {"target_latency": None, "ratio": min(ratio, 1 - _RATIO_STEP)}
            recipe = decide(model, replace(options, axis=axis, **tried), shape, tokens=tokens)
            try:
                plan = dry_plan(recipe, shape)
            except ImpossiblePlanError:
                break
            excess = prefill_share(plan, picture) - share
            if excess <= 0:
                return ratio
            if ratio >= 1:
                break
            ratio += max(excess * pace, _RATIO_STEP)
    message = f"target_latency {share} cannot be reached on {' or '.join(axes)}"
    if picture.patches:
        message += f": the backbone has {in_backbone:.0%} of the work of a question with an image"
    raise ImpossiblePlanError(message)


def prefill_share(plan: Plan, picture: Picture) -> float:
    """Compute the FLOPs of a question about an image, as a share of the original's."""
    before, after = (sum(question_flops(each, picture)) for each in (plan.before, plan.after))
    return after / before


def resolve(
    model: str, options: PruneConfig, plan: Plan | None = None, say: Say = silent, tests: int = 0
) -> tuple[Recipe, Plan | None, "SampleSplit"]:
    """Decide everything that can be decided before weights are read, and check it.

    Returns the recipe, the plan where tokens alone reach the ratio (or the given one), and the
    samples.
    """
    shape, has_data = models.anatomy(model), options.data is not None
    described = models.load_config(model, options.trust_remote_code)
    share = getattr(options, "image_tokens", None)
    if share is not None:
        with raised_as(ConfigError, SlimError, f"image_tokens {share}:"):
            knobs_of(described)
        if not has_data:
            raise ConfigError(f"image_tokens {share} needs --data")
    # without samples
    recipe = decide(model, options, shape, say, tests=tests)
    tasks = check_questions(recipe.part(Questions)) if recipe.tasks is not None else {}
    gates.parse(recipe.require, gates.in_percent(tasks, recipe.test_samples > 0))
    check_recipe(recipe)
    if plan is None:
        require_possible(recipe, shape, silent if recipe.trims_vocabulary else say)
    if (line := lost_heads(described)) is not None:
        say(line)
    try_lora(described, recipe.recover)
    # with samples
    samples = read_split(recipe, say)
    if (
        recipe.recover is not None
        and (train := recipe.recover.train) not in ("lora", "full")
        and samples.training
    ):
        if not shape.projector_params:
            raise ConfigError(f"train {train!r}: {shape.model_type!r} has no projector")
        if not any(sample.images for sample in samples.training):
            raise ConfigError(f"train {train!r} needs images, and the data have none")
    if has_data and not any(sample.images for sample in samples.calibration):
        recipe = without_towers(recipe, len(samples.calibration))
    gates.parse(recipe.require, gates.in_percent(tasks, bool(samples.test)))
    budget = None
    if share is not None:
        name = models.resolve(model)
        processor = models.load_processor(name, described, options.trust_remote_code)
        shown = [*samples.calibration, *samples.training]
        budget = budgets_for(described, processor, shown)(share)
        say(f"images take {budget}; the original is evaluated with all tokens")
    # which tokens are kept, and what depends on them: a latency's ratio, and the axes
    if plan is None and recipe.trims_vocabulary:
        counted = samples.counted(recipe) if has_data else []  # only the user's own say it
        chosen = vocabulary_for(model, options, counted, options.trust_remote_code)
        say(chosen.line())
        recipe = decide(model, options, shape, tokens=chosen.tokens, tests=tests)
        plan = tokens_alone(recipe, shape)
        if plan is None:
            require_possible(recipe, shape, say)
    elif plan is None and (fewer := tokens_of_trial(recipe, options, samples, shape, say)):
        trimmed = decide(model, options, shape, tokens=fewer).trials
        recipe = replace(recipe, trials=(*recipe.trials, *trimmed))
    if shape.tower is not None and shape.tower.unread and not (recipe.tower_ratio or plan):
        say("nobody reads the last layer of the vision tower: --tower-ratio removes it for nothing")
    return replace(recipe, pictures=budget), plan, samples


def without_towers(recipe: Recipe, count: int) -> Recipe:
    """Drop the trials that need images; refuse a recipe that does itself."""
    if recipe.tower_ratio:
        told = f"none of the {count} calibration samples has one: see --samples"
        raise ConfigError(f"tower_ratio {recipe.tower_ratio:g} needs images, and {told}")
    left = tuple(trial for trial in recipe.trials if not trial.tower_ratio)
    return replace(recipe, trials=left if recipe.axis == "auto" or len(left) > 1 else ())


def check_recipe(recipe: Recipe) -> None:
    """Check a recipe as far as possible without model and samples."""
    device_named(recipe.device)
    if recipe.vocab_size == "auto" and recipe.data is None and recipe.vocab_text is None:
        raise ConfigError("vocab_size 'auto' needs --data or --vocab-text")
    rows = {name: scoring.criterion_named(name, {}) for name in recipe.criterion}
    data_bound = [name for name, row in rows.items() if row.needs_data]
    if data_bound and recipe.data is None:
        raise ConfigError(f"criterion {data_bound[0]!r} needs --data")
    if recipe.token_weights is not None:
        parse_token_weights(recipe.token_weights)
        repairs_a_plan = recipe.ratio is None and recipe.data is not None and not rows
        if not data_bound and not repairs_a_plan:
            raise ConfigError(f"token_weights {recipe.token_weights!r}: no criterion reads data")
    if recipe.data is None:
        recipe.refuse(_OF_DATA, "needs --data")


def require_possible(recipe: Recipe, anatomy: Anatomy, say: Say) -> None:
    """Refuse a recipe that a model's shape does not allow; say how it is scored."""
    if recipe.axis != "auto":  # whose trials are possible
        dry_plan(recipe, anatomy)
    if recipe.data is None and recipe.criterion:
        say(f"no data: scoring by {' and '.join(recipe.criterion)}")


def dry_plan(recipe: Recipe, anatomy: Anatomy) -> Plan:
    """Make a plan from random scores, to raise the errors that `make_plan` would after scoring."""
    if recipe.tokens is None and recipe.trims_vocabulary:  # not chosen: the first stand for them
        asked = recipe.vocab_size
        count = asked if isinstance(asked, int) else anatomy.vocab_size // 3
        recipe = replace(recipe, tokens=tuple(range(min(count, anatomy.vocab_size))))
    plan = ranked_plan(recipe, anatomy, [dummy_scores(anatomy, recipe.criterion)])
    if recipe.data is not None and WALKING in recipe.criterion:
        require_choosable(plan)
    return plan


def dummy_scores(anatomy: Anatomy, criteria: Sequence[str]) -> Scores:
    """Draw random scores for the units of criteria, to find out whether a plan is possible."""
    drawn = scoring.score_random(Statistics(), anatomy)
    units = {unit for name in criteria for unit in CRITERIA[name].units}
    values = {at: v for at, v in drawn.items() if (at if isinstance(at, str) else at[1]) in units}
    return Scores.of_units(", ".join(criteria), units, anatomy.num_layers, values)


def ranked_plan(recipe: Recipe, anatomy: Anatomy, scores: Sequence[Scores]) -> Plan:
    """Make the plan that scores alone give; a ``balanced`` walk begins at a ``uniform`` one."""
    even = "protect" if recipe.allocation == "protect" else "uniform"
    kept = {**recipe.of_units, "tokens": recipe.tokens}
    return make_plan(anatomy, scores, recipe.size, recipe.axis or "width", even, **kept)


def tokens_alone(recipe: Recipe, anatomy: Anatomy) -> Plan | None:
    """Make the plan where a recipe's tokens reach its ratio; None if more must be removed.

    A tower's share is removed beside it.
    """
    if recipe.tokens is None or recipe.experts:
        return None
    plan = make_plan(anatomy, [], 0.0, tokens=recipe.tokens)
    return replace(plan, asked_ratio=recipe.size) if plan.ratio >= recipe.size else None


# Vocabulary.


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


def tokens_of_trial(
    recipe: Recipe, options: PruneConfig, samples: "SampleSplit", shape: Anatomy, say: Say
) -> tuple[int, ...] | None:
    """Choose the tokens of a further trial, which validation loss decides on, too.

    It keeps all that the data needs, more by rank, up to a third, and as the ratio allows. There is
    none where too little is known of other text, or tokens weigh little, must stay, or are chosen.
    """
    fewest = tokens_to_try(shape, recipe.size)
    if not recipe.tries_tokens or fewest is None or shape.why_tokens_stay is not None:
        return None
    try:
        counted, trusted = samples.counted(recipe), options.trust_remote_code
        chosen = vocabulary_for(recipe.model, options, counted, trusted, fewest)
    except SlimError as error:
        say(f"the vocabulary stays whole: {error}")
        return None
    if chosen.coverage is None or len(chosen.tokens) == chosen.total:
        return None
    say(f"also trying a trimmed vocabulary; used only if validation loss drops: {chosen.line()}")
    return chosen.tokens


def tokens_to_try(shape: Anatomy, ratio: float) -> int | None:
    """Return how many tokens a trial keeps at least; None where they weigh too little."""
    rule, weigh = rules().tokens_first, shape.token_params * shape.vocab_size
    if weigh < rule.from_share * shape.backbone_params:
        return None
    most = math.ceil(ratio * shape.backbone_params / shape.token_params)  # that the ratio takes
    return max(int(shape.vocab_size // rule.one_of), shape.vocab_size - most)


# Samples: those that calibrate, train and test.


@dataclass(frozen=True)
class SampleSplit:
    """The samples of a recipe."""

    calibration: Sequence[Sample]
    training: Sequence[Sample]
    test: Sequence[Sample] = ()  # none equals one of the others

    def counted(self, recipe: Recipe) -> list[Sample]:
        """Return the samples whose tokens count: without validation samples if these decide."""
        judges = {*map(id, judging(self.calibration) if recipe.tries_tokens else ())}
        known = {id(sample): sample for sample in (*self.calibration, *self.training)}
        return [sample for key, sample in known.items() if key not in judges]


def judging(calibration: Sequence[Sample]) -> Sequence[Sample]:
    """Return the user's validation samples, which alone decide; all of fewer than four."""
    own = [sample for sample in calibration if not sample.is_general]
    return own if len(own) < VALIDATION_EVERY else split_validation(own)[1]


def read_split(recipe: Recipe, say: Say = silent) -> SampleSplit:
    """Read the samples of a recipe, as many as it needs, and split them."""
    how = (rows_to_read(recipe), say, recipe.seed, recipe.test_samples)
    samples = samples_for(recipe.model, recipe.part(DataConfig), *how)
    found = split(samples, recipe)
    if count := sum(sample.is_general for sample in found.calibration):
        say(f"added {count} general-text passages to the calibration set (general_text)")
    if samples and recipe.test_samples and not found.test:
        enough = FEWEST_TESTS * TEST_SHARE
        few = f"{len(samples)} samples are too few, {enough} are needed"
        why = few if len(samples) < enough else "the last samples equal others"
        say(f"data: no test samples left, so retention will not be measured: {why}")
    return found


def rows_to_read(recipe: Recipe) -> int | None:
    """Count the samples that a recipe needs; None for all."""
    training = 0 if recipe.recover is None else recipe.training_samples
    if training is None:
        return None
    needed = recipe.samples + training + recipe.test_samples
    return max(needed, recipe.test_samples * TEST_SHARE)


def samples_for(
    model: str | Path, source: DataConfig, limit: int | None, say: Say, seed: int = 0, test: int = 0
) -> list[Sample]:
    """Read the samples that options name, if any; ``say`` reports each skipped row."""
    if source.data is None:
        return []
    config = models.load_config(model, source.trust_remote_code)
    processor = models.load_processor(models.resolve(model), config, source.trust_remote_code)
    how = (processor, source.max_length, context_of(config), source.too_long, seed, test)
    return read.load_samples(source.data, source.images, limit, source.max_bad_rows, say, *how)


def split(samples: Sequence[Sample], recipe: Recipe) -> SampleSplit:
    """Split samples at random; the test samples are the same for all seeds and numbers."""
    tests = min(recipe.test_samples, len(samples) // TEST_SHARE)
    tests = 0 if tests < FEWEST_TESTS else tests
    order = read.drawn([sample.place for sample in samples], recipe.seed, tests)
    used, last = ([samples[index] for index in part] for part in order)
    shown, rest = used[: recipe.samples], used[recipe.samples :]
    # the first ones, too, where these are none or fewer than `training_samples`
    training = [*rest, *shown][: recipe.training_samples or len(rest) or None]
    if recipe.general_text and shown:
        context = context_of(models.load_config(recipe.model, recipe.trust_remote_code))
        longest = [each for each in (recipe.max_length, context) if each is not None]
        count = round(len(shown) * recipe.general_text / (1 - recipe.general_text))
        usual = round(median(sample.tokens for sample in shown)) or None  # length of a passage
        shown += general_samples(count, recipe.seed, min(longest, default=None), usual)
    return SampleSplit(shown, training, not_among(last, used) if tests else ())


def not_among(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """Drop the samples that equal one of the others in text and pictures."""

    def content(sample: Sample) -> tuple[str, ...]:
        pictures = (identifying_bytes(image, may_move=True) for image in sample.images)
        return (repr(sample.messages), *(digest([picture]) for picture in pictures))

    texts = {repr(sample.messages) for sample in samples}
    seen = {content(other) for other in others if repr(other.messages) in texts}
    return [sample for sample in samples if content(sample) not in seen]


# Checks of what other parts are given.


def try_lora(config: PreTrainedConfig, recover: RecoverConfig | None) -> None:
    """Refuse what PEFT refuses of ``lora``: try it on a model without weights."""
    if recover is not None and recover.train == "lora" and recover.lora:
        prepare_training(models.empty_model(config), recover)


def check_questions(questions: Questions, log: bool = False) -> dict[str, Any]:
    """Check the tasks and their options before a model is loaded; return the tasks by name."""
    own, theirs = split_names(questions.tasks)
    tasks = find_tasks(own) if own or not theirs else []
    found: dict[str, Any] = {task.name: task for task in tasks}
    if theirs:
        found |= check_names(theirs, questions.limit, questions.task_folder)
        if questions.floors or log:
            raise ConfigError(f"--floors and --replies do not work with {theirs[0]!r}")
    elif questions.task_folder is not None:
        raise ConfigError(
            f"task_folder {questions.task_folder!r} is only for benchmarks such as mme"
        )
    return found


def criterion_options(recipe: Recipe, criterion: str) -> dict[str, Any]:
    """Return those options of a recipe that a criterion has, beside weights of tokens."""
    return {name: getattr(recipe, name) for name in CRITERIA[criterion].from_request}
