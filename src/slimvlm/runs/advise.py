"""Tell before a run, without weights, what it would do and cost: `advise`, and a dry run."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, cast, get_args

import torch

from slimvlm.core import options
from slimvlm.core.errors import WORDS, ConfigError, ImpossiblePlanError, SlimError
from slimvlm.core.options import CompressConfig
from slimvlm.core.progress import Say, duration
from slimvlm.data.chat import encode_samples
from slimvlm.data.general import SHARE as GENERAL_TEXT
from slimvlm.data.samples import Sample
from slimvlm.data.vocabulary import TokenizerFile
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import BYTES, params_of_target, weight_bytes
from slimvlm.models.devices import device_named, free_memory
from slimvlm.models.load import anatomy as anatomy_of
from slimvlm.models.load import load_config, load_processor
from slimvlm.models.load import resolve as resolve_name
from slimvlm.models.pictures import PictureBudget, picture_of, usual_picture, with_settings
from slimvlm.planning.make import ratio_for_params
from slimvlm.planning.plan import Plan
from slimvlm.runs.chart import ChartRow, chart_row, expected, rules, subject_of
from slimvlm.runs.compress import compress_command
from slimvlm.runs.cost import Cost, Sizes, bytes_of_picture, cost, kept_bytes
from slimvlm.runs.recipe import (
    Recipe,
    decide,
    dry_plan,
    prefill_share,
    resolve,
    tokens_to_try,
)
from slimvlm.runs.tables import millions, size

_ENCODED = 16  # samples that are encoded at most, to learn how long they are


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """AVG-% that was measured with a recipe where as large a share of the layers was removed."""

    model: str
    percent: float
    source: str
    same: bool  # whether it is the model in question


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recipe for a model and a budget."""

    model: str
    ratio: float  # share of the backbone to remove
    axis: options.AxisChoice  # auto lets the data decide, before training
    token_share: float  # share of the backbone removed with tokens
    decoder_ratio: float  # share of the decoder layers removed with the rest
    recipe: ChartRow
    expected: tuple[Expectation, ...]  # of this model first, then of others of about its size
    latency: float | None  # of a question with an image, as a share of the original's work
    params: tuple[int, int]  # of the whole model before and after
    weight_bytes: tuple[int, int]  # likewise
    fraction: float  # share of the data to train on
    cost: Cost
    notes: tuple[str, ...]  # reasons and warnings
    command: str


def advise(
    model: str,
    *,
    ratio: float | None = None,
    target_params: str | None = None,
    target_memory: str | None = None,
    target_latency: float | None = None,
    data: bool = True,
    gpu: bool | None = None,
    samples: int | None = None,
    dtype: str = "bfloat16",
) -> Advice:
    """Choose a recipe for a model and exactly one budget, which must be possible to meet.

    Arguments are the options of ``slimvlm advise``; ``gpu`` is by default whether this machine has
    one, and ``samples`` as many as the paper used.
    """
    shape, known = anatomy_of(model), rules()
    if samples is not None and samples < 1:
        raise ConfigError(f"samples {samples} must be at least 1")
    targets = {"target_params": target_params, "target_memory": target_memory}
    budget = {"ratio": ratio, **targets, "target_latency": target_latency}
    if sum(value is not None for value in budget.values()) != 1:
        names = [f"--{name.replace('_', '-')}" for name in budget]
        raise ConfigError(f"advise needs exactly one of {', '.join(names)}")
    if (params := params_of_target(target_params, target_memory, dtype)) is not None:
        ratio = ratio_for_params(shape, params)
    named = "demo" if model == "demo" else "DATA.json"
    config = CompressConfig(
        ratio=ratio if ratio is None else round(ratio, 4),
        target_latency=target_latency,
        axis="chart",
        data=named if data else None,
        recover=options.RunTraining() if data else options.UNTRAINED,
    )
    recipe, why = _decided(model, config, shape)
    row = next(row for row in known.fractions if recipe.size <= row.up_to)
    fraction, enough = row.fraction, f"{row.why} ({known.fractions_source})"
    given, needed = samples or known.full_set, round(fraction * known.full_set)
    if samples is not None and samples <= needed:  # few are all used
        fraction, enough = 1.0, f"train on all {samples:,} samples: the paper trained on {needed:,}"
    elif samples is not None:
        fraction = round(needed / samples, 4)
    tokens, on_tokens = _tokens_first(model, shape, recipe.size, data and target_latency is None)
    picture = picture_of(model)
    sizes = Sizes(
        shape=shape,
        tokens=float(known.constants.text_tokens) + picture.tokens,
        samples=given,
        calibration=round(min(config.samples, given) / (1 - GENERAL_TEXT)),
        token_bytes={name: kept_bytes(load_config(model), name) for name in {dtype, "bfloat16"}},
        vocabulary=tokens,
        beside=bytes_of_picture(load_config(model), picture.tokens, dtype),
        picture=picture,
        images=1.0,
    )
    device = device_named()
    if gpu is not None and gpu == (device.type == "cpu"):
        device = torch.device("cuda" if gpu else "cpu")

    def cost_of(recipe: Recipe) -> Cost:
        if recipe.recover is None:
            return cost(recipe, sizes, device, dtype)
        trained = replace(recipe, recover=replace(recipe.recover, fraction=fraction))
        tried = len(get_args(options.Axis)) * (sizes.token_share < recipe.size)
        return cost(trained, sizes, device, dtype, tried)

    found, notes = cost_of(recipe), list[str]()
    limit, hours = known.constants.max_hours_without_gpu, found.training_hours
    if device.type == "cpu" and hours > limit:
        notes.append(known.notes["without_gpu"].format(hours=hours, limit=limit))
        config = replace(config, recover=options.UNTRAINED)
        recipe, why = _decided(model, config, shape)
        found = cost_of(recipe)
    learning, gone = recipe.recover, recipe.size
    notes.append(f"the paper's chart says {recipe.axis}: {why.why} ({why.source})")
    axis: options.AxisChoice = recipe.axis or "width"
    if learning is not None and sizes.token_share < gone:
        notes += [known.notes["axis_auto"], enough]
        axis = "auto"
    notes += on_tokens
    if shape.expert_counts and shape.expert_counts[0] > shape.experts_per_token:
        notes.append(known.notes["experts"].format(shape=shape))
    chosen: dict[str, Any] = {"axis": axis}
    if target_latency is None:
        chosen |= {"ratio": round(gone, 4), "vocab_size": tokens}
    if learning is not None:
        chosen["recover"] = replace(learning, fraction=fraction)
    share, latency = sizes.decoder_share(gone), None
    with suppress(ImpossiblePlanError):
        latency = prefill_share(dry_plan(replace(recipe, vocab_size=tokens), shape), picture)
    before, after = shape.total_params, shape.total_params - round(gone * shape.backbone_params)
    held = weight_bytes(shape, dtype)
    return Advice(
        model=model,
        ratio=gone,
        axis=axis,
        token_share=min(sizes.token_share, gone),
        decoder_ratio=share,
        recipe=why,
        expected=_expectations(shape, why, share),
        latency=latency,
        params=(before, after),
        weight_bytes=(held, round(held * after / before)),
        fraction=1.0 if learning is None else fraction,
        cost=found,
        notes=tuple(notes),
        command=compress_command(model, replace(config, **chosen), "run"),
    )


def _decided(model: str, config: CompressConfig, shape: Anatomy) -> tuple[Recipe, ChartRow]:
    """Decide what to do by the chart; also return the row of the chart, with what was decided."""
    recipe = decide(model, config, shape)
    learning, can_learn = recipe.recover, shape.projector_params > 0
    row = chart_row(recipe.size, learning is not None, can_learn)
    if recipe.axis in get_args(options.Axis):  # at a border, a latency's ratio is of another row
        row = replace(row, axis=cast(options.Axis, recipe.axis))
    return recipe, row


def _expectations(shape: Anatomy, recipe: ChartRow, share: float) -> tuple[Expectation, ...]:
    """List what a recipe retained of models of about this size, this one first."""
    known, found = rules(), list[Expectation]()
    subject = subject_of({**vars(shape), "num_layers": shape.num_layers})
    # all weights were trained of the demo model only, LoRA of the papers'
    for train in (recipe.train, "full") if recipe.train == "lora" else (recipe.train,):
        for name, layers in known.decoder_shares.items():
            factor, same = shape.backbone_params / known.backbone_params[name], name == subject
            if same or 1 / known.alike_within <= factor <= known.alike_within:
                found += [
                    Expectation(model=name, percent=value, source=curve.source, same=same)
                    for curve, value in expected(recipe.axis, train, recipe.loss, share * layers)
                    if curve.model == name
                    and (train == recipe.train or curve.ours)
                    and (curve.repaired or not curve.ours)  # the papers' are of their own command
                ]
    return tuple(sorted(found, key=lambda each: not each.same))


def _tokens_first(
    model: str, shape: Anatomy, ratio: float, is_open: bool
) -> tuple[int | None, list[str]]:
    """Choose how many tokens to keep where some are removed first, None for all; with notes."""
    # is_open: there is data to count, and a budget that fewer tokens help to meet
    rule, fewest = rules().tokens_first, tokens_to_try(shape, ratio)
    if fewest is None:
        return None, []
    share = shape.token_params * shape.vocab_size / shape.backbone_params
    many = f"{share:.0%} of the backbone are embeddings and head"
    of_layers = min(ratio / (1 - share), 1.0)
    alone = f"{many}: {ratio:.0%} of the backbone is {of_layers:.0%} of its layers"
    try:
        if shape.why_tokens_stay is not None:
            raise ConfigError(shape.why_tokens_stay)
        if (processor := load_processor(resolve_name(model), load_config(model))) is None:
            raise ConfigError("the model has no tokenizer")
        file = TokenizerFile.of(processor)
    except SlimError as error:
        return None, [f"{alone}; no token can be removed: {error}"]
    if not is_open:
        return None, [f"{alone}; fewer tokens make it smaller: compress --vocab-size auto"]
    kept = max(fewest, len(file.with_parts(file.needed)))
    choice = "compress --vocab-size auto keeps as many as the data needs, all keeps every one"
    return kept, [f"{many}, and {rule.why} ({rule.source}): {kept:,} are kept; {choice}"]


def advice_rows(advice: Advice) -> list[list[str]]:
    """Make rows of a name and a value."""
    recipe, spent = advice.recipe, advice.cost
    axis = "the axis that the data chooses" if advice.axis == "auto" else advice.axis
    removed = f"{advice.ratio:.1%} of the backbone"
    of_layers = f"{advice.decoder_ratio:.1%} of its layers, along {axis}"
    if not advice.token_share:
        removed += f", {of_layers}"
    else:
        removed += f": tokens first, about {advice.token_share:.1%}"
        removed += f"; then {of_layers}" if advice.decoder_ratio else ""
    kept = [
        f"{row.percent:.1f} % ({row.model}{', this model' if row.same else ''}; {row.source})"
        for row in advice.expected
    ]
    (before, after), (held, smaller) = advice.params, advice.weight_bytes
    rows = [
        ["remove", removed],
        ["train", f"{recipe.train}, loss {recipe.loss}" if recipe.train else "nothing"],
        ["parameters", f"{millions(after)} of {millions(before)}"],
        ["weights", f"{size(smaller)} of {size(held)}"],
        *_under("expected AVG-%", kept or [rules().notes["not_measured"]]),
    ]
    if advice.latency is not None:
        rows.append(["time to the first token", f"{advice.latency:.0%} of the original's"])
    if recipe.train:
        rows.append(["training samples", f"{spent.samples:,}"])
    return [*rows, *_under("why", advice.notes), *_needs(spent)]


def _needs(spent: Cost, device: str = "", free: float = math.inf) -> list[list[str]]:
    """Make rows of memory and time, compared with what is free on a device, and their basis."""

    def memory(needed: float, cure: str) -> str:
        if needed > free:
            return f"about {size(needed)}, more than the {size(free)} free on {device}: {cure}"
        return f"about {size(needed)}" + f" on {device}" * bool(device)

    def hours(count: float) -> str:
        return f"about {duration(3600 * count)}"

    rows = [
        ["memory of pruning", memory(spent.calibration_bytes, rules().notes["less_to_prune"])],
        ["time of pruning", hours(spent.pruning_hours)],
    ]
    if device and spent.hidden_states:
        rows.append(["hidden states", spent.hidden_states])
    if spent.training_bytes:
        rows.append(["memory of training", memory(spent.training_bytes, WORDS["cures"]["train"])])
        rows.append(["time of training", hours(spent.training_hours)])
    if spent.questions_hours:
        rows.append(["time of evaluation", hours(spent.questions_hours)])
    if spent.load:
        rows.append(["load", spent.load])
    return [*rows, *_under("estimates rest on", spent.rests_on)]


def _under(name: str, lines: Sequence[str]) -> list[list[str]]:
    """Make rows of several lines; the first one has the name."""
    return [[name if i == 0 else "", line] for i, line in enumerate(lines)]


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The plan of a compression that was not run, and its needs."""

    plan: Plan  # how much is kept; which units is drawn at random
    axes: tuple[str, ...]  # that would be tried; one if it is decided
    fewer_tokens: int  # kept in a further try of the best axis; 0 without one
    calibration: int  # samples
    training: int
    report: int  # test samples
    tokens: float  # mean length of a sample
    pictures: PictureBudget | None  # if images are to take fewer tokens
    dtype: str  # of the weights
    device: str
    free_bytes: int  # on the device now
    cost: Cost


def dry_run(model: str, config: CompressConfig, say: Say = print) -> DryRun:
    """Check a compression, as `compress` does, and estimate its plan, memory and time."""
    shape = anatomy_of(model)
    recipe, alone, samples = resolve(model, config, say=say)
    trials = [trial for trial in recipe.trials if not trial.is_trimmed] or [recipe]
    trimmed = [trial for trial in recipe.trials if trial.is_trimmed]
    axes = tuple(str(trial.axis) for trial in trials[: None if alone is None else 1])
    first = trials[0]  # whose plan is shown; together they are scored by all criteria
    whole = replace(recipe, ratio=first.ratio, test_samples=len(samples.test))
    described = load_config(model, config.trust_remote_code)
    processor = load_processor(resolve_name(model), described, config.trust_remote_code)
    if recipe.pictures is not None:
        processor = with_settings(processor, recipe.pictures.settings)
    given = [*samples.calibration, *samples.training]
    step = max(-(-len(given) // _ENCODED), 1)

    def length(sample: Sample) -> int:
        return int(encode_samples(processor, [sample])["input_ids"].shape[1])

    lengths = [length(sample) for sample in given[::step]]
    # a batch is as long as its longest sample, which is looked for among all
    weigh = lambda sample: (len(sample.images), len(repr(sample.messages)))  # noqa: E731
    parts = (samples.calibration, samples.training)
    ends = [length(max(part, key=weigh)) if part else 0 for part in parts]
    shown = -(-len(samples.calibration) // step)  # of these calibrate; general text is among them
    shown_in = [sum(len(s.images) for s in part) / max(len(part), 1) for part in parts]
    dtype: str = config.dtype
    if dtype == "auto":
        stored = str(described.dtype).removeprefix("torch.")
        dtype = stored if stored in BYTES else "bfloat16"
    picture = usual_picture(described, processor)
    device, tries = device_named(config.device), len(axes) + bool(trimmed)
    sizes = Sizes(
        shape=shape,
        tokens=fmean(lengths) if lengths else 0.0,
        longest=(max([*lengths[:shown], ends[0]]), max([*lengths[shown:], ends[1]])),
        samples=0 if recipe.recover is None else len(samples.training),
        calibration=len(samples.calibration),
        token_bytes={name: kept_bytes(described, name) for name in {dtype, "bfloat16"}},
        vocabulary=None if recipe.tokens is None else len(recipe.tokens),
        beside=shown_in[0] * bytes_of_picture(described, picture.tokens, dtype),
        picture=picture,
        images=max(shown_in),
    )
    return DryRun(
        plan=alone or dry_plan(first, shape),
        axes=axes,
        fewer_tokens=len(trimmed[0].tokens or ()) if trimmed else 0,
        calibration=sizes.calibration,
        training=sizes.samples,
        report=len(samples.test),
        tokens=sizes.tokens,
        pictures=recipe.pictures,
        dtype=dtype,
        device=str(device),
        free_bytes=free_memory(device),
        cost=cost(whole, sizes, device, dtype, tries if tries > 1 else 0),
    )


def dry_run_rows(found: DryRun) -> list[list[str]]:
    """Make rows of a name and a value."""
    before, after, spent = found.plan.before, found.plan.after, found.cost
    smaller, held = (size(weight_bytes(shape, found.dtype)) for shape in (after, before))
    uses = {"calibration": found.calibration, "training": found.training, "test": found.report}
    samples = ", ".join(f"{count:,} {use}" for use, count in uses.items() if count) or "none"
    if found.tokens:
        samples += f"; about {found.tokens:.0f} tokens each"
    rows = [
        ["plan", found.plan.summary()],
        ["parameters", f"{after.total_params:,} of {before.total_params:,}"],
        ["weights", f"{smaller} of {held} in {found.dtype}"],
        ["samples", samples],
    ]
    if found.pictures is not None:
        rows.append(["images", f"take {found.pictures}"])
    if len(found.axes) > 1 or found.fewer_tokens:
        tried = f"{', '.join(found.axes)} are tried; the plan is of the first"
        if found.fewer_tokens:
            tried += f"; the best is tried again after trimming to {found.fewer_tokens:,} tokens"
        rows.insert(1, ["axes", tried])
    return [*rows, *_needs(spent, found.device, found.free_bytes)]
