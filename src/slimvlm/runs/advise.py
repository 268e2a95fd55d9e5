"""Which recipe for a model and a budget, what it should keep and what it costs: `advise`.

Nothing is run and no weights are read. Rules and measured numbers come from ``recipes.yaml``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, get_args

import torch

from slimvlm.core.errors import ConfigError, SlimError
from slimvlm.core.options import (
    Axis,
    AxisChoice,
    CalibrationConfig,
    CompressConfig,
    RecoverConfig,
)
from slimvlm.data.tokenizer_file import TokenizerFile
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import params_for_memory, parse_bytes, parse_count, weight_bytes
from slimvlm.models.load import anatomy as anatomy_of
from slimvlm.models.load import default_device, load_config, load_processor, resolve
from slimvlm.planning.make import ratio_for_params
from slimvlm.runs.command import compress_command
from slimvlm.runs.compress import request_of
from slimvlm.runs.estimate import (
    Cost,
    Sizes,
    estimate_cost,
    image_tokens,
    token_bytes,
)
from slimvlm.runs.recipes import (
    Recipe,
    are_alike,
    expected_of_layers,
    fraction_for,
    recipe_for,
    rules,
    subject_of,
)
from slimvlm.runs.request import resolved
from slimvlm.runs.tokens import tokens_to_try

_STEP = 0.005
"""How finely ratios are tried for a latency."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What was measured for the recipe where as large a share of the decoder layers went.

    Attributes:
        model: The model that was measured.
        percent: AVG-%.
        source: Where the number stands.
        same: Whether it is the model in question.
    """

    model: str
    percent: float
    source: str
    same: bool


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What `advise` says.

    Attributes:
        model: Folder, hub id or ``demo``.
        ratio: Share of the backbone to remove.
        axis: Where to prune: ``auto`` lets the data decide, before training.
        recipe: The study's: where it prunes, what it trains.
        token_share: Share of the backbone that goes with tokens, 0 where all of them stay.
        decoder_ratio: Share of the decoder layers that goes with the rest.
        expected: Measurements of this recipe where such a share of the layers went: of this model
            first, then of others of about its size.
        latency: Time to read a question as a share of the original's, None if not measured.
        params: Parameters of the whole model before and after.
        weight_bytes: Bytes of its weights before and after.
        fraction: Share of the data to train on.
        cost: Memory and time.
        notes: Why, and what to beware of.
        command: What to run.
    """

    model: str
    ratio: float
    axis: AxisChoice
    token_share: float
    decoder_ratio: float
    recipe: Recipe
    expected: tuple[Expectation, ...]
    latency: float | None
    params: tuple[int, int]
    weight_bytes: tuple[int, int]
    fraction: float
    cost: Cost
    notes: tuple[str, ...]
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
    """Choose a recipe for a model and a budget.

    Args:
        model: Folder, hub id or ``demo``; its configuration and its tokenizer are read.
        ratio: Share of the backbone's parameters to remove.
        target_params: Instead: parameters of the whole smaller model, such as ``5B``.
        target_memory: Instead: memory of its weights, such as ``8GiB``.
        target_latency: Instead: time to read a question as a share of the original's.
        data: Whether there are conversations to train on.
        gpu: Whether there is a GPU; by default, whether this machine has one.
        samples: How many conversations there are; by default as many as the study had.
        dtype: Data type that weights are held in.

    Raises:
        ConfigError: If not exactly one budget is given, or it cannot be met.
    """
    shape = anatomy_of(model)
    if samples is not None and samples < 1:
        raise ConfigError(f"samples {samples} must be at least 1")
    subject = subject_of({**vars(shape), "num_layers": shape.num_layers})
    budget = {
        **{"ratio": ratio, "target_params": target_params},
        **{"target_memory": target_memory, "target_latency": target_latency},
    }
    ratio = _ratio(shape, subject, budget, data, dtype)
    fraction, why = _fraction(ratio, samples)
    given = rules().full_set if samples is None else samples
    tokens, on_tokens = _tokens_first(model, shape, ratio, data and target_latency is None)
    sees = image_tokens(model) if shape.vision_params else 0
    sizes = Sizes(
        shape=shape,
        tokens=float(sees + rules().constants.text_tokens),
        samples=given,
        calibration=min(CalibrationConfig().samples, given),
        token_bytes=token_bytes(load_config(model), dtype),
        vocabulary=tokens,
    )
    device = default_device()
    if gpu is not None and gpu == (device.type == "cpu"):
        device = torch.device("cuda" if gpu else "cpu")

    def asked(recipe: Recipe) -> CompressConfig:
        return _config(model, ratio, recipe, fraction, data, tokens)

    recipe, cost, notes = _affordable(sizes, ratio, data, device, dtype, asked)
    share = sizes.decoder_share(ratio)
    axis = request_of(model, replace(asked(recipe), axis=None)).prune.axis or recipe.axis
    after = shape.total_params - round(ratio * shape.backbone_params)
    size = weight_bytes(shape, dtype)
    return Advice(
        model=model,
        ratio=ratio,
        axis=axis,
        token_share=min(sizes.token_share, ratio),
        decoder_ratio=share,
        recipe=recipe,
        expected=_expectations(recipe, share, subject, shape.backbone_params),
        latency=_latency(recipe.axis, max(ratio - sizes.token_share, 0.0), subject),
        params=(shape.total_params, after),
        weight_bytes=(size, round(size * after / shape.total_params)),
        fraction=fraction if recipe.train else 1.0,
        cost=cost,
        notes=(*notes, *([why] if recipe.train else []), *on_tokens, *_on_experts(shape)),
        command=compress_command(model, replace(asked(recipe), axis=axis), "run"),
    )


def _affordable(
    sizes: Sizes,
    ratio: float,
    data: bool,
    device: torch.device,
    dtype: str,
    asked: Callable[[Recipe], CompressConfig],
) -> tuple[Recipe, Cost, list[str]]:
    """The recipe, unless its training would take too long here."""

    def cost_of(recipe: Recipe) -> Cost:
        request = resolved(request_of("", asked(recipe)))
        tried = len(get_args(Axis)) if recipe.train else 0
        return estimate_cost(sizes, request, device, dtype, tried)

    recipe = recipe_for(ratio, data)
    cost = cost_of(recipe)
    limit = rules().constants.max_hours_without_gpu
    notes = []
    if device.type == "cpu" and cost.training_hours > limit:
        notes = [
            f"without a GPU the training would take about {cost.training_hours:,.0f} h, more than "
            f"{limit} h: not trained"
        ]
        recipe = recipe_for(ratio, False)
        cost = cost_of(recipe)
    notes.append(f"the study's chart says {recipe.axis}: {recipe.why} ({recipe.source})")
    if recipe.train:
        notes.append(
            "axis auto: depth, width and both are tried on the data, and held-out answers choose. "
            "What is expected is said of the chart's axis"
        )
    return recipe, cost, notes


def _ratio(
    shape: Anatomy, subject: str | None, budget: Mapping[str, Any], data: bool, dtype: str
) -> float:
    """The ratio that meets the one budget that is given."""
    given = [(name, value) for name, value in budget.items() if value is not None]
    if len(given) != 1:
        names = [f"--{name.replace('_', '-')}" for name in budget]
        raise ConfigError(f"advise needs exactly one of {', '.join(names)}")
    ((name, value),) = given
    match name:
        case "target_params":
            return ratio_for_params(shape, parse_count(value))
        case "target_memory":
            return ratio_for_params(shape, params_for_memory(parse_bytes(value), dtype))
        case "target_latency":
            return _ratio_for_latency(subject, value, data)
    wanted: float = value
    return wanted


def _ratio_for_latency(subject: str | None, share: float, data: bool) -> float:
    """The smallest ratio whose recipe was measured to be as fast as that."""
    if not 0 < share <= 1:
        raise ConfigError(f"target_latency {share} must be above 0 and at most 1")
    fastest = 1.0
    for step in range(round(1 / _STEP)):
        ratio = round(step * _STEP, 4)
        found = _latency(recipe_for(ratio, data).axis, ratio, subject)
        if found is None:
            break
        fastest = min(fastest, found)
        if found <= share:
            return ratio
    raise ConfigError(f"target_latency {share}: the fastest that was measured is {fastest:.2f}")


def _latency(axis: str, ratio: float, subject: str | None) -> float | None:
    """Share of the time to read a question: of the model itself, else of the study's models.

    Of these the curves count that reach farthest, the same ones at every ratio.
    """
    curves = [row for row in rules().latency if row.axis == axis]
    own = [row for row in curves if row.model == subject]
    others = [row for row in curves if not row.ours]
    farthest = max(max(row.values) for row in others)
    shown = own or [row for row in others if max(row.values) == farthest]
    values = [value for row in shown if (value := row.at(ratio)) is not None]
    return fmean(values) if values else None


def _tokens_first(
    model: str, shape: Anatomy, ratio: float, is_open: bool
) -> tuple[int | None, list[str]]:
    """How many tokens stay where some go first, None for all; and what there is to say about it.

    Args:
        model: Folder, hub id or ``demo``.
        shape: Its anatomy.
        ratio: Share of the backbone that goes.
        is_open: Whether there is data to count, and a budget that fewer tokens help to meet.
    """
    rule, outside = rules().tokens_first, shape.token_params * shape.vocab_size
    share, third = outside / shape.backbone_params, tokens_to_try(shape)
    if third is None:
        return None, []
    of_layers = min(ratio / (1 - share), 1.0)
    many = f"{share:.0%} of the backbone are embeddings and head"
    alone = f"{many}: {ratio:.0%} of the backbone is {of_layers:.0%} of its layers"
    needed = _tokens_needed(model, shape)
    if isinstance(needed, str):
        return None, [f"{alone}; no token can go: {needed}"]
    if not is_open:
        return None, [f"{alone}; fewer tokens make it smaller: --vocab-size auto"]
    kept = max(third, needed)
    told = f"{kept:,} stay; --vocab-size auto keeps as many as the data needs, all keeps every one"
    return kept, [f"{many}, and {rule.why} ({rule.source}): {told}"]


def _on_experts(shape: Anatomy) -> list[str]:
    """What there is to say about experts."""
    if not shape.expert_counts or shape.expert_counts[0] <= shape.experts_per_token:
        return []
    return [
        f"{shape.expert_share:.0%} of the backbone are experts, of which a token takes "
        f"{shape.experts_per_token} a layer; some can go whole: --experts 0.25 takes a quarter"
    ]


def _tokens_needed(model: str, shape: Anatomy) -> int | str:
    """How many tokens must stay, whatever the data; or why all of them must."""
    if shape.why_tokens_stay is not None:
        return shape.why_tokens_stay
    try:
        processor = load_processor(resolve(model), load_config(model))
        if processor is None:
            return "the model has no tokenizer"
        file = TokenizerFile.of(processor)
    except SlimError as error:
        return str(error)
    return len(file.with_parts(file.needed))


def _expectations(
    recipe: Recipe, share: float, subject: str | None, backbone_params: int
) -> tuple[Expectation, ...]:
    """What was measured where such a share of the layers went, here or on models like this one."""
    found = expected_of_layers(recipe.axis, recipe.train, recipe.loss, share)
    if recipe.train == "lora":  # what learns more than LoRA was measured on the demo model
        more = expected_of_layers(recipe.axis, "full", recipe.loss, share)
        found += [f for f in more if f[0].ours]
    rows = [
        Expectation(model=row.model, percent=value, source=row.source, same=row.model == subject)
        for row, value in found
        if row.model == subject or are_alike(row.model, backbone_params)
    ]
    return tuple(sorted(rows, key=lambda row: not row.same))


def _fraction(ratio: float, samples: int | None) -> tuple[float, str]:
    """The share of the data to train on: of few samples all."""
    fraction, why = fraction_for(ratio)
    needed = round(fraction * rules().full_set)
    if samples is None:
        return fraction, why
    if samples <= needed:
        return 1.0, f"train on all {samples:,} conversations: the study trained on {needed:,}"
    return round(needed / samples, 4), why


def _config(
    model: str, ratio: float, recipe: Recipe, fraction: float, data: bool, tokens: int | None
) -> CompressConfig:
    source = ("demo" if model == "demo" else "DATA.json") if data else None
    recover = None
    if recipe.train is not None:
        recover = RecoverConfig(train=recipe.train, loss=recipe.loss, fraction=fraction)
    return CompressConfig(
        ratio=round(ratio, 4),
        axis=recipe.axis,
        vocab_size=tokens,
        data=source,
        recover=recover,
    )
