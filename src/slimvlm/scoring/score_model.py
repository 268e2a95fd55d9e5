"""Score a model's units on calibration data: model + batches → `Scores`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from slimvlm.core.errors import ConfigError, DataError, NumericalError
from slimvlm.core.progress import progress
from slimvlm.data.chat import encode_samples
from slimvlm.data.roles import ROLES
from slimvlm.data.samples import Sample
from slimvlm.models.anatomy import WIDTH_UNITS, read_anatomy
from slimvlm.models.classes import require_full_precision
from slimvlm.models.hidden import evaluating
from slimvlm.scoring.batches import Batch, Watched
from slimvlm.scoring.criteria import DEFAULT_CRITERIA, criterion_named
from slimvlm.scoring.statistics import Statistics
from slimvlm.scoring.unit_scores import Scores

PART_BYTES = 2 * 2**30
"""Statistics that `score` holds at a time, where those of all layers would be large."""


def collect(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: str,
    token_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Statistics:
    """Run the capture that a criterion needs.

    Args:
        model: The model; its parameters and their flags are unchanged afterwards.
        batches: Model inputs (``input_ids`` or ``inputs_embeds``, ``attention_mask``, ``labels``,
            ``pixel_values``, ...). Read once, in order. Without ``labels`` the whole text counts.
        criterion: A name from ``CRITERIA``.
        token_weights: Weight of each token by role (``image``, ``prompt``, ``answer``; roles that
            are not named weigh 1), for any criterion that needs data. None: sums run over all
            valid tokens, losses over the labelled ones. Given: sums and losses are weighted;
            losses are those of prompt and answer tokens, since tokens of pictures are never
            predicted.
        **options: The criterion's options.

    Raises:
        ConfigError: If the criterion, an option or a role is unknown, or a weight cannot be used.
        DataError: If data is needed and none is given.
        NumericalError: If NaN or infinity appears; the message says where.
    """
    return _collected(model, batches, criterion, token_weights, options)


def score(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    criterion: str = DEFAULT_CRITERIA["width"][0],
    token_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Scores:
    """Score the units that a criterion is about; higher means keep.

    Arguments and errors as in `collect`. See ``slimvlm.CRITERIA`` for the criteria and their
    options. A criterion that needs Gram matrices reads the batches several times if those of all
    layers take more than 2 GiB (``PART_BYTES``), for so many layers at a time.

    Returns:
        Float32 scores on the CPU.
    """
    layer_bytes = criterion_named(criterion, options).capture.layer_bytes
    if layer_bytes is None:
        statistics = collect(model, batches, criterion, token_weights, **options)
        return scores_from(statistics, model, criterion, token_weights, **options)
    parts: list[list[int]] = []  # runs of layers that fit, one layer at least
    room = 0
    for index, shape in enumerate(read_anatomy(model).layers):
        size = layer_bytes(shape)
        if not parts or size > room:
            parts.append([])
            room = PART_BYTES
        parts[-1].append(index)
        room -= size
    given = batches if len(parts) == 1 else list(batches)
    rows: dict[str, list[Tensor]] = {unit: [] for unit in WIDTH_UNITS}
    for layers in parts:
        statistics = _collected(model, given, criterion, token_weights, options, layers=layers)
        scores = scores_from(statistics, model, criterion, token_weights, **options)
        for unit, found in rows.items():
            found += [scores.of(unit)[index] for index in layers]
    return replace(scores, kv_group=rows["kv_group"], neuron=rows["neuron"])


def _collected(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: str,
    token_weights: Mapping[str, float] | None,
    options: Mapping[str, Any],
    **part: Any,
) -> Statistics:
    """As `collect`; ``part`` names the part of the statistics that is collected."""
    config: Any = model.config
    require_full_precision(config, "scored")
    row = criterion_named(criterion, options)
    given = {**row.fixed, **{k: v for k, v in options.items() if k in row.capture.options}}
    if token_weights is not None:
        check_token_weights(criterion, token_weights)
        given["token_weights"] = token_weights
    watched = Watched(batches)
    with evaluating(model):
        try:
            return row.capture.function(model, watched, **given, **part)
        except NumericalError as error:
            raise NumericalError(f"{error}{watched.place(model)}") from error


def scores_from(
    statistics: Statistics,
    model: nn.Module,
    criterion: str,
    token_weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Scores:
    """Turn collected statistics into scores; ``token_weights`` is only written down."""
    row = criterion_named(criterion, options)
    given = {name: value for name, value in options.items() if name not in row.capture.options}
    about = {"samples": statistics.num_samples, "tokens": statistics.num_tokens, **options}
    if token_weights is not None:
        about["token_weights"] = dict(token_weights)
    result = row.function(statistics, read_anatomy(model), **given)
    return replace(result, criterion=criterion, options=about)


def check_token_weights(criterion: str, token_weights: Mapping[str, float]) -> None:
    """Refuse token weights without data, of unknown roles, or below 0 or infinite or all 0."""
    if not criterion_named(criterion, {}).needs_data:
        raise ConfigError(f"token_weights: criterion {criterion!r} reads no data to weigh")
    for role, weight in token_weights.items():
        if role not in ROLES or not 0 <= weight < float("inf"):
            raise ConfigError(
                f"token_weights {role}={weight} must be one of {', '.join(ROLES)} with a weight of "
                "0 or more"
            )
    if not any(token_weights.get(role, 1.0) for role in ROLES):
        raise ConfigError(f"token_weights {dict(token_weights)}: one role needs a weight above 0")


def calibration_batches(
    processor: Any, samples: Sequence[Sample], batch_size: int = 1, description: str = "calibrate"
) -> Iterable[dict[str, Tensor]]:
    """Encode samples batch by batch, with a progress bar on stderr."""
    if not samples:
        raise DataError("no calibration sample was given")
    starts = range(0, len(samples), batch_size)
    for start in progress(starts, description):
        yield encode_samples(processor, samples[start : start + batch_size])
