"""What was kept on samples that nothing was fitted to: the end of every `compress` and `prune`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slimvlm.data.samples import Sample
from slimvlm.evaluation.data_result import DataResult
from slimvlm.evaluation.on_data import (
    States,
    alone,
    batches_of,
    compared,
    kept,
    names_of,
    said_by,
    words_of,
)
from slimvlm.evaluation.said import Said
from slimvlm.models.hidden import evaluating, head_of, head_weights_of
from slimvlm.models.parts import decoder_layers, final_norm, text_config_of
from slimvlm.scoring.layerwise.runner import LayerwiseModel, Source
from slimvlm.scoring.layerwise.stores import StatesPlace

ORIGINAL, PRUNED = "original", "pruned"
FILE = "data-{}.json"
"""Where a run keeps the result of a stage, among its results."""
_BATCH = 4


def said_by_original(model: PreTrainedModel, processor: Any, samples: Sequence[Sample]) -> Said:
    """What the original says, kept while it is cut and when it is gone."""
    head = head_weights_of(model)
    return said_by(model, processor, samples, _BATCH, ORIGINAL, head)


def result_of(said: Said, samples: Sequence[Sample], device: torch.device) -> DataResult:
    """Compute the original's own result; its head runs on the device."""
    return alone(said, names_of(samples), device)


def said_from_files(
    source: Source, folder: Path, device: torch.device, processor: Any, samples: Sequence[Sample]
) -> Said:
    """As `said_by_original`, with one layer in memory at a time."""
    with _final_states(source, folder, device, processor, samples) as states:
        return kept(ORIGINAL, states, head_weights_of(source.model), words_of(processor))


def compared_from_files(
    source: Source,
    folder: Path,
    device: torch.device,
    processor: Any,
    samples: Sequence[Sample],
    original: Said,
) -> DataResult:
    """A smaller model beside the original, with one layer in memory at a time."""
    with _final_states(source, folder, device, processor, samples) as states:
        words, names = words_of(processor), names_of(samples)
        return compared(PRUNED, states, head_of(source.model), names, words, original)


@contextmanager
def _final_states(
    source: Source, folder: Path, device: torch.device, processor: Any, samples: Sequence[Sample]
) -> Iterator[Iterator[States]]:
    """Compute final hidden states of samples; inside, the head has its weights.

    Hidden states between layers are kept where they fit; ``folder`` is for files, if need be.
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
        last = len(decoder_layers(runner.model))
        for index in range(last):
            with runner.layer(index) as layer:
                for batch in runner.batches():
                    layer(**batch)
            store.drop(f"hidden-{index}")
        with source.after_layers(device):
            yield (
                (
                    places[batch["place"]],
                    final_norm(runner.model)(runner.input_of(last, batch["place"])),
                    batch["labels"],
                )
                for batch in runner.batches()
            )


def read_held_out(folder: Path, stages: Sequence[str]) -> dict[str, DataResult]:
    """What a run has measured on held-out samples so far, by stage, the original first."""
    paths = {stage: folder / "results" / FILE.format(stage) for stage in stages}
    return {stage: DataResult.load(path) for stage, path in paths.items() if path.exists()}


def held_out_json(results: Mapping[str, DataResult]) -> dict[str, Any]:
    """The figures of each stage as plain values."""
    return {
        stage: {
            "samples": len(result.samples),
            "tokens": result.tokens,
            **{
                name: None if figure is None else vars(figure)
                for name, figure in vars(result.figures).items()
            },
            "notes": list(result.notes),
        }
        for stage, result in results.items()
    }
