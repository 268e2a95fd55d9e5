"""Measure on held-out samples how close a smaller model stays to the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slimvlm.data.samples import Sample
from slimvlm.evaluation.on_data import DataResult, paired_result
from slimvlm.evaluation.predictions import Predictions, States, batches_of, predictions_of
from slimvlm.models.hidden import evaluating, head_of, head_weights_of
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.scoring.layerwise.runner import LayerwiseModel, Source
from slimvlm.scoring.layerwise.stores import StatesPlace

ORIGINAL, PRUNED = "original", "pruned"
FILE = "data-{}.json"
"""File of a stage's held-out result, in the results of a run."""
_BATCH = 4


def predictions_of_original(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample]
) -> Predictions:
    """Predict with the original, before pruning changes it in place."""
    head = head_weights_of(model)
    return predictions_of(model, processor, samples, _BATCH, ORIGINAL, head)


def predictions_from_files(
    source: Source, folder: Path, device: torch.device, processor: Any, samples: Sequence[Sample]
) -> Predictions:
    """Predict with the original, with one layer in memory at a time."""
    with _final_states(source, folder, device, processor, samples) as states:
        return Predictions.of(ORIGINAL, states, head_weights_of(source.model), processor)


def paired_from_files(
    source: Source,
    folder: Path,
    device: torch.device,
    processor: Any,
    samples: Sequence[Sample],
    original: Predictions,
) -> DataResult:
    """Compare a smaller model with the original, with one layer in memory at a time."""
    with _final_states(source, folder, device, processor, samples) as states:
        return paired_result(PRUNED, states, head_of(source.model), samples, processor, original)


@contextmanager
def _final_states(
    source: Source, folder: Path, device: torch.device, processor: Any, samples: Sequence[Sample]
) -> Iterator[Iterator[States]]:
    """Compute final hidden states of samples layer by layer; inside, the head has its weights.

    Hidden states between layers stay in memory if they fit, else in files in ``folder``.
    """
    found = list(batches_of(processor, samples, _BATCH))
    places, batches = [each for each, _ in found], [batch for _, batch in found]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    width = text_config_of(source.model.config).hidden_size
    needed = 3 * tokens * width * source.model.dtype.itemsize
    store = StatesPlace.of(needed, device).store(folder)
    runner = LayerwiseModel(source, store, device)
    with evaluating(runner.model), torch.no_grad():
        runner.embed(batches)
        last = len(Parts(runner.model).layers)
        for index in range(last):
            with runner.layer(index) as layer:
                for batch in runner.batches():
                    layer(**batch)
            store.drop(f"hidden-{index}")
        with source.after_layers(device):
            yield (
                (
                    places[batch["place"]],
                    Parts(runner.model).norm(runner.input_of(last, batch["place"])),
                    batch["labels"],
                )
                for batch in runner.batches()
            )


def read_held_out(folder: Path, stages: Sequence[str]) -> dict[str, DataResult]:
    """Read the held-out results of a run so far, by stage, the original first."""
    paths = {stage: folder / "results" / FILE.format(stage) for stage in stages}
    return {stage: DataResult.load(path) for stage, path in paths.items() if path.exists()}
