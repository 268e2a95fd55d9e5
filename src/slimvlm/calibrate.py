"""Score a model's units on calibration data: model + batches → `Scores`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.capture import CAPTURES, Batch
from slimvlm.chat import encode_samples
from slimvlm.errors import DataError
from slimvlm.geometry import read_anatomy
from slimvlm.progress import progress
from slimvlm.samples import Sample
from slimvlm.scores import criterion_named
from slimvlm.values import Scores, Statistics

DEFAULT_CRITERIA: dict[str, tuple[str, ...]] = {
    "depth": ("block_influence",),
    "width": ("activation",),
    "both": ("block_influence", "activation"),
}
"""Chosen by measurement; see "Criteria for width" in ``docs/results.md``."""


def collect(
    model: PreTrainedModel, batches: Iterable[Batch], criterion: str, **options: Any
) -> Statistics:
    """Run the capture that a criterion needs.

    Args:
        model: The model; its parameters and their flags are unchanged afterwards.
        batches: Model inputs (``input_ids`` or ``inputs_embeds``, ``attention_mask``, ``labels``,
            ``pixel_values``, ...). Read once, in order. Without ``labels`` the whole text counts.
        criterion: A name from ``CRITERIA``.
        **options: The criterion's options.

    Raises:
        ConfigError: If the criterion or an option is unknown.
        DataError: If data is needed and none is given.
        NumericalError: If NaN or infinity appears; the message says where.
    """
    row = criterion_named(criterion, options)
    given = {name: value for name, value in options.items() if name in row.capture_options}
    was_training = model.training
    model.eval()
    try:
        return CAPTURES[row.capture](model, batches, **row.fixed, **given)
    finally:
        model.train(was_training)


def score(
    model: PreTrainedModel,
    batches: Iterable[Batch] = (),
    criterion: str = "taylor",
    **options: Any,
) -> Scores:
    """Score the units that a criterion is about; higher means keep.

    Arguments and errors as in `collect`. See ``slimvlm.scores.CRITERIA`` for the criteria and
    their options.

    Returns:
        Float32 scores on the CPU.
    """
    statistics = collect(model, batches, criterion, **options)
    return scores_from(statistics, model, criterion, **options)


def scores_from(
    statistics: Statistics, model: PreTrainedModel, criterion: str, **options: Any
) -> Scores:
    """Turn collected statistics into scores."""
    row = criterion_named(criterion, options)
    given = {name: value for name, value in options.items() if name in row.options}
    result = row.function(statistics, read_anatomy(model), **given)
    return Scores(
        criterion=criterion,
        layer=result.layer,
        kv_group=result.kv_group,
        neuron=result.neuron,
        layer_runs=result.layer_runs,
        options={"samples": statistics.num_samples, "tokens": statistics.num_tokens, **options},
    )


def calibration_batches(
    processor: Any, samples: Sequence[Sample], batch_size: int = 1, description: str = "calibrate"
) -> Iterable[dict[str, Tensor]]:
    """Encode samples batch by batch, with a progress bar on stderr."""
    if not samples:
        raise DataError("no calibration sample was given")
    starts = range(0, len(samples), batch_size)
    for start in progress(starts, description):
        yield encode_samples(processor, samples[start : start + batch_size])
