"""What a compression would do and need, found without touching weights: ``compress --dry-run``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from slimvlm.core.errors import LESS_TO_TRAIN
from slimvlm.core.options import CompressConfig
from slimvlm.core.progress import Say, duration
from slimvlm.data.chat import encode_samples
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import Anatomy
from slimvlm.models.cost import BYTES, free_memory, weight_bytes
from slimvlm.models.load import anatomy, device_named, load_config, load_processor, resolve
from slimvlm.planning.plan import Plan
from slimvlm.runs.compress import request_of
from slimvlm.runs.estimate import Cost, Sizes, estimate_cost, token_bytes
from slimvlm.runs.request import (
    Request,
    check_questions,
    check_request,
    rehearse,
    requests_by_axis,
    resolved,
)
from slimvlm.runs.stages import read_split
from slimvlm.runs.tables import size
from slimvlm.runs.tokens import tokens_alone, with_tokens

_LESS_TO_PRUNE = "prune --low-memory holds one layer at a time, and recover trains"
_LOOKED_AT = 16
"""Samples that are encoded at most, to learn how long they are."""


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a compression would do and need.

    Attributes:
        plan: How much of which units stays; which ones is drawn at random here.
        axes: The axes that would be tried; one if it is decided.
        fewer_tokens: How many tokens would stay in a further try of the best axis; 0 without one.
        calibration: Samples to calibrate on.
        training: Samples to train on; 0 without training.
        report: Samples that stay unseen, for the end.
        tokens: About so many tokens a sample.
        dtype: Data type of the weights.
        device: Where models would be.
        free_bytes: What is free there now.
        cost: Memory and time.
    """

    plan: Plan
    axes: tuple[str, ...]
    fewer_tokens: int
    calibration: int
    training: int
    report: int
    tokens: float
    dtype: str
    device: str
    free_bytes: int
    cost: Cost


def foresee(model: str, config: CompressConfig, say: Say = print) -> Foreseen:
    """Check a compression and say what it would do; reads the configuration and the data.

    Args:
        model: Folder, hub id or ``demo``.
        config: What would be done.
        say: Receives a line for each thing that is worth one.

    Raises:
        SlimError: For anything that `slimvlm.compress` would refuse before it reads weights.
    """
    shape = anatomy(model)
    request = resolved(request_of(model, config), say, shape)
    if request.questions is not None:
        check_questions(request.questions)
    check_request(request, shape, say)
    samples = read_split(request, say)
    counted = [] if config.data is None else samples.counted(request)
    request = with_tokens(request, counted, say)
    tried = _by_axis(request, shape)
    first = next(iter(tried.values()))
    described = load_config(model, config.trust_remote_code)
    processor = load_processor(resolve(model), described, config.trust_remote_code)
    tokens = _mean_tokens(processor, [*samples.calibration, *samples.training])
    device = device_named(config.device)
    dtype = _dtype_of(config.dtype, described.dtype)
    training = len(samples.training) if request.trains else 0
    request = replace(first, report_samples=len(samples.report))
    tries = len(tried) + bool(request.fewer_tokens)
    sizes = Sizes(
        shape=shape,
        tokens=tokens,
        samples=training,
        calibration=len(samples.calibration),
        token_bytes=token_bytes(described, dtype),
        vocabulary=None if request.tokens is None else len(request.tokens),
    )
    return Foreseen(
        plan=tokens_alone(request, shape) or rehearse(request.prune, shape, request.tokens),
        axes=tuple(tried),
        fewer_tokens=len(request.fewer_tokens or ()),
        calibration=len(samples.calibration),
        training=training,
        report=len(samples.report),
        tokens=tokens,
        dtype=dtype,
        device=str(device),
        free_bytes=free_memory(device),
        cost=estimate_cost(
            sizes,
            request,
            device,
            dtype,
            tries if tries > 1 else 0,
        ),
    )


def foreseen_rows(found: Foreseen) -> list[list[str]]:
    """A name and its value in every row."""
    before, after = found.plan.before, found.plan.after
    held, cost = weight_bytes(before, found.dtype), found.cost
    smaller = weight_bytes(after, found.dtype)
    counts = [(found.calibration, "calibrate"), (found.training, "train")]
    counts.append((found.report, "stay unseen"))
    told = ", ".join(f"{count:,} {what}" for count, what in counts if count) or "none"

    def memory(needed: float, cure: str) -> str:
        if needed <= found.free_bytes:
            return f"about {size(needed)} on {found.device}"
        free = f"{size(found.free_bytes)} free on {found.device}"
        return f"about {size(needed)}, more than the {free}: {cure}"

    rows = [
        ["plan", found.plan.summary()],
        ["parameters", f"{after.total_params:,} of {before.total_params:,}"],
        ["weights", f"{size(smaller)} of {size(held)} in {found.dtype}"],
        ["samples", f"{told}; about {found.tokens:.0f} tokens each" if found.tokens else told],
        ["memory of pruning", memory(cost.calibration_bytes, _LESS_TO_PRUNE)],
        ["time of pruning", f"about {duration(3600 * cost.pruning_hours)}"],
    ]
    if cost.hidden_states:
        rows.append(["hidden states", cost.hidden_states])
    if len(found.axes) > 1 or found.fewer_tokens:
        tried = f"{', '.join(found.axes)} are tried; the plan is of the first"
        again = f"; the best is tried again behind {found.fewer_tokens:,} tokens"
        rows.insert(1, ["axes", tried + again * bool(found.fewer_tokens)])
    if found.training:
        rows += [
            ["memory of training", memory(cost.training_bytes, LESS_TO_TRAIN)],
            ["time of training", f"about {duration(3600 * cost.training_hours)}"],
        ]
    names = ["estimates rest on", *[""] * len(cost.rests_on)]
    return [*rows, *([name, why] for name, why in zip(names, cost.rests_on, strict=False))]


def _by_axis(request: Request, shape: Anatomy) -> dict[str, Request]:
    if request.prune.axis == "auto":
        return {str(axis): each for axis, each in requests_by_axis(request, shape).items()}
    return {str(request.prune.axis): request}


def _mean_tokens(processor: Any, samples: Sequence[Sample]) -> float:
    """Mean length of some of the samples, pictures included; 0 without any."""
    looked_at = samples[:: -(-len(samples) // _LOOKED_AT)] if samples else []
    lengths = [encode_samples(processor, [s])["input_ids"].shape[1] for s in looked_at]
    return fmean(lengths) if lengths else 0.0


def _dtype_of(asked: str, stored: object) -> str:
    """The data type that weights are held in, bfloat16 if the configuration does not say."""
    if asked != "auto":
        return asked
    name = str(stored).removeprefix("torch.")
    return name if name in BYTES else "bfloat16"
