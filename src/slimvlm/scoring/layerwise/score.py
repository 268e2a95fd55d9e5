"""Scores of a checkpoint that does not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from slimvlm.core.errors import NumericalError
from slimvlm.core.files import new_folder
from slimvlm.core.progress import Say, progress, silent
from slimvlm.models.anatomy import LAYER_UNITS
from slimvlm.models.load import device_named
from slimvlm.models.parts import Parts, text_config_of
from slimvlm.scoring.batches import Batch
from slimvlm.scoring.criteria import DEFAULT_CRITERIA, require_low_memory
from slimvlm.scoring.layerwise.checkpoint import LazyCheckpoint, open_checkpoint
from slimvlm.scoring.layerwise.runner import LayerView, LayerwiseModel
from slimvlm.scoring.layerwise.stores import Scratch, scratch_folder
from slimvlm.scoring.score_model import check_token_weights, collect, score, scores_from
from slimvlm.scoring.unit_scores import Scores


def score_checkpoint(
    model: str | Path,
    batches: Iterable[Batch] = (),
    criterion: str = DEFAULT_CRITERIA["width"][0],
    token_weights: Mapping[str, float] | None = None,
    dtype: str = "auto",
    scratch: str | Path | None = None,
    say: Say = silent,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    **options: Any,
) -> Scores:
    """`slimvlm.score` of a checkpoint whose weights do not fit in memory.

    One decoder layer is in memory at a time, mapped from the safetensors files. All batches go
    through it before the next one comes; its outputs lie in a scratch folder. Vision tower,
    projector and embeddings run first, alone. Criteria that compute gradients are refused.

    A run that was killed resumes after the last whole layer when it is started again with the same
    ``scratch``. The folder is removed when all is done.

    Args:
        model: Folder, hub id or ``demo``; weights as safetensors.
        batches: Model inputs, as for `slimvlm.score`. Read once, in order.
        criterion: As for `slimvlm.score`.
        token_weights: As for `slimvlm.score`.
        dtype: Data type of the weights; statistics are float32 or better.
        scratch: Folder for activations; by default a temporary one, which cannot be resumed.
        say: Receives the size of the scratch folder before layers begin.
        trust_remote_code: Run code that lies in the checkpoint.
        device: Where layers run; by default the accelerator if there is one, else the CPU.
        **options: The criterion's options.

    Returns:
        The scores that `slimvlm.score` gives.

    Raises:
        ConfigError: If the criterion needs the whole model, something cannot be read, or the
            scratch folder's disk is too small.
        DataError: If data is needed and none is given.
        NumericalError: If NaN or infinity appears; the message says where.
        UnsupportedModelError: If layers read keys and values of earlier ones.
    """
    device = device_named(device)
    require_low_memory(criterion, options)
    if token_weights is not None:
        check_token_weights(criterion, token_weights)
    checkpoint = open_checkpoint(model, dtype, trust_remote_code)
    asked = {criterion: options}
    return score_by_layer(checkpoint, batches, asked, token_weights, scratch, say, device)[0]


def score_by_layer(
    checkpoint: LazyCheckpoint,
    batches: Iterable[Batch],
    criteria: Mapping[str, Mapping[str, Any]],
    token_weights: Mapping[str, float] | None = None,
    scratch: str | Path | None = None,
    say: Say = silent,
    device: str | torch.device | None = None,
) -> list[Scores]:
    """Score by several criteria, given with their options. Otherwise as `score_checkpoint`."""
    captures = {name: require_low_memory(name, given).capture for name, given in criteria.items()}
    needs_data = any(capture.passes for capture in captures.values())
    keeps_hidden = any(capture.sees == "hidden_states" for capture in captures.values())
    by_layer = [name for name, capture in captures.items() if capture.sees == "layer"]
    model, depth = checkpoint.model, len(Parts(checkpoint.model).layers)
    with scratch_folder(scratch) as folder:
        store = Scratch(folder)
        runner = LayerwiseModel(checkpoint, store, device_named(device))
        store.keep_if_same("model.json", checkpoint.identity)
        request = {
            "batches": runner.embed(batches) if needs_data else None,
            "criteria": [[name, dict(given)] for name, given in criteria.items()],
            "token_weights": token_weights and dict(token_weights),
        }
        store.keep_if_same("run.json", request, spared="batches")
        if needs_data:
            tokens = sum(batch["attention_mask"].numel() for batch in runner.batches())
            token_bytes = text_config_of(model.config).hidden_size * model.dtype.itemsize
            store.announce((depth if keeps_hidden else 2) * tokens * token_bytes, say)

        done = max((i for i in range(depth + 1) if store.has(f"hidden-{i}")), default=0)
        last = depth if by_layer or needs_data else 0
        for index in progress(range(done, last), "layers forward"):
            with runner.layer(index) as view:
                for name in by_layer:
                    reads = captures[name].passes > 0
                    data = (runner.batches(), name, token_weights) if reads else ((), name)
                    _score_layer(
                        view, index, data, criteria[name], folder / f"scores-{name}-{index}"
                    )
                if needs_data:
                    _finish_hidden(runner, index, view)
            if not keeps_hidden:
                store.drop(f"hidden-{index}")
        scores: list[Scores] = []
        for name, given in criteria.items():
            if captures[name].sees == "nothing":
                scores.append(score(model, (), name, **given))
            elif captures[name].sees == "hidden_states":
                with runner.replayed() as view:
                    statistics = collect(view, runner.batches(), name, token_weights, **given)
                scores.append(scores_from(statistics, model, name, token_weights, **given))
            else:
                files = [folder / f"scores-{name}-{index}" / "scores" for index in range(depth)]
                scores.append(_joined([Scores.load(file) for file in files]))
        return scores


def _score_layer(
    view: LayerView, index: int, data: Any, options: Mapping[str, Any], file: Path
) -> None:
    """Score one layer as if the model had no other, unless a stopped run has done so."""
    if file.exists():
        return
    try:
        found = score(view, *data, **options)
    except NumericalError as error:
        raise NumericalError(f"decoder layer {index}, called 0 here: {error}") from error
    with new_folder(file) as folder:
        found.save(folder / "scores")


@torch.no_grad()
def _finish_hidden(runner: LayerwiseModel, index: int, view: LayerView) -> None:
    """Store the outputs of a layer for the batches that no capture has run."""
    for batch in runner.batches():
        if runner.store.about(f"hidden-{index + 1}", batch["place"]) is None:
            view(**batch)
    runner.store.finish(f"hidden-{index + 1}")


def _joined(parts: list[Scores]) -> Scores:
    """Join the scores of single layers."""
    joined: dict[str, Any] = {
        unit: [values for part in parts for values in part.of(unit)]
        for unit in LAYER_UNITS
        if parts[0].of(unit) is not None
    }
    if parts[0].layer is not None:
        joined["layer"] = torch.cat([part.layer for part in parts if part.layer is not None])
    return Scores(parts[0].criterion, options=parts[0].options, **joined)
